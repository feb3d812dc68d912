"""What the arms of a study reach, against what they cost."""

import numpy as np
from matplotlib.figure import Figure

from vitssl.pictures import panels

SHAPES = "os^Dv"


@panels.picture
def arms(found: dict, cost: str, score: str) -> Figure:
    """Draw one point per arm with its spread over seeds, and one dot per seed.

    `found` is {arm: {column: [value of each seed, or None]}}, see `study.run`; `cost`
    and `score` are the columns of the axes.
    """
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axis = figure.subplots()
    for i, (arm, columns) in enumerate(found.items()):
        pairs = zip(columns.get(cost, ()), columns.get(score, ()), strict=False)
        pairs = [(x, y) for x, y in pairs if x is not None and y is not None]
        if not pairs:
            continue
        x, y = np.asarray(pairs, float).T
        spread = y.std(ddof=1) if len(y) > 1 else 0.0
        # Colours come again after some arms; shapes tell those apart.
        look = dict(
            color=f"C{i % len(panels.COLOURS)}",
            fmt=SHAPES[i // len(panels.COLOURS) % len(SHAPES)],
        )
        axis.errorbar(x.mean(), y.mean(), spread, capsize=3, label=arm, **look)
        axis.plot(x, y, ".", color=look["color"], alpha=0.5)
    axis.set_xlabel(cost)
    axis.set_ylabel(score)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
