"""The safetensors format: a JSON header, then the raw bytes of every array.

The package reads and checks the header. Arrays are mapped here, as its own are copies
in memory, and written here, as it wants all arrays at once.

Source: github.com/huggingface/safetensors, "Format".
"""

import json
import math
import mmap
import os
import pathlib
import re
import struct
from collections.abc import Callable, Iterable, Mapping

import ml_dtypes
import numpy as np
import safetensors

from vitssl import disk, errors

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype]]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read(path: disk.AnyPath) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return ({name: array}, metadata) of a file.

    Arrays are read-only views of the file: nothing is read until it is used.

    Raises:
        CheckpointError: the package refuses the file (truncated, a header that is too
            long or whose places and shapes do not agree), numpy cannot hold an array,
            or an unknown dtype.
    """
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            parts = [(name, file.get_slice(name)) for name in file.offset_keys()]
            kinds = [(n, p.get_dtype(), tuple(p.get_shape())) for n, p in parts]
        return _mapped(path, kinds), metadata
    except errors.CheckpointError:
        raise
    except Exception as e:  # noqa: BLE001 - sizes and dimensions without end, too.
        if kind := re.search(r"unknown variant `(F[468]_?\w*|C\d+)`", str(e)):
            raise errors.CheckpointError(
                _strange(path, "an array", kind[1][:20])
            ) from e
        what = errors.told(e)
        raise errors.CheckpointError(
            f"{path}: no sound safetensors file ({what})"
        ) from e


def _mapped(path, kinds):
    """Return {name: view of the file} of (name, dtype, shape) in the file's order."""
    with pathlib.Path(path).open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    at, found = 8 + struct.unpack("<Q", data[:8])[0], {}
    for name, kind, shape in kinds:  # One after the other, without holes.
        if kind not in DTYPES:
            raise errors.CheckpointError(_strange(path, errors.told(name), kind))
        flat = np.frombuffer(data, DTYPES[kind], math.prod(shape), at)
        found[name] = flat.reshape(shape)
        at += flat.nbytes
    return found


def _strange(path, name, kind) -> str:
    """Return that a dtype is not read, and what to do."""
    scales = ""
    if kind[:2] in ("F8", "F4", "F6"):
        scales = "; floats of few bits are weights only with their scales: dequantise"
    return f"{path}: {name}: dtype {kind}; want {', '.join(DTYPES)}{scales}"


def write(
    path: disk.AnyPath, arrays: Mapping, metadata: Mapping[str, str] | None = None
) -> None:
    """Write {name: array} and texts for the header, whole or not at all.

    Raises:
        CheckpointError: an array's dtype has no name in the format.
    """
    shapes = {name: (np.shape(a), np.dtype(a.dtype)) for name, a in arrays.items()}
    for name, (_, dtype) in shapes.items():
        if dtype not in _NAMES:
            known = ", ".join(map(str, _NAMES))
            raise errors.CheckpointError(f"{name}: dtype {dtype}; want {known}")
    write_lazily(path, shapes, ((n, arrays[n]) for n in order(shapes)), metadata)


def write_lazily(
    path: disk.AnyPath,
    shapes: Shapes,
    items: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
    last: Callable[[], Mapping[str, str]] | None = None,
) -> None:
    """Write arrays one by one as an iterable makes them.

    Args:
        path: an existing file is replaced once the new one is complete.
        shapes: {name: (shape, dtype)} of all of them.
        items: (name, array) pairs in the order of `order(shapes)`.
        metadata: texts to keep in the header.
        last: () -> the same texts as they shall be, no longer and no shorter; asked
            once the arrays are written.

    Raises:
        CheckpointError: an item is not what `shapes` promised.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(_header(shapes, metadata or {}))
            for (name, array), want in zip(items, order(shapes), strict=True):
                shape, dtype = shapes[name]
                array = np.ascontiguousarray(array).reshape(np.shape(array))
                if name != want or array.shape != shape or array.dtype != dtype:
                    raise errors.CheckpointError(f"{path}: {name} is not as announced")
                file.write(array.reshape(-1).view(np.uint8).data)
            if last is not None:
                file.seek(0)
                file.write(_header(shapes, last()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def order(shapes: Shapes) -> list[str]:
    """Return the names in the order of the file: wide dtypes first, then by name."""
    return sorted(shapes, key=lambda name: (-shapes[name][1].itemsize, name))


def _header(shapes, metadata) -> bytes:
    header, at = {}, 0
    if metadata:
        header["__metadata__"] = dict(metadata)
    for name in order(shapes):
        shape, dtype = shapes[name]
        end = at + math.prod(shape) * dtype.itemsize
        place = {"shape": list(shape), "data_offsets": [at, end]}
        header[name] = {"dtype": _NAMES[dtype]} | place
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Arrays start aligned.
    return struct.pack("<Q", len(text)) + text
