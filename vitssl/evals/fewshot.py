"""Few-shot classification by the nearest class centroid, over random episodes."""

from typing import Literal

import numpy as np


def unit(features):
    """Return float64 rows [M, D] of length one; a row of zeros stays."""
    x = np.asarray(features, np.float64)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(length > 0, length, 1)


def centroids(features, label, classes: int):
    """Return the mean direction of each class, [C, D]; not scaled to length one.

    Args:
        features: [M, D]; scaled to length one here.
        label: int [M], with at least one sample of each of the `classes`.
    """
    label = np.asarray(label)
    x = unit(features)
    return np.stack([x[label == c].mean(0) for c in range(classes)])


def classify(query, centre, metric: Literal["cosine", "euclidean"] = "cosine"):
    """Return the nearest centroid of each query, int [Q]; of equals the lower.

    Args:
        query: [Q, D]; scaled to length one here.
        centre: [C, D] of `centroids`.
        metric: "cosine" takes the largest dot product (a centroid of a spread-out class
            is short and wins less often), "euclidean" the smallest distance.
    """
    dot = unit(query) @ centre.T  # [Q, C]
    if metric == "cosine":
        return dot.argmax(1)
    return ((centre**2).sum(1) - 2 * dot).argmin(1)


def evaluate(
    features,
    label,
    *,
    ways: int = 5,
    shots: tuple[int, ...] = (1, 5, 10),
    queries: int = 15,
    episodes: int = 100,
    metric: Literal["cosine", "euclidean"] = "cosine",
    seed: int = 0,
) -> dict[int, dict[str, float]]:
    """Classify held-out samples of a few classes from a few examples of each.

    An episode draws `ways` classes, then `shots` examples and `queries` samples of
    each, all different. A class needs shots + queries samples to take part; with fewer
    such classes than `ways` all of them are used, with fewer than two that number of
    shots is left out of the result.

    Args:
        features: [M, D].
        label: int [M]; samples below 0 take no part.
        ways, shots, queries, episodes: numbers as above.
        metric: see `classify`.
        seed: of the draws; each number of shots has its own stream.

    Returns:
        {shots: {"top1": mean over episodes, "std": between them (of the population),
        "interval": half of the 95 % interval of the mean, 1.96 std / sqrt(episodes),
        "ways": classes per episode}}.

    Source: jonwiggins/H-JEPA src/evaluation/transfer.py:FewShotEvaluator.
    """
    label = np.asarray(label)
    x = unit(features)
    members = [np.flatnonzero(label == c) for c in np.unique(label[label >= 0])]
    found = {}
    for shot in shots:
        enough = [rows for rows in members if len(rows) >= shot + queries]
        way = min(ways, len(enough))
        if way < 2:
            continue
        rng = np.random.default_rng((seed, shot))
        right = np.zeros(episodes)
        for e in range(episodes):
            drawn = np.stack(
                [
                    rng.choice(enough[c], shot + queries, replace=False)
                    for c in rng.choice(len(enough), way, replace=False)
                ]
            )  # [ways, shot + queries]
            centre = x[drawn[:, :shot]].mean(1)  # [ways, D]
            query = x[drawn[:, shot:].ravel()]
            guess = classify(query, centre, metric)
            right[e] = (guess == np.repeat(np.arange(way), queries)).mean()
        found[shot] = {
            "top1": float(right.mean()),
            "std": float(right.std()),
            "interval": float(1.96 * right.std() / np.sqrt(episodes)),
            "ways": float(way),
        }
    return found
