"""Start from parameters that exist: `init.from` of any config."""

import dataclasses
import itertools
import logging
import re
from collections.abc import Iterator
from typing import Literal

import jax
import numpy as np

from vitssl import errors, tree
from vitssl.convert import backbone, positions
from vitssl.data import orders

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Init:
    """Config section `init`.

    Attributes:
        from_: key `from`: "" (random weights), or any form of `opened.past`: WORKDIR,
            WORKDIR@best, WORKDIR@STEP, weights that `vitssl convert import` wrote.
        part: of a run: its parameters, their average, or with the averaged encoder.
        skip: patterns of parameter names that keep their random value.
        rename: ((pattern of our name, stored name), ...), the first that fits wins;
            "\\1" stands for the first group. Several of ours may take one stored leaf:
            (("stage_[12]/backbone/(.*)", r"encoder/\\1"),) fills two networks.
        absent: patterns of names that keep their initial value if they are not stored.
        weights: what `from` should name: a recipe that makes it, configs/FILE.py:NAME,
            or weights of a model hub, OWNER/NAME; "" = the recipe needs none.
    """

    from_: str = ""
    part: Literal["params", "ema", "target"] = "params"
    skip: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    absent: tuple[str, ...] = ()
    weights: str = ""

    @property
    def wanted(self) -> str:
        """Return what to get, as words, or ""."""
        if not self.weights:
            return ""
        if self.weights.startswith("configs/"):
            return f"this recipe starts from a run of --config={self.weights}"
        return (
            f"this recipe starts from {self.weights}: get its model.safetensors, then "
            "vitssl convert import FILE --to=DIR and --config.init.from=DIR"
        )

    def check(self) -> Iterator[str]:
        """Yield what is wrong with the patterns."""
        for key, patterns in (
            ("skip", self.skip),
            ("absent", self.absent),
            ("rename", [pattern for pattern, _ in self.rename]),
        ):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as e:
                    yield f"{key}: {pattern!r} is not a regular expression: {e}"


def load(spec: Init, past, params):
    """Return (`params` with the leaves of the same names that `past` has, skipped).

    `skipped` are the names that `spec.skip` left at their random values.

    Weights of an encoder fill "encoder/" and every "backbone/" of a method that names
    its networks so. Position tables are resampled where the model is for images of
    another size: of converted weights by their family's rule, of a run by PyTorch's
    bicubic.

    Raises:
        CheckpointError: no checkpoint there; no name in common; leaves of another
            shape or absent that `spec.skip` does not name (all of them listed).
    """
    stored = renamed(past.params(spec.part), tree.flat(params), spec.rename)
    leaves, taken, skipped, faults = tree.flat(params), {}, [], []
    for name, leaf in leaves.items():
        if any(re.fullmatch(p, name) for p in spec.skip):
            skipped.append(name)
            continue
        if name not in stored and (alias := _alias(name)) in stored:
            stored[name] = stored[alias]
        if name in stored and name.endswith("pos_embed"):
            stored[name] = _resampled(past, name, stored[name], leaf.shape)
        if name not in stored and any(re.fullmatch(p, name) for p in spec.absent):
            continue
        if name not in stored:
            faults.append(f"{name}: not in the checkpoint")
        elif stored[name].shape != leaf.shape:
            faults.append(f"{name}: {_misfit(name, stored[name].shape, leaf.shape)}")
        else:
            taken[name] = stored[name]
    if faults or not taken:
        lines = "\n  ".join(faults[:12]) or "no parameter is left to load"
        raise errors.CheckpointError(
            f"init.from={spec.from_}: does not fit this model\n  {lines}\n"
            "  name what shall stay random in init.skip"
        )
    logger.info(
        "init.from=%s: %d of %d parameters loaded, %d skipped, %d stored ones unused",
        spec.from_,
        len(taken),
        len(leaves),
        len(leaves) - len(taken),
        len(set(stored) - set(taken)),
    )

    leaves |= {name: _placed(value, leaves[name]) for name, value in taken.items()}
    return tree.nest(leaves), tuple(skipped)


def statistics(spec: Init, past, params, extra):
    """Return `extra` with the batch statistics that belong to loaded parameters.

    Those of a layer are loaded where its gain is; those of a layer without a gain only
    where nothing is skipped, for then the checkpoint is of the same method.

    Raises:
        CheckpointError: a loaded layer has no statistics there, or of another shape.
    """
    if "stats" not in extra:
        return extra
    names, leaves = tree.flat(params), tree.flat(extra["stats"])
    skip = [name for name in names if any(re.fullmatch(p, name) for p in spec.skip)]
    stored, faults = renamed(past.statistics(), leaves, spec.rename), []
    for name, leaf in leaves.items():
        gain = f"{name.rpartition('/')[0]}/scale"
        if gain in skip or (gain not in names and skip):
            continue
        found = stored.get(name, stored.get(_alias(name)))
        if found is not None and found.shape == leaf.shape:
            leaves[name] = _placed(found, leaf)
        elif gain in names:
            faults.append(f"stats/{name}: not in the checkpoint, or of another shape")
    if faults:
        message = f"init.from={spec.from_}: does not fit this model\n  "
        raise errors.CheckpointError(message + "\n  ".join(faults[:12]))
    return extra | {"stats": tree.nest(leaves)}


def _placed(value, leaf):
    """Return a stored array as the leaf that it replaces is held."""
    value = np.asarray(value, leaf.dtype)
    return jax.device_put(value, getattr(leaf, "sharding", None))


def _misfit(name, there, here) -> str:
    """Return what is wrong with a shape; of the kernel that reads pixels, in words."""
    reads = backbone.reads([name]) and len(there) == len(here) == 4
    if reads and there[2] != here[2]:
        return (
            f"it was trained on {there[2]} channel(s), data.channels gives it {here[2]}"
            "; set data.channels, data.mean and data.std to its own"
        )
    return f"{there} stored, {here} here"


def check_classes(spec: Init, past, classes, params) -> None:
    """Refuse a trained classifier of other classes than those of the data.

    A head of the same size would load, and name everything wrongly.

    Args:
        past: what `spec.from_` is.
        classes: names of the data's classes, in order.

    Raises:
        CheckpointError: the first classes that differ.
    """
    heads = (n for n in tree.flat(params) if n.startswith("head/"))
    loaded = [n for n in heads if not any(re.fullmatch(p, n) for p in spec.skip)]
    if not loaded or past.imported:
        return
    stored = past.meta.get("classes")
    same_classes(spec.from_, stored, classes, "name the head in init.skip")


def same_classes(path, stored, classes, way_out: str) -> None:
    """Raise CheckpointError where stored class names are not the data's.

    Args:
        path: of the checkpoint, for the message.
        stored: names, or None where it does not tell.
        classes: names of the data.
        way_out: what to do.
    """
    if not stored or list(stored) == list(classes):
        return
    pairs = itertools.zip_longest(stored, classes, fillvalue="(none)")
    i, (old, new) = next((i, p) for i, p in enumerate(pairs) if p[0] != p[1])
    raise errors.CheckpointError(
        f"{path}: was trained on {len(stored)} classes, the data have {len(classes)}; "
        f"class {i} is {old!r} there and {new!r} here; {way_out}"
    )


def same_order(path, meta: dict, images: int, sampling: str) -> None:
    """Raise CheckpointError where a run would go on in another order of its images.

    Args:
        path: of the run, for the message.
        meta: beside its state; where that names no order, they were all listed.
        images: of the training set.
        sampling: see `dataset.Data`.
    """
    old, new = meta.get("order", "listed"), orders.name(images, sampling)
    if old != new:
        raise errors.CheckpointError(
            f"{path}: its order of images is {old!r}, that of {images} images with "
            f"data.sampling={sampling} is {new!r} in this version: it cannot go on "
            f"exactly; start anew from its weights (init.from={path}), or go on with "
            "the data and the version it was trained with"
        )


def renamed(stored, names, rules) -> dict:
    """Return the stored leaves, each once more under every name a rule gives it.

    Args:
        stored: {name: array}.
        names: of the leaves that are to be filled.
        rules: see `Init.rename`.
    """
    more = {}
    for name in names:
        for pattern, there in rules:
            if match := re.fullmatch(pattern, name):
                if (key := match.expand(there)) in stored:
                    more[name] = stored[key]
                break
    return {**stored, **more}


def _alias(name) -> str:
    """Return the name that a leaf below "backbone/" has in converted weights."""
    _, found, rest = f"/{name}".partition("/backbone/")
    return f"encoder/{rest}" if found else name


def _resampled(past, name, table, shape):
    """Return a position table for the grid of the model, if that is all it lacks."""
    if table.shape == tuple(shape):
        return table
    rows, wanted = table.shape[1], shape[1]
    for first in (1, 0):
        sides = [round(max(0, n - first) ** 0.5) for n in (rows, wanted)]
        squares = [side * side + first for side in sides]
        if squares == [rows, wanted]:
            # Of our own runs as torch resizes, which is what fine-tuning is used to.
            rule = past.weights.about.rule if past.imported else "plain"
            logger.info(
                "init.from=%s: %s resampled from %s to %s (%s)",
                past.path,
                name,
                table.shape,
                tuple(shape),
                rule,
            )
            return positions.resample(table, first, sides[1], rule)
    return table
