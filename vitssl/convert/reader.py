"""Read a file of weights by what its name says it is; nothing is ever executed."""

import dataclasses
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from vitssl import disk, errors
from vitssl.convert import reader_torch, safetensors
from vitssl.data import npy

MAX_RATIO, SMALL = npy.MAX_RATIO, npy.SMALL  # Of an archive bomb.

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


def read(path: disk.AnyPath) -> Weights:
    """Return what a `.safetensors`, `.npz`, `.pth`, `.pt`, `.bin` file holds.

    Raises:
        CheckpointError: no such file, another ending, or a file that is damaged or
            refused; see the reader of its kind.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise errors.CheckpointError(f"{path}: no such file; want {' '.join(KINDS)}")
    ending = path.suffix.lower()
    try:
        if ending == ".safetensors":
            arrays, metadata = safetensors.read(path)
            return Weights(path, arrays, metadata)
        if ending == ".npz":
            return Weights(path, _npz(path))
        if ending in TORCH:
            return Weights(path, reader_torch.read(path))
    except OSError as e:
        raise errors.CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
    raise errors.CheckpointError(f"{path}: want a file that ends in {' '.join(KINDS)}")


def state_dicts(tree: Any, path: str = "") -> dict[str, dict[str, np.ndarray]]:
    """Return {path: {key: array}} of every dict that holds arrays, outermost first.

    A training checkpoint holds several: "model", "teacher", "target_encoder".
    """
    found: dict[str, dict[str, np.ndarray]] = {}
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
        found = npy.archive(path, SMALL, MAX_RATIO)
    except (ValueError, OSError) as e:
        raise errors.CheckpointError(
            f"{path}: not a sound .npz ({errors.told(e)})"
        ) from e
    brain = np.dtype(ml_dtypes.bfloat16)
    return {k: x.view(brain) if x.dtype.kind == "V" else x for k, x in found.items()}
