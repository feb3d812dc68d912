"""NT-Xent, InfoNCE, KoLeo."""

import einops
import jax
import jax.numpy as jnp

from vitssl.losses import regression
from vitssl.ops import accelerator

# Hides a logit. Finite: a row with every entry hidden must not become nan.
_HIDDEN = -1e30


def nt_xent(a, b, valid=None, *, temperature, cosine=True, eps=1e-8):
    """SimCLR's loss: pick out the other view of the same image among 2B - 1.

    Args:
        a, b: [B, D] or [B, N, D] (tokens are rows), row i of both from image i.
        valid: [B] or [B, N] bool, pairs that count, as anchors and as negatives.
        temperature: divides the similarities (0.1 in H-JEPA, 0.5 in SimCLR).
        cosine: normalise rows first; False compares by dot product.
        eps: shortest length a row is divided by.

    Returns:
        loss: [] mean cross-entropy over 2B anchors, in nats; log(2B - 1) at chance.
        metrics: "accuracy" share of anchors whose positive beats every negative (a
            tie does not: collapsed features score 0), "positive_similarity" and
            "negative_similarity" mean plain similarity of pairs and of non-pairs.

    Source: Chen et al. 2020, arXiv:2002.05709, Eq. 1.
    """
    if a.shape != b.shape or a.ndim not in (2, 3):
        raise ValueError(
            f"nt_xent: want two [B, D] or [B, N, D], got {a.shape} and {b.shape}"
        )
    keep = jnp.ones(a.shape[:-1], bool) if valid is None else valid > 0
    if keep.shape != a.shape[:-1]:
        raise ValueError(f"nt_xent: valid {keep.shape} is not {a.shape[:-1]}")
    keep = einops.rearrange(jnp.concatenate([keep, keep]), "... -> (...)")  # [2B]
    z = jnp.concatenate([a, b]).astype(jnp.float32)
    z = einops.rearrange(z, "... d -> (...) d")  # [2B, D]
    z = jnp.where(keep[:, None], z, 0.0)
    z = regression.unit(z, eps) if cosine else z
    similarity = jnp.matmul(z, z.T, precision=accelerator.precision())  # [2B, 2B]
    n = len(z)
    pair = jnp.roll(jnp.arange(n), n // 2)  # Anchor i's positive is i + B mod 2B.
    candidate = keep & ~jnp.eye(n, dtype=bool)
    logits = jnp.where(candidate, similarity / temperature, _HIDDEN)
    positive = jnp.take_along_axis(logits, pair[:, None], 1)[:, 0]  # [2B]
    loss = regression.masked_mean(jax.nn.logsumexp(logits, 1) - positive, keep)
    return loss, _metrics(similarity, candidate, keep, pair)


def infonce(a, b, *, temperature, eps=1e-12):  # [B, D], row i of both from image i
    """Cross-view InfoNCE: pick out the other view among the B of the other side.

    Its negatives are B - 1 per anchor, all of the other view, where NT-Xent has
    2 B - 2 of both. Rows are normalised here; `eps` is the shortest length.

    Returns:
        loss: [] mean of the cross-entropies a -> b and b -> a, in nats; log B at
            chance, 0 of an empty batch.
        metrics: as of `nt_xent`.

    Source: w2sg-arnav/HierarchialViT hvit/training/losses.py:InfoNCELoss; van den
    Oord et al. 2018, arXiv:1807.03748, Eq. 4.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"infonce: want two [B, D], got {a.shape} and {b.shape}")
    z = regression.unit(jnp.stack([a, b]), eps)  # [2, B, D]
    similarity = jnp.matmul(z[0], z[1].T, precision=accelerator.precision())  # [B, B]
    n = len(a)
    if not n:
        return jnp.float32(0.0), {}
    logits = similarity / temperature
    positive = jnp.diagonal(logits)
    rows = jax.nn.logsumexp(logits, 1) - positive
    columns = jax.nn.logsumexp(logits, 0) - positive
    both = jnp.concatenate([similarity, similarity.T])  # [2B, B]
    pair = jnp.tile(jnp.arange(n), 2)
    always = jnp.ones(2 * n, bool)
    metrics = _metrics(both, jnp.ones_like(both, bool), always, pair)
    return (rows.mean() + columns.mean()) / 2, metrics


def _metrics(similarity, candidate, keep, pair):
    """Accuracy and mean similarities of pairs and non-pairs; no gradient."""
    similarity = jax.lax.stop_gradient(similarity)  # [2B, 2B]
    is_pair = jnp.arange(similarity.shape[1]) == pair[:, None]
    negative = candidate & keep[:, None] & ~is_pair
    positive = jnp.take_along_axis(similarity, pair[:, None], 1)[:, 0]  # [2B]
    best = jnp.where(negative, similarity, -jnp.inf).max(1)
    return {
        "accuracy": regression.masked_mean((positive > best).astype(jnp.float32), keep),
        "positive_similarity": regression.masked_mean(positive, keep),
        "negative_similarity": regression.masked_mean(similarity, negative),
    }


def infonce_one_way(a, b, *, temperature=0.1):  # [B, D] of two views -> []
    """Pick out row i of `b` for row i of `a` among the rows of `b`; one direction.

    Rows are normalised here. Mean cross-entropy in nats; log B at chance.

    Source: van den Oord et al. 2018, arXiv:1807.03748, Eq. 4.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(
            f"infonce_one_way: want two [B, D], got {a.shape} and {b.shape}"
        )
    a, b = regression.unit(a, 1e-12), regression.unit(b, 1e-12)
    logits = jnp.matmul(a, b.T, precision=accelerator.precision()) / temperature
    return (jax.nn.logsumexp(logits, 1) - jnp.diagonal(logits)).mean()


def koleo(x, valid=None, eps=1e-8):  # [N, D], [N] bool -> []
    """Spread rows over the sphere: minus the mean log distance to the nearest.

    Rows are normalised here; at least two must be valid. `eps` is added to distances.

    Source: Sablayrolles et al. 2019, arXiv:1806.03198, Eq. 2, as in DINOv2.
    """
    valid = jnp.ones(len(x), bool) if valid is None else valid
    x = regression.unit(jnp.where(valid[:, None], x, 0), eps)
    cosine = jnp.matmul(x, x.T, precision=accelerator.precision())
    other = valid[None] & ~jnp.eye(len(x), dtype=bool)
    nearest = jnp.where(other, cosine, -jnp.inf).argmax(1)  # [N]
    gap = jnp.square(x - x[nearest] + eps).sum(1)
    # Rows that do not count lie at distance 0, where a root has no gradient.
    distance = jnp.sqrt(jnp.where(valid, gap, 1.0))
    return regression.masked_mean(-jnp.log(distance + eps), valid)
