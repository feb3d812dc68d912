"""The safetensors format: a JSON header, then the raw bytes of every array.

Source: github.com/huggingface/safetensors, "Format". Own code, because the package's
numpy side knows no bfloat16 and does not map files into memory.
"""

import json
import math
import mmap
import os
import pathlib
import struct
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np

from vitssl import errors

MAX_HEADER = 100 * 10**6  # The limit of the reference implementation.
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
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return ({name: array}, metadata) of a file.

    Arrays are read-only views of the file: nothing is read until it is used.

    Raises:
        CheckpointError: truncated, a header over `MAX_HEADER`, an unknown dtype, or
            places and shapes that do not agree.
    """
    path = pathlib.Path(path)
    size = path.stat().st_size
    if size < 8:
        raise errors.CheckpointError(f"{path}: truncated, no safetensors header")
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    (length,) = struct.unpack("<Q", data[:8])
    if length > MAX_HEADER:
        raise errors.CheckpointError(
            f"{path}: its header claims {length} bytes, at most {MAX_HEADER} are read; "
            "it is no safetensors file or damaged"
        )
    if 8 + length > size:
        raise errors.CheckpointError(f"{path}: truncated in its header")
    try:
        header = json.loads(data[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        entries = {name: _entry(e) for name, e in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise errors.CheckpointError(f"{path}: damaged header ({e})") from e
    base, found = 8 + length, {}
    for name, (dtype, shape, first, last) in entries.items():
        count = math.prod(shape)
        if last - first != count * dtype.itemsize or first < 0:
            raise errors.CheckpointError(
                f"{path}: {name}: {last - first} bytes for {shape} of {dtype}"
            )
        if base + last > size:
            raise errors.CheckpointError(f"{path}: truncated in {name}")
        flat = np.frombuffer(data, dtype, count, base + first)
        found[name] = flat.reshape(shape)
    return found, metadata


def _entry(entry):
    """Return (dtype, shape, first, last) of one entry of the header."""
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    numbers = (first, last, *shape)
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"sizes {numbers}")
    return DTYPES[entry["dtype"]], shape, first, last


def write(path, arrays: Mapping, metadata: Mapping[str, str] | None = None) -> None:
    """Write {name: array}, whole or not at all.

    Args:
        path: the file; an existing one is replaced once the new one is complete.
        arrays: {name: array}; a mapping that makes its arrays when asked needs the
            memory of one.
        metadata: texts to keep in the header.

    Raises:
        CheckpointError: an array's dtype has no name in the format.
    """
    shapes = {name: (np.shape(a), _dtype_of(name, a)) for name, a in arrays.items()}
    write_lazily(path, shapes, ((n, arrays[n]) for n in _order(shapes)), metadata)


def write_lazily(path, shapes, items: Iterable, metadata=None, last=None) -> None:
    """Write arrays one by one as an iterable makes them.

    Args:
        path: as in `write`.
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
            for (name, array), want in zip(items, _order(shapes), strict=True):
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


def order(shapes: Mapping) -> list[str]:
    """Return the names in the order of the file: wide dtypes first, then by name."""
    return _order(shapes)


def _order(shapes):
    return sorted(shapes, key=lambda name: (-shapes[name][1].itemsize, name))


def _dtype_of(name, array):
    dtype = np.dtype(array.dtype)
    if dtype not in _NAMES:
        known = ", ".join(str(d) for d in _NAMES)
        raise errors.CheckpointError(f"{name}: dtype {dtype}; safetensors has {known}")
    return dtype


def _header(shapes, metadata) -> bytes:
    header, at = {}, 0
    if metadata:
        header["__metadata__"] = dict(metadata)
    for name in _order(shapes):
        shape, dtype = shapes[name]
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Arrays start aligned.
    return struct.pack("<Q", len(text)) + text
