"""Files that hold many images each: which there are, of which split, in which classes.

What is written of them as shards elsewhere; see `tar` and `parquet`.
"""

import abc
import dataclasses
import glob
import json
import os
import pathlib
import re
from typing import NamedTuple

import numpy as np

from vitssl import errors
from vitssl.data import decode
from vitssl.data.sources import folder, layout, scan

CLASSES = "classes.json"
_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 1 << 20  # Files that braces may stand for.


class Row(NamedTuple):
    """One image.

    Attributes:
        piece: index of its file.
        name: in that file.
        offset: where it begins there, in bytes; or its row.
        size: in bytes; 0 if only its file knows.
        label: as it was read, None = unlabelled.
    """

    piece: int
    name: str
    offset: int
    size: int
    label: int | str | None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Packed(folder.Files):
    """Images inside of larger files; the path of one goes on into its file.

    Attributes:
        pieces: the files, from `root` on.
        piece: int32 [N], index of each image's file.
        offset: int64 [N], see `Row`.
    """

    pieces: tuple[str, ...]
    piece: np.ndarray
    offset: np.ndarray

    @abc.abstractmethod
    def encoded(self, i: int) -> bytes:
        """Return the bytes of image i as they are stored."""

    def image(self, i: int) -> np.ndarray:
        """Return image i, decoded."""
        name = decode.printable(self.path(i))
        return decode.decode(self.encoded(i), **self._how, name=name)


@dataclasses.dataclass(frozen=True)
class Place:
    """The files of a data set.

    Attributes:
        base: folder that all of them are in.
        pieces: their paths from there, sorted.
        name, expected: of the kind of source, for messages.
    """

    base: pathlib.Path
    pieces: tuple[str, ...]
    name: str
    expected: str

    def path(self, k: int) -> str:
        """Return where file k is."""
        return str(self.base / self.pieces[k])

    def known(self) -> tuple[str, ...]:
        """Return the names of the classes beside the files, () without them.

        Raises:
            DataError: they are no list of names, each once.
        """
        path = self.base / CLASSES
        if not path.exists():
            return ()
        try:
            names = json.loads(decode.contents(path))
        except (ValueError, RecursionError):
            names = None
        texts = isinstance(names, list) and all(isinstance(n, str) for n in names)
        if not texts or len(set(names)) < len(names):
            raise errors.DataError(
                f"{decode.printable(path)}: want a JSON list of the classes, each once"
            )
        return tuple(names)

    def kept(self, split: str, rows, labels, holdout: float) -> np.ndarray:
        """Return which images are of a split: bool [N].

        By the first word of a file's name, or else of its folders, that names a split;
        where no file has one, a fixed share of the images is held out.

        Raises:
            DataError: files of other splits only.
        """
        piece = np.array([row.piece for row in rows], np.int64)
        of = [_split(path) for path in self.pieces]
        if split == "all":
            return np.ones(len(rows), bool)
        if not any(of):
            paths = [os.path.join(self.pieces[r.piece], r.name) for r in rows]
            return folder.held_out(paths, labels, holdout) == (split != "train")
        other = {"val": "test", "test": "val"}.get(split, "")
        chosen = split if split in of else other
        if chosen not in of:
            have = ", ".join(sorted({s for s in of if s}))
            layout.fail(
                self.name, f"no file of split {split!r}, only of {have}", self.base,
                self.expected,
            )  # fmt: skip
        if unnamed := of.count(""):
            layout.once(
                f"{self.name}: {decode.printable(self.base)}: left out: {unnamed} "
                "file(s) whose names say no split (split='all' takes them)"
            )
        return (np.array(of) == chosen)[piece]


def find(name: str, root, files: str, ends: tuple[str, ...], expected: str) -> Place:
    """Return the files below a folder, or that a pattern names, or the one file.

    Args:
        root: folder, file, or a pattern: "*" and "?", "{000..012}", "{a,b}".
        files: pattern from the folder on; "" = all that end so, at any depth.

    Raises:
        DataError: there are none.
    """
    root = os.path.expanduser(str(root))
    pattern = os.path.join(root, files) if files else ""
    if root and not os.path.isdir(root):
        pattern = root
        root = os.path.dirname(re.split(r"[*?{\[]", root, maxsplit=1)[0]) or "."
    base = layout.root_of(name, root, expected)
    found = set() if pattern else set(_below(base, ends))
    for one in _expanded(pattern) if pattern else ():
        met = glob.glob(one, recursive=True) if glob.has_magic(one) else [one]
        if absent := [p for p in met if not os.path.isfile(p)]:
            layout.fail(name, "no such file", absent[0], expected)
        found |= {os.path.relpath(p, base) for p in met}
    if not found:
        what = pattern or " or ".join(f"*{end}" for end in ends)
        layout.fail(name, f"no file {decode.printable(what)}", base, expected)
    return Place(base, tuple(sorted(found)), name, expected)


def _below(base, ends):
    """Yield every file below a folder that ends so, from the folder on."""
    for at, folders, files in os.walk(base):
        folders[:] = [
            f for f in folders if f[0] != "." and f.lower() not in scan.SYSTEM
        ]
        mine = (f for f in files if f[0] != "." and f.lower().endswith(ends))
        yield from (os.path.relpath(os.path.join(at, f), base) for f in mine)


def _expanded(pattern) -> list[str]:
    """Return what a pattern with braces stands for, in order."""
    found = _BRACES.search(pattern)
    if not found:
        return [pattern]
    numbers = _NUMBERS.fullmatch(found[1])
    if numbers:
        low, high = map(int, numbers.groups())
        if high - low >= _MOST:
            raise errors.UsageError(f"{pattern!r}: more than {_MOST} files")
        each = [f"{k:0{len(numbers[1])}d}" for k in range(low, high + 1)]
    else:
        each = found[1].split(",")
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [one for part in each for one in _expanded(head + part + tail)]


def _split(path) -> str:
    """Return the split that the name of a file says, or its folders do; or ""."""
    above, name = os.path.split(path.lower())
    for part in (name, *reversed(above.split(os.sep))):
        for word in re.split("[^a-z]+", part):
            if word in folder.SPLITS and word != "all":
                return folder.SPLITS[word]
    return ""


def packed(made, place: Place, rows, *, split, classes, labels, holdout, **about):
    """Return the images of a split as a `Packed`.

    Args:
        made: (rows of the split, **fields) -> the source.
        rows: of all files, in their order.
        labels: int32 [N].

    Raises:
        DataError: the split has no image.
    """
    keep = np.flatnonzero(place.kept(split, rows, labels, holdout))
    rows = [rows[k] for k in keep]
    if not rows:
        layout.fail(
            place.name, f"no image in split {split!r}", place.base, place.expected
        )
    paths = [os.fsencode(os.path.join(place.pieces[r.piece], r.name)) for r in rows]
    return made(
        rows,
        root=str(place.base),
        paths=b"".join(paths),
        ends=np.cumsum([len(p) for p in paths], dtype=np.int64),
        labels=labels[keep],
        classes=classes,
        name=place.name,
        split=split,
        pieces=place.pieces,
        piece=np.array([r.piece for r in rows], np.int32),
        offset=np.array([r.offset for r in rows], np.int64),
        **about,
    )
