"""Arrays out of `.npy` and `.npz` files of anybody: checked before they are read."""

import io
import math
import zipfile

import numpy as np

from vitssl import errors

MAX_RATIO = 20  # Unpacked over packed bytes of an archive; numbers hardly compress.
SMALL = 2**26  # Bytes that may unpack to this many at any ratio.
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_BRAIN = np.dtype("V2")  # What numpy makes of bfloat16.


def array(data: bytes) -> np.ndarray:
    """Return the array in the bytes of a `.npy` file, as a read-only view of them.

    Raises:
        ValueError: damaged, fewer bytes than its shape wants, or no plain numbers
            (Python objects are pickles, and never read).
    """
    file = io.BytesIO(data)
    try:
        read = _HEADERS[np.lib.format.read_magic(file)]
        shape, fortran, dtype = read(file)
    except Exception as e:  # noqa: BLE001 - it is Python's parser that reads a header.
        raise ValueError(f"no header of a .npy file ({errors.told(e)})") from e
    if dtype.kind not in "fiub" and dtype != _BRAIN:
        raise ValueError(f"holds {dtype}, no numbers")
    count, start = math.prod(shape), file.tell()
    if min(shape, default=0) < 0 or count * dtype.itemsize > len(data) - start:
        raise ValueError(f"{dtype} {list(shape)} is more than its {len(data)} bytes")
    flat = np.frombuffer(data, dtype, count, start) if count else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def archive(path, small: int = SMALL, ratio: int = MAX_RATIO) -> dict[str, np.ndarray]:
    """Return {name: array} of a `.npz` file.

    Args:
        small, ratio: it may unpack to `small` bytes, or to `ratio` times what it has.

    Raises:
        ValueError: no npz, truncated, an archive bomb, names that lead out of the
            archive, or a member that `array` refuses.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as file:
            infos = file.infolist()
            _check(infos, small, ratio)
            members = ((i.filename.removesuffix(".npy"), file.read(i)) for i in infos)
            return {name: _named(name, data) for name, data in members}
    except (ValueError, OSError):
        raise
    except Exception as e:  # noqa: BLE001 - of zip, of zlib, of struct, of memory.
        raise ValueError(f"{type(e).__name__}: {e}") from e


def _named(name, data):
    try:
        return array(data)
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from e


def _check(infos, small, ratio):
    for info in infos:
        parts = info.filename.replace("\\", "/").split("/")
        if info.filename.startswith("/") or ".." in parts:
            raise ValueError(
                f"refused, {errors.told(info.filename)!r} leads out of the archive"
            )
        if not info.filename.endswith(".npy"):
            raise ValueError(f"{errors.told(info.filename)!r} is no array")
        # Other methods unpack more at once than they are asked for.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"{errors.told(info.filename)!r} is packed as numpy never does"
            )
    unpacked = sum(i.file_size for i in infos)
    packed = sum(i.compress_size for i in infos)
    if unpacked > small and unpacked > ratio * packed:
        raise ValueError(f"refused, {packed} bytes claim to unpack to {unpacked}")
