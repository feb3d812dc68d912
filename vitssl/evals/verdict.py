"""What came of a run, in one sentence: it learned, it did not, it collapsed.

Everything is read from the metrics that a run logged, so a run that goes on, its report
and a table of runs say the same.
"""

import dataclasses
import math

import numpy as np

from vitssl.evals import accuracy

COLLAPSED, RANK = "quality/collapsed", "quality/effective_rank"
# What decides, the first that was measured: (name, score, what it has to beat, name).
# Pixels of an image are alike: their share counts as one of images.
PAIRS = (
    ("pixels right", "final/test/accuracy", "test/accuracy", "before the first step"),
    ("top-1", "final/test/top1", "final/test/largest_class", "the largest class"),
    ("k-NN", "final/trained/knn/top1", "final/untrained/knn/top1", "untrained"),
    ("linear", "final/trained/linear/top1", "final/untrained/linear/top1", "untrained"),
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A sentence about a run, and the few words of it for a table."""

    text: str
    short: str

    def __str__(self) -> str:
        """Return the sentence."""
        return self.text


def difference(ours, theirs, count, other=None) -> tuple[float, float]:
    """Return the 95 % interval of ours - theirs, shares of `count` and `other` images.

    Source: Newcombe 1998, "Interval estimation for the difference between independent
    proportions", method 10. Both are of the same images, which makes it too wide, not
    too narrow, if they are right on the same ones.
    """
    (low, high), (low2, high2) = (
        accuracy.wilson(share, n)
        for share, n in ((ours, count), (theirs, other or count))
    )
    gap = ours - theirs
    down = math.hypot(ours - low, high2 - theirs)
    return gap - down, gap + math.hypot(high - ours, theirs - low2)


def few_directions(metrics: dict) -> list[tuple[int, int]]:
    """Return the stretches (first, last step) in which evaluations saw a collapse.

    The features of an untrained network lie close together, too: step 0 is left out.

    Args:
        metrics: {name: (steps, values)}, see `curves.read`.
    """
    seen = list(zip(*metrics.get(COLLAPSED, ((), ())), strict=True))
    final = metrics.get(f"final/trained/{COLLAPSED}")
    if final is not None:
        seen.append((final[0][-1], final[1][-1]))
    found, going = [], False
    for step, value in seen:
        if step == 0 or math.isnan(value):
            continue
        if value > 0 and going:
            found[-1] = found[-1][0], int(step)
        elif value > 0:
            found.append((int(step), int(step)))
        going = value > 0
    return found


def verdict(metrics: dict) -> Verdict | None:
    """Return what came of a run; None while there is nothing to say.

    Args:
        metrics: {name: (steps, values)} of the whole run.
    """
    thin = few_directions(metrics)
    last = _last_looked(metrics)
    since = thin[-1][0] if thin and thin[-1][1] == last else None
    finished = any(key.startswith("final/") for key in metrics)
    if not finished:
        if since is None:
            return None
        words = f"few directions since step {since}"
        return Verdict(f"So far: {words}{_rank(metrics)}.", words)
    learned, said = _scores(metrics)
    if since is not None and not learned and _low_rank(metrics):
        words = f"collapsed since step {since}"
        text = f"Collapsed since step {since}: few directions in use{_rank(metrics)}"
        return Verdict(f"{text}; {said}.", words)
    heads = {True: "It learned", False: "No sign that it learned", None: "Not decided"}
    words = {True: "learned", False: "not learned", None: "-"}[learned]
    text = f"{heads[learned]}: {said}."
    if since is not None:
        text += f" Few directions in use since step {since}{_rank(metrics)}."
        words += f", few directions since {since}"
    elif thin:
        first, end = thin[0][0], thin[-1][1]
        when = f"from step {first} to {end}" if end > first else f"at step {end}"
        text += f" Few directions were in use {when}, not at the end."
    return Verdict(text, words)


def _last_looked(metrics):
    """Return the step of the last evaluation that looked for a collapse."""
    keys = (COLLAPSED, f"final/trained/{COLLAPSED}")
    return max((int(metrics[k][0][-1]) for k in keys if k in metrics), default=None)


def _value(metrics, key):
    found = metrics.get(key)
    return float(found[1][-1]) if found is not None and len(found[1]) else math.nan


def _rival(metrics, key):
    """Return what has to be beaten: at the end, or what an evaluation said before."""
    if key.startswith("final/"):
        return _value(metrics, key)
    steps, values = metrics.get(key, ((), ()))
    return float(values[0]) if len(steps) and steps[0] == 0 else math.nan


def _low_rank(metrics) -> bool:
    """Return whether the rank says collapse, too; True if nothing does.

    A warning may be of a small variance alone, which features have that nobody scaled.
    """
    rank, dim = _value(metrics, RANK), _value(metrics, "final/trained/dim")
    first = float(metrics[RANK][1][0]) if RANK in metrics else math.nan
    unknown = math.isnan(rank) or math.isnan(dim)
    return unknown or rank < 0.1 * dim or rank < 0.5 * first


def _rank(metrics) -> str:
    """Return " (3.5 of 64)": how many, if it was measured."""
    rank, dim = _value(metrics, RANK), _value(metrics, "final/trained/dim")
    if math.isnan(rank):
        rank = _value(metrics, f"final/trained/{RANK}")
    if math.isnan(rank):
        return ""
    return f" ({rank:.1f}" + ("" if math.isnan(dim) else f" of {dim:.0f}") + ")"


def _scores(metrics):
    """Return (whether it learned, None if nothing tells; what was measured)."""
    for name, ours, theirs, rival in PAIRS:
        score, beaten = _value(metrics, ours), _rival(metrics, theirs)
        head = ours.rpartition("/")[0]
        counts = (f"{head}/images", "final/trained/query")
        counts = [n for n in (_value(metrics, key) for key in counts) if 1 <= n < 2**53]
        if not (0 <= score <= 1 and 0 <= beaten <= 1):
            continue
        if not counts:
            pair = f"{name} {score:.1%}, {rival} {beaten:.1%}"
            return None, f"{pair}, of an unknown number of test images"
        count = int(counts[0])
        low, high = difference(score, beaten, count)
        said = [accuracy.written(x, count) for x in (score, beaten)]
        text = f"{name} {said[0]}, {rival} {said[1]}, on {count} test images"
        if low <= 0 <= high:
            text += ", which are too few to tell them apart"
        return low > 0, text
    loss = metrics.get("loss")
    moved = ""
    if loss is not None and len(loss[1]) > 1:
        first, last = np.asarray(loss[1], float)[[0, -1]]
        moved = f"; loss {first:.4g} at first, {last:.4g} at last"
    return None, f"no accuracy was measured that could say whether it learned{moved}"
