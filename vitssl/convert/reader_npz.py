"""Arrays out of an `.npz`, as big_vision and the first ViT release write them."""

import pathlib
import zipfile

import ml_dtypes
import numpy as np

from vitssl import errors

MAX_RATIO = 1000  # Unpacked over packed size; weights do not compress.
SMALL = 2**28  # Bytes that may unpack to this many at any ratio.


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return {name: array} of a file.

    bfloat16, which numpy writes as two nameless bytes, comes back as
    `ml_dtypes.bfloat16`.

    Raises:
        CheckpointError: no npz, truncated, an archive bomb, names that lead out of
            the archive, or arrays of Python objects (pickles, never read).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check(path, archive.infolist())
        with np.load(path, allow_pickle=False) as file:
            return {name: _typed(path, name, file[name]) for name in file.files}
    except errors.CheckpointError:
        raise
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, KeyError) as e:
        raise errors.CheckpointError(f"{path}: not a sound .npz ({e})") from e


def _check(path, infos):
    for info in infos:
        parts = info.filename.replace("\\", "/").split("/")
        if info.filename.startswith("/") or ".." in parts:
            raise errors.CheckpointError(
                f"{path}: refused, {info.filename!r} leads out of the archive"
            )
        if not info.filename.endswith(".npy"):
            raise errors.CheckpointError(f"{path}: {info.filename!r} is no array")
    unpacked = sum(i.file_size for i in infos)
    packed = sum(i.compress_size for i in infos)
    if unpacked > SMALL and unpacked > MAX_RATIO * packed:
        raise errors.CheckpointError(
            f"{path}: refused, {packed} bytes claim to unpack to {unpacked}"
        )


def _typed(path, name, array):
    if array.dtype == np.dtype("V2"):
        return array.view(ml_dtypes.bfloat16)
    if array.dtype.kind not in "fiub":
        raise errors.CheckpointError(f"{path}: {name} holds {array.dtype}, no numbers")
    return array
