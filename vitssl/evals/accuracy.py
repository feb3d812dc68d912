"""From class scores to top-1, top-5 and the confusion matrix; numpy, ties decided."""

import numpy as np


def rank(score, label):  # [Q, C], int [Q] in 0..C-1 -> int [Q]
    """Return how many classes come before the true one.

    Classes are ordered by falling score; of equal scores the lower class is first, so
    that the answer does not depend on a sorting routine. A class scored -inf was not
    named at all: its rank is C, which is among no best.
    """
    label = np.asarray(label)
    true = np.take_along_axis(score, label[:, None], 1)  # [Q, 1]
    ahead = score > true  # [Q, C]
    ahead |= (score == true) & (np.arange(score.shape[1]) < label[:, None])
    return np.where(np.isneginf(true[:, 0]), score.shape[1], ahead.sum(1))


def top(position, classes: int) -> dict[str, float]:
    """Return {"top1": share, "top5": share} from the `rank` of every sample.

    With two classes or fewer top-5 says nothing and is left out; with three or four it
    means all of them that were named.
    """
    position = np.asarray(position)
    if not position.size:
        raise ValueError("accuracy.top: no samples")
    found = {"top1": float((position < 1).mean())}
    if classes > 2:
        found["top5"] = float((position < min(5, classes)).mean())
    return found


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the interval of Wilson's score around a share of `count` trials.

    It holds the true share in about 95 of 100 experiments, also near 0 and 1 and of a
    few images.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical
    inference".
    """
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    half = float(z * spread / (1 + z * z / count))
    return max(0.0, middle - half), min(1.0, middle + half)


def written(share: float, count: float | None) -> str:
    """Return "90.3% (86.8-93.0)": a share of `count` images, and `wilson`'s interval.

    Where it is not known of how many, the share alone.
    """
    if not count or not 1 <= count < 2**53 or not 0 <= share <= 1:
        return f"{share:.1%}"
    low, high = wilson(share, int(count))
    return f"{share:.1%} ({100 * low:.1f}-{100 * high:.1f})"


def told(scores: dict, most: int | None = None) -> list[str]:
    """Return "name value" of the first scores; of "top1", with its interval.

    `scores["images"]` is of how many, if it is known.
    """
    images = scores.get("images")
    return [
        f"{name} {written(value, images) if name == 'top1' else f'{value:.4g}'}"
        for name, value in list(scores.items())[:most]
    ]


def confusion(label, predicted, classes: int):
    """Return int [C, C]: row is the true class, column the predicted one."""
    cells = np.asarray(label, np.int64) * classes + np.asarray(predicted, np.int64)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def measure(score, label) -> dict:  # Logits [M, C], int [M]
    """Return "top1", "top5" (see `top`), "loss" and "confusion" (see `confusion`).

    The loss is the mean cross-entropy in nats.
    """
    score = np.asarray(score, np.float64)
    label = np.asarray(label)
    classes = score.shape[1]
    most = score.max(1, keepdims=True)
    total = np.log(np.exp(score - most).sum(1)) + most[:, 0]
    loss = total - np.take_along_axis(score, label[:, None], 1)[:, 0]
    return {
        **top(rank(score, label), classes),
        "loss": float(loss.mean()),
        "confusion": confusion(label, score.argmax(1), classes),
    }
