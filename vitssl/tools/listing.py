"""`vitssl runs DIR`: one line per run."""

import json
import math
import time

from vitssl import errors, tree
from vitssl.data import decode
from vitssl.evals import accuracy, verdict
from vitssl.run import log

# Metrics shown if runs have them: key, heading, form of a value ("": an accuracy).
COLUMNS = (
    ("loss", "loss", "{:.4g}"),
    ("knn/top1", "k-NN", ""),
    ("probe/top1", "probe", ""),
    ("test/top1", "test", ""),
    ("final/trained/knn/top1", "final k-NN", ""),
    ("final/trained/linear/top1", "final linear", ""),
    ("final/untrained/knn/top1", "untrained", ""),
    ("time/images_per_second", "img/s", "{:.0f}"),
)


def rows(runs, metrics=(), sort="") -> tuple[list[str], list[list[str]]]:
    """Return (headings, rows of text) of a table of runs.

    Args:
        metrics: () is those of `COLUMNS` that any run has.
        sort: metric by which to sort, the highest first; "" keeps the order.

    Raises:
        UsageError: a metric that no run has.
    """
    known = {key for run in runs for key in run.metrics}
    known = sorted(known, key=tree.natural)
    for key in (*metrics, *((sort,) if sort else ())):
        if key not in known:
            raise errors.UsageError(
                f"no run has the metric {key!r}; there is: {', '.join(known) or 'none'}"
            )
    shown = [(key, key, "{:.4g}") for key in metrics]
    shown = shown or [column for column in COLUMNS if column[0] in known]
    if sort:
        runs = sorted(runs, key=lambda run: _rank(run.last(sort)))
    verdicts = [verdict.verdict(run.metrics) for run in runs]
    headings = ["run", "state", "step", *(h for _, h, _ in shown), "left", "age"]
    lines = [_row(run, shown) for run in runs]
    if any(verdicts):
        headings.append("verdict")
        for line, found in zip(lines, verdicts, strict=True):
            line.append(found.short if found else "-")
    return headings, lines


def _rank(value):
    return math.inf if value is None or math.isnan(value) else -value


def _row(run, shown):
    total, eta = run.status.get("total_steps"), run.status.get("eta_seconds")
    step = f"{run.step}/{total}" if total else f"{run.step}"
    cells = [decode.printable(run.path), run.state, step]
    for key, _, form in shown:
        cells.append(value_of(run, key, form))
    going = run.state == "training" and eta is not None
    cells.append(log.duration(eta) if going else "-")
    since = run.status.get("time")
    cells.append(log.duration(time.time() - since) if since else "-")
    return cells


def value_of(run, key, form="") -> str:
    """Return the last value of a metric, by a format; "" is that of an accuracy."""
    value = run.last(key)
    if value is None:
        return "-"
    if form:
        return form.format(value)
    count = run.last(f"{key.rpartition('/')[0]}/images")
    if count is None and key.startswith("probe/"):
        count = run.last("knn/images")
    return accuracy.written(value, count)


def text(headings, body) -> str:
    """Return a table for the terminal that is Markdown as well."""
    width = [max(map(len, column)) for column in zip(headings, *body, strict=True)]
    lines = []
    for line in (headings, ["-" * n for n in width], *body):
        cells = [c.rjust(n) for c, n in zip(line, width, strict=True)]
        cells[:2] = [c.ljust(n) for c, n in zip(line[:2], width, strict=False)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_json(runs) -> str:
    """Return one JSON object per line: path, state, step and last metrics of a run."""
    lines = []
    for run in runs:
        order = sorted(run.metrics, key=tree.natural)
        values = {key: run.last(key) for key in order}
        one = {"run": decode.printable(run.path), "state": run.state, "step": run.step}
        if found := verdict.verdict(run.metrics):
            one["verdict"] = found.short
        lines.append(json.dumps({**one, "metrics": values}))
    return "\n".join(lines)
