"""What every source shares: examples, split names, errors that say what was found."""

import abc
import dataclasses
import functools
import logging
import os
import pathlib

import numpy as np

from vitssl import errors
from vitssl.data import decode

logger = logging.getLogger("vitssl.data")

ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval"),
}


class Source(abc.ABC):
    """A data set: `len()`, and `[i] -> {"image": uint8 [H, W, C], "label": int}`.

    Images with spectral planes are uint16, see `spectral`.

    It has `name`, `root`, `split`, `classes` (names, tuple), `channels` (int) and, if
    they are known without reading images, `labels` (int32 [N], -1 = unlabelled). Where
    images have several labels each, or none, these are -1, the labels are `several`
    (uint8 [N, K] of 0 and 1), and an example has its row as "labels".

    It is a dataclass and cheap to pickle: only its fields travel, and files are opened
    again, or mapped, where it arrives.
    """

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.example(i)

    def __getstate__(self):
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @abc.abstractmethod
    def example(self, i: int) -> dict:
        """Return example i, which exists."""

    def reduced(self, reduction) -> "Source":
        """Return the source that decodes large photographs for a transform; or itself.

        Args:
            reduction: of the transform, see `reduced`.
        """
        del reduction
        return self


class Images(Source):
    """A source whose examples are an image and its label, nothing else."""

    @abc.abstractmethod
    def image(self, i: int) -> np.ndarray:
        """Return image i, which exists: uint8 [H, W, C]."""

    def example(self, i: int) -> dict:
        """Return image i and its label, or labels."""
        found = {"image": self.image(i), "label": int(self.labels[i])}
        several = getattr(self, "several", None)
        return found if several is None else found | {"labels": several[i]}


def counts(source) -> np.ndarray | None:
    """Return the images of every class [K], or None where only images tell."""
    several = getattr(source, "several", None)
    if several is not None:
        return several.sum(0, dtype=np.int64)
    labels = getattr(source, "labels", None)
    if labels is None:
        return None
    labels = np.asarray(labels)
    return np.bincount(labels[labels >= 0], minlength=len(source.classes))


def split_of(name: str, split: str, known: dict) -> str:
    """Return the canonical name of a split.

    Args:
        name: of the data set, for the message.
        known: from every accepted name to the canonical one.

    Raises:
        DataError: the data set has no such split.
    """
    if split not in known:
        raise errors.DataError(
            f"{name}: no split {split!r}; there is: {', '.join(known)}"
        )
    return known[split]


@functools.cache
def once(line: str) -> None:
    """Warn, but only once of the same: a run opens its splits several times."""
    logger.warning("%s", line)


def fail(name: str, problem: str, path, expected: str):
    """Raise a DataError with the path, the expected layout and what is there."""
    raise errors.DataError(
        f"{name}: {problem}\n"
        f"  path:     {decode.printable(path)}\n"
        f"  expected: {expected}\n"
        f"  found:    {_listing(pathlib.Path(path))}"
    )


def _listing(path, most=8):
    """Return a short, readable list of what lies in a folder."""
    if not path.exists():
        if not path.parent.is_dir():
            return "no such path"
        there = _listing(path.parent)
        return f"no such path; {decode.printable(path.parent)} holds {there}"
    if not path.is_dir():
        return f"a file of {path.stat().st_size} bytes"
    names = sorted(e.name + "/" * e.is_dir() for e in os.scandir(path))
    if not names:
        return "an empty folder"
    more = f", ... ({len(names)} entries)" if len(names) > most else ""
    return ", ".join(map(decode.printable, names[:most])) + more


def root_of(name: str, root, expected: str, inner="") -> pathlib.Path:
    """Return `root` as an absolute path (~ expanded) of an existing folder.

    Args:
        inner: folder below it to return instead, if it is there.

    Raises:
        DataError: it is empty, missing, or not a folder.
    """
    if not root:
        raise errors.DataError(f"{name}: data.root is empty\n  expected: {expected}")
    path = pathlib.Path(root).expanduser().absolute()
    if not path.is_dir():
        fail(name, "data.root is not a folder", path, expected)
    return path / inner if (path / inner).is_dir() else path


def need(name: str, base: pathlib.Path, files, expected: str):
    """Raise a DataError that lists which of some files are not below `base`."""
    missing = [file for file in files if not (base / file).is_file()]
    if missing:
        fail(name, f"no file {', '.join(missing)}", base, expected)


def beside(paths, root, suffix: str, what: str) -> tuple[str, ...]:
    """Return the file below `root` of every image path relative to it.

    Args:
        suffix: in place of the image's.
        what: is in those files, for the message.

    Raises:
        DataError: some images have none, with an example.
    """
    found = [os.path.join(root, os.path.splitext(p)[0] + suffix) for p in paths]
    missing = [p for p in found if not os.path.isfile(p)]
    if missing:
        raise errors.DataError(
            f"{len(missing)} of {len(found)} images have no {what}, for example "
            f"{decode.printable(missing[0])}"
        )
    return tuple(found)


def named_like(files, root, suffixes, what: str) -> tuple[str, ...]:
    """Return the file below `root` that is named like each of a `folder.Files`.

    Args:
        suffixes: that it may have; all have that of the first.

    Raises:
        DataError: as `beside`.
    """
    paths = [files.relative(i) for i in range(len(files))]
    first = os.path.join(root, os.path.splitext(paths[0])[0])
    here = (s for s in suffixes if os.path.isfile(first + s))
    return beside(paths, root, next(here, suffixes[0]), what)


def check(source):
    """Return a source that has images; warn if they are all of one class.

    Raises:
        DataError: no image at all.
    """
    where = f"{source.name}: {decode.printable(source.root)} split {source.split!r}"
    if not len(source):
        raise errors.DataError(f"{where} holds no image")
    seen = counts(source)
    if (len(source.classes) if seen is None else np.count_nonzero(seen)) == 1:
        only = source.classes[0] if source.classes else "?"
        logger.warning(
            "%s has one class only (%s): accuracies on it mean nothing", where, only
        )
    return source
