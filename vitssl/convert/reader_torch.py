"""Weights out of a `.pth`: a zip of one pickle and the raw bytes of every tensor.

No torch, no unpickling (see `data.pickles`), no copy: arrays are views of the file,
which the system reads as they are used.
"""

import math
import mmap
import pathlib
import struct
import zipfile
from typing import Any

import numpy as np

from vitssl import errors
from vitssl.data import pickles

MAX_RECORDS = 1_000_000
_LEGACY = b"\x80"  # A bare pickle, as torch wrote until 1.6.
_LOCAL = struct.Struct("<4sHHHHHLLLHH")  # Header of a record, before its name.


def read(path: pathlib.Path) -> Any:
    """Return the object of a file of `torch.save` of PyTorch 1.6 or newer.

    Nested dicts, lists, tuples, numbers, texts and read-only numpy arrays; bfloat16 as
    `ml_dtypes.bfloat16`.

    Raises:
        CheckpointError: not such a file, truncated, compressed, with names that lead
            out of the archive, or with anything but data in its pickle.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise errors.CheckpointError(f"{path}: is empty")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if data[:4] != b"PK\x03\x04":
        raise errors.CheckpointError(_stranger(path, data))
    archive = _Archive(path, data)
    program = archive.bytes("data.pkl")
    return pickles.read(program, str(path), _Arrays(archive).view)


def _stranger(path, data):
    """Return why a file that is no zip is not read."""
    fix = (
        "in PyTorch: torch.save(torch.load(OLD, weights_only=True), NEW), or save its "
        "state_dict as .safetensors"
    )
    if data[:1] == _LEGACY:
        return f"{path}: legacy format of torch before 1.6, a bare pickle; {fix}"
    if data[257:262] == b"ustar":
        return f"{path}: legacy format of torch before 0.1, a tar; {fix}"
    return f"{path}: not a file of torch.save (no zip archive); want .pth, .pt or .bin"


class _Archive:
    """The records of the zip; all checks of names, places and sizes are here."""

    def __init__(self, path, data):
        self.path, self.data = path, data
        try:
            with zipfile.ZipFile(path) as file:
                infos = file.infolist()
        except Exception as e:  # noqa: BLE001 - damage shows in any way it likes.
            raise self.fault(f"truncated or damaged zip ({errors.told(e)})") from e
        if len(infos) > MAX_RECORDS:
            raise self.fault(f"{len(infos)} records, at most {MAX_RECORDS} are read")
        for info in infos:
            self._check_name(info.filename)
        pickles = [i.filename for i in infos if i.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            kind = "a TorchScript archive" if self._scripted(infos) else "not weights"
            raise self.fault(f"{kind}; want one data.pkl, there are {len(pickles)}")
        if self._scripted(infos):
            raise self.fault("a TorchScript archive; save its state_dict() instead")
        self.root = pickles[0].removesuffix("data.pkl")
        self.records = {}
        for info in infos:
            name = info.filename.removeprefix(self.root)
            if name in self.records:
                raise self.fault(f"record {errors.told(name)!r} is there twice")
            self.records[name] = info
        if "byteorder" in self.records and self.bytes("byteorder") != b"little":
            raise self.fault("written on a big-endian machine; not read")

    @staticmethod
    def _scripted(infos):
        return any(i.filename.endswith("/constants.pkl") for i in infos)

    def fault(self, text):
        """Return an error that names the file."""
        return errors.CheckpointError(f"{self.path}: {text}")

    def _check_name(self, name):
        parts = name.replace("\\", "/").split("/")
        if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
            raise self.fault(
                f"refused, record {errors.told(name)!r} leads out of the archive"
            )

    def span(self, name) -> tuple[int, int]:
        """Return (first byte, number of bytes) of a record in the file."""
        if name not in self.records:
            raise self.fault(f"record {errors.told(name)!r} is missing")
        info = self.records[name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise self.fault(f"record {errors.told(name)!r} is compressed or encrypted")
        start = info.header_offset
        header = self.data[start : start + _LOCAL.size]
        if start < 0 or len(header) < _LOCAL.size or header[:4] != b"PK\x03\x04":
            raise self.fault(f"truncated or damaged at record {errors.told(name)!r}")
        *_, name_size, extra_size = _LOCAL.unpack(header)
        first = start + _LOCAL.size + name_size + extra_size
        if not 0 <= first <= first + info.file_size <= len(self.data):
            raise self.fault(f"truncated in record {errors.told(name)!r}")
        return first, info.file_size

    def bytes(self, name) -> bytes:
        """Return the bytes of a small record."""
        first, size = self.span(name)
        if size > pickles.MAX_BYTES:
            raise self.fault(
                f"record {errors.told(name)!r} has {size} bytes, too many to read"
            )
        return self.data[first : first + size]


class _Arrays:
    """Makes arrays of what a pickle says about tensors."""

    def __init__(self, archive):
        self.archive, self.raw, self.unfolded = archive, {}, 0

    def view(self, storage, offset, shape, stride, dtype):
        """Return a tensor as a view of the file; see `pickles.read`.

        No byte outside the tensor's own record is ever reached, and a tensor may only
        be larger than its record (as expanded ones are) within `MAX_BUILT`, of all.
        """
        dtype = dtype or storage.dtype
        if dtype is None:
            raise self.archive.fault("a tensor without a dtype")
        flat, size = self._storage(storage.key, dtype), math.prod(shape)
        if len(shape) != len(stride) or min((offset, *shape, *stride)) < 0:
            raise self.archive.fault(
                f"a tensor of offset {offset}, shape {shape[:9]}, strides {stride[:9]}"
            )
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if size > flat.size:
            self.unfolded += size * dtype.itemsize
        if self.unfolded > pickles.MAX_BUILT or (size and last >= flat.size):
            raise self.archive.fault(
                f"a tensor {shape[:9]} is larger than its bytes, data/{storage.key}"
            )
        if not size:
            return np.zeros(shape, dtype)
        bytes_each = tuple(dtype.itemsize * step for step in stride)
        view = np.lib.stride_tricks.as_strided(flat[offset:], shape, bytes_each)
        view.flags.writeable = False
        return view

    def _storage(self, key, dtype):
        """Return all elements of one record as a flat array."""
        if (key, dtype) not in self.raw:
            first, size = self.archive.span(f"data/{key}")
            count = size // dtype.itemsize
            self.raw[key, dtype] = np.frombuffer(self.archive.data, dtype, count, first)
        return self.raw[key, dtype]
