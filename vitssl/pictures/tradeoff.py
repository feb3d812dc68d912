"""What the arms of a study reach, against what they cost."""

import numpy as np
from matplotlib.figure import Figure

from vitssl.pictures import panels

SHAPES = "os^Dv"


@panels.picture
def arms(found: dict, cost: str, score: str) -> Figure:
    """Draw one point per arm with its spread over seeds, and one dot per seed.

    Where no arm costs 5 % more than another, they stand side by side, the best first.
    `found` is {arm: {column: [value of each seed, or None]}}, see `study.run`; `cost`
    and `score` are the columns of the axes.
    """
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axis = figure.subplots()
    points = {arm: _points(columns, cost, score) for arm, columns in found.items()}
    points = {arm: pairs.T for arm, pairs in points.items() if len(pairs)}
    costs = [x.mean() for x, _ in points.values()]
    alike = bool(costs) and 0 < max(costs) < 1.05 * min(costs)
    if alike:
        ranked = sorted(points, key=lambda arm: -points[arm][1].mean())
        axis.set_xticks(range(len(ranked)), ranked, rotation=45, ha="right")
    for i, (arm, (x, y)) in enumerate(points.items()):
        x = np.full(len(y), ranked.index(arm)) if alike else x
        spread = y.std(ddof=1) if len(y) > 1 else 0.0
        # Colours come again after some arms; shapes tell those apart.
        look = dict(
            color=f"C{i % len(panels.COLOURS)}",
            fmt=SHAPES[i // len(panels.COLOURS) % len(SHAPES)],
        )
        axis.errorbar(x.mean(), y.mean(), spread, capsize=3, label=arm, **look)
        axis.plot(x, y, ".", color=look["color"], alpha=0.5)
    axis.set_xlabel(f"{cost}: {min(costs):.3g} to {max(costs):.3g}" if alike else cost)
    axis.set_ylabel(score)
    if not alike:
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _points(columns, cost, score):
    """Return [seed, 2], what each seed cost and reached; those without one left out."""
    pairs = zip(columns.get(cost, ()), columns.get(score, ()), strict=False)
    pairs = [(x, y) for x, y in pairs if x is not None and y is not None]
    return np.asarray(pairs, float)
