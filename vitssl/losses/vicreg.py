"""VICReg: two views agree, every dimension varies, no two say the same.

Source: Bardes, Ponce, LeCun 2022, arXiv:2105.04906, Eq. 1-6; the variants marked
"original" are those of jonwiggins/H-JEPA src/losses/vicreg.py.
"""

import einops
import jax
import jax.numpy as jnp

from vitssl import errors
from vitssl.losses import regression

# (invariance, variance, covariance), as published.
WEIGHTS = (25.0, 25.0, 1.0)


def halves(z, valid=None):
    """Split a batch [B, ...] (and its `valid`) into two: the original's "views".

    Row i of the first half and row i of the second are different images, so an
    invariance term on them pulls different images together. Kept for parity.

    Returns:
        (za, zb, valid_a, valid_b), each [B // 2, ...]; the last sample of an odd
        batch is left out, and a single sample is both halves.
    """
    half = len(z) // 2
    if half == 0:
        return z, z, valid, valid
    if valid is None:
        return z[:half], z[half : 2 * half], None, None
    return z[:half], z[half : 2 * half], valid[:half], valid[half : 2 * half]


def variance_covariance(z, valid=None, *, threshold=1.0, eps=1e-4, covariance="paper"):
    """Return the two terms of VICReg that need one view only.

    variance: [] mean over D of max(0, gamma - sqrt(Var + eps)); unbiased Var.
    covariance: [] squared off-diagonal covariances.
    With fewer than two valid rows Var and covariances are 0.

    Args:
        z: [..., D]; everything but the last axis counts as rows.
        valid: [...] bool, rows that count; None counts all.
        threshold: gamma, the standard deviation every dimension should reach.
        eps: added to the variance under the root.
        covariance: "paper" divides the squared off-diagonal entries by D, "mean"
            (original) by their number D (D - 1), which is D - 1 times weaker.
    """
    if covariance not in ("paper", "mean"):
        raise errors.UsageError(f"covariance={covariance!r}: one of paper, mean")
    z = z.astype(jnp.float32)
    width = z.shape[-1]
    if valid is None:
        valid = jnp.ones(z.shape[:-1], jnp.float32)
    if valid.shape != z.shape[:-1]:
        raise ValueError(f"variance_covariance: valid {valid.shape}, rows {z.shape}")
    keep = einops.rearrange(valid, "... -> (...) 1").astype(jnp.float32)  # [R, 1]
    z = einops.rearrange(z, "... d -> (...) d")  # [R, D]
    z = jnp.where(keep > 0, z, 0.0)
    count = keep.sum()
    z = jnp.where(keep > 0, z - z.sum(0) / jnp.maximum(count, 1.0), 0.0)
    # Full float32 products: a GPU's default (10-bit mantissas) drowns small terms.
    c = jnp.matmul(z.T, z, precision="highest") / jnp.maximum(count - 1, 1.0)  # [D, D]
    std = jnp.sqrt(jnp.diagonal(c) + eps)  # [D]
    variance = jnp.maximum(0.0, threshold - std).mean()
    off = jnp.where(jnp.eye(width, dtype=bool), 0.0, c)
    share = width if covariance == "paper" else max(1, width * (width - 1))
    return variance, jnp.square(off).sum() / share


def vicreg(
    za,
    zb,
    valid_a=None,
    valid_b=None,
    *,
    weights=WEIGHTS,
    threshold=1.0,
    eps=1e-4,
    covariance="paper",
):
    """Return (weighted sum [], terms) of VICReg on two views of the same images.

    The terms [] before weighting are "invariance", "variance", "covariance", and the
    last two of each view under "..._a" and "..._b".

    Args:
        za, zb: [B, D] or [B, N, D] (tokens are rows), row i of both from image i.
        valid_a, valid_b: [B] or [B, N] bool; the invariance term uses what is valid
            in both.
        weights: (invariance, variance, covariance), numbers or an array [3].
        threshold, eps, covariance: see `variance_covariance`.
    """
    if za.shape != zb.shape or za.ndim not in (2, 3):
        raise ValueError(
            f"vicreg: want two [B, D] or [B, N, D], got {za.shape} and {zb.shape}"
        )
    options = dict(threshold=threshold, eps=eps, covariance=covariance)
    valid = both(valid_a, valid_b)
    invariance = regression.level_loss(za, zb, valid, kind="mse", detach=False)
    va, ca = variance_covariance(za, valid_a, **options)
    vb, cb = variance_covariance(zb, valid_b, **options)
    variance, covariance = (va + vb) / 2, (ca + cb) / 2
    terms = (invariance, variance, covariance)
    loss = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    parts = dict(invariance=invariance, variance=variance, covariance=covariance)
    parts |= dict(variance_a=va, variance_b=vb, covariance_a=ca, covariance_b=cb)
    return loss, parts


def both(a, b):
    """Valid in both views; None means everything."""
    if a is None or b is None:
        return a if b is None else b
    return (a > 0) & (b > 0)


def adapt(weights, parts, *, momentum=0.99, eps=1e-4, ceiling=(30.0, 30.0, 2.0)):
    """Move VICReg's weights towards the terms that are small (original's variant).

    Args:
        weights: [3] of (invariance, variance, covariance), the state; float32 and
            constant for the gradient when returned.
        parts: of `vicreg`, before weighting.
        momentum: of the moving average.
        ceiling: [3] weight of a term whose share of the sum is 0; one whose share
            is 1 goes to 0.
    """
    terms = [parts[name] for name in ("invariance", "variance", "covariance")]
    terms = jax.lax.stop_gradient(jnp.stack(terms))
    goal = (1 - terms / (terms.sum() + eps)) * jnp.asarray(ceiling)
    return momentum * jnp.asarray(weights, jnp.float32) + (1 - momentum) * goal
