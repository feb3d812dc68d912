"""Numbers of part discovery and of classification under changing backgrounds.

On the host, from the rows that `measures` leaves. Accuracies are fractions.
"""

import numpy as np

from vitssl.evals import accuracy


def classification(logits, labels) -> dict:
    """Return the accuracies that the original reports, of [M, C] and [M].

    "top1"; "macro", the mean over the classes that occur as label or prediction (in
    "macro_top5" as label); "per_class" [C] (0 where a class never occurs);
    "worst_class" over the classes that occur; "auroc"; for C > 5 "top5", "macro_top5".
    """
    classes = logits.shape[1]
    place = accuracy.rank(logits, labels)
    there = np.bincount(labels, minlength=classes)

    def recalls(k):
        hits = np.bincount(labels[place < k], minlength=classes)
        return hits / np.maximum(1, there)

    share = recalls(1)
    # torchmetrics counts a class that is only ever predicted for top-1 alone.
    seen = (there > 0) | (np.bincount(logits.argmax(-1), minlength=classes) > 0)
    found = {
        "top1": float((place < 1).mean()),
        "macro": float(share[seen].mean()),
        "per_class": share,
        "worst_class": float(share[there > 0].min()),
    }
    if classes > 5:
        found["macro_top5"] = float(recalls(5)[there > 0].mean())
        found["top5"] = float((place < 5).mean())
    return found | {"auroc": auroc(logits, labels)}


def auroc(logits, labels) -> float:
    """Return the area under the ROC curve: of class 1 for two classes.

    Else the mean over C of one against the rest, in which a class without examples
    counts 0, as in torchmetrics.
    """
    z = logits - logits.max(-1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    classes = p.shape[1]
    if classes == 2:
        return _area(p[:, 1], labels == 1)
    return float(np.mean([_area(p[:, c], labels == c) for c in range(classes)]))


def _area(score, positive) -> float:
    """Return P(score of a positive > of a negative), ties half; 0 without either."""
    from scipy import stats

    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return 0.0
    ranks = stats.rankdata(score)
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def groups(logits, labels, group) -> dict:
    """Return the accuracy of every group of images, their mean and their minimum.

    Source: Sagawa et al. 2020, arXiv:1911.08731 (worst group).
    """
    right = logits.argmax(-1) == labels
    each = {f"group{g}": float(right[group == g].mean()) for g in np.unique(group)}
    values = list(each.values())
    return each | {"worst_group": min(values), "group_mean": float(np.mean(values))}


def mutual_information(table) -> float:
    """Return NMI of a contingency table [K, P]: I / mean of the entropies."""
    p = table / table.sum()
    a, b = p.sum(1), p.sum(0)
    entropy = [-(x[x > 0] * np.log(x[x > 0])).sum() for x in (a, b)]
    if not any(entropy):
        return 1.0  # One cluster on either side: the same partition.
    at = p > 0
    information = (p[at] * np.log(p[at] / np.outer(a, b)[at])).sum()
    return float(max(0.0, information) / np.mean(entropy))


def rand_index(table) -> float:
    """Return the adjusted Rand index of a contingency table [K, P]."""
    t = table.astype(np.float64)
    pairs = lambda x: (x * (x - 1) / 2).sum()  # noqa: E731
    both, ours, theirs, all_ = pairs(t), pairs(t.sum(1)), pairs(t.sum(0)), t.sum()
    expected = ours * theirs / max(1.0, all_ * (all_ - 1) / 2)
    most = (ours + theirs) / 2
    return 1.0 if most == expected else float((both - expected) / (most - expected))


def agreement(ours, theirs) -> dict:
    """Return {"nmi", "ari"} of two labellings [M]."""
    theirs = np.asarray(theirs).astype(int)
    wide = int(theirs.max()) + 1
    flat = np.bincount(np.asarray(ours).astype(int) * wide + theirs)
    table = np.pad(flat, (0, -len(flat) % wide)).reshape(-1, wide)
    return {"nmi": mutual_information(table), "ari": rand_index(table)}


def intersection_over_union(counts) -> dict:
    """Return IoUs from `measures.overlap` [M, 2, 2], totalled over the images."""
    total = counts.sum(0, dtype=np.int64)  # (fg, bg) x (intersection, union)
    front, back = (float(i / max(1, u)) for i, u in total)
    return {"iou_fg": front, "iou_bg": back, "miou": (front + back) / 2}


def keypoint_error(fit, test) -> float:
    """Return the error of keypoints regressed from part centres, in % of the box.

    For every keypoint a linear map of standardised centres (absent parts 0 after that),
    fitted where it is visible; the mean distance over all visible test keypoints.

    Args:
        fit, test: dicts of centres [M, K, 2], part_there [M, K], keypoints [M, P, 2],
            keypoint_seen [M, P], coordinates as shares of the box.

    Source: ananthu-aniraj/ifam engine/eval_interpretability_nmi_ari_keypoint.py, after
    SCOPS, Hung et al. 2019, arXiv:1905.01298.
    """
    wrong = []
    for p in range(fit["keypoints"].shape[1]):
        seen, judged = fit["keypoint_seen"][:, p], test["keypoint_seen"][:, p]
        if not seen.any() or not judged.any():
            continue
        x, mean, scale = _centres(fit, seen)
        y = fit["keypoints"][seen, p]
        y_mean, y_scale = y.mean(0), _scale(y)
        weights = np.linalg.lstsq(x, (y - y_mean) / y_scale, rcond=None)[0]
        guess = _centres(test, judged, mean, scale)[0] @ weights * y_scale + y_mean
        wrong.append(np.linalg.norm(guess - test["keypoints"][judged, p], axis=-1))
    return float(100 * np.concatenate(wrong).mean()) if wrong else float("nan")


def _centres(rows, which, mean=None, scale=None):
    """Return (standardised centres [M', 2 K], their mean and scale)."""
    x = rows["centres"][which].reshape(int(which.sum()), -1).astype(np.float64)
    if mean is None:
        mean, scale = x.mean(0), _scale(x)
    there = np.repeat(rows["part_there"][which], 2, axis=1)
    return np.where(there, (x - mean) / scale, 0.0), mean, scale


def _scale(x):
    """Standard deviations; 1 where nothing varies."""
    scale = x.std(0)
    return np.where(scale > 0, scale, 1.0)


def coarse(guesses, mapping):
    """Return the coarse classes of fine ones, -1 = none, by {fine: coarse}."""
    table = np.full(1 + max([int(guesses.max()), *map(int, mapping)]), -1)
    for fine, group in mapping.items():
        table[int(fine)] = group
    return table[guesses]


def thresholds(owner, values, parts, quantiles) -> dict:
    """Return the confidence that a share of each part's patches stays below.

    Args:
        owner: int [M, h, w] of training images, K = the background.
        values: [M, h, w] product with the prototype of the owner.
        parts: K.
        quantiles: shares q.

    Returns:
        {q: float64 [K]}; nan for a part that owns no patch.
    """
    columns = []
    for k in range(parts):
        some = values[owner == k]
        empty = np.full(len(quantiles), np.nan)
        columns.append(np.quantile(some, quantiles) if len(some) else empty)
    return dict(zip(quantiles, np.stack(columns, axis=-1), strict=True))


def scores(rows: dict, removed=()) -> dict:
    """Return every number that the rows of a test split allow.

    Args:
        rows: of `PartDiscovery.outputs`, with "label", in order of "index".
        removed: parts that were away all along.

    Returns:
        Accuracies of the prediction by their own names, of the first stage with
        "_stage_1"; groups; "nmi", "ari" at keypoints and "dense_nmi", "dense_ari" by
        pixel; "keypoint_error" (fitted on the even images, judged on the odd ones);
        IoUs; accuracies before swapped backgrounds and "bg_gap"; "without_k"; "images"
        that all this is of, and the share of their "largest_class".
    """
    labels, found = rows["label"], {}
    for end in ("", "_stage_1"):
        if f"logits{end}" in rows:
            logits = rows[f"logits{end}"]
            values = classification(logits, labels)
            if "group" in rows:
                values |= groups(logits, labels, rows["group"])
            found |= {f"{k}{end}": v for k, v in values.items()}
    found |= _swapped(rows, labels)
    if "logits_without" in rows:
        right = rows["logits_without"].argmax(-1) == labels[:, None]  # [M, K]
        gone = set(removed)
        left = [k for k in range(right.shape[1] + len(gone)) if k not in gone]
        means = zip(left, right.mean(0), strict=True)
        found |= {f"without_{k}": float(v) for k, v in means}
    counts = np.bincount(labels[labels >= 0])
    if counts.any():
        found["images"] = float(counts.sum())
        found["largest_class"] = float(counts.max() / counts.sum())
    return found | _parts(rows)


def _swapped(rows, labels):
    found = {}
    for name in ("swap_same", "swap_random"):
        if f"logits_{name}" in rows:
            right = rows[f"logits_{name}"].argmax(-1) == labels
            found[name] = float(right.mean())
    if len(found) == 2:
        found["bg_gap"] = found["swap_same"] - found["swap_random"]
    return found


def _parts(rows):
    """Return how the parts agree with the truth there is."""
    found = {}
    if "keypoint_part" in rows:
        seen = rows["keypoint_seen"].astype(bool)
        which = np.broadcast_to(np.arange(seen.shape[1]), seen.shape)
        found |= agreement(rows["keypoint_part"][seen], which[seen])
        half = {k: rows[k] for k in ("centres", "part_there", "keypoints")}
        half["keypoint_seen"] = seen
        even, odd = ({k: v[i::2] for k, v in half.items()} for i in (0, 1))
        found["keypoint_error"] = keypoint_error(even, odd)
    if "contingency" in rows:
        table = rows["contingency"].sum(0, dtype=np.int64)
        found["dense_nmi"] = mutual_information(table)
        found["dense_ari"] = rand_index(table)
    if "overlap" in rows:
        found |= intersection_over_union(rows["overlap"])
    return found
