"""Parquet and Arrow files of images: what Hugging Face's `datasets` keeps on disk.

Needs the extra [parquet]. An image is a column of bytes, or of {bytes, path}; names of
classes come from the schema. Arrow files (`save_to_disk`) are mapped. Of a parquet file
a whole row group has to be read for one image, so groups stay in memory up to 1 GiB;
`vitssl pack` makes tar or ArrayRecord files, which have no such limit.
"""

import collections
import dataclasses
import functools
import json
import os
import threading

from vitssl import errors, ranges
from vitssl.data import decode
from vitssl.data.sources import folder, layout, pieces, tables

EXPECTED = (
    "ROOT/**/*.parquet or *.arrow, such as train-00000-of-00004.parquet, with a column "
    "of images: bytes, or {bytes, path}"
)
ENDS = (".parquet", ".arrow")
IMAGES = ("image", "img", "picture", "photo")
LABELS = ("label", "labels", "fine_label", "class", "cls", "target")
HELD = 1 << 30  # Bytes of row groups in memory, of each process.


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Parquet(pieces.Packed):
    """Images in rows of parquet or Arrow files; `column` is theirs."""

    column: str

    @functools.cached_property
    def _lock(self):
        return threading.Lock()

    @functools.cached_property
    def _readers(self):
        return {}

    @functools.cached_property
    def _groups(self):
        return collections.OrderedDict()

    def encoded(self, i: int) -> bytes:
        """Return the bytes of image i.

        Raises:
            DataError: they cannot be read, or the row has none.
        """
        name = decode.printable(self.path(i))
        try:
            with self._lock:  # pyarrow's readers are for one thread at a time.
                value = self._value(int(self.piece[i]), int(self.offset[i]))
        except Exception as e:  # noqa: BLE001 - pyarrow has a dozen of its own kinds.
            why = errors.told(e)
            raise errors.DataError(f"{name}: cannot be read: {why}") from e
        if isinstance(value, dict):
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise errors.DataError(
                f"{name}: cannot be read: the row holds no bytes; a path alone is not "
                "followed"
            )
        return value

    def _value(self, piece, row):
        if piece not in self._readers:
            path = os.path.join(self.root, self.pieces[piece])
            self._readers[piece] = _reader(path)
        reader, group = self._readers[piece], 0
        if not hasattr(reader, "read_row_group"):
            return reader.column(self.column)[row].as_py()
        while row >= (count := reader.metadata.row_group(group).num_rows):
            row, group = row - count, group + 1
        return self._group(piece, reader, group)[row].as_py()

    def _group(self, piece, reader, group):
        """Return the images of a row group, kept as long as there is room."""
        held, key = self._groups, (piece, group)
        if key not in held:
            given = dict(columns=[self.column], use_threads=False)
            held[key] = reader.read_row_group(group, **given).column(self.column)
            while len(held) > 1 and sum(x.nbytes for x in held.values()) > HELD:
                held.popitem(last=False)
                layout.once(
                    f"parquet: {decode.printable(self.root)}: more than {HELD >> 20} "
                    "MiB of row groups, which are read again and again; vitssl pack "
                    "makes tar files, which are read at random"
                )
        held.move_to_end(key)
        return held[key]


def _arrow():
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as e:
        raise errors.DataError(
            "data.source=parquet needs pyarrow: pip install 'vitssl[parquet]'"
        ) from e
    return pyarrow, ipc, parquet


def _reader(path):
    """Return a ParquetFile, or a mapped Table of an Arrow file."""
    pyarrow, ipc, parquet = _arrow()
    decode.regular(path)
    if path.lower().endswith(".parquet"):
        return parquet.ParquetFile(path)
    try:  # `datasets` writes streams.
        return ipc.open_stream(pyarrow.memory_map(path)).read_all()
    except pyarrow.ArrowInvalid:
        return ipc.open_file(pyarrow.memory_map(path)).read_all()


def open(
    root,
    split,
    *,
    channels=3,
    files="",
    image="auto",
    label="auto",
    holdout: ranges.BelowOne = 0.1,
    value_range: tuple[float, ...] = (),
):
    """Images in parquet or Arrow files, in the order of the files and their rows.

    Names of files say their split ("train-00000-of-00004.parquet"), else their folders
    do; where none does, a fixed share of the images is held out.

    Args:
        root: folder, file, or pattern; see `pieces.find`.
        split: "train", "val", "test" or "all".
        files: pattern of the files to take, from root on.
        image, label: columns; label="" leaves every image unlabelled.
        holdout: share of the images to hold out where no file names a split.
        value_range: as of "folder".

    Raises:
        DataError: pyarrow (extra [parquet]), files, columns or the split are missing.
    """
    bounds = folder.bounds_of(value_range)
    split = layout.split_of("parquet", split, folder.SPLITS)
    _arrow()
    place = pieces.find("parquet", root, files, ENDS, EXPECTED)
    rows, columns, known = [], set(), place.known()
    for k in range(len(place.pieces)):
        column, names, labels = _table(place.path(k), image, label)
        columns.add(column)
        known = known or names
        rows += [pieces.Row(k, str(n), n, 0, y) for n, y in enumerate(labels)]
    if len(columns) > 1:
        which = ", ".join(sorted(columns))
        raise errors.DataError(
            f"parquet: {decode.printable(place.base)}: files have different columns of "
            f"images ({which}); name one by data.options.image"
        )
    said = [row.label for row in rows]
    labels, classes = tables.numbered(str(place.base), said, known)
    about = dict(classes=classes, labels=labels, holdout=holdout, split=split)
    return pieces.packed(
        lambda rows, **fields: Parquet(column=columns.pop(), **fields),
        place, rows, **about, channels=channels, bounds=bounds,
    )  # fmt: skip


def _table(path, image, label):
    """Return (column of images, names of classes, label of every row) of a file."""
    where = decode.printable(path)
    try:
        reader = _reader(path)
        lazy = hasattr(reader, "read_row_group")
        schema = reader.schema_arrow if lazy else reader.schema
        features = _features(schema)
        column = _column(where, schema, features, image, "image")
        name = label and _column(where, schema, features, label, "label")
        count = reader.metadata.num_rows if lazy else reader.num_rows
        if not name:
            return column, (), [None] * count
        table = reader.read([name], use_threads=False) if lazy else reader
        labels = table.column(name).to_pylist()
    except errors.DataError:
        raise
    except Exception as e:  # noqa: BLE001 - pyarrow has a dozen of its own kinds.
        raise errors.DataError(f"{where}: cannot be read: {errors.told(e)}") from e
    kinds = {type(y) for y in labels} - {type(None)}
    if not kinds <= {int, str, bool}:
        found = ", ".join(sorted(k.__name__ for k in kinds))
        raise errors.DataError(
            f"{where}: column {name!r} holds {found}; want one number or name for each "
            "image (data.options.label='' leaves them unlabelled)"
        )
    names = features.get(name, {}).get("names") or ()
    labels = [int(y) if isinstance(y, bool) else y for y in labels]
    return column, tuple(map(str, names)), labels


def _features(schema) -> dict:
    """Return what `datasets` says of the columns: {name: {"_type": ...}}."""
    try:
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        found = told["info"]["features"]
        return {k: v for k, v in found.items() if isinstance(v, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _column(where, schema, features, wanted, key) -> str:
    """Return the column of images or labels; of labels "" where there is none.

    Raises:
        DataError: it is not there, or several may be meant.
    """
    kind, usual = {"image": ("Image", IMAGES), "label": ("ClassLabel", LABELS)}[key]
    if wanted != "auto":
        if wanted in schema.names:
            return wanted
        _fail(where, schema, f"no column {wanted!r}", key)
    found = [n for n in schema.names if features.get(n, {}).get("_type") == kind]
    if key == "image":
        found = found or [f.name for f in schema if _may_be_image(f.type)]
    found = [n for n in usual if n in (found or schema.names)] or found
    if found and (len(found) == 1 or found[0] in usual):
        return found[0]
    if found or key == "image":
        _fail(where, schema, f"{'several' if found else 'no'} {key} columns", key)
    return ""


def _may_be_image(kind) -> bool:
    pyarrow, _, _ = _arrow()
    types = pyarrow.types
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind)


def _fail(where, schema, what, key):
    have = ", ".join(map(decode.printable, schema.names[:12]))
    raise errors.DataError(
        f"{where}: {what}; it has: {have}; name one by data.options.{key}"
    )
