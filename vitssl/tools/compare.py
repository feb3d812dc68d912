"""`vitssl compare A B ...`: what differs between runs, and what came of it."""

import itertools

from vitssl.tools import charts, html, listing

_TIMES = ("time/", "compile/", "memory/", "freeze/")


def differing(runs) -> list[tuple[str, list]]:
    """Return [(key path, [value of each run])] of the config values that differ.

    A value that a run lacks is None.
    """
    flat = [dict(leaves(run.config)) for run in runs]
    keys = dict.fromkeys(itertools.chain.from_iterable(flat))
    found = []
    for key in keys:
        values = [one.get(key) for one in flat]
        if any(value != values[0] for value in values):
            found.append((key, values))
    return found


def leaves(config, path=""):
    """Yield ("section.key", value) of nested dicts."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def shared(runs) -> list[str]:
    """Return the metrics that at least two runs have, what is looked at first first."""
    counts = {}
    for run in runs:
        for key in run.metrics:
            counts[key] = counts.get(key, 0) + 1
    keys = [key for key, count in counts.items() if count > 1]
    return sorted(keys, key=charts.importance)


def text(runs) -> str:
    """Return both tables for the terminal."""
    names = short_names(runs)
    differences = [
        [key, *map(_written, values)] for key, values in differing(runs)
    ] or [["(none)", *("" for _ in runs)]]
    numbers = [
        [key, *(_number(run.last(key)) for run in runs)]
        for key in shared(runs)
        if not key.startswith(_TIMES[1:])
    ]
    parts = [
        "Values of the config that differ:",
        listing.text(["key", *names], differences),
        "\nLast value of every shared metric:",
        listing.text(["metric", *names], numbers or [["(none)", *names]]),
    ]
    return "\n".join(parts)


def page(runs) -> str:
    """Return one self-contained HTML page: the tables, and curves over each other."""
    names = short_names(runs)
    rows = [[key, *map(_written, values)] for key, values in differing(runs)]
    plots = []
    for key in shared(runs):
        series = [
            (name, *run.metrics[key])
            for name, run in zip(names, runs, strict=True)
            if key in run.metrics
        ]
        if max(len(steps) for _, steps, _ in series) > 1:
            plots.append(charts.lines(key, series))
    numbers = [
        [key, *(_number(run.last(key)) for run in runs)]
        for key in shared(runs)
        if not key.startswith(_TIMES)
    ]
    body = [
        html.element("h1", "Comparison of " + " and ".join(names)),
        html.section("What differs", _differences(names, rows)),
        html.section("Curves", html.grid([charts.legend(names)], plots)),
        html.section("Last values", html.table(["metric", *names], numbers)),
    ]
    return html.document("vitssl: " + " / ".join(names), body)


def _differences(names, rows):
    """Return the table of differences, folded if it would hide the curves."""
    found = html.table(["key", *names], rows)
    return html.folded(f"{len(rows)} values", found, opened=len(rows) <= 15)


def short_names(runs) -> list[str]:
    """Return the paths of runs without what they begin with together."""
    parts = [run.path.resolve().parts for run in runs]
    cut = 0
    while all(len(p) > cut + 1 and p[cut] == parts[0][cut] for p in parts):
        cut += 1
    return ["/".join(p[cut:]) for p in parts]


def _written(value) -> str:
    return "(absent)" if value is None else str(value)


def _number(value) -> str:
    return "-" if value is None else f"{value:.5g}"
