"""Where the weights of a path are: one file, a folder of a hub, a file in shards.

FOLDER is what timm and transformers save, or the cache of a hub around it. An index,
*.index.json, names the shard of every key; no shard lies outside of its folder.
"""

import json
import pathlib

from vitssl import disk, errors
from vitssl.convert import reader

_INDEX = ".index.json"
# The names that timm and transformers write, best first.
_NAMES = (
    "model.safetensors",
    f"model.safetensors{_INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{_INDEX}",
)


def file_of(path: disk.AnyPath) -> pathlib.Path:
    """Return the file of weights, or of an index, that a path means.

    Raises:
        CheckpointError: a folder without weights, or with several that may be meant.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        return path
    snapshots = path / "snapshots"
    if snapshots.is_dir():
        found = sorted(p for p in snapshots.iterdir() if p.is_dir())
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise errors.CheckpointError(
                f"{snapshots}: give one of its folders: {names}"
            )
        path = found[0]
    for name in _NAMES:
        if (path / name).is_file():
            return path / name
    found = sorted(p for p in path.iterdir() if p.is_file() and _is_weights(p))
    if len(found) != 1:
        names = ", ".join(p.name for p in found[:8]) or f"none of {' '.join(_NAMES)}"
        raise errors.CheckpointError(
            f"{path}: give one file of it; there is {names}; want {_endings()}"
        )
    return found[0]


def _is_weights(path) -> bool:
    return path.name.endswith(_INDEX) or path.suffix.lower() in reader.KINDS


def _endings() -> str:
    return " ".join((*reader.KINDS, f"*{_INDEX}"))


def files(file: pathlib.Path) -> list[pathlib.Path]:
    """Return the files that hold the weights of a file or of an index.

    Raises:
        CheckpointError: see `read`.
    """
    if not file.name.endswith(_INDEX):
        return [file]
    return [file.parent / name for name in sorted(set(_places(file).values()))]


def read(file: pathlib.Path) -> reader.Weights:
    """Return what a file holds, or all shards of an index together.

    Raises:
        CheckpointError: see `reader.read`; an index that is damaged or leads out of its
            folder, a shard that is missing or lacks a key.
    """
    if not file.name.endswith(_INDEX):
        return reader.read(file)
    places, found, shards = _places(file), {}, {}
    metadata: dict[str, str] = {}
    for name in sorted(set(places.values())):
        shards[name] = reader.read(file.parent / name)
        metadata |= shards[name].metadata
    for key, name in places.items():
        held = shards[name].tree
        if not isinstance(held, dict) or key not in held:
            raise errors.CheckpointError(f"{file}: {key}: not in its shard {name}")
        found[key] = held[key]
    return reader.Weights(file, found, metadata)


def _places(file) -> dict[str, str]:
    """Return {key: name of its shard}."""
    try:
        places = json.loads(file.read_text("utf-8"))["weight_map"]
        for key, name in places.items():
            if pathlib.PurePath(name).name != name or "\\" in name or name == "..":
                raise errors.CheckpointError(
                    f"{file}: {key}: refused, {name!r} leads out of the folder"
                )
    except FileNotFoundError as e:
        raise errors.CheckpointError(f"{file}: no such file; want {_endings()}") from e
    except errors.CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        raise errors.CheckpointError(
            f"{file}: no index of shards, want {{'weight_map': {{KEY: FILE}}}} ({e})"
        ) from e
    if not places:
        raise errors.CheckpointError(f"{file}: its weight_map is empty")
    return places
