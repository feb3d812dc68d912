"""Distances between predicted and target features."""

import jax
import jax.numpy as jnp

from vitssl import errors

KINDS = ("mse", "smoothl1", "huber")


def unit(x, eps=1e-8):  # [..., D] -> [..., D]
    """Scale rows to length 1: x / max(|x|, eps), in float32.

    The squared length is clamped before the root: an all-zero row stays zero and has
    a finite gradient, where the norm itself has none.
    """
    x = x.astype(jnp.float32)
    square = jnp.square(x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, eps * eps))


def masked_mean(x, valid=None):  # [...], bool or weights >= 0 [...] -> []
    """Mean of `x` where `valid` says so, None for everywhere; 0 if it never does."""
    if valid is None:
        return x.mean()
    if valid.shape != x.shape:
        raise ValueError(f"masked_mean: valid {valid.shape} is not {x.shape}")
    weight = valid.astype(jnp.float32)
    total = weight.sum()
    return (weight * x).sum() / jnp.where(total > 0, total, 1.0)


def distance(d, kind, *, delta=1.0, beta=1.0):
    """Elementwise penalty of the differences `d`, any shape.

    "mse": d^2. "smoothl1": d^2 / 2 beta below `beta` (1 in the papers), |d| - beta/2
    above. "huber": d^2 / 2 up to `delta`, delta (|d| - delta/2) above.

    Raises:
        UsageError: unknown kind.
    """
    if kind == "mse":
        return d * d
    if kind not in KINDS:
        raise errors.UsageError(f"loss kind={kind!r}: one of {', '.join(KINDS)}")
    knee, slope = (beta, 1.0) if kind == "smoothl1" else (delta, delta)
    size = jnp.abs(d)
    return jnp.where(
        size < knee, d * d * (slope / (2 * knee)), slope * (size - knee / 2)
    )


def level_loss(
    prediction,
    target,
    valid=None,
    *,
    kind,
    normalize=False,
    delta=1.0,
    beta=1.0,
    eps=1e-8,
    detach=True,
):
    """Mean distance [] of predicted from target tokens of one level, in float32.

    The mean runs over the valid tokens of the whole batch and over D, so a sample
    with few targets weighs less and padding weighs nothing; it is 0 if no token is
    valid.

    Args:
        prediction, target: [..., N, D].
        valid: [..., N] bool or weights; tokens that are 0 get no gradient, whatever
            they hold (nan included). None counts every token.
        kind, delta, beta: see `distance`.
        normalize: put both sides on the unit sphere first (`eps`: see `unit`).
        detach: no gradient into `target`; False for training without EMA target.

    Source: jonwiggins/H-JEPA src/losses/hjepa_loss.py, whose masked form forgets to
    divide by D.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"level_loss: prediction {prediction.shape} is not target {target.shape}"
        )
    p, t = prediction.astype(jnp.float32), target.astype(jnp.float32)
    t = jax.lax.stop_gradient(t) if detach else t
    if valid is not None:
        if valid.shape != p.shape[:-1]:
            raise ValueError(f"level_loss: valid {valid.shape} is not {p.shape[:-1]}")
        # Cleared before any arithmetic: 0 * nan would be nan, in the gradient too.
        keep = valid.astype(jnp.float32)[..., None] > 0
        p, t = jnp.where(keep, p, 0.0), jnp.where(keep, t, 0.0)
    if normalize:
        p, t = unit(p, eps), unit(t, eps)
    each = distance(p - t, kind, delta=delta, beta=beta).mean(-1)  # [..., N]
    return masked_mean(each, valid)
