"""Cross-entropies of classification; all in float32, averaged over the batch."""

import jax
import jax.numpy as jnp


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
