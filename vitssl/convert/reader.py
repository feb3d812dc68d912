"""Read a file of weights by what its name says it is; nothing is ever executed."""

import dataclasses
import pathlib
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from vitssl import errors
from vitssl.convert import reader_torch, safetensors

MAX_RATIO = 1000  # Unpacked over packed size of an .npz; weights do not compress.
SMALL = 2**28  # Bytes that may unpack to this many at any ratio.

TORCH = (".pth", ".pt", ".bin", ".tar", ".ckpt")
KINDS = (".safetensors", ".npz", *TORCH)


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a file holds.

    Attributes:
        tree: nested containers with numpy arrays as leaves; arrays of a `.pth` or
            `.safetensors` are read-only views of the file.
        metadata: texts of a safetensors header.
    """

    path: pathlib.Path
    tree: Any
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)


def read(path) -> Weights:
    """Return what a `.safetensors`, `.npz`, `.pth`, `.pt`, `.bin` file holds.

    Raises:
        CheckpointError: no such file, another ending, or a file that is damaged or
            refused; see the reader of its kind.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise errors.CheckpointError(f"{path}: no such file; want {' '.join(KINDS)}")
    ending = path.suffix.lower()
    if ending == ".safetensors":
        arrays, metadata = safetensors.read(path)
        return Weights(path, arrays, metadata)
    if ending == ".npz":
        return Weights(path, _npz(path))
    if ending in TORCH:
        return Weights(path, reader_torch.read(path))
    raise errors.CheckpointError(f"{path}: want a file that ends in {' '.join(KINDS)}")


def state_dicts(tree, path: str = "") -> dict[str, dict[str, np.ndarray]]:
    """Return {path: {key: array}} of every dict that holds arrays, outermost first.

    A training checkpoint holds several: "model", "teacher", "target_encoder".
    """
    found = {}
    if not isinstance(tree, dict):
        return found
    arrays = {str(k): v for k, v in tree.items() if isinstance(v, np.ndarray)}
    if arrays:
        found[path] = arrays
    for key, value in tree.items():
        if isinstance(value, dict) and not str(key).startswith("optimizer"):
            found |= state_dicts(value, f"{path}.{key}" if path else str(key))
    return found


def _npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return {name: array}, as big_vision and the first ViT release write them.

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
