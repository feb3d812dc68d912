"""Tables of labels and lists of files, which lie beside a folder of images."""

import csv
import dataclasses
import os
import pathlib
import posixpath
import re

import numpy as np

from vitssl import errors
from vitssl.data import decode
from vitssl.data.sources import layout

ENDS = (".csv", ".tsv", ".parquet")
FILES = (
    "file filename file_name filepath path image image_path image_id image_index img "
    "id name"
)
LABELS = "label class category target y diagnosis dx species"
# Columns whose cells may hold several labels, and what then separates them.
SEVERAL = "labels classes categories tags findings finding_labels diagnoses attributes"
_MARKS = "|;"  # In any column of labels.
_NUMBERS = {"true": 1.0, "false": 0.0}


@dataclasses.dataclass(frozen=True)
class Table:
    """What a file says of images.

    Attributes:
        path: of the file.
        labels: {name of an image: index of its class}, or indices of several.
        classes: their names.
        splits: {name of an image: split}, {} if the table says none.
        several: whether an image may have several labels, or none.
    """

    path: str
    labels: dict
    classes: tuple[str, ...]
    splits: dict
    several: bool = False

    def labelled(self, members, split: str) -> list[tuple]:
        """Return (path, label or labels) of the members that a split has by the table.

        A name is the path of an image or its last part, with or without its ending.

        Args:
            members: (path, anything).

        Raises:
            DataError: the table names none of them, or two by one name.
        """
        met, found = {}, []
        if split not in self.splits.values():  # They stand in for each other.
            split = {"val": "test", "test": "val"}.get(split, split)
        for path, _ in members:
            name = next((n for n in _names(path) if n in self.labels), None)
            if name is None:
                continue
            if name in met:
                raise errors.DataError(
                    f"{self.path}: {name!r} may be {decode.printable(met[name])} or "
                    f"{decode.printable(path)}; give paths"
                )
            met[name] = path
            if not self.splits or split in ("all", self.splits[name]):
                found.append((path, self.labels[name]))
        out = {"image(s) that it does not name": len(members) - len(met)}
        out["name(s) without an image here"] = len(self.labels) - len(met)
        if not met and members:
            raise errors.DataError(
                f"{self.path}: it names none of {len(members)} images, such as "
                f"{decode.printable(members[0][0])}; it has {next(iter(self.labels))!r}"
            )
        if any(out.values()):
            told = ", ".join(f"{n} {what}" for what, n in out.items() if n)
            layout.once(f"folder: {self.path}: left out: {told}")
        return found


def _names(path):
    """Yield what a table may call an image."""
    last = posixpath.basename(path)
    yield from (path, os.path.splitext(path)[0], last, os.path.splitext(last)[0])


def read(path, separator: str = "auto") -> Table:
    """Return a table: a column of files, and labels.

    Labels are a column of names or numbers, or one column of 0 and 1 for each class.
    An image has several labels, or none, where a cell holds a list or a separator, or
    where the ones of a row are not exactly one. A column "split" decides over the
    splits.

    Args:
        separator: of the labels in a cell; "auto": "|" or ";", in a column of a plural
            name a comma, in "tags" a blank, if any cell has one; "": a cell is one
            label; "rows": an image has a row for every label.

    Raises:
        UsageError: not the name of a table.
        DataError: no such file, or columns that are missing or say two classes.
    """
    path = str(pathlib.Path(path).expanduser())
    where = decode.printable(path)
    if not path.lower().endswith(ENDS):
        raise errors.UsageError(
            f"data.options.labels={path}: one of folder, none, any, or a table of "
            f"labels, *{' *'.join(ENDS)}"
        )
    rows = _rows(path, where)
    columns = {_column(k): k for k in rows[0]}
    key = next((columns[n] for n in FILES.split() if n in columns), None)
    if key is None:
        _fail(where, rows, "file")
    splits = _splits(where, rows, key, columns.get("split"))
    known = f"{LABELS} {SEVERAL}".split()
    label = next((columns[n] for n in known if n in columns), None)
    if label is None:
        given = [c for c in rows[0] if c not in (key, columns.get("split"))]
        sets, classes = _ones(where, rows, key, given), tuple(map(str, given))
        several = any(len(ones) != 1 for ones in sets.values())
    else:
        mark = _mark(where, separator, label, [row[label] for row in rows])
        sets, classes = _named(where, rows, key, label, mark)
        several = mark is not None
    if not several:
        return Table(where, {k: v[0] for k, v in sets.items()}, classes, splits)
    count = sum(map(len, sets.values())) / len(sets)
    none = sum(not labels for labels in sets.values())
    without = f", {none} of them without any" if none else ""
    layout.once(
        f"folder: {where}: several labels an image: {count:.2f} of {len(classes)} in "
        f"the mean of {len(sets)} images{without}"
    )
    return Table(where, sets, classes, splits, True)


def _mark(where, separator, column, cells) -> str | None:
    """Return what separates the labels of a cell; None where a cell is one label."""
    if separator != "auto":
        return separator or None
    name = _column(column)
    marks = _MARKS + "," * (name in SEVERAL.split()) + " " * (name == "tags")
    texts = [c for c in cells if isinstance(c, str)]
    found = next((m for m in marks if any(m in t for t in texts)), None)
    if found:
        layout.once(
            f"folder: {where}: the labels in column {column!r} are separated by "
            f"{found!r} (data.options.separator decides)"
        )
    return found or ("|" if any(_is_list(c) for c in cells) else None)


def _column(name) -> str:
    return str(name).strip().lower().replace(" ", "_")


def _is_list(cell) -> bool:
    return isinstance(cell, list | tuple)


def _named(where, rows, key, column, mark) -> tuple[dict, tuple]:
    """Return ({name: its labels' indices}, classes) of a column of labels.

    Without a mark an image has one label, of which -1 says that it has none.
    """
    said = {}
    for row in rows:
        name, labels = _plain(row[key]), _values(row[column], mark)
        before = said.setdefault(name, labels)
        if mark == "rows":
            said[name] = (*before, *labels)
        elif before != labels:
            both = " and ".join(", ".join(map(repr, x)) or "none" for x in
                                (before, labels))  # fmt: skip
            raise errors.DataError(
                f"{where}: {row[key]!r} is {both}; if images have a row for every "
                "label, set data.options.separator=rows"
            )
    flat = [label for labels in said.values() for label in labels]
    numbers, classes = numbered(where, flat)
    ahead = iter(numbers.tolist())
    sets = {k: tuple(next(ahead) for _ in labels) for k, labels in said.items()}
    if mark is not None:
        sets = {k: tuple(sorted({*v} - {-1})) for k, v in sets.items()}
    return sets, classes


def _values(cell, mark) -> tuple:
    """Return the labels in a cell, each an int, a str, or None."""
    if mark in (None, "rows") and not _is_list(cell):
        return (_value(cell),)
    if isinstance(cell, str):
        parts = cell.strip("[]").split(None if mark == " " else mark)
        cell = [p.strip(" '\"") for p in parts if p.strip(" '\"")]
    return tuple(_value(x) for x in (cell if _is_list(cell) else (cell,)))


def _value(label):
    """Return a label as int, str, or None."""
    if isinstance(label, float | bool):
        return int(label) if label == label and label == int(label) else None
    return label if label is None or isinstance(label, int) else str(label)


def _ones(where, rows, key, columns) -> dict:
    """Return {name: indices of the columns that are 1} of columns of 0 and 1."""
    ones = {}
    for row in rows:
        try:
            values = [_number(row[c]) for c in columns]
        except (TypeError, ValueError):
            values = []
        if not values or not {*values} <= {0.0, 1.0}:
            _fail(where, rows, "label")
        found = tuple(k for k, value in enumerate(values) if value)
        if ones.setdefault(_plain(row[key]), found) != found:
            raise errors.DataError(f"{where}: {row[key]!r} has two rows that differ")
    return ones


def _number(cell) -> float:
    text = str(cell).strip().lower()
    return _NUMBERS[text] if text in _NUMBERS else float(text)


def _splits(where, rows, key, column):
    if column is None:
        return {}
    known = {a: s for s, names in layout.ALIASES.items() for a in names}
    found = {_plain(row[key]): str(row[column]).strip().lower() for row in rows}
    if alien := sorted({*found.values()} - {*known}):
        raise errors.DataError(
            f"{where}: split {alien[0]!r}: one of {', '.join(known)}"
        )
    return {name: known[split] for name, split in found.items()}


def _rows(path, where) -> list[dict]:
    """Return the rows of a table, each a dict.

    Raises:
        DataError: it cannot be read, or has no row.
    """
    try:
        if path.lower().endswith(".parquet"):
            from pyarrow import parquet

            rows = parquet.read_table(path).to_pylist()
        else:
            rows = _text_rows(decode.contents(path).decode("utf-8-sig"), path)
    except errors.DataError:
        raise
    except ImportError as e:
        raise errors.DataError(
            f"{where}: needs pyarrow: pip install 'vitssl[parquet]', or give a .csv"
        ) from e
    except Exception as e:  # noqa: BLE001 - pyarrow has a dozen of its own kinds.
        raise errors.DataError(f"{where}: cannot be read: {errors.told(e)}") from e
    if not rows:
        raise errors.DataError(f"{where}: a table without rows")
    return rows


def _text_rows(text, path):
    head = text.partition("\n")[0]
    mark = "\t" if path.lower().endswith(".tsv") else ","
    mark = ";" if mark not in head and ";" in head else mark
    rows = list(csv.DictReader(text.splitlines(), delimiter=mark))
    for n, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise ValueError(f"row {n} has not the {len(rows[0])} columns of the head")
    return [{k: v.strip() for k, v in row.items()} for row in rows]


def _plain(name) -> str:
    """Return a name in a table as a path from the folder on."""
    return posixpath.normpath(str(name).strip().replace("\\", "/"))


def _fail(where, rows, what):
    have = ", ".join(map(str, list(rows[0])[:12]))
    known = FILES if what == "file" else LABELS
    more = "" if what == "file" else ", or one column of 0 and 1 for each class"
    raise errors.DataError(
        f"{where}: no column of the {what}s ({known.split()[0]}{more}); it has: {have}"
    )


def listed(path, base, members) -> list:
    """Return the members, (path, label), that a text file names, or whose folders.

    Args:
        path: of the file: paths from `base` on, one per line, "#" begins a comment.

    Raises:
        DataError: no such file, or a line that is neither.
    """
    path = pathlib.Path(path).expanduser()
    text = decode.contents(path).decode("utf-8", "surrogateescape")
    lines = [line for line in text.splitlines() if line.strip() and line[0] != "#"]
    wanted = {_plain(os.path.relpath(os.path.join(base, x.strip()), base)): x
              for x in lines}  # fmt: skip
    used, found = set(), []
    for member in members:
        steps = member[0].split("/")
        ways = {"/".join(steps[:n]) for n in range(1, len(steps) + 1)} | {"."}
        if here := ways & wanted.keys():
            used |= here
            found.append(member)
    if missing := [wanted[w] for w in wanted if w not in used]:
        raise errors.DataError(
            f"{decode.printable(path)}: {len(missing)} of {len(wanted)} lines are no "
            f"image and no folder of images of {decode.printable(base)}, for example "
            f"{missing[0]!r}"
        )
    return found


def numbered(where: str, said, known=()) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return (labels int32 [N], names of the classes).

    Numbers below the number of images stand for themselves; other numbers and names
    are counted in their order.

    Args:
        where: they were read, for the message.
        said: int or str of each image, None or -1 = unlabelled.
        known: names of the classes, which numbers index.

    Raises:
        DataError: a number or a name that is not of `known`.
    """
    said = [None if s in (-1, "", "-1") else s for s in said]
    kinds = sorted({s for s in said if s is not None}, key=str)
    if all(_is_number(k) for k in kinds):
        said = [None if s is None else int(s) for s in said]
        kinds = sorted({int(k) for k in kinds})
        if known and kinds and not 0 <= kinds[0] <= kinds[-1] < len(known):
            raise errors.DataError(
                f"{where}: labels {kinds[0]}..{kinds[-1]} of {len(known)} classes"
            )
        plain = kinds and kinds[0] >= 0 and kinds[-1] < len(said)
        number = {k: k if known or plain else i for i, k in enumerate(kinds)}
        if not known:
            known = range(kinds[-1] + 1) if plain else kinds
    else:
        said = [None if s is None else str(s) for s in said]
        known = known or sorted(map(str, kinds))
        number = {name: i for i, name in enumerate(known)}
        if alien := sorted({s for s in said if s is not None} - set(number)):
            raise errors.DataError(
                f"{where}: {errors.told(alien[0])!r} is none of {len(known)} classes"
            )
    labels = [-1 if s is None else number[s] for s in said]
    return np.array(labels, np.int32), tuple(map(str, known))


def _is_number(value) -> bool:
    return isinstance(value, int) or re.fullmatch(r"-?\d{1,9}", value) is not None
