"""Few-shot classification by the nearest class centroid, over random episodes."""

import dataclasses
import functools
from typing import Literal

import numpy as np

from vitssl.evals import evaluator


def unit(features):  # [M, D]
    """Return float64 rows of length one; a row of zeros stays."""
    x = np.asarray(features, np.float64)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(length > 0, length, 1)


def classify(query, centre, metric: Literal["cosine", "euclidean"] = "cosine"):
    """Return the nearest centroid of each query, int [Q]; of equals the lower.

    Args:
        query: [Q, D]; scaled to length one here.
        centre: [C, D] means of unit vectors, not scaled to length one.
        metric: "cosine" takes the largest dot product (a centroid of a spread-out class
            is short and wins less often), "euclidean" the smallest distance.
    """
    dot = unit(query) @ centre.T  # [Q, C]
    if metric == "cosine":
        return dot.argmax(1)
    return ((centre**2).sum(1) - 2 * dot).argmin(1)


@dataclasses.dataclass(frozen=True)
class FewShot(evaluator.Evaluator):
    """Classifies held-out samples of a few classes from a few examples of each.

    An episode draws `ways` classes, then `shots` examples and `queries` samples of
    each, all different. A class needs shots + queries samples to take part; with fewer
    such classes than `ways` all of them are used, with fewer than two that number of
    shots is left out of the result.

    Source: jonwiggins/H-JEPA src/evaluation/transfer.py:FewShotEvaluator.
    """

    ways: int = 5
    shots: tuple[int, ...] = (1, 5, 10)
    queries: int = 15
    episodes: int = 100

    prefix = "fewshot_"
    columns = {r"(\d+)/top1": (r"\1-shot", "{:.1%}")}

    def __str__(self) -> str:
        """Return "few-shot: 5-way nearest centroid, 100 episodes"."""
        return f"few-shot: {self.ways}-way nearest centroid, {self.episodes} episodes"

    def __call__(self, bank, query, classes, seed=0) -> dict[str, float]:
        """Return "<shots>/<name>" of the query images alone.

        Names are "top1", the mean over episodes; "std" between them (of the
        population); "interval", half of the 95 % interval of the mean, 1.96 std /
        sqrt(episodes); "ways", classes per episode. Each number of shots has its own
        stream of `seed`.
        """
        del bank, classes
        x, label = unit(query["vector"]), np.asarray(query["label"])
        members = [np.flatnonzero(label == c) for c in np.unique(label[label >= 0])]
        found = {}
        for shots in self.shots:
            enough = [m for m in members if len(m) >= shots + self.queries]
            ways = min(self.ways, len(enough))
            if ways < 2:
                continue
            rng = np.random.default_rng((seed, shots))
            draw = functools.partial(self._episode, x, enough, ways, shots, rng)
            right = np.array([draw() for _ in range(self.episodes)])
            each = {
                "top1": right.mean(),
                "std": right.std(),
                "interval": 1.96 * right.std() / np.sqrt(self.episodes),
                "ways": ways,
            }
            found |= {f"{shots}/{key}": float(value) for key, value in each.items()}
        return found

    def _episode(self, x, members, ways, shots, rng) -> float:
        """Return the accuracy of one episode on unit features x [M, D]."""
        drawn = np.stack(
            [
                rng.choice(members[c], shots + self.queries, replace=False)
                for c in rng.choice(len(members), ways, replace=False)
            ]
        )  # [ways, shots + queries]
        centre = x[drawn[:, :shots]].mean(1)  # [ways, D]
        guess = classify(x[drawn[:, shots:].ravel()], centre)
        return (guess == np.repeat(np.arange(ways), self.queries)).mean()
