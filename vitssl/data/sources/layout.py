"""What every source shares: split names, labels, errors that say what was found."""

import logging
import os
import pathlib

import numpy as np

from vitssl import errors
from vitssl.data import decode

logger = logging.getLogger("vitssl.data")

ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def split_of(name, split, known):
    """The canonical name of `split`, one of the keys of `known`.

    Args:
        name: of the data set, for the message.
        split: what the user asked for.
        known: dict from every accepted name to the canonical one.

    Raises:
        DataError: the data set has no such split.
    """
    if split not in known:
        raise errors.DataError(
            f"{name}: no split {split!r}; there is: {', '.join(known)}"
        )
    return known[split]


def listing(path, most=8):
    """A short, readable list of what lies in the folder `path`."""
    path = pathlib.Path(path)
    if not path.exists():
        parent = path.parent
        near = (
            f"; {decode.printable(parent)} holds {listing(parent)}"
            if parent.is_dir()
            else ""
        )
        return "no such path" + near
    if not path.is_dir():
        return f"a file of {path.stat().st_size} bytes"
    names = sorted(e.name + "/" * e.is_dir() for e in os.scandir(path))
    names = [decode.printable(name) for name in names]
    if not names:
        return "an empty folder"
    more = f", ... ({len(names)} entries)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def fail(name, problem, path, expected):
    """Raise a DataError with the path, the expected layout and what is there."""
    raise errors.DataError(
        f"{name}: {problem}\n"
        f"  path:     {decode.printable(path)}\n"
        f"  expected: {expected}\n"
        f"  found:    {listing(path)}"
    )


def root_of(name, root, expected):
    """`root` as an absolute path (~ expanded) of an existing folder.

    Raises:
        DataError: it is empty, missing, or not a folder.
    """
    if not root:
        raise errors.DataError(f"{name}: data.root is empty\n  expected: {expected}")
    path = pathlib.Path(root).expanduser().absolute()
    if not path.is_dir():
        fail(name, "data.root is not a folder", path, expected)
    return path


def check(source, *, min_classes=0):
    """Refuse an empty data set; warn about, or refuse, one of too few classes.

    Args:
        source: with `labels` [N] (-1 = unlabelled) if it knows them.
        min_classes: distinct labels the caller needs (2 for a probe). With 0, a
            single class is only a warning: self-supervision does not need more.

    Raises:
        DataError: no image at all, or fewer than `min_classes` distinct labels.
    """
    where = f"{source.name}: {decode.printable(source.root)} split {source.split!r}"
    if not len(source):
        raise errors.DataError(f"{where} holds no image")
    labels = getattr(source, "labels", None)
    if labels is None:
        seen = len(source.classes)
    else:
        labels = np.unique(labels)
        seen = int((labels >= 0).sum())
    if seen < min_classes:
        raise errors.DataError(
            f"{where}: {seen} labelled class(es) among {len(source)} images; "
            f"{min_classes} or more are needed to evaluate\n"
            f"  classes: {', '.join(source.classes[:8]) or 'none'}"
        )
    if seen == 1:
        logger.warning(
            "%s has one class only (%s): accuracies on it mean nothing",
            where,
            source.classes[0] if source.classes else "?",
        )
    return source
