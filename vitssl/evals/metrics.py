"""What a classifier is judged by: F1 and its parts, and whether it knows when it errs.

Everything is numpy in float64, from the confusion matrix or from the scores.
"""

import numpy as np
import scipy.optimize

BINS = 15  # Of confidence, in the calibration error.


def per_class(confusion) -> dict:
    """Return {"precision", "recall", "f1", "support"} [C] of counts [true, predicted].

    What would be 0 / 0 is 0: a class without images or without predictions.
    """
    confusion = np.asarray(confusion, np.float64)
    hit, truth, named = np.diag(confusion), confusion.sum(1), confusion.sum(0)

    def share(a, b):
        return np.divide(a, b, out=np.zeros_like(a), where=b > 0)

    return {
        "precision": share(hit, named),
        "recall": share(hit, truth),
        "f1": share(2 * hit, truth + named),
        "support": truth,
    }


def summary(confusion) -> dict[str, float]:
    """Return accuracy and the means of F1, precision and recall.

    "..._macro" is the mean over all classes, those without images included, which
    count 0; "..._weighted" weighs them by their images, as scikit-learn does.
    """
    each = per_class(confusion)
    support = each["support"]
    total = max(1.0, support.sum())
    found = {"accuracy": float(np.trace(np.asarray(confusion)) / total)}
    for key in ("f1", "precision", "recall"):
        found[f"{key}_macro"] = float(each[key].mean())
        found[f"{key}_weighted"] = float((each[key] * support).sum() / total)
    return found


def log_softmax(logits):
    """Return log p float64 [M, C] of logits."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def calibration_error(logits, label, bins: int = BINS) -> float:
    """Return the expected calibration error: mean |accuracy - confidence| of bins.

    Bins of confidence are of equal width and closed above; each weighs as much as it
    holds.

    Source: Guo et al. 2017, arXiv:1706.04599, Eq. 3.
    """
    counts, right, sure = reliability(logits, label, bins)
    return float(np.abs(right - sure).sum() / counts.sum())


def reliability(logits, label, bins: int = BINS):
    """Return (images, how many are right, sum of confidences) of every bin, [bins]."""
    p = np.exp(log_softmax(logits))
    sure, right = p.max(1), p.argmax(1) == np.asarray(label)
    place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    each = (np.ones(len(sure)), right.astype(float), sure)
    return tuple(np.bincount(place, w, minlength=bins) for w in each)


def temperature(logits, label) -> float:
    """Return the T > 0 that minimises the cross-entropy of logits / T.

    Source: Guo et al. 2017, arXiv:1706.04599, section 4.2.
    """
    rows = np.arange(len(label))

    def loss(log_t):
        return -log_softmax(np.asarray(logits) / np.exp(log_t))[rows, label].mean()

    found = scipy.optimize.minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded")
    return float(np.exp(found.x))


def calibration(logits, label) -> dict[str, float]:
    """Return "ece", "temperature" and "ece_scaled" of logits [M, C].

    The scaled error is cross-fitted: every half of the images, taken alternately, is
    divided by the temperature of the other, so that none is judged by its own.
    """
    logits, label = np.asarray(logits, np.float64), np.asarray(label)
    found = {"ece": calibration_error(logits, label)}
    if len(label) < 4:
        return found
    scaled = np.empty_like(logits)
    for half in (0, 1):
        t = temperature(logits[1 - half :: 2], label[1 - half :: 2])
        scaled[half::2] = logits[half::2] / t
    found["temperature"] = temperature(logits, label)
    found["ece_scaled"] = calibration_error(scaled, label)
    return found
