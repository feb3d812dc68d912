"""Pictures of a run over time, drawn from its metrics.jsonl."""

import json
import math
import re
from array import array

import matplotlib
import numpy as np

from vitssl import tree
from vitssl.pictures import panels

# Thresholds under or over which a representation counts as collapsed.
LOW_DEVIATION, LOW_RANK, HIGH_SIMILARITY = 0.01, 0.1, 0.9
LEVELS, MOMENTUM, GRADIENTS = r"loss_h\d+$", r"(^|[/_])(momentum|ema)$", r"grad"
MAX_LINE = 2**20  # Characters of a line that is read.
# Of values that are drawn: beyond these their squares and ratios are no numbers.
SMALLEST, LARGEST = 1e-100, 1e100
_PLUMBING = re.compile(r"^(time|compile|memory|freeze|final)/|^nonfinite|_norm/")
MOST = 32  # Charts of a picture; the report has all.
MOST_NAMED = 16  # Curves of one chart that its legend names.


def read(path):
    """Return {metric: (steps [n], values [n])} of a metrics.jsonl.

    A line that is torn (the run was killed in the middle of it) and anything that is
    no number is left out. A step that was logged twice counts with its last value.

    Raises:
        OSError: it cannot be read.
    """
    found = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in iter(lambda: file.readline(MAX_LINE), ""):
            try:
                values = json.loads(line)
                step = values.pop("step")
                if not _whole(step):
                    continue
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                continue
            for key, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    steps, numbers = found.setdefault(key, (array("d"), array("d")))
                    steps.append(step)
                    numbers.append(_bounded(value))
    return {printable(key): _ordered(*points) for key, points in found.items()}


def printable(text: str) -> str:
    """Return a text that any terminal shows on the line it is written to.

    Line ends stay, everything else that is no character is written out.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
        for c in text
    )


def _whole(step) -> bool:
    number = isinstance(step, int | float) and not isinstance(step, bool)
    return number and 0 <= step < 2**53 and step == int(step)


def _bounded(value) -> float:
    """Return a value that can be subtracted and divided, or is not finite."""
    if abs(value) < SMALLEST:
        return 0.0
    if abs(value) > LARGEST:
        return math.inf if value > 0 else -math.inf
    return float(value)


def _ordered(steps, values):
    """Return points by step as arrays, of each step the last one."""
    steps, values = np.array(steps, np.int64), np.array(values)
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last = np.append(steps[1:] != steps[:-1], True)
    return steps[last], values[last]


def smooth(values, width):  # [n] -> [n]
    """Return the mean of the values around each, weighted by a Gaussian.

    Its standard deviation is `width` entries; 0 returns the values. It does not lag
    behind, as a moving average over the past would. Non-finite values are passed over.
    """
    values = np.asarray(values, np.float64)
    if width <= 0 or not len(values):
        return values
    reach = int(np.ceil(4 * width))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    finite = np.isfinite(values)
    window = slice(reach, reach + len(values))
    total = np.convolve(np.where(finite, values, 0.0), kernel)[window]
    mass = np.convolve(finite, kernel)[window]
    return np.where(mass > 1e-9, total / np.maximum(mass, 1e-9), np.nan)


def _draw(axis, curve, label="", *, colour=None):
    """Draw the raw values pale and, of a long curve, the smoothed ones over them."""
    steps, values = curve
    if len(values) < 30:
        axis.plot(steps, values, "o-", markersize=2.5, label=label, color=colour)
        return
    smoothed = smooth(values, len(values) / 60)
    (line,) = axis.plot(steps, smoothed, label=label, color=colour)
    axis.plot(steps, values, alpha=0.3, linewidth=0.8, color=line.get_color())


def courses(metrics) -> list[str]:
    """Return the metrics that `training` draws if nobody chooses: those that move."""
    keys = [key for key in matching(metrics, ".") if not _PLUMBING.search(key)]
    return [key for key in keys if len(set(metrics[key][1])) > 1]


@panels.picture
def training(metrics, *, keys=()):
    """Draw a chart for each metric of `read`: raw values pale, smoothed ones strong.

    No keys: all of the run that move, without times, memory and other plumbing; the
    first `MOST` of them.
    """
    chosen = list(keys) or courses(metrics)
    # What everybody looks at first comes first.
    chosen = sorted(chosen, key=lambda k: (k != "loss", "loss" not in k))
    if not chosen:
        raise ValueError("no metric has two different values yet")
    more, chosen = len(chosen) - MOST, chosen[:MOST]
    title = "Training" + (f" (and {more} more in `vitssl report`)" if more > 0 else "")
    figure, axes = panels.charts(len(chosen), title, columns=4, size=(2.6, 1.8))
    for axis, key in zip(axes, chosen, strict=True):
        _draw(axis, metrics[key], colour=panels.COLOURS[5])
        axis.set_title(key)
        axis.set_xlabel("step", size=7)
    return figure


@panels.picture
def levels(metrics):
    """Draw the losses of all levels, `loss_h<k>`, on one logarithmic scale."""
    return _together(metrics, LEVELS, "Loss by level", ylabel="loss")


def _together(metrics, pattern, title, **labels):
    """Draw the metrics of a pattern in one chart, on a logarithmic scale."""
    keys = _some(metrics, pattern)
    figure, axes = panels.charts(1, title, size=(7.0, 3.6))
    # Many are blocks of a network: from the first, dark, to the last.
    ramp = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(keys)))
    colours = panels.COLOURS if len(keys) <= len(panels.COLOURS) else ramp
    named = set(np.linspace(0, len(keys) - 1, min(MOST_NAMED, len(keys))).astype(int))
    for i, key in enumerate(keys):
        label = key if i in named else "_"
        _draw(axes[0], metrics[key], label, colour=colours[i])
    axes[0].set(yscale="log", xlabel="step", **labels)
    axes[0].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
    return figure


def matching(metrics, pattern) -> list[str]:
    """Return the keys of `metrics` in which the regex is found, in natural order.

    A metric of one value has no course, and those of the final evaluation are one each.
    """
    found = (k for k, (steps, _) in metrics.items() if len(steps) > 1)
    found = (k for k in found if re.search(pattern, k) and not k.startswith("final/"))
    return sorted(found, key=tree.natural)


def _some(metrics, pattern):
    if keys := matching(metrics, pattern):
        return keys
    raise ValueError(
        f"no curve like {pattern}; there is {sorted(metrics, key=tree.natural)}"
    )


@panels.picture
def momentum(metrics):
    """Draw the momentum of the EMA target and, beside it, how far it is from 1."""
    keys = _some(metrics, MOMENTUM)
    figure, axes = panels.charts(2, "EMA target", columns=2)
    steps, values = metrics[keys[0]]
    axes[0].plot(steps, values, color=panels.COLOURS[5])
    axes[0].set(title="momentum m", xlabel="step")
    axes[0].ticklabel_format(axis="y", useOffset=False)
    # At the end m may be 1 exactly, which has no place on a logarithmic scale.
    left = np.where(values < 1, 1 - values, np.nan)
    axes[1].plot(steps, left, color=panels.COLOURS[4])
    axes[1].set(title="1 - m", xlabel="step", yscale="log")
    return figure


@panels.picture
def gradients(metrics):
    """Draw all gradient norms, of the whole and of parts, on a logarithmic scale."""
    return _together(metrics, GRADIENTS, "Gradient norms")


# Not every cosine is a bad sign: that of predictions and their targets is a good one.
COLLAPSE = {
    "deviation": r"(^|[/_])std$",
    "rank": r"(^|[/_])(rank|rankme|effective_rank)$",
    "similarity": r"(^|[/_])mean_similarity$",
}


@panels.picture
def collapse(metrics, width):
    """Draw the signs of a collapse that were logged, with the zone of one shaded.

    Deviations, ranks and similarities of features are found by the metrics' names; of
    `width` features a rank below width / 10 counts as collapsed.
    """
    zones = {
        "deviation": (0.0, LOW_DEVIATION, "standard deviation of features"),
        "rank": (0.0, LOW_RANK * width, f"rank of features (of {width})"),
        "similarity": (HIGH_SIMILARITY, 1.0, "similarity of features"),
    }
    found = {kind: matching(metrics, COLLAPSE[kind]) for kind in zones}
    found = {kind: keys for kind, keys in found.items() if keys}
    if not found:
        _some(metrics, "|".join(COLLAPSE.values()))
    title = "Signs of collapse (in the shaded zone)"
    figure, axes = panels.charts(len(found), title, size=(3.8, 2.8))
    for axis, (kind, keys) in zip(axes, found.items(), strict=True):
        low, high, title = zones[kind]
        for i, key in enumerate(keys):
            _draw(axis, metrics[key], key, colour=panels.COLOURS[(5 - i) % 6])
        axis.axhspan(low, high, color=panels.COLOURS[4], alpha=0.18, lw=0)
        axis.set(title=title, xlabel="step")
        if kind == "similarity":
            axis.set_ylim(min(0.0, axis.get_ylim()[0]), 1.0)
        else:
            axis.set_ylim(0, max(axis.get_ylim()[1], 1.2 * high))
        below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.2))
        axis.legend(fontsize=7, ncols=2, **below)
    return figure
