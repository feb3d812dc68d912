"""What a run leaves at its end: last words, scores, a verdict, pictures."""

import contextlib
import logging

import numpy as np

from vitssl import disk, errors
from vitssl.evals import verdict
from vitssl.run import log

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def last_words(workdir, held):
    """Say in status.json why a run ended that did not finish.

    A command that fails before it did anything leaves what an earlier one says.
    """
    path = workdir / "status.json"
    before = _status_of(path)
    try:
        yield
    except errors.Preempted:
        raise  # Said already, with the step.
    except Exception as e:
        # Another run may have the workdir by now.
        if held is not None and not held.lost:
            now, error = _status_of(path), f"{type(e).__name__}: {e}"
            if not now or now != before:
                kept = {
                    k: now[k]
                    for k in ("step", "total_steps", "steps_per_epoch", "best")
                    if k in now
                }
                log.write_status(workdir, state="failed", error=error, **kept)
        raise


def _status_of(path) -> dict:
    """Return a status.json, {} if it is not there or damaged."""
    with contextlib.suppress(OSError, disk.Damaged):
        return disk.parse(path.read_bytes())
    return {}


def first_line(e) -> str:
    """Return what an exception says, in one line."""
    return f"{type(e).__name__}: {e}".partition("\n")[0]


def scores(workdir, arrays) -> str:
    """Write the arrays of the final evaluation; return why that failed, or ""."""
    path = workdir / "scores.npz"
    try:
        np.savez_compressed(path, **arrays)
    except OSError as e:
        path.unlink(missing_ok=True)
        return f"{path.name} could not be written: {e.strerror}"
    return ""


def verdict_of(workdir, at, values):
    """Return what came of a run, by all that it logged and its last values, or None."""
    from vitssl.pictures import curves

    try:
        found = curves.read(workdir / "metrics.jsonl")
    except OSError:
        found = {}
    last = {k: (np.array([at]), np.array([v])) for k, v in values.items()}
    return verdict.verdict(last | found)


def pictures(parts, state, untrained, workdir) -> str:
    """Write the pictures of a finished run; return why that failed, or ""."""
    from vitssl.pictures import drawing
    from vitssl.pictures.gather import gather

    s = parts.experiment.settings
    try:
        material = gather(
            parts.method,
            (state.params, state.extra),
            s.data,
            s.evals,
            seed=s.seed,
            untrained=(untrained.params, untrained.extra),
            metrics_path=workdir / "metrics.jsonl",
        )
        paths = list(drawing.write_all(workdir / "pictures", material))
    except Exception as e:
        if not isinstance(e, OSError | errors.VitsslError):
            logger.exception("the pictures could not be drawn")
        return f"the pictures could not be drawn: {first_line(e)}"
    logger.info("%d pictures in %s", len(paths), workdir / "pictures")
    return ""
