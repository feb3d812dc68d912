"""What a classifier is judged by: F1 and its parts, and whether it knows when it errs.

Everything is numpy in float64, from the confusion matrix or from the scores.
"""

import numpy as np

BINS = 15  # Of confidence, in the calibration error.


def per_class(confusion) -> dict:
    """Return {"precision", "recall", "f1", "support"} [C] of counts [true, predicted].

    What would be 0 / 0 is 0: a class without images or without predictions.
    """
    # It takes a second to import.
    from sklearn.metrics import precision_recall_fscore_support

    truth, named = np.indices(np.shape(confusion)).reshape(2, -1)
    found = precision_recall_fscore_support(
        truth,
        named,
        labels=range(len(confusion)),
        sample_weight=np.ravel(confusion).astype(float),
        zero_division=0,
    )
    return dict(zip(("precision", "recall", "f1", "support"), found, strict=True))


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
    from scipy import special

    p = np.exp(special.log_softmax(np.asarray(logits, np.float64), axis=1))
    sure, right = p.max(1), p.argmax(1) == np.asarray(label)
    place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    each = (np.ones(len(sure)), right.astype(float), sure)
    return tuple(np.bincount(place, w, minlength=bins) for w in each)


def temperature(logits, label) -> float:
    """Return the T > 0 that minimises the cross-entropy of logits / T.

    Source: Guo et al. 2017, arXiv:1706.04599, section 4.2.
    """
    from scipy import optimize, special

    logits, rows = np.asarray(logits, np.float64), np.arange(len(label))

    def loss(log_t):
        return -special.log_softmax(logits / np.exp(log_t), axis=1)[rows, label].mean()

    found = optimize.minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded")
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
