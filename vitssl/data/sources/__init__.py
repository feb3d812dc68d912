"""Data sets: `open(kind, root, split, **options)` gives a source.

A source has `len()`, `[i] -> {"image": uint8 [H, W, C], "label": int}` (-1 =
unlabelled) and the attributes `classes` (names, tuple), `channels` (int), `labels`
(int32 [N], where known without reading images), `root`, `name`, `split`. It is cheap
to pickle: files are opened again, or mapped, where it arrives.
"""

import difflib
import inspect

from vitssl import errors
from vitssl.data.sources import (
    birds,
    cifar,
    cub,
    digits,
    fake,
    fields,
    folder,
    imagenet,
    in9,
    layout,
    leaves,
    metashift,
    mixture,
    olmoearth,
    sarcld,
    scenes,
    siim_acr,
    stl10,
    tfds,
    waterbirds,
)


def _mixture(
    root, split, *, parts="", how="concat", weights=(), temperature=1.0, seed=0
):
    """Several data sets as one; see `mixture.Mixture`.

    Args:
        root: not used; each part names its own.
        split: of every part.
        parts: "kind=root,kind=root,...".
        how, weights, temperature, seed: see `mixture.mix`; how is its kind.
    """
    made = [open(k, r, split) for k, r in mixture.parse(parts)]
    numbers = dict(weights=weights, temperature=temperature, seed=seed)
    return mixture.mix(made, kind=how, split=split, **numbers)


SOURCES = {
    "digits": digits.open,
    "scenes": scenes.open,
    "birds": birds.open,
    "fields": fields.open,
    "leaves": leaves.open,
    "folder": folder.open,
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
    "sarcld": sarcld.open,
    "plantvillage": sarcld.plantvillage,
    "fake": fake.open,
    "mixture": _mixture,
}

check = layout.check


def open(kind, root, split, *, min_classes=0, **options):
    """Open a data set and check that it can be used.

    Args:
        kind: a key of SOURCES.
        root: folder on disk, "" for those that need none.
        split: "train", "val", "test" and what else the kind has.
        min_classes: refuse a set with fewer distinct labels.
        options: of the kind; see its `open`.

    Raises:
        UsageError: no such kind or option.
        DataError: the data are not there, or not usable.
    """
    if kind not in SOURCES:
        near = difflib.get_close_matches(str(kind), SOURCES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise errors.UsageError(
            f"data.source={kind!r}{hint} There is: {', '.join(SOURCES)}"
        )
    known = options_of(kind)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise errors.UsageError(
            f"data.source={kind!r} has no option {', '.join(unknown)}; "
            f"it has: {', '.join(known) or 'none'}"
        )
    try:
        source = SOURCES[kind](root, split, **options)
    except OSError as e:
        raise errors.DataError(f"{kind}: {root!r}: {e}") from e
    return layout.check(source, min_classes=min_classes)


def options_of(kind):
    """Dict from each option of a kind of source to its default value."""
    parameters = inspect.signature(SOURCES[kind]).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}
    if kind == "scenes":
        options |= scenes.difficulty()
    return options
