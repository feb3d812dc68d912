"""Data sets: `open(kind, root, split, **options)` gives a `layout.Source`.

A new one is a file here and its line in `SOURCES`: a function of (root, split), or a
class such as `drawn.Drawn`, whose keyword arguments are the options, with their
defaults and, in the annotations, what they accept.
"""

import difflib
import inspect
from collections.abc import Iterator
from typing import Literal

from vitssl import errors, ranges
from vitssl.data.sources import (
    arrayrecord,
    birds,
    cifar,
    cub,
    digits,
    fake,
    fields,
    folder,
    geotiff,
    imagenet,
    in9,
    layout,
    leaves,
    mados,
    metashift,
    mixture,
    olmoearth,
    parquet,
    pastis,
    sarcld,
    scenes,
    siim_acr,
    stl10,
    tar,
    tfds,
    waterbirds,
)


def _mixture(
    root,
    split,
    *,
    parts="",
    how: Literal["weighted", "balanced", "concat"] = "concat",
    weights: tuple[ranges.NotNegative, ...] = (),
    temperature: ranges.Positive = 1.0,
    seed=0,
):
    """Several data sets as one; see `mixture.Mixture`.

    Args:
        root: not used; each part names its own.
        parts: "kind=root,kind=root,...".
        how: its kind.
    """
    del root
    made = [open(kind, where, split) for kind, where in mixture.parse(parts)]
    numbers = dict(weights=weights, temperature=temperature, seed=seed)
    return mixture.mix(made, kind=how, split=split, **numbers)


SOURCES = {
    "digits": digits.open,
    "scenes": scenes.Scenes,
    "birds": birds.Birds,
    "fields": fields.Fields,
    "leaves": leaves.Leaves,
    "folder": folder.open,
    "tar": tar.open,
    "parquet": parquet.open,
    "array_record": arrayrecord.open,
    "cifar10": cifar.open10,
    "cifar100": cifar.open100,
    "stl10": stl10.open,
    "imagenet": imagenet.open,
    "imagenet100": imagenet.open100,
    "in9": in9.open,
    "tfds": tfds.open,
    "cub": cub.open,
    "waterbirds": waterbirds.open,
    "siim_acr": siim_acr.open,
    "metashift": metashift.open,
    "olmoearth": olmoearth.open,
    "eurosat": geotiff.eurosat,
    "pastis": pastis.open,
    "mados": mados.open,
    "geotiff": geotiff.open,
    "sarcld": sarcld.open,
    "plantvillage": folder.plantvillage,
    "fake": fake.open,
    "mixture": _mixture,
}


def open(kind: str, root, split: str, **options) -> layout.Source:
    """Open a data set and check that it can be used.

    Args:
        kind: a key of SOURCES.
        root: folder on disk, "" for those that need none.
        split: "train", "val", "test" and what else the kind has.
        options: of the kind.

    Raises:
        UsageError: no such kind or option, or a value that it does not accept.
        DataError: the data are not there, or not usable.
    """
    if found := list(faults(kind, options)):
        raise errors.UsageError("\n".join(f"data.{line}" for line in found))
    accepted = _accepted(kind)
    options = {k: ranges.convert(accepted[k], v) for k, v in options.items()}
    try:
        source = SOURCES[kind](root, split, **options)
    except OSError as e:
        raise errors.DataError(f"{kind}: {root!r}: {e}") from e
    return layout.check(source)


def faults(kind: str, options: dict) -> Iterator[str]:
    """Yield what is wrong with the config keys `data.source` and `data.options`."""
    if kind not in SOURCES:
        known = ", ".join(sorted(SOURCES))
        yield f"source={kind!r}: one of {known}{_nearest(kind, SOURCES)}"
        return
    accepted = _accepted(kind)
    for key, value in options.items():
        if key not in accepted:
            have = ", ".join(accepted) or "none"
            yield f"options.{key}: {kind} has: {have}{_nearest(key, accepted)}"
        elif fault := ranges.fault(accepted[key], value):
            yield f"options.{key}={value!r}: {fault}"


def options_of(kind: str) -> dict:
    """Return the default of each option of a kind of source."""
    return {p.name: p.default for p in _options(kind)}


def _options(kind):
    parameters = inspect.signature(SOURCES[kind]).parameters.values()
    return [p for p in parameters if p.kind == p.KEYWORD_ONLY]


def _accepted(kind):
    """Return the annotation of each option; without one, the type of the default."""
    return {
        p.name: type(p.default) if p.annotation is p.empty else p.annotation
        for p in _options(kind)
    }


def _nearest(name, known):
    near = difflib.get_close_matches(str(name), known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""
