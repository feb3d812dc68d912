"""From scores of images that have several labels to average precision; numpy."""

import numpy as np


def average_precision(score, truth):  # [M, K], {0, 1} [M, K] -> [K]
    """Return the mean precision at the images of every label, as scores rank them.

    sum_n (R_n - R_{n-1}) P_n over the distinct scores of a label, from the highest: no
    interpolation, and images of equal score count as one step, so that their order
    does not matter. A label that no image has is nan.
    """
    pairs = zip(np.transpose(score), np.transpose(truth), strict=True)
    return np.array([_one(s, t) for s, t in pairs])


def _one(score, truth):  # [M], {0, 1} [M] -> []
    if not np.any(truth):
        return np.nan
    order = np.argsort(-score, kind="stable")
    score, truth = score[order], truth[order]
    last = np.append(np.flatnonzero(score[1:] != score[:-1]), len(score) - 1)
    hits = np.cumsum(truth, dtype=np.int64)[last]
    return (hits / (last + 1) * np.diff(hits, prepend=0)).sum() / hits[-1]


def mean(each) -> float:
    """Return the mAP of `average_precision`: of labels that occur; nan without any."""
    each = each[np.isfinite(each)]
    return float(each.mean()) if each.size else float("nan")


def measure(score, truth) -> dict:  # Logits [M, K], {0, 1} [M, K]
    """Return "map", "f1_macro", "f1_micro", "loss", and "ap", "support" [K].

    F1 is of the labels whose probability is above one half; what would be 0 / 0 is 0.
    The loss is the cross-entropy of an image in nats, summed over labels.
    """
    score, truth = np.asarray(score, np.float64), np.asarray(truth, np.int64)
    each = average_precision(score, truth)
    named = score > 0
    both, total = (named & (truth > 0)).sum(0), named.sum(0) + truth.sum(0)
    f1 = 2 * both / np.maximum(total, 1)
    loss = np.logaddexp(0.0, score) - truth * score
    return {
        "map": mean(each),
        "f1_macro": float(f1.mean()),
        "f1_micro": float(2 * both.sum() / max(1, total.sum())),
        "loss": float(loss.sum(1).mean()),
        "ap": each,
        "support": truth.sum(0),
    }
