"""ArrayRecord files of images, read at random: a record is an image file's bytes.

FILE.csv beside FILE.array_record has the name and the label of every record, in their
order, as `vitssl pack --format=array_record` writes it; without it images have none.
Needs the package array_record, which comes with grain (not on Windows).

Source: github.com/google/array_record.
"""

import csv
import dataclasses
import functools
import os

import numpy as np

from vitssl import errors, ranges
from vitssl.data import decode
from vitssl.data.sources import folder, layout, pieces, tables

EXPECTED = (
    "ROOT/**/*.array_record, such as train-00000.array_record, of image files' bytes, "
    "with train-00000.csv of their names and labels"
)
END = ".array_record"
OPTIONS = "readahead_buffer_size:0"  # Of a reader: records are wanted one by one.
HEAD = ("key", "file", "label")  # Of the table; "labels" where there may be several.
_HANDLES = 256  # Files that stay open.


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Records(pieces.Packed):
    """Images that are the records of ArrayRecord files."""

    @functools.cached_property
    def _readers(self):
        return {}

    def encoded(self, i: int) -> bytes:
        """Return the bytes of image i.

        Raises:
            DataError: the file cannot be read, or is not what it was.
        """
        piece, record = int(self.piece[i]), int(self.offset[i])
        reader = self._readers.get(piece)
        if reader is None:
            reader = opened(os.path.join(self.root, self.pieces[piece]))
            if len(self._readers) < _HANDLES:
                self._readers.setdefault(piece, reader)
        try:
            (data,) = reader.read([record])
        except Exception as e:  # noqa: BLE001 - whatever its C++ side raises.
            name, why = decode.printable(self.path(i)), errors.told(e)
            raise errors.DataError(f"{name}: cannot be read: {why}") from e
        return data


def module():
    """Return the package's module of readers and writers.

    Raises:
        DataError: it is not installed.
    """
    try:
        from array_record.python import array_record_module
    except ImportError as e:
        raise errors.DataError(
            "ArrayRecord files need the package array_record, which there is for Linux "
            "and macOS: pip install array-record; or take tar"
        ) from e
    return array_record_module


def opened(path):
    """Return a reader of a whole file.

    Raises:
        DataError: it is not there, or damaged.
    """
    try:
        decode.regular(path)
        reader = module().ArrayRecordReader(str(path), OPTIONS)
        why = "" if reader.ok() else "no whole ArrayRecord file; copy it again"
    except (OSError, RuntimeError, ValueError) as e:
        why = f"cannot be read: {errors.told(e)}"
    if why:
        raise errors.DataError(f"{decode.printable(path)}: {why}")
    return reader


def open(
    root,
    split,
    *,
    channels=3,
    files="",
    holdout: ranges.BelowOne = 0.1,
    value_range: tuple[float, ...] = (),
):
    """Images in ArrayRecord files, in the order of the files and of their records.

    Names of files say their split ("train-00000.array_record"), else their folders do;
    where none does, a fixed share of the images is held out.

    Args:
        root: folder, file, or pattern; see `pieces.find`.
        split: "train", "val", "test" or "all".
        files: pattern of the files to take, from root on.
        holdout: share of the images to hold out where no file names a split.
        value_range: as of "folder".

    Raises:
        DataError: no such file, one that is damaged, or not that split.
    """
    bounds = folder.bounds_of(value_range)
    split = layout.split_of("array_record", split, folder.SPLITS)
    place = pieces.find("array_record", root, files, (END,), EXPECTED)
    rows = [row for k in range(len(place.pieces)) for row in _rows(place, k)]
    several = any(isinstance(row.label, tuple) for row in rows)
    flat = [k for row in rows for k in _set(row.label)] if several else ()
    labels, classes = tables.numbered(
        str(place.base), flat if several else [r.label for r in rows], place.known()
    )
    if several:
        labels = np.full(len(rows), -1, np.int32)

    def made(rows, **fields):
        ones = [_set(row.label) for row in rows]
        ones = folder.matrix(ones, len(classes)) if several else None
        return Records(**fields, several=ones)

    about = dict(classes=classes, labels=labels, holdout=holdout, split=split)
    return pieces.packed(made, place, rows, **about, channels=channels, bounds=bounds)


def _set(label) -> tuple:
    return label if isinstance(label, tuple) else () if label is None else (label,)


def _rows(place, piece) -> list:
    """Return a `pieces.Row` for every record of a file.

    Raises:
        DataError: its table is of another number of records, or says no labels.
    """
    path = place.path(piece)
    count = opened(path).num_records()
    names, labels = [str(n) for n in range(count)], [None] * count
    table = path.removesuffix(END) + ".csv"
    if os.path.isfile(table):
        names, labels = _table(table)
    if len(names) != count:
        raise errors.DataError(
            f"{decode.printable(table)}: {len(names)} rows for {count} records"
        )
    each = zip(names, labels, strict=True)
    return [pieces.Row(piece, name, n, 0, y) for n, (name, y) in enumerate(each)]


def _table(path) -> tuple[list, list]:
    """Return (names, labels: numbers, None, or tuples of several) of a file."""
    where = decode.printable(path)
    try:
        text = decode.contents(path).decode()
        head, *rows = csv.reader(text.splitlines())
        several = head == [*HEAD[:2], "labels"]
        if not several and head != [*HEAD]:
            raise ValueError(f"its columns are {', '.join(head)}")
        names = [name for _, name, _ in rows]
        sets = [tuple(map(int, cell.split("|"))) if cell else () for *_, cell in rows]
        if any(k < 0 for labels in sets for k in labels):
            raise ValueError("a label below 0")
    except ValueError as e:
        raise errors.DataError(
            f"{where}: no table of records ({errors.told(e)}); pack them again"
        ) from e
    return names, sets if several else [s[0] if s else None for s in sets]


def write(path, source, which) -> None:
    """Write some images of a source as a file, and the table beside it.

    Args:
        path: of the file, which ends so.
        source: `folder.Files`.
        which: indices.
    """
    writer = module().ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    try:
        for i in which:
            writer.write(source.encoded(i))
    finally:
        writer.close()


def table(source, which) -> list[tuple]:
    """Return the rows of the table of some images, the heads first."""
    several = source.several
    rows = [(*HEAD[:2], HEAD[2] if several is None else "labels")]
    for i in which:
        if several is not None:
            cell = "|".join(map(str, np.flatnonzero(several[i])))
        else:
            cell = int(source.labels[i]) if source.labels[i] >= 0 else ""
        rows.append((f"{i:08d}", decode.printable(source.relative(i)), cell))
    return rows
