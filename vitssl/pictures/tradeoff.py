"""What the arms of a study reach, against what they cost."""

import numpy as np
from matplotlib.figure import Figure

from vitssl.pictures import panels


@panels.picture
def arms(found: dict, cost: str, score: str) -> Figure:
    """Draw one point per arm with its spread over seeds, and one dot per seed.

    `found` is {arm: {column: [value of each seed, or None]}}, see `study.run`; `cost`
    and `score` are the columns of the axes.
    """
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axis = figure.subplots()
    for arm, columns in found.items():
        pairs = zip(columns.get(cost, ()), columns.get(score, ()), strict=False)
        pairs = [(x, y) for x, y in pairs if x is not None and y is not None]
        if not pairs:
            continue
        x, y = np.asarray(pairs, float).T
        spread = y.std(ddof=1) if len(y) > 1 else 0.0
        drawn = axis.errorbar(x.mean(), y.mean(), spread, fmt="o", capsize=3, label=arm)
        axis.plot(x, y, ".", color=drawn[0].get_color(), alpha=0.5)
    axis.set_xlabel(cost)
    axis.set_ylabel(score)
    axis.legend()
    return figure
