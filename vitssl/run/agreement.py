"""What the splits, the pixels and a checkpoint must agree on, said before step 0."""

import logging
import re
import unicodedata

import numpy as np

from vitssl import errors, tree
from vitssl.convert import backbone
from vitssl.data import sources as kinds
from vitssl.data.sources import layout

logger = logging.getLogger(__name__)

SAMPLE = 16  # Images that are looked at.
DARK = 256 // 8  # All values below that: an eighth of the range.


def present(source) -> dict[str, int]:
    """Return {class: images} of the classes that a split has images of.

    Where labels are not known before images are read, a class counts as one image.
    """
    count = layout.counts(source)
    if count is None:
        return dict.fromkeys(source.classes, 1)
    named = zip(source.classes, count.tolist(), strict=False)
    return {c: n for c, n in named if n}


def same_classes(taught: tuple, scored: tuple) -> None:
    """Warn of classes that one of two splits lacks.

    Args:
        taught, scored: (config key and value, `present` classes) of the split that
            teaches, and of the one that is scored.

    Raises:
        DataError: the two have no class in common.
    """
    (old_key, old), (new_key, new) = taught, scored
    if not old or not new or set(old) == set(new):
        return
    spelling = _spelling(old, new)
    if not set(old) & set(new):
        raise errors.DataError(
            f"{new_key} has no class of {old_key}: {_short(new)} against "
            f"{_short(old)}{spelling}"
        )
    for key, here, other_key, other in (
        (new_key, new, old_key, old),
        (old_key, old, new_key, new),
    ):
        lost = {c: n for c, n in here.items() if c not in other}
        if lost:
            logger.warning(
                "%s has %d of %d classes that %s has no image of: %s%s",
                key,
                len(lost),
                len(here),
                other_key,
                ", ".join(f"{c} ({n})" for c, n in list(lost.items())[:8])
                + ", ..." * (len(lost) > 8),
                spelling,
            )
            spelling = ""


def _short(classes, most=6) -> str:
    more = f", ... ({len(classes)} classes)" if len(classes) > most else ""
    return ", ".join(map(str, list(classes)[:most])) + more


def _spelling(old, new) -> str:
    """Return how to fix class names that differ in case or accents alone, or ""."""
    plain = {_folded(c): c for c in old}
    pairs = [(c, plain[_folded(c)]) for c in new if _folded(c) in plain]
    pairs = [(a, b) for a, b in pairs if a != b]
    if not pairs:
        return ""
    a, b = map(ascii, pairs[0])
    return (
        f"; {len(pairs)} differ in case or in how accents are stored alone, as {a} and "
        f"{b}: give their folders one name"
    )


def _folded(name) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def bright(data, source) -> None:
    """Warn where no image of a sample reaches an eighth of the range of pixels."""
    most = 0
    for i in np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).astype(int):
        try:
            image = source[int(i)].get("image")
        except errors.DataError:
            continue  # It is counted, and named, where it is read.
        if image is None:
            return
        most = max(most, int(image.max()) * 255 // np.iinfo(image.dtype).max)
    if most < DARK:
        way_out = "see how they were stored"
        if "value_range" in kinds.options_of(data.source):
            way_out = "data.options.value_range=(0, 4095) is right for 12 bits"
        logger.warning(
            "data.split=%r: no value of %d images passes %d of 255: nearly black; %s",
            data.split,
            min(SAMPLE, len(source)),
            most,
            way_out,
        )


def with_checkpoint(spec, past, data, size, params) -> None:
    """Warn where a checkpoint saw other pixels than it now meets; one line each.

    Other channels do not load, which `warmstart.load` says.

    Args:
        spec, past: `init`, and what it opens.
        data, size: section and training size of this run.
        params: of this run; where what reads the pixels starts anew, nothing is said.
    """
    kernels = backbone.reads(tree.flat(params))
    if all(any(re.fullmatch(p, name) for p in spec.skip) for name in kernels):
        return
    if past.imported:
        about = past.weights.about
        mean, std, before = about.mean, about.std, about.model.get("image_size")
    else:
        try:
            old = past.experiment
        except errors.VitsslError as e:  # The weights may be older than the keys.
            why = str(e).partition("\n")[0]
            logger.warning("init.from=%s: its data are not known: %s", spec.from_, why)
            return
        mean, std = old.settings.data.mean, old.settings.data.std
        before = old.training_size
    compared = [("image size in pixels", before, size)] if before else []
    if len(mean) == data.channels:
        compared += [("data.mean", tuple(mean), data.mean)]
        compared += [("data.std", tuple(std), data.std)]
    for what, there, here in compared:
        if there != here:
            logger.warning(
                "init.from=%s: %s was %s there, is %s here",
                *(spec.from_, what, there, here),
            )
