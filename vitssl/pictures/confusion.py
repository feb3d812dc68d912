"""Confusion matrices, and the report of a classifier: on one page, and as JSON.

The report comes from the arrays that a run leaves in WORKDIR/scores.npz.
"""

import json
import pathlib

import numpy as np

from vitssl.evals import accuracy, metrics
from vitssl.pictures import panels

# Which of the scored weights and views the report is of: the first that exists.
ORDER = ("ema_tta_", "tta_", "ema_", "")
MOST = 40  # Classes that fit into the table and the matrix.


def chosen(found: dict):
    """Return (prefix, {name: array}) of what the report is of; (None, {}) if nothing.

    Args:
        found: {prefix + name: array}, with "confusion" [C, C], "reliability" [3, bins].
    """
    for prefix in ORDER:
        if f"{prefix}confusion" in found:
            names = ("confusion", "reliability")
            own = {k: found[f"{prefix}{k}"] for k in names if f"{prefix}{k}" in found}
            return prefix, own
    return None, {}


def numbers(found: dict, classes=()) -> dict:
    """Return the report as plain data: means, one row per class, the matrix."""
    prefix, own = chosen(found)
    each = metrics.per_class(own["confusion"])
    rows = {
        name: {key: float(values[i]) for key, values in each.items()}
        for i, name in enumerate(_names(len(own["confusion"]), classes))
    }
    report = {
        "scored": prefix.rstrip("_") or "parameters as they are",
        **metrics.summary(own["confusion"]),
        "classes": rows,
        "confusion": np.asarray(own["confusion"]).tolist(),
    }
    if "reliability" in own:
        total, right, sure = own["reliability"]
        report["ece"] = float(np.abs(right - sure).sum() / max(1.0, total.sum()))
    return report


def write(found: dict, classes=(), *, path) -> None:
    """Write `numbers` as JSON."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(numbers(found, classes), indent=1) + "\n")


@panels.picture
def page(found: dict, classes=()):
    """Draw the report of `chosen`: confusion matrix, table of classes, calibration."""
    report = numbers(found, classes)
    _, own = chosen(found)
    count = int(np.sum(own["confusion"]))
    title = (
        f"Test split ({report['scored']}): macro F1 {report['f1_macro']:.3f}, "
        f"accuracy {accuracy.written(report['accuracy'], count)} of {count} images"
    )
    figure, axes = panels.charts(4, title, columns=2, size=(4.6, 3.9))
    matrix, table, curve, bars = axes
    matrix.set_title("Confusion matrix")
    _matrix(matrix, own["confusion"], list(report["classes"]))
    _table(table, report)
    _calibration(curve, own.get("reliability"), report.get("ece"))
    _bars(bars, report)
    return figure


@panels.picture
def neighbours(matrix, classes=()):  # Counts [C, C], rows truth.
    """Draw what k-NN takes the images of each class for."""
    matrix = np.asarray(matrix)
    names = _names(len(matrix), classes)
    count = int(matrix.sum())
    right = accuracy.written(np.trace(matrix) / max(1, count), count)
    side = min(9.0, 2.6 + 0.32 * len(matrix))
    title = f"k-NN of the final evaluation\n{right} of {count} test images right"
    figure, (axis,) = panels.charts(1, title, size=(side, side))
    _matrix(axis, matrix, names)
    return figure


def _names(count, classes):
    return [classes[i] if i < len(classes) else str(i) for i in range(count)]


def _matrix(axis, confusion, names):
    """Draw every row as shares of its class, with the counts if they are readable."""
    confusion = np.asarray(confusion)
    shares = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.grid(False)
    axis.set(xlabel="predicted (shade: share of the true class)", ylabel="true")
    if len(names) > MOST:
        return
    small = dict(fontsize=6)
    if max(map(len, names)) > 3:
        small |= dict(rotation=60, ha="right")
    axis.set_xticks(range(len(names)), names, **small)
    axis.set_yticks(range(len(names)), names, fontsize=6)
    if len(names) <= 20:
        for (i, j), n in np.ndenumerate(confusion):
            if n:
                ink = "white" if shares[i, j] > 0.5 else panels.INK
                axis.text(j, i, n, ha="center", va="center", color=ink, fontsize=6)


def _table(axis, report):
    axis.axis("off")
    axis.set_title("Per class")
    heads = ("precision", "recall", "f1", "support")
    lines = [f"{'class':<24}{'prec.':>7}{'recall':>7}{'F1':>7}{'images':>8}"]
    for name, row in list(report["classes"].items())[:MOST]:
        *shares, images = (row[k] for k in heads)
        cells = "".join(f"{v:7.3f}" for v in shares)
        lines.append(f"{name[:23]:<24}{cells}{images:8.0f}")
    for kind in ("macro", "weighted"):
        keys = [f"{k}_{kind}" for k in ("precision", "recall", "f1")]
        cells = "".join(f"{report[k]:7.3f}" for k in keys)
        lines.append(f"{kind + ' mean':<24}{cells}")
    size = min(6.5, 150 / max(1, len(lines)))
    text = "\n".join(lines)
    axis.text(0, 1, text, va="top", family="DejaVu Sans Mono", fontsize=size)


def _calibration(axis, reliability, ece):
    axis.set(xlabel="confidence", ylabel="share that is right")
    axis.set(xlim=(0, 1), ylim=(0, 1))
    if reliability is None:
        axis.set_title("Calibration: not measured")
        return
    count, right, sure = reliability
    full = count > 0
    axis.plot([0, 1], [0, 1], color="#8A8D99", linewidth=0.8)
    axis.plot(sure[full] / count[full], right[full] / count[full], marker="o")
    axis.set_title(f"Calibration: error {ece:.3f}")


def _bars(axis, report):
    rows = list(report["classes"].values())
    axis.bar(range(len(rows)), [row["f1"] for row in rows], color=panels.COLOURS[5])
    axis.axhline(report["f1_macro"], color="#8A8D99", linewidth=0.8)
    axis.set(ylim=(0, 1), title="F1 of every class, and their mean", ylabel="F1")
    if len(rows) <= MOST:
        names = list(report["classes"])
        axis.set_xticks(range(len(rows)), names, rotation=60, ha="right", fontsize=6)
