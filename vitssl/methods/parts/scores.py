"""Numbers of part discovery and of classification under changing backgrounds.

On the host, from the rows that `parts.measures` leaves. Accuracies are fractions.
"""

import dataclasses
import os
from collections.abc import Iterator

import numpy as np

from vitssl.evals import accuracy


@dataclasses.dataclass(frozen=True)
class Measures:
    """Config section `measures`.

    Attributes:
        leave_one_out: also classify without each single part in turn (K times the
            second stage), beside those of `parts.removed`.
        thresholds: shares of each part's least confident patches, as (0.01, 0.05): the
            final evaluation finds them in the bank split (`evals.final_samples_train`
            of it) and scores the test split with such patches taken away.
        backgrounds: folder of ImageNet-9, whose variants the final evaluation scores;
            "" = off. See `data.sources.in9`.
        mapping: JSON file {class of the model: class of ImageNet-9, or -1}; "" = they
            are the same.
        challenge: backgrounds to put behind each foreground of ImageNet-9; 0 = off.
        maps: probability with which a batch of the test split is drawn with its parts,
            in WORKDIR/pictures/maps; 0.0 = off.
        maps_every_epochs: when: at evaluations in epoch 1, in each so-manieth, and at
            the end.
    """

    leave_one_out: bool = False
    thresholds: tuple[float, ...] = ()
    backgrounds: str = ""
    mapping: str = ""
    challenge: int = 0
    maps: float = 0.0
    maps_every_epochs: int = 16

    def check(self) -> Iterator[str]:
        """Yield what is out of range or not there."""
        if any(not 0.0 < q < 1.0 for q in self.thresholds):
            yield f"thresholds={self.thresholds}: shares above 0 and below 1"
        if self.challenge < 0:
            yield f"challenge={self.challenge}: 0 (off) or more backgrounds"
        if self.challenge and not self.backgrounds:
            yield f"challenge={self.challenge}: needs measures.backgrounds, a folder"
        for key, there in (("backgrounds", os.path.isdir), ("mapping", os.path.isfile)):
            path = getattr(self, key)
            if path and not there(os.path.expanduser(path)):
                yield f"{key}={path!r}: there is no such path"
        if not 0.0 <= self.maps <= 1.0:
            yield f"maps={self.maps}: a probability, 0 to 1"
        if self.maps_every_epochs < 1:
            yield f"maps_every_epochs={self.maps_every_epochs}: 1 or more"


def classification(logits, labels) -> dict:
    """Return the accuracies that the original reports.

    Args:
        logits: [M, C].
        labels: [M].

    Returns:
        "top1"; "macro", the mean over the classes that occur as label or prediction
        (in "macro_top5" as label);
        "per_class" [C] (0 where a class never occurs); "worst_class" over the classes
        that occur; "auroc": of class 1 for two classes, else the mean over C of one
        against the rest, in which a class without examples counts 0, as in
        torchmetrics; for C > 5 "top5", "macro_top5".
    """
    classes = logits.shape[1]
    place = accuracy.rank(logits, labels)
    found = {"top1": float((place < 1).mean())}
    there = np.bincount(labels, minlength=classes)
    for k, end in ((1, ""), (5, "_top5")):
        if k == 5 and classes <= 5:
            break
        hits = np.bincount(labels[place < k], minlength=classes)
        share = hits / np.maximum(1, there)
        # torchmetrics counts a class that is only ever predicted for top-1 alone.
        guessed = np.bincount(logits.argmax(-1), minlength=classes) > 0
        seen = (there > 0) | (guessed & (k == 1))
        found[f"macro{end}"] = float(share[seen].mean())
        if k == 5:
            found["top5"] = float((place < 5).mean())
        else:
            found["per_class"] = share
            found["worst_class"] = float(share[there > 0].min())
    found["auroc"] = auroc(logits, labels)
    return found


def auroc(logits, labels) -> float:
    """Return the area under the ROC curve, see `classification`."""
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
    each = {int(g): float(right[group == g].mean()) for g in np.unique(group)}
    return {
        **{f"group{g}": value for g, value in each.items()},
        "worst_group": min(each.values()),
        "group_mean": float(np.mean(list(each.values()))),
    }


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
    """Return IoUs from `partmeasures.overlap` [M, 2, 2], totalled over the images."""
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


def coarse_accuracy(logits, targets, mapping) -> float:
    """Return the accuracy over classes that fine classes belong to (ImageNet-9).

    Args:
        logits: [M, C] of fine classes.
        targets: [M] coarse classes.
        mapping: {fine class: coarse class, -1 = none, which is always wrong}.

    Source: Xiao et al. 2020, arXiv:2006.09994.
    """
    return float((coarse(logits.argmax(-1), mapping) == targets).mean())


def coarse(guesses, mapping):
    """Return the coarse class of fine ones, -1 = none; arguments as above."""
    table = np.full(1 + max([int(guesses.max()), *map(int, mapping)]), -1)
    for fine, group in mapping.items():
        table[int(fine)] = group
    return table[guesses]


def background_gap(same, random) -> float:
    """Return how much accuracy a random background costs against the own kind's."""
    return same - random


def challenge(wrong) -> float:
    """Return the share of foregrounds no background makes the model err on.

    Args:
        wrong: [foregrounds, backgrounds] bool.
    """
    return float(1.0 - np.asarray(wrong).any(1).mean())


def thresholds(maps, dot, quantiles) -> dict:
    """Return the confidence that a share of each part's patches stays below.

    Args:
        maps: [M, h, w, K+1] of training images.
        dot: [M, h, w, K+1] products with the prototypes (`Found.dot`).
        quantiles: shares q.

    Returns:
        {q: float64 [K]}; nan for a part that owns no patch.
    """
    own = maps.argmax(-1)
    values = np.take_along_axis(dot, own[..., None], axis=-1)[..., 0]
    return least(own, values, maps.shape[-1] - 1, quantiles)


def least(owner, values, parts, quantiles) -> dict:
    """Return `thresholds` from less: what owns each patch, and its own product.

    Args:
        owner: int [M, h, w], K = the background.
        values: [M, h, w] product with the prototype of the owner.
        parts: K.
        quantiles: see `thresholds`.
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
        rows: of `Parts.outputs`, with "label", in order of "index".
        removed: parts that were away all along.

    Returns:
        Accuracies of the prediction by their own names, of the first stage with
        "_stage_1"; groups; "nmi", "ari" at keypoints and "dense_nmi", "dense_ari" by
        pixel; "keypoint_error" (fitted on the even images, judged on the odd ones);
        IoUs; accuracies before swapped backgrounds and "bg_gap"; "without_k".
    """
    labels, found = rows["label"], {}
    for key, end in (("logits", ""), ("logits_stage_1", "_stage_1")):
        if key in rows:
            values = classification(rows[key], labels)
            found |= {f"{k}{end}": v for k, v in values.items()}
            if "group" in rows:
                values = groups(rows[key], labels, rows["group"])
                found |= {f"{k}{end}": v for k, v in values.items()}
    found |= _swapped(rows, labels)
    if "logits_without" in rows:
        right = rows["logits_without"].argmax(-1) == labels[:, None]  # [M, K]
        gone = set(removed)
        left = [k for k in range(right.shape[1] + len(gone)) if k not in gone]
        means = zip(left, right.mean(0), strict=True)
        found |= {f"without_{k}": float(v) for k, v in means}
    return found | _parts(rows)


def _swapped(rows, labels):
    found = {}
    for name in ("swap_same", "swap_random"):
        if f"logits_{name}" in rows:
            right = rows[f"logits_{name}"].argmax(-1) == labels
            found[name] = float(right.mean())
    if len(found) == 2:
        found["bg_gap"] = background_gap(found["swap_same"], found["swap_random"])
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
