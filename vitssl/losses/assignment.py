"""Crops sorted alike: what an output is given, and the cross-entropy of the crops."""

import einops
import jax
import jax.numpy as jnp

_HIDDEN = -1e30  # The score of a row that does not count; finite, so no nan.


def views(target, scores, temperature):
    """Return the cross-entropy [] of all pairs of different crops, in nats.

    Args:
        target: probabilities [B, G, K] of the global crops.
        scores: [B, V, K] of all crops, the global ones first.
        temperature: of the scores.

    Source: arXiv:2104.14294, Eq. 3.
    """
    log_q = jax.nn.log_softmax(scores / temperature)
    cross = -jnp.einsum("bgk,bvk->gv", target, log_q) / len(target)
    other = ~jnp.eye(*cross.shape, dtype=bool)
    return cross.sum(where=other) / (cross.size - len(cross))


def sinkhorn(scores, heat, valid=None, rounds=3):  # [..., K], [...] -> [..., K]
    """Return probabilities of every row such that outputs are used evenly by all rows.

    Source: Caron et al. 2020, arXiv:2006.09882, section 3.1; rounds as in DINOv2.
    """
    x = scores / heat
    flat = einops.rearrange(x, "... k -> (...) k")
    keep = jnp.ones((len(flat), 1), bool)
    if valid is not None:
        keep = einops.rearrange(valid, "... -> (...) 1")
    for _ in range(rounds):
        flat = jnp.where(keep, flat, _HIDDEN)
        flat = jax.nn.log_softmax(flat - jax.nn.logsumexp(flat, 0))
    return jnp.exp(flat).reshape(x.shape)


def entropies(target):  # [B, G, K] -> {name: []}
    """Return how sure targets are, and how varied, in nats.

    Collapsed ones are alike: to one output (both 0), or to all (both log K).
    """

    def entropy(p):
        return -(p * jnp.log(jnp.maximum(p, 1e-12))).sum(-1).mean()

    mean = target.mean((0, 1))
    return {"entropy": entropy(target), "entropy_of_mean": entropy(mean)}
