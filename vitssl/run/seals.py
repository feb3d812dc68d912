"""The seal of a checkpoint: which of those in a folder are whole, and which are not.

WORKDIR/checkpoints/<step>/vitssl.sha256.json, written last, holds a digest of every
file of the step. Nothing here is deleted but what a save of ours left unfinished;
all else that is in the way is renamed: STEP.damaged, STEP.unsealed.
"""

import contextlib
import hashlib
import json
import logging
import pathlib
import shutil

import jax
import numpy as np

from vitssl import disk, errors

logger = logging.getLogger(__name__)
MANIFEST = "vitssl.sha256.json"
FORMAT = 1
_TEMPORARY = ".orbax-checkpoint-tmp"


def sealed(directory) -> list[int]:
    """Return the steps under `directory` (a workdir's checkpoints) that have a seal."""
    return [step for step in _steps(directory) if _seal(directory, step).is_file()]


def unsealed(directory) -> list[int]:
    """Return the steps without one: a save was killed, or they were copied so."""
    return [step for step in _steps(directory) if not _seal(directory, step).exists()]


def _steps(directory) -> list[int]:
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        return []
    # Of all decimal digits that there are, orbax writes the ASCII ones.
    named = (p for p in directory.iterdir() if p.name.isascii() and p.name.isdecimal())
    return sorted(int(p.name) for p in named)


def _seal(directory, step: int) -> pathlib.Path:
    return pathlib.Path(directory) / str(step) / MANIFEST


def write(step_dir: pathlib.Path) -> None:
    """Seal a step whose files are all written."""
    found = sorted(p for p in step_dir.rglob("*") if p.is_file())
    own = [p for p in found if not p.name.startswith(MANIFEST)]
    table = {str(p.relative_to(step_dir)): _digest(p) for p in own}
    about = {"format": FORMAT, "files": table}
    disk.write(step_dir / MANIFEST, json.dumps(about, indent=1))


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_format(step_dir) -> None:
    """Refuse a step that another version of this package has written.

    What is damaged says nothing of its format, and is let through.

    Raises:
        CheckpointError: both versions, and what to do.
    """
    step_dir = pathlib.Path(step_dir)
    try:
        written = disk.read(step_dir / MANIFEST).get("format")
    except disk.Damaged:
        return
    if not isinstance(written, int) or written == FORMAT:
        return
    age = "a newer" if written > FORMAT else "an older"
    raise errors.CheckpointError(
        f"{step_dir}: a checkpoint of format {written}, this version of vitssl reads "
        f"format {FORMAT}; nothing was changed: go on with {age} version, or give "
        "another --workdir"
    )


def damage(step_dir: pathlib.Path) -> str:
    """Return what is wrong with the files of a sealed step, or "".

    Raises:
        CheckpointError: they may not be read, which says nothing of them.
    """
    try:
        about = disk.read(step_dir / MANIFEST)
        table = about.get("files")
        if not isinstance(about.get("format"), int):
            return f'{MANIFEST}: it lacks a number "format"'
        if not table or not isinstance(table, dict):
            return f'{MANIFEST}: it lacks a table "files"'
        for name, digest in table.items():
            if not (step_dir / name).is_file():
                return f"{name} is missing"
            if _digest(step_dir / name) != digest:
                return f"{name} does not match its sha256"
    except disk.Damaged as e:
        if isinstance(e.__cause__, PermissionError):
            raise _unreadable(step_dir, e) from e
        return f"{MANIFEST}: {e}"
    except PermissionError as e:
        raise _unreadable(e.filename, e.strerror) from e
    except (OSError, ValueError) as e:  # A disk that fails, a name with a null byte.
        return str(e)
    return ""


def _unreadable(path, why) -> errors.CheckpointError:
    return errors.CheckpointError(
        f"{path}: cannot be read ({why}); make it readable, or give another --workdir"
    )


def check(directory) -> None:
    """Refuse a folder that a run could not go on with, but a person can.

    Raises:
        CheckpointError: a step is of another version; no step has a seal.
    """
    for step in sealed(directory):
        check_format(pathlib.Path(directory) / str(step))
    # A save of the state before the first update, killed, is no loss.
    if any(unsealed(directory)) and not sealed(directory):
        raise errors.CheckpointError(without(directory))


def without(directory) -> str:
    """Return what to say of a folder in which no checkpoint has a seal."""
    there = ", ".join(map(str, unsealed(directory)))
    return (
        f"{directory}: no {MANIFEST} in {there}, so nothing says that these "
        "checkpoints are whole; copy the files too, or train with --reseal, which "
        "reads the checkpoints and takes them as they are"
    )


def tidy(directory: pathlib.Path) -> None:
    """Make way in a folder for a run that starts.

    Temporary folders of orbax are removed; a step without a seal is renamed: a save
    was killed, which is made again, or somebody lost the seal.
    """
    for path in directory.iterdir():
        if _TEMPORARY in path.name:
            discard(path)
    for step in unsealed(directory):
        new = disk.aside(directory / str(step), "unsealed")
        logger.warning(
            "checkpoint %d has no %s, so nothing says that it is whole: kept as %s",
            *(step, MANIFEST, new),
        )


def is_unfinished(path: pathlib.Path) -> bool:
    """Return whether a folder is what orbax writes into, or a step without a seal."""
    return _TEMPORARY in path.name or (
        path.name.isdecimal() and not (path / MANIFEST).exists()
    )


def discard(path: pathlib.Path) -> None:
    """Remove what a save of this run, or one that was killed, left unfinished."""
    logger.warning("removing the unfinished checkpoint %s", path)
    shutil.rmtree(path, ignore_errors=True)


def reseal(directory) -> None:
    """Seal the steps that have no seal, if they can be read to the end.

    Raises:
        CheckpointError: one cannot.
    """
    import orbax.checkpoint as ocp

    for step in unsealed(directory):
        path = pathlib.Path(directory) / str(step)
        with reading(path):
            handler = ocp.PyTreeCheckpointHandler()
            with ocp.Checkpointer(handler) as reader:
                tree = metadata(handler, path / "state")
                # As arrays of the host: the devices may be others than there.
                host = ocp.RestoreArgs(restore_type=np.ndarray)
                wanted = jax.tree.map(lambda _, host=host: host, tree)
                reader.restore(path / "state", restore_args=wanted)
            with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
                reader.restore(path / "meta")
        write(path)
        logger.warning("checkpoint %d was read and is sealed anew", step)


def metadata(handler, path):
    """Return the tree of shapes that a folder of orbax says it holds.

    Of a handler: a `Checkpointer` would look there for what belongs to the whole step,
    and warn.
    """
    from etils import epath

    return handler.metadata(epath.Path(path)).tree


@contextlib.contextmanager
def reading(path):
    """Turn what orbax raises for files that are not what it wrote into one line.

    Raises:
        CheckpointError: names `path`.
    """
    try:
        yield
    except (errors.VitsslError, jax.errors.JaxRuntimeError):
        raise  # Said already; a device that is full.
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as e:
        why = (str(e).strip() or type(e).__name__).partition("\n")[0][:200]
        raise errors.CheckpointError(f"{path}: cannot be read ({why})") from e
