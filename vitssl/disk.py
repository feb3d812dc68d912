"""Small files of our own: written whole or not at all, and read without trust.

A process may die while it writes, a disk may fill up, a person may edit what is there.
"""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Iterator

from vitssl import errors

# What names a file or a folder.
AnyPath = str | os.PathLike[str]
# What a file system says of itself, not of us.
_STATES = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE", "EFBIG")
_ROOM = ("EMFILE", "ENFILE", "ENOTCONN", "ETIMEDOUT", "ENAMETOOLONG", "ENOENT")
FAULTS = {getattr(errno, name) for name in (*_STATES, *_ROOM)}


class Damaged(ValueError):  # noqa: N818 - a state, which callers judge.
    """A file does not hold what we once wrote there; the text is one line of why."""


@contextlib.contextmanager
def faults(place: AnyPath) -> Iterator[None]:
    """Turn what a file system refuses into one line.

    Args:
        place: what it was about; the file itself is named where it is known.

    Raises:
        CheckpointError: what it refused.
    """
    try:
        yield
    except OSError as e:
        if isinstance(e, errors.VitsslError) or e.errno not in FAULTS:
            raise
        raise errors.CheckpointError(
            f"{e.filename or place}: {e.strerror}; free space, or give another "
            "--workdir, and run the same command again"
        ) from e


def write(path: AnyPath, text: str) -> None:
    """Replace a file by `text`: who reads sees all of the old one, or of the new one.

    Raises:
        OSError: it cannot be written; the old file is still there.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)  # On a full disk it holds room.
        raise OSError(e.errno, e.strerror, str(path)) from e


def read(path: AnyPath) -> dict:
    """Return the JSON object in a file.

    Raises:
        Damaged: there is none, and why.
    """
    try:
        return parse(pathlib.Path(path).read_bytes())
    except OSError as e:
        raise Damaged(e.strerror or str(e)) from e


def parse(raw: bytes | str) -> dict:
    """Return the JSON object in a text.

    Raises:
        Damaged: there is none, and why.
    """
    if not raw.strip():
        raise Damaged("it is empty")
    try:
        value = json.loads(raw.decode() if isinstance(raw, bytes) else raw)
    except UnicodeDecodeError as e:
        raise Damaged("it is no UTF-8 text") from e
    except RecursionError as e:
        raise Damaged("it is nested too deeply") from e
    except ValueError as e:
        raise Damaged(f"it is no JSON ({e})") from e
    if not isinstance(value, dict):
        raise Damaged(f"it holds a {type(value).__name__}, not an object")
    return value


def aside(path: AnyPath, why: str) -> pathlib.Path:
    """Rename a file or folder so that it is in nobody's way; return its new path.

    Args:
        why: the ending: 12 becomes 12.damaged, or 12.damaged-2 where there is one.

    Raises:
        OSError: it cannot be renamed.
    """
    path = pathlib.Path(path)
    new, count = path.with_name(f"{path.name}.{why}"), 1
    while os.path.lexists(new):
        count += 1
        new = path.with_name(f"{path.name}.{why}-{count}")
    return path.rename(new)
