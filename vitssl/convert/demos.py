"""Small trained networks that come with the package: `vitssl.load("demo:localmim")`.

They are files of the format of `backbone`, in 16 bits, in `vitssl/demos`; README.md
there has the commands that made them, NAME.md what each of them scored.
"""

import os
import pathlib

from vitssl import errors

PREFIX = "demo:"
FOLDER = pathlib.Path(__file__).parents[1] / "demos"


def names() -> tuple[str, ...]:
    """Return what there is, without the prefix."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.safetensors")))


def found(path: str | os.PathLike) -> str | os.PathLike:
    """Return the file of "demo:NAME"; any other path as it is.

    Raises:
        CheckpointError: there is no such demo.
    """
    text = str(path)
    if not text.startswith(PREFIX):
        return path
    name = text.removeprefix(PREFIX)
    if name not in names():
        known = ", ".join(PREFIX + one for one in names()) or "none"
        raise errors.CheckpointError(f"{text}: there is: {known}")
    return FOLDER / f"{name}.safetensors"
