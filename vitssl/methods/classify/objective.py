"""Cross-entropies of classification; all in float32, averaged over the batch."""

import jax
import jax.numpy as jnp
import numpy as np


def soft_targets(label, classes, smoothing=0.0):
    """Return the smoothed one-hot targets [B, K] of labels [B].

    The true class has 1 - s + s / K, the others s / K.

    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    off = smoothing / classes
    return jax.nn.one_hot(label, classes) * (1 - smoothing) + off


def cross_entropy(logits, target, weight=None):
    """Return the mean of -sum_k t_k log p_k over the batch: [].

    Args:
        logits: [B, K].
        target: [B, K], rows that sum to one.
        weight: [K] weight of every class, or None. The mean is then weighted by the
            weights of the targets, as PyTorch does.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    if weight is None:
        return -(target * log_p).sum(-1).mean()
    rows = target * weight
    return -(rows * log_p).sum() / rows.sum()


def consistency(logits, others):
    """Return the mean over the batch of KL(softmax(logits) || softmax(other)): [].

    Args:
        logits: [B, K] of all streams together.
        others: [S, B, K] of each by itself; the sum of their divergences.

    Source: w2sg-arnav/HierarchialViT enable_consistency_loss_heads (its heads, for
    which it has no loss).
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    log_q = jax.nn.log_softmax(jnp.asarray(others, jnp.float32), axis=-1)
    each = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)  # [S, B]
    return each.mean(-1).sum()


def class_weights(counts):
    """Return the weight N / (K n_c) of every class, 1 for a class without images.

    Args:
        counts: [K] training images per class.

    Source: w2sg-arnav/HierarchialViT hvit/data/dataset.py (scikit-learn's "balanced").
    """
    counts = np.asarray(counts, np.float32)
    full = counts.sum() / (len(counts) * np.maximum(counts, 1))
    return np.where(counts > 0, full, 1.0).astype(np.float32)


def labelled(logits, label, *, smoothing=0.0, weight=None):
    """Return the cross-entropy of labels, smoothed and weighted as PyTorch does: [].

    With weights w, the class terms of the smoothing have their own, and the sum over
    the batch is divided by the sum of w over the labels.

    Args:
        logits: [B, K].
        label: [B] int.
        smoothing: share of a target that is spread over all classes.
        weight: [K] weight of every class, or None.
    """
    if weight is None:
        return cross_entropy(logits, soft_targets(label, logits.shape[-1], smoothing))
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    weight = jnp.asarray(weight, jnp.float32)
    target = soft_targets(label, logits.shape[-1], smoothing)
    return -(target * weight * log_p).sum() / weight[label].sum()


def focal(logits, label, *, gamma=2.0, alpha=1.0, reduction="mean"):
    """Return mean alpha (1 - p)^gamma (-log p), p of the true class: [], or [B].

    Args:
        logits: [B, K].
        label: [B] int.
        gamma: how much less what is known already weighs.
        alpha: factor, a number or one for every class [K].
        reduction: "mean", "sum" or "none".

    Source: Lin et al. 2017, arXiv:1708.02002, Eq. 5.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    log_p = jnp.take_along_axis(log_p, label[:, None], 1)[:, 0]  # [B]
    alpha = jnp.asarray(alpha, jnp.float32)
    alpha = alpha[label] if alpha.ndim else alpha
    # expm1 keeps 1 - p, and its gradient, where p is nearly one.
    each = -alpha * (-jnp.expm1(log_p)) ** gamma * log_p
    return {"mean": each.mean, "sum": each.sum, "none": lambda: each}[reduction]()


def mixed(loss, label, other, lam):
    """Return lam L(label) + (1 - lam) L(other): the loss of mixed images.

    Args:
        loss: function of labels [B].
        label, other: [B] int, of an image and of what was mixed into it.
        lam: [] share of the first.
    """
    return lam * loss(label) + (1 - lam) * loss(other)
