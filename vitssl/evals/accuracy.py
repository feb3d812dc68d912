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
