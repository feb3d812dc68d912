"""`vitssl compare A B ...`: what differs between runs, and what came of it."""

import collections
import itertools

from vitssl.data import decode
from vitssl.tools import charts, html, listing

_TIMES = ("time/", "compile/", "memory/", "freeze/")


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


def text(runs) -> str:
    """Return both tables for the terminal."""
    names = short_names(runs)
    differences = _differences(runs) or [["(none)", *("" for _ in runs)]]
    numbers = _numbers(runs, _TIMES[1:]) or [["(none)", *names]]
    parts = [
        "Values of the config that differ:",
        listing.text(["key", *names], differences),
        "\nLast value of every shared metric:",
        listing.text(["metric", *names], numbers),
    ]
    return "\n".join(parts)


def page(runs) -> str:
    """Return one self-contained HTML page: the tables, and curves over each other."""
    names = short_names(runs)
    plots = []
    for key in shared(runs):
        series = [
            (name, *run.metrics[key])
            for name, run in zip(names, runs, strict=True)
            if key in run.metrics
        ]
        if max(len(steps) for _, steps, _ in series) > 1:
            plots.append(charts.lines(key, series))
    numbers = html.table(["metric", *names], _numbers(runs, _TIMES))
    rows = _differences(runs)
    found = html.table(["key", *names], rows)
    # Folded where it would hide the curves.
    found = html.folded(f"{len(rows)} values", found, opened=len(rows) <= 15)
    body = [
        html.element("h1", "Comparison of " + " and ".join(names)),
        html.section("What differs", found),
        html.section("Curves", html.grid([charts.legend(names)], plots)),
        html.section("Last values", numbers),
    ]
    return html.document("vitssl: " + " / ".join(names), body)


def _differences(runs):
    def written(value):
        return "(absent)" if value is None else str(value)

    return [[key, *map(written, values)] for key, values in differing(runs)]


def _numbers(runs, without):
    def written(value):
        return "-" if value is None else f"{value:.5g}"

    keys = [key for key in shared(runs) if not key.startswith(without)]
    return [[key, *(written(run.last(key)) for run in runs)] for key in keys]


def short_names(runs) -> list[str]:
    """Return the paths of runs without what they begin with together."""
    parts = [run.path.resolve().parts for run in runs]
    cut = 0
    while all(len(p) > cut + 1 and p[cut] == parts[0][cut] for p in parts):
        cut += 1
    return [decode.printable("/".join(p[cut:])) for p in parts]
