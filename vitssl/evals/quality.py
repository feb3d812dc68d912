"""How much of their space features use: rank, variance, angles, signs of collapse.

Everything here is numpy in float64 on features [N, D] a caller has extracted, except
`collapse_metrics`, which runs on the device inside the training step.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vitssl.evals import evaluator

# Share of the variance that `n_components_99` explains.
VARIANCE = 0.99


def subsample(features, most=10_000):
    """At most `most` rows of [N, D], evenly spaced (files are sorted by class)."""
    if len(features) <= most:
        return features
    return features[np.linspace(0, len(features) - 1, most).astype(int)]


def singular_values(features, *, centre=True):
    """Singular values of [N, D], largest first: [min(N, D)] float64.

    From the eigenvalues of the smaller Gram matrix: ten times faster than an SVD,
    and a direction below 1e-7 of the largest counts as zero.
    """
    features = np.asarray(features, np.float64)
    x = features - features.mean(0) if centre else features
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    square = np.linalg.eigvalsh(gram)[::-1]
    eps = np.finfo(np.float64).eps
    # Rounding of the product, and of the mean (constant features leave 1e-16).
    noise = max(
        len(gram) * eps * square[0], (10 * eps) ** 2 * np.square(features).sum()
    )
    return np.sqrt(np.where(square > noise, square, 0.0))


def effective_rank(values):
    """exp of the entropy of singular values [K] over their sum: 1 to their number.

    0 if all values are 0 (constant features).

    Source: Roy, Vetterli 2007, "The effective rank".
    """
    total = values.sum()
    if total <= 0:
        return 0.0
    p = values[values > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def rankme(features, eps=1e-7):
    """RankMe of [N, D]: effective rank of the features as they are, not centred.

    exp(-sum p_k log p_k) with p_k = sigma_k / sum sigma + eps.

    Source: Garrido et al. 2023, arXiv:2210.02885, Eq. 1.
    """
    values = singular_values(features, centre=False)
    p = values / max(values.sum(), np.finfo(np.float64).tiny) + eps
    return float(np.exp(-(p * np.log(p)).sum()))


def rank_metrics(features, *, variance_threshold=VARIANCE):
    """How many directions the features [N, D] spread over.

    Returns:
        "effective_rank", "rank_ratio" (over D), "rankme", "feature_dim",
        "n_components_99" (principal components that explain `variance_threshold`),
        "variance_first_component" and "variance_first_10" (shares of the variance),
        "singular_value_max", "singular_value_mean"; all but rankme centred.
    """
    values = singular_values(features)
    width = features.shape[1]
    total = np.square(values).sum()
    share = np.square(values) / (total if total > 0 else 1.0)
    rank = effective_rank(values)
    # The last sum may round to below the threshold 1.
    count = min(np.searchsorted(np.cumsum(share), variance_threshold) + 1, len(share))
    return {
        "effective_rank": rank,
        "rank_ratio": rank / width,
        "rankme": rankme(features),
        "feature_dim": float(width),
        "n_components_99": float(count if total > 0 else 0),
        "variance_first_component": float(share[0]),
        "variance_first_10": float(share[:10].sum()),
        "singular_value_max": float(values[0]),
        "singular_value_mean": float(values.mean()),
    }


def variance_metrics(features):
    """Spread of each dimension of [N, D] and how dimensions move together.

    Returns:
        "mean_variance", "std_variance", "min_variance", "max_variance" over D of
        the biased variance; "mean_feature", "std_feature" of all entries;
        "mean_covariance" and "mean_abs_correlation" over the D (D - 1) off-diagonal
        entries (a constant dimension correlates with nothing).
    """
    x = np.asarray(features, np.float64)
    centred = x - x.mean(0)
    variance = np.square(centred).mean(0)  # [D]
    covariance = centred.T @ centred / max(1, len(x) - 1)  # [D, D]
    std = np.sqrt(np.diagonal(covariance))
    std = np.where(std > 0, std, 1.0)
    off = ~np.eye(x.shape[1], dtype=bool)
    count = max(1, off.sum())
    correlation = covariance / std / std[:, None]
    return {
        "mean_variance": float(variance.mean()),
        "std_variance": float(variance.std()),
        "min_variance": float(variance.min()),
        "max_variance": float(variance.max()),
        "mean_feature": float(x.mean()),
        "std_feature": float(x.std()),
        "mean_covariance": float(covariance[off].sum() / count),
        "mean_abs_correlation": float(np.abs(correlation[off]).sum() / count),
    }


def angle_metrics(features, *, rows=1024):
    """Cosine similarities over all pairs of different rows of [N, D], N >= 2.

    Args:
        rows: compared at a time; memory is rows x N numbers.

    Returns:
        "mean_similarity", "std_similarity", "min_similarity", "max_similarity",
        "mean_self_similarity" (below 1 only if there are zero rows),
        "uniformity" log mean exp(-2 |x - y|^2) of unit rows (lower spreads more),
        "uniformity_cosine" log mean exp(2 cos), what the original calls uniformity.

    Source: Wang, Isola 2020, arXiv:2005.10242, Eq. 3; the second
        jonwiggins/H-JEPA src/evaluation/feature_quality.py.
    """
    x = np.asarray(features, np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-8)
    count, total, square, near, near_cosine = 0, 0.0, 0.0, 0.0, 0.0
    low, high = np.inf, -np.inf
    for start in range(0, len(x), rows):
        block = x[start : start + rows] @ x[start:].T
        # Each pair once: what lies right of the diagonal.
        cosine = block[np.triu(np.ones(block.shape, bool), k=1)]
        if not cosine.size:
            continue
        count += cosine.size
        total += cosine.sum()
        square += np.square(cosine).sum()
        low, high = min(low, cosine.min()), max(high, cosine.max())
        near += np.exp(4 * cosine - 4).sum()  # |x - y|^2 = 2 - 2 cos
        near_cosine += np.exp(2 * cosine).sum()
    if not count:
        raise ValueError(f"angle_metrics: needs 2 rows or more, got {len(x)}")
    mean = total / count
    return {
        "mean_similarity": float(mean),
        "std_similarity": float(np.sqrt(max(0.0, square / count - mean * mean))),
        "min_similarity": float(low),
        "max_similarity": float(high),
        "mean_self_similarity": float(np.square(x).sum(1).mean()),
        "uniformity": float(np.log(near / count)),
        "uniformity_cosine": float(np.log(near_cosine / count)),
    }


def collapse_flags(metrics, *, rank_ratio=0.1, variance=0.01, components=0.1):
    """Which signs of collapse `metrics` show, each 0.0 or 1.0.

    Args:
        metrics: of `rank_metrics` and `variance_metrics`.
        rank_ratio: smallest healthy effective rank, as a share of D.
        variance: smallest healthy mean variance.
        components: smallest healthy `n_components_99`, as a share of D.

    Returns:
        "rank_collapse", "variance_collapse", "dimension_collapse", "any_collapse".
    """
    few = metrics["n_components_99"] < components * metrics["feature_dim"]
    flags = {
        "rank_collapse": metrics["rank_ratio"] < rank_ratio,
        "variance_collapse": metrics["mean_variance"] < variance,
        "dimension_collapse": few,
    }
    flags["any_collapse"] = any(flags.values())
    return {name: float(flag) for name, flag in flags.items()}


def feature_quality(features, *, most=10_000, variance_threshold=VARIANCE, **flags):
    """All metrics of this file on at most `most` rows of [N, D], {name: float}.

    Args:
        **flags: thresholds of `collapse_flags`.

    Raises:
        ValueError: not [N, D] with N >= 2, or not finite.
    """
    features = np.asarray(features)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"feature_quality: want [N >= 2, D], got {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("feature_quality: features hold nan or inf")
    x = subsample(features, most).astype(np.float64)
    out = rank_metrics(x, variance_threshold=variance_threshold)
    out |= variance_metrics(x)
    out |= angle_metrics(x)
    return out | collapse_flags(out, **flags)


def spread(features) -> dict[str, float]:
    """Return how far and in how many directions features [N, D] spread.

    "std" (mean over dimensions), "rankme", "effective_rank", and "collapsed": 1.0 if
    any of `collapse_flags` is set.
    """
    x = subsample(np.asarray(features, np.float64))
    variance = x.var(0)
    found = rank_metrics(x) | {"mean_variance": float(variance.mean())}
    # A few images cannot span many dimensions, which is no collapse.
    room = max(1, min(x.shape[1], len(x) - 1))
    shares = {"rank_ratio": found["effective_rank"] / room, "feature_dim": room}
    return {
        "std": float(np.sqrt(variance).mean()),
        "rankme": found["rankme"],
        "effective_rank": found["effective_rank"],
        "collapsed": collapse_flags(found | shares)["any_collapse"],
    }


@dataclasses.dataclass(frozen=True)
class Quality(evaluator.Evaluator):
    """Measures how the features spread, by `feature_quality` and `spread`."""

    labelled = False
    columns = {"rankme": ("RankMe", "{:.1f}"), "std": ("std", "{:.3g}")}

    def __call__(self, bank, query, classes) -> dict[str, float]:
        """Return the metrics of the query's vectors."""
        del bank, classes
        return feature_quality(query["vector"]) | spread(query["vector"])


def collapse_metrics(features, *, centre=True, rows=100):
    """Signs of collapse cheap enough for every training log, in jnp.

    Args:
        features: [B, D], or [B, ..., D] whose tokens are columns.
        centre: measure spread and rank about the batch mean. False is the original:
            the deviation of all entries from their one mean, rank not centred.
        rows: at most this many samples enter the rank.

    Returns:
        "std": [] unbiased deviation over the batch, mean over D; 0 on collapse.
        "norm": [] mean length of a row.
        "effective_rank": [] of at most `rows` rows; 0 if they are all equal.
        No gradient flows through them.
    """
    x = jax.lax.stop_gradient(features).astype(jnp.float32)
    x = x.reshape(len(x), -1)  # [B, D]
    norm = jnp.sqrt(jnp.square(x).sum(1)).mean()
    std = jnp.std(x, 0, ddof=min(1, len(x) - 1)).mean()
    few = x[:rows]
    eps = jnp.finfo(jnp.float32).eps
    floor = (10 * eps) ** 2 * jnp.square(few).sum()  # Rounding of the mean.
    if centre:
        few = few - few.mean(0)
    else:
        std = jnp.std(x, ddof=1)
    tall = len(few) >= few.shape[1]
    gram = jnp.matmul(*((few.T, few) if tall else (few, few.T)), precision="highest")
    square = jnp.linalg.eigvalsh(gram)
    # Below this an eigenvalue is rounding: 1 is 1e-3 of the largest singular value.
    noise = jnp.maximum(len(gram) * eps * square.max(), floor)
    values = jnp.sqrt(jnp.where(square > noise, square, 0.0))
    p = values / jnp.maximum(values.sum(), 1e-30)
    entropy = -(p * jnp.log(jnp.where(p > 0, p, 1.0))).sum()
    rank = jnp.where(values.sum() > 0, jnp.exp(entropy), 0.0)
    return {"std": std, "norm": norm, "effective_rank": rank}
