"""What commands that make a table of a folder of images share."""

import contextlib
import os
import pathlib
import time

import numpy as np

from vitssl import errors, sizes
from vitssl.convert import place as places
from vitssl.data import decode


def place(to, kinds: tuple[str, ...]) -> pathlib.Path:
    """Return where to write, once it is sure that one can.

    Args:
        to: of the command line; folders are made.
        kinds: endings.

    Raises:
        UsageError: another ending, no such place, or pyarrow is missing.
    """
    to = pathlib.Path(to)
    if to.suffix not in kinds:
        ends = " or ".join(kinds)
        raise errors.UsageError(f"--to={decode.printable(to)}: must end in {ends}")
    if to.suffix == ".parquet":
        arrow(kinds[0])
    places.check(to, "--to")
    return to


@contextlib.contextmanager
def whole(to):
    """Give a file to write, which takes the place of `to` once it is complete.

    Raises:
        UsageError: a fault of the file system.
    """
    part = to.with_name(f".vitssl.{os.getpid()}{to.suffix}")
    with places.writing("--to", to):
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, to)
        finally:
            part.unlink(missing_ok=True)


def counts(**flags) -> None:
    """Raise UsageError where a flag that counts something is below 1."""
    for key, value in flags.items():
        if value < 1:
            raise errors.UsageError(f"--{key}={value}: 1 or more")


def compare(source, weights, show, most=8) -> None:
    """Show where a sample of images is other than what weights were trained on.

    Args:
        source: `folder.Files`.
        weights: `inference.Features`.
        show: receives lines; first those that say what of the weights is a guess.
        most: images to look at.
    """
    for note in weights.notes:
        show(note)
    shapes, grey = [], []
    for i in np.linspace(0, len(source) - 1, min(most, len(source))).astype(int):
        try:
            image = source.image(int(i))
        except errors.DataError:
            continue  # It is counted, and named, where it is read.
        shapes.append(image.shape[:2])
        grey.append((image == image[..., :1]).all())
    if not shapes:
        return
    if weights.channels == 3 and all(grey):
        show(f"the images are grey, {weights.name} takes 3 channels: grey is repeated")
    side = min(sizes.pair(weights.image_size))
    if (largest := max(min(shape) for shape in shapes)) < side:
        show(
            f"the images have short sides of at most {largest} px, {weights.name} is "
            f"for {sizes.written(weights.image_size)}: they are enlarged"
        )


def watched(batches, total, batch_size, show, every=5.0):
    """Yield the batches of one pass, and show how far it is every few seconds."""
    start = last = time.perf_counter()
    for i in range(-(-total // batch_size)):
        yield next(batches)
        now = time.perf_counter()
        if now - last > every:
            done = min(total, (i + 1) * batch_size)
            rate = done / (now - start)
            left = (total - done) / rate
            show(f"{done}/{total} images, {rate:.0f}/s, {left:.0f} s left")
            last = now


def arrow(other: str):
    """Return (pyarrow, pyarrow.parquet), which are no dependencies of ours.

    Raises:
        UsageError: they are not there; the ending `other` needs none.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as e:
        raise errors.UsageError(
            "--to=*.parquet needs pyarrow: pip install 'vitssl[parquet]'; or write "
            f"{other}"
        ) from e
    return pyarrow, parquet
