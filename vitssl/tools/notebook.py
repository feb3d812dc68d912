"""For notebooks: train with a progress bar, and show the pictures of a run.

Nothing here needs IPython: a bar is text that is written over, and a picture is a
PIL image, which every notebook shows when a cell ends with it.
"""

import contextlib
import io
import logging
import pathlib
import sys
import time

from PIL import Image

from vitssl import config, errors, progress
from vitssl.data import decode
from vitssl.run import experiment, loop

_WIDTH, _PAUSE = 24, 0.25  # Of the bar; seconds between two drawings.
_KEPT = ("after step", "|", "earned", "ollapsed", "Not decided")  # In lines worth it.


def run(spec: str, *overrides: str, workdir, verbose: bool = False) -> dict:
    """Train a config, or go on with it, under a progress bar.

    Args:
        spec: "configs/hjepa.py" or "configs/hjepa.py:NAME".
        overrides: "key.path=value" texts.
        workdir: directory of the run; the same one again resumes.
        verbose: show every line that the command line shows, and no bar.

    Returns:
        the metrics of the final evaluation, {"final/trained/knn/top1": ...}.

    Raises:
        VitsslError: whatever ends a run; the message says what to do.
    """
    checked = experiment.read(experiment.load(spec, overrides))
    with bar(verbose):
        return loop.run(checked, workdir, name=config.name_of(spec))


@contextlib.contextmanager
def bar(verbose: bool = False):
    """Show the log of the package as a bar: steps, evaluations and warnings."""
    package = logging.getLogger("vitssl")
    before = package.handlers[:], package.level, package.propagate
    handler = logging.StreamHandler(sys.stdout) if verbose else _Bar()
    package.handlers[:] = [handler]
    package.setLevel(logging.INFO if verbose else progress.BETWEEN)
    package.propagate = False
    try:
        yield
    finally:
        handler.close()
        package.handlers[:], package.level, package.propagate = before


class _Bar(logging.Handler):
    """Writes progress over itself, and everything worth keeping below it."""

    def __init__(self):
        super().__init__()
        self._open, self._drawn = False, 0.0

    def emit(self, record):
        told, now = getattr(record, "progress", None), time.monotonic()
        if told is not None:
            last = told.done >= told.total
            if not told.over and (last or now - self._drawn > _PAUSE):
                self._drawn, self._open = now, True
                full = _WIDTH * told.done // max(1, told.total)
                drawn = "█" * full + "░" * (_WIDTH - full)
                sys.stdout.write(f"\r{drawn} {record.getMessage().strip():<80}")
            sys.stdout.flush()
            return
        text = record.getMessage()
        if record.levelno >= logging.WARNING or any(part in text for part in _KEPT):
            self.close()
            print(text)
        sys.stdout.flush()

    def close(self):
        if self._open:
            sys.stdout.write("\n")
            self._open = False
        super().close()


def picture(figure) -> Image.Image:
    """Return a matplotlib figure as an image, which a cell can end with."""
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    return Image.open(file)


def pictures(workdir, *names: str, width: int = 900) -> Image.Image:
    """Return pictures of a finished run, one below the other.

    Args:
        workdir: of the run.
        names: files of WORKDIR/pictures, without ".png".
        width: of the result, in pixels; wider pictures are scaled down.

    Raises:
        UsageError: one of them is not there; the message lists those that are.
        DataError: one is no picture.
    """
    folder = pathlib.Path(workdir) / "pictures"
    there = sorted(p.stem for p in folder.glob("*.png"))
    missing = [name for name in names if name not in there]
    if missing or not names:
        what = f"no picture {missing[0]!r}" if missing else "name a picture"
        raise errors.UsageError(f"{folder}: {what}; there is: {', '.join(there)}")
    arrays = (decode.read(folder / f"{name}.png", channels=3) for name in names)
    images = [Image.fromarray(array) for array in arrays]
    images = [
        i.resize((width, round(i.height * width / i.width))) if i.width > width else i
        for i in images
    ]
    page = Image.new("RGB", (width, sum(i.height for i in images)), "white")
    top = 0
    for image in images:
        page.paste(image, (0, top))
        top += image.height
    return page
