"""What commands that make a table of a folder of images share."""

import pathlib
import time

from vitssl import errors


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
        raise errors.UsageError(f"--to={to}: must end in {' or '.join(kinds)}")
    if to.suffix == ".parquet":
        arrow(kinds[0])
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        new = not to.exists()
        to.open("ab").close()
        if new:
            to.unlink()
    except OSError as e:
        raise errors.UsageError(f"--to={to}: {e.strerror}; give another") from e
    return to


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
