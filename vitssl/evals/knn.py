"""Exact weighted k-nearest-neighbour classification in bounded memory.

The bank is scanned in blocks. Matrix products rank its rows, and the best few of each
query are then compared again one by one in float64: a matrix product in float32 rounds
differently for every block size. So the answer does not depend on the blocks, and of
equal neighbours the lower index comes first (the limit: more than `_SPARE` rows that
are as near as the k-th to within float32, yet are not copies of one row).
"""

import concurrent.futures
import dataclasses
import functools
import math
from typing import Literal

import einops
import jax
import jax.numpy as jnp
import numpy as np

from vitssl import errors
from vitssl.data import loader
from vitssl.evals import accuracy, evaluator, ranking

Metric = Literal["cosine", "euclidean"]

# Candidates compared beyond the k wanted: rows that the rounding of the matrix product
# may have put on the wrong side of the k-th.
_SPARE = 8
# Rows of the bank that estimate the centre of the features.
_CENTRE = 4096
# On a CPU, queries per matrix product, and scores: 10 MB, which its cache holds.
_CPU_QUERIES, _CPU_SCORES = 256, 2560 * 1024
# Numbers that a thread gathers at a time for the comparison: in float64 1 MiB, which
# stays in a core's cache.
_GATHER = 2**17


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a search is cut up.

    Attributes:
        held: queries on the device at a time; the bank is read once for each lot.
        query: queries per matrix product; divides `held`.
        bank: rows of the bank per matrix product.
    """

    held: int
    query: int
    bank: int


def blocks(
    queries: int, rows: int, width: int, keep: int, max_bytes: int, fewest: int = 256
) -> Blocks:
    """Return the largest blocks whose search stays within `max_bytes` on the device.

    On a CPU the scores of a product stay in its cache, too.

    Args:
        keep: candidates held for each query.
        max_bytes: limit on arguments, results and temporaries of the search.
        fewest: rows of the bank below which rather the queries are cut.

    Raises:
        UsageError: not even one query fits.
    """
    floats = max_bytes // 4
    least = min(rows, max(fewest, 2 * keep))
    each = 2 * width + 4 * keep  # Held for a query: itself twice, candidates in, out.

    def room(held, query):
        # Per query at work: itself, the union of old and new candidates. Per pair: the
        # product, its masked and padded copy. Two blocks in flight, one prepared.
        fixed = held * each + query * (2 * width + 12 * keep)
        return (floats - fixed) // (4 * query + 4 * width + 4)

    short = min(rows, keep)  # A block holds at least the candidates.
    held = queries
    while held > 1 and (held * each > floats // 4 or room(held, 1) < short):
        held = math.ceil(held / 2)
    on_cpu = jax.default_backend() == "cpu"
    query = min(held, _CPU_QUERIES if on_cpu else 1024)
    while query > 1 and room(held, query) < least:
        query = math.ceil(query / 2)
    held = math.ceil(held / query) * query
    fit = min(rows, room(held, query))
    if on_cpu:
        fit = min(fit, max(short, _CPU_SCORES // query))
    if fit < short:
        need = 4 * (each + 2 * width + 12 * keep + short * (8 + 4 * width))
        raise errors.UsageError(
            f"knn_max_bytes={max_bytes}: too few for features of width {width} and "
            f"{keep} candidates; give {need} or, for speed, much more"
        )
    # Blocks of equal size, so that the last is not mostly a repetition.
    return Blocks(held, query, math.ceil(rows / math.ceil(rows / fit)))


def search(
    bank,
    query,
    k: int,
    *,
    metric: Metric = "cosine",
    max_bytes: int = 2**28,
    leave_one_out: bool = False,
):
    """Find the k nearest rows of the bank for every query, exactly.

    Args:
        bank: [M, D] array, memory map or anything that slices into one.
        query: [Q, D].
        k: neighbours, at most M (M - 1 when leaving one out).
        metric: "cosine" compares directions; a row of zeros has cosine 0 to all.
        max_bytes: memory used on the device; the host holds no copy of the bank.
        leave_one_out: row i of the bank is query i, and no neighbour of itself.

    Returns:
        score: float64 [Q, k], falling: the cosine, or minus the euclidean distance.
        index: int32 [Q, k] rows of the bank; of equal scores the lower is first.

    Raises:
        ValueError: shapes that do not fit, or k out of range.
        NonFiniteError: a feature is not a finite number.
    """
    m, q = len(bank), len(query)
    if bank.ndim != 2 or query.ndim != 2 or bank.shape[1] != query.shape[1]:
        raise ValueError(f"knn: want [M, D], [Q, D]: {bank.shape}, {query.shape}")
    if leave_one_out and m != q:
        raise ValueError(f"knn: leave_one_out needs bank = queries; {m} and {q} rows")
    if not 1 <= k <= m - leave_one_out:
        raise ValueError(f"knn: k={k} of {m} rows; 1 to {m - leave_one_out}")
    keep = min(k + _SPARE, m - leave_one_out)
    cut = blocks(q, m, bank.shape[1], keep, max_bytes)
    # Differences to a point amid the features keep the digits that tell them apart.
    middle = jax.device_put(np.asarray(bank[:_CENTRE], np.float32))
    middle = jax.device_get(_unit(middle) if metric == "cosine" else middle)
    centre = jax.device_put(middle.mean(0, dtype=np.float64).astype(np.float32))
    found = []
    for start in range(0, q, cut.held):
        lot = np.asarray(query[start : start + cut.held], np.float32)
        own = np.full(len(lot), -1)
        if leave_one_out:
            own = np.arange(start, start + len(lot))
        near = _scan(bank, lot, own, centre, cut, keep, metric == "cosine")
        found.append(_compare(bank, lot, near, k, metric))
    score, index = (np.concatenate(part) for part in zip(*found, strict=True))
    if not np.isfinite(score).all():
        raise errors.NonFiniteError("k-NN: a feature is not a finite number")
    return score, index


def _scan(bank, lot, own, centre, cut, keep, cosine):
    """Return the indices [Q, keep] of candidates for one lot of queries [Q, D]."""
    m, q = len(bank), len(lot)
    pad = -q % cut.query
    lot = np.pad(lot, ((0, pad), (0, 0)))
    own = np.pad(own.astype(np.int32), (0, pad), constant_values=-1)
    lot = einops.rearrange(lot, "(n q) d -> n q d", q=cut.query)
    own = einops.rearrange(own, "(n q) -> n q", q=cut.query)
    shape = (*own.shape, keep)
    best = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32)
    lot, own, best = jax.device_put((lot, own, best))

    def block(i):
        # The last block begins early, to have the shape of the others; its rows below
        # `new` were seen before.
        start, new = min(i * cut.bank, m - cut.bank), i * cut.bank
        rows = np.asarray(bank[start : start + cut.bank], np.float32)
        return jax.device_put((rows, np.int32(start), np.int32(new)))

    count = math.ceil(m / cut.bank)
    ahead = block(0)
    for i in range(count):
        best = _update(best, lot, own, centre, *ahead, cosine=cosine)
        # The next block travels while this one is searched; never a third.
        ahead = block(i + 1) if i + 1 < count else None
        jax.block_until_ready(best)
    return jax.device_get(best[1]).reshape(-1, keep)[:q]


@functools.partial(jax.jit, static_argnames="cosine", donate_argnames="best")
def _update(best, query, own, centre, bank, start, new, *, cosine):
    """Merge the candidates of one block of the bank into the best so far.

    Args:
        best: (nearness [n, q, keep], index [n, q, keep]).
        query, own: [n, q, D], and the row [n, q] that is no neighbour (-1: none).
        centre: [D].
        bank: [m, D], rows start .. start + m of it, of which those from `new` count.
    """
    m, keep = len(bank), best[0].shape[-1]
    rows = _offset(bank, centre, cosine)
    half = 0.5 * (rows * rows).sum(1)  # [m]
    blank = ~bank.any(1)  # [m]
    number = start + jnp.arange(m, dtype=jnp.int32)
    largest = jax.lax.top_k if jax.default_backend() == "cpu" else _largest

    # Half the squared distance, negative, but for what is equal for all rows, is one
    # product; a pass over [q, m] more, for what is rare, is a sixth of the time.
    rows = jnp.concatenate([rows, -half[:, None]], 1)  # [m, D + 1]

    def exceptions(score, x, delta, self_row):
        if cosine:  # Zeros have no direction: cosine 0, squared distance 2.
            right_angle = 0.5 * (delta * delta).sum(1, keepdims=True) - 1
            score = jnp.where(blank, right_angle, score)
            score = jnp.where(x.any(1, keepdims=True), score, 0.0)
        skip = (number < new) | (number == self_row[:, None])
        return jnp.where(skip, -jnp.inf, score)

    def one(part):
        near, index, x, self_row = part
        delta = _offset(x, centre, cosine)  # [q, D]
        ones = jnp.ones((len(x), 1), x.dtype)
        augmented = jnp.concatenate([delta, ones], 1)  # [q, D + 1]
        score = jnp.einsum("qd,md->qm", augmented, rows, precision="highest")
        rare = (start < new) | (self_row >= 0).any()
        if cosine:
            rare |= blank.any() | ~x.any(1).all()
        score = jax.lax.cond(
            rare, exceptions, lambda score, *_: score, score, x, delta, self_row
        )
        value, column = largest(score, min(keep, m))
        # What was found before has the lower indices, and top_k keeps the order of
        # equals: it goes first.
        near = jnp.concatenate([near, value], 1)
        index = jnp.concatenate([index, number[column]], 1)
        near, place = jax.lax.top_k(near, keep)
        return near, jnp.take_along_axis(index, place, 1)

    return jax.lax.map(one, (*best, query, own))


@jax.jit
def _unit(x):
    """Return [.., D] with rows of length one; a row of zeros stays."""
    squared = (x * x).sum(-1, keepdims=True)
    return x / jnp.sqrt(jnp.where(squared > 0, squared, 1.0))


def _offset(x, centre, cosine):
    """Return x - centre, of the direction of x if `cosine`, without mere rounding."""
    away = (_unit(x) if cosine else x) - centre
    return jnp.where(jnp.abs(away) < 3e-7 * jnp.abs(centre), 0.0, away)


def _largest(score, k):
    """Return what `jax.lax.top_k` does, in the way that suits accelerators.

    They sort all m columns for it. But the k largest lie in the k groups of columns
    with the largest maxima, because each group ahead of theirs holds an element ahead
    of them: two short selections replace the long one.
    """
    m = score.shape[1]
    size = 2 ** round(math.log2(m / k) / 2)
    score = jnp.pad(score, ((0, 0), (0, -m % size)), constant_values=-jnp.inf)
    score = einops.rearrange(score, "q (g s) -> q g s", s=size)
    _, group = jax.lax.top_k(score.max(-1), min(k, score.shape[1]))
    group = jnp.sort(group, -1)  # Rising, so that ties go to the lower column.
    inside = jnp.take_along_axis(score, group[:, :, None], 1)  # [q, k, s]
    value, place = jax.lax.top_k(einops.rearrange(inside, "q g s -> q (g s)"), k)
    column = jnp.take_along_axis(group, place // size, 1) * size + place % size
    return value, jnp.minimum(column, m - 1)


def _compare(bank, query, near, k, metric):
    """Return the best k of the candidates `near` [Q, keep] by scores in float64."""

    def part(start):
        index = near[start : start + size]  # [q, keep]
        x = np.asarray(query[start : start + size], np.float64)
        y = np.asarray(bank[index], np.float64)  # [q, keep, D]
        if metric == "cosine":
            length = np.sqrt(np.vecdot(y, y) * np.vecdot(x, x)[:, None])
            score = np.vecdot(y, x[:, None]) / np.where(length > 0, length, 1)
        else:
            y -= x[:, None]
            score = -np.sqrt(np.vecdot(y, y))
        order = np.lexsort((index, -score), axis=-1)[:, :k]
        return (np.take_along_axis(a, order, 1) for a in (score, index))

    size = max(1, _GATHER // (near.shape[1] * query.shape[1]))
    # More threads than cores take each other's cache.
    with concurrent.futures.ThreadPoolExecutor(loader.cores()) as pool:
        parts = list(pool.map(part, range(0, len(query), size)))
    return (np.concatenate(a) for a in zip(*parts, strict=True))


def weights(score, *, temperature: float):  # [Q, k] -> [Q, k]
    """Return the votes of neighbours by their scores; each row sums to 1.

    exp(cos / temperature) with "cosine" (Wu et al. 2018, arXiv:1805.01978, section
    3.4, where it is 0.07), exp(-distance / temperature) with "euclidean".
    """
    logit = np.asarray(score, np.float64) / temperature
    share = np.exp(logit - logit.max(1, keepdims=True))
    return share / share.sum(1, keepdims=True)


def vote(weight, label, classes: int):  # [Q, k], int [Q, k] -> [Q, C]
    """Return class probabilities: the summed weights of the neighbours by label."""
    q = len(weight)
    cell = np.arange(q)[:, None] * classes + np.asarray(label, np.int64)
    total = np.bincount(cell.ravel(), np.ravel(weight), minlength=q * classes)
    return einops.rearrange(total, "(q c) -> q c", c=classes)


@dataclasses.dataclass(frozen=True)
class KNN(evaluator.Evaluator):
    """Classifies by the k nearest images of the bank, for every k and temperature.

    A class without a vote is never among the five of top-5; utkutpcgl/ViTFreeze counts
    such classes, too.

    Attributes:
        k, temperature: to try; the first of each is reported. A k beyond the size of
            the bank means the whole bank.
        metric, max_bytes: as in `search`; max_bytes also bounds the class votes on the
            host.
        standardised: measure a second time with every feature standardised by the bank,
            which takes away what is common to all images.
    """

    k: tuple[int, ...]
    temperature: tuple[float, ...]
    metric: Metric = "cosine"
    max_bytes: int = 2**28
    standardised: bool = False

    prefix = "knn_"
    several = True
    columns = {
        "top1": ("k-NN top-1", "{:.1%}"),
        "standardised_top1": ("standardised", "{:.1%}"),
        "map": ("k-NN mAP", "{:.1%}"),
    }

    def __str__(self) -> str:
        """Return "k-NN: k=20, cosine, temperature 0.07"."""
        first = f"k={self.k[0]}, {self.metric}, temperature {self.temperature[0]:g}"
        return f"k-NN: {first}"

    def __call__(self, bank, query, classes) -> dict[str, float]:
        """Return "top1", "top5", "confusion" [C, C] and "images" of the first pair.

        Of several pairs also "k<k>_t<t>/top1", "/top5"; and "standardised_top1", if
        that is wanted. Of images of several labels "map": a label's score is the share
        of the neighbours, by their weights, that have it.
        """
        found = self._sweep(bank, query, classes)
        scores, counts = next(iter(found.values()))
        values = dict(scores)
        if counts is not None:
            values |= {"confusion": counts, "images": float(counts.sum())}
        if len(found) > 1:
            for (k, t), (each, _) in found.items():
                values |= {f"k{k}_t{t:g}/{key}": value for key, value in each.items()}
        if self.standardised and "top1" in values:
            first = dict(k=self.k[:1], temperature=self.temperature[:1])
            again = dataclasses.replace(self, **first)
            found = again.sweep(*_standardised(bank, query), classes)
            values["standardised_top1"] = next(iter(found.values()))["top1"]
        return values

    def sweep(self, bank, query, classes) -> dict[tuple[int, float], dict[str, float]]:
        """Return {(k, temperature): {"top1": share, "top5": share}, or {"map": .}}.

        The neighbours are searched once, for the largest k; rows without a label take
        no part.
        """
        found = self._sweep(bank, query, classes)
        return {pair: scores for pair, (scores, _) in found.items()}

    def _sweep(self, bank, query, classes) -> dict:
        """Return {(k, temperature): (scores, confusion [C, C])}."""
        bank, bank_label = _labelled(bank)
        query, query_label = _labelled(query)
        ks = tuple(dict.fromkeys(min(k, len(bank)) for k in self.k))
        score, index = search(
            bank, query, max(ks), metric=self.metric, max_bytes=self.max_bytes
        )
        several = bank_label.ndim == 2
        cells = classes * max(ks) if several else classes + max(ks)
        size, found = max(1, self.max_bytes // (32 * cells)), {}
        for k in ks:
            for tau in self.temperature:
                rows, named = [], []
                for start in range(0, len(query), size):
                    part = slice(start, start + size)
                    weight = weights(score[part, :k], temperature=tau)
                    label = bank_label[index[part, :k]]  # [q, k] or [q, k, K]
                    if several:
                        rows.append(np.einsum("qk,qkc->qc", weight, label))
                        continue
                    chance = _ranked(weight, label, classes)
                    rows.append(accuracy.rank(chance, query_label[part]))
                    named.append(chance.argmax(1))
                rows = np.concatenate(rows)
                if several:
                    each = ranking.average_precision(rows, query_label)
                    found[k, tau] = {"map": ranking.mean(each)}, None
                    continue
                named = accuracy.confusion(query_label, np.concatenate(named), classes)
                found[k, tau] = accuracy.top(rows, classes), named
        return found


def _ranked(weight, label, classes):
    """Return the `vote`, -inf for a class of no neighbour: it was not named."""
    named = vote(np.ones_like(weight), label, classes) > 0
    return np.where(named, vote(weight, label, classes), -np.inf)


def _standardised(bank, query):
    """Return both with vectors that have mean 0 and variance 1 over the bank."""
    x = bank["vector"]
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    std = np.where(std > 1e-6 * np.abs(mean), std, 1)  # Less is rounding.

    def scaled(y):
        return ((y - mean) / std).astype(np.float32)

    return (part | {"vector": scaled(part["vector"])} for part in (bank, query))


def _labelled(images):
    """Return (vectors, labels) of the rows that have a label; no copy if all have.

    Labels are int [M], or 0 and 1 in [M, K] where images have several.
    """
    features, label = images["vector"], np.asarray(images["label"])
    if "labels" in images:
        return features, images["labels"]
    has = label >= 0
    if not has.any():
        raise ValueError("knn: no row has a label")
    return (features, label) if has.all() else (features[has], label[has])
