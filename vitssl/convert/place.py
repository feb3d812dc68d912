"""Where weights are written: looked at before the work, faults in one line."""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator

from vitssl import disk, errors
from vitssl.data import decode


def file_in(to: disk.AnyPath, name: str) -> pathlib.Path:
    """Return the file to write: `to` itself if it ends as `name` does, else in it.

    Raises:
        UsageError: `to` ends as files of another kind do.
    """
    to = pathlib.Path(to)
    ending = pathlib.PurePath(name).suffix
    if to.suffix.lower() in _FILES and to.suffix != ending:
        raise errors.UsageError(
            f"--to={decode.printable(to)}: want a folder or *{ending}"
        )
    return to if to.suffix == ending else to / name


_FILES = (".npz", ".safetensors", ".pth", ".pt", ".bin", ".npy", ".msgpack", ".onnx")


def check(file: pathlib.Path, flag: str, size: int = 0) -> None:
    """Raise UsageError where a file of `size` bytes cannot be written."""
    with writing(flag, file):
        if file.is_dir():
            raise OSError(0, "is a folder")
        made = [p for p in (file.parent, *file.parent.parents) if not p.exists()]
        file.parent.mkdir(parents=True, exist_ok=True)
        probe = file.with_name(".vitssl.probe")
        try:
            probe.write_bytes(b"x")
            free = shutil.disk_usage(file.parent).free
        finally:
            probe.unlink(missing_ok=True)
            for folder in made:  # A refusal that follows leaves nothing behind.
                folder.rmdir()
        if size > free:
            needs = f"needs {size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
            raise OSError(0, needs)


@contextlib.contextmanager
def reading(kind: type[errors.VitsslError]) -> Iterator[None]:
    """Turn faults of the file system that nothing else told into one line.

    Args:
        kind: what to raise.
    """
    try:
        yield
    except BrokenPipeError:  # Of the terminal: `vitssl convert families | head`.
        raise
    except OSError as e:
        where = decode.printable(e.filename) if e.filename else "files"
        raise kind(f"{where}: {e.strerror or e}") from e


@contextlib.contextmanager
def writing(flag: str, to: disk.AnyPath) -> Iterator[None]:
    """Turn faults of the file system into one line that names the flag.

    Raises:
        UsageError: such a fault.
    """
    try:
        yield
    except OSError as e:
        where, why = decode.printable(to), e.strerror or e
        raise errors.UsageError(f"{flag}={where}: {why}; give another") from e
