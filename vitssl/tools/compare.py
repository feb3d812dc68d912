"""`vitssl compare A B ...`: what differs between runs, and what came of it."""

import collections
import itertools
import re

from vitssl.data import decode
from vitssl.evals import verdict
from vitssl.tools import charts, html, listing

# What is better: a pattern of the metric's name, and whether higher is.
BETTER = (
    (r"(^|[/_])(top[15]|accuracy|f1\w*|\w*iou|map|worst\w*|mfu_percent)$", True),
    (r"images_per_second$", True),
    (r"(^|[/_])(loss\w*|ece\w*|step_seconds|peak_bytes)$", False),
)
# Rows of the final evaluation that no run made, and a k that nobody reports.
_ASIDE = re.compile(r"^final/(raw_pixels|largest_class|colour_histogram)/|/k\d+_t")


def differing(runs) -> list[tuple[str, list]]:
    """Return [(key path, [value of each run, or None])] where configs differ."""
    flat = [dict(leaves(run.config)) for run in runs]
    keys = dict.fromkeys(itertools.chain.from_iterable(flat))
    found = [(key, [one.get(key) for one in flat]) for key in keys]
    return [(key, v) for key, v in found if any(value != v[0] for value in v)]


def leaves(config, path=""):
    """Yield ("section.key", value) of nested dicts."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def shared(runs) -> list[str]:
    """Return the metrics that at least two runs have, what is looked at first first."""
    counts = collections.Counter(key for run in runs for key in run.metrics)
    keys = [key for key, count in counts.items() if count > 1]
    return sorted(keys, key=charts.importance)


def better(key: str) -> bool | None:
    """Return whether a higher value of a metric is better; None if neither is."""
    return next((high for pattern, high in BETTER if re.search(pattern, key)), None)


def best(key, runs) -> set[int]:
    """Return which runs have the best last value, if not all of them have it."""
    high = better(key)
    values = {i: run.last(key) for i, run in enumerate(runs)}
    known = {i: v for i, v in values.items() if v is not None and v == v}
    if high is None or len(known) < 2 or len(set(known.values())) < 2:
        return set()
    top = max(known.values()) if high else min(known.values())
    return {i for i, value in known.items() if value == top}


def text(runs) -> str:
    """Return both tables for the terminal."""
    names = short_names(runs)
    differences = _differences(runs) or [["(none)", *("" for _ in runs)]]
    every = _changing(runs)
    keys = [key for key in every if better(key) is not None]
    rows = [
        [key, *(cell + " *" * won for cell, won in _cells(key, runs))] for key in keys
    ]
    parts = [
        "Values of the config that differ:",
        listing.text(["key", *names], differences),
        "\nLast values that differ (* is the best):",
        listing.text(["metric", *names], rows or [["(none)", *("" for _ in runs)]]),
    ]
    if len(every) > len(keys):
        parts.append(f"{len(every) - len(keys)} more differ, of which none is better")
    return "\n".join([*parts, "", *(f"{n}: {said}" for n, said in _verdicts(runs))])


def _verdicts(runs):
    """Yield (name, verdict) of the runs that have one."""
    for name, run in zip(short_names(runs), runs, strict=True):
        if found := verdict.verdict(run.metrics):
            yield name, found.text


def page(runs) -> str:
    """Return one self-contained HTML page: the tables, and curves over each other."""
    names = short_names(runs)
    unit = "epoch" if all(run.per_epoch for run in runs) else "step"
    plots = []
    for key in shared(runs):
        series = [
            (name, run.metrics[key][0] / (run.per_epoch if unit == "epoch" else 1), v)
            for name, run in zip(names, runs, strict=True)
            for v in [run.metrics[key][1] if key in run.metrics else None]
            if v is not None
        ]
        if max(len(steps) for _, steps, _ in series) > 1 and not _ASIDE.search(key):
            plots.append(charts.lines(key, series, unit=unit))
    found = html.table(["key", *names], rows := _differences(runs))
    said = [html.element("p", f"{n}: {t}", class_="note") for n, t in _verdicts(runs)]
    plain, marked = (
        [k for k in _changing(runs) if bool(best(k, runs)) == m] for m in (0, 1)
    )
    sections = {
        # Folded where it would hide what follows.
        "What differs": [
            html.folded(f"{len(rows)} values", found, opened=len(rows) <= 15)
        ],
        "Last values that differ": [
            *said,
            _table(marked, names, runs),
            html.folded(f"{len(plain)} without a best", _table(plain, names, runs)),
        ],
        "Curves": [html.grid([charts.legend(names)], plots)],
    }
    body = [
        html.element("h1", "Comparison of " + " and ".join(names)),
        html.navigation(sections),
        *(html.section(heading, *content) for heading, content in sections.items()),
    ]
    return html.document("vitssl: " + " / ".join(names), body, charts.SCRIPT)


def _table(keys, names, runs) -> html.Safe:
    rows = [
        [key, *(html.element("b", x) if won else x for x, won in _cells(key, runs))]
        for key in keys
    ]
    return html.table(["metric", *names], rows)


def _differences(runs):
    def written(value):
        return "(absent)" if value is None else str(value)

    return [[key, *map(written, values)] for key, values in differing(runs)]


def _changing(runs) -> list[str]:
    """Return the shared metrics whose last values differ, the final ones first."""
    keys = [key for key in shared(runs) if not _ASIDE.search(key)]
    keys = [k for k in keys if len({cell for cell, _ in _cells(k, runs)}) > 1]
    return sorted(keys, key=lambda key: not key.startswith("final/"))


def _cells(key, runs) -> list[tuple[str, bool]]:
    """Return (last value, whether it is the best) of each run."""
    form = "" if key.endswith("/top1") else "{:.5g}"
    won = best(key, runs)
    return [(listing.value_of(run, key, form), i in won) for i, run in enumerate(runs)]


def short_names(runs) -> list[str]:
    """Return the paths of runs without what they begin with together."""
    parts = [run.path.resolve().parts for run in runs]
    cut = 0
    while all(len(p) > cut + 1 and p[cut] == parts[0][cut] for p in parts):
        cut += 1
    return [decode.printable("/".join(p[cut:])) for p in parts]
