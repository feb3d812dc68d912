"""SIGReg: along random directions, features should look like a standard Gaussian.

Source: Balestriero, LeCun 2025, arXiv:2511.08544 (LeJEPA); "reference_points" and
"char_function" are those of jonwiggins/H-JEPA src/losses/sigreg.py.
"""

import math
import statistics

import einops
import jax
import jax.numpy as jnp
import numpy as np

from vitssl import errors
from vitssl.losses import regression, vicreg

# The largest intermediate array, in numbers (64 MiB of float32).
ELEMENTS = 2**24


def directions(key, slices, width):
    """Draw [slices, width] unit vectors, uniform on the sphere.

    The same key gives the same directions: pass a constant one for fixed slices.
    """
    return regression.unit(jax.random.normal(key, (slices, width)))


def lejepa(x, weight, *, points=17, t_max=3.0):  # [R, K], [R] -> [K]
    """Epps-Pulley statistic of each column against N(0, 1), not standardised.

    rows * integral over |t| <= t_max of exp(-t^2 / 2) |phi_x(t) - exp(-t^2 / 2)|^2,
    by trapezoids on [0, t_max]. It sees mean and scale, hence resists shrinking to a
    point. For Gaussian rows its mean is sum_t w_t (1 - exp(-t^2)), 1.05 as set here,
    whatever their number. `weight` is 1 for rows that count, 0 for others, here and
    below.
    """
    t = np.linspace(0.0, t_max, points, dtype=np.float32)
    trapezoid = np.full(points, 2 * t_max / (points - 1), np.float32)
    trapezoid[[0, -1]] /= 2
    gap = _characteristic_gap(x, weight, t)  # [K, T]
    return weight.sum() * (gap * (trapezoid * np.exp(-t * t / 2))).sum(-1)


def char_function(x, weight, *, points=32, t_min=0.2, t_max=4.0, scale=1.0, eps=1e-6):
    """Epps-Pulley integral of each standardised column (LeWorldModel's form).

    integral from t_min to t_max of exp(-t^2 / 2 scale^2) |phi_x(t) - exp(-t^2 / 2)|^2
    by trapezoids. Blind to mean and scale: it cannot see a shrinking of features.
    """
    t = np.linspace(t_min, t_max, points, dtype=np.float32)
    trapezoid = np.full(points, (t_max - t_min) / (points - 1), np.float32)
    trapezoid[[0, -1]] /= 2
    gap = _characteristic_gap(_standardise(x, weight, eps), weight, t)  # [K, T]
    return (gap * (trapezoid * np.exp(-t * t / (2 * scale * scale)))).sum(-1)


def reference_points(x, weight, *, points=17, eps=1e-6):
    """Squared kernel distance (MMD) of each standardised column to normal quantiles.

    Kernel exp(-d^2 / 2), diagonals included. Blind to mean and scale, and quadratic
    in rows (row pairs are visited in blocks of at most `ELEMENTS` numbers).
    """
    r = quantiles(points)
    x = _standardise(x, weight, eps)  # [R, K]
    share = (weight / jnp.maximum(weight.sum(), 1.0))[:, None]  # [R, 1]
    across = _kernel(x[..., None], r).mean(-1)  # [R, K]
    among = _kernel(r[:, None], r).mean()
    return _pairs(x, share) - 2 * (share * across).sum(0) + among


def quantiles(points):
    """Standard normal quantiles [points] at probabilities linspace(0.01, 0.99)."""
    normal = statistics.NormalDist()
    at = np.linspace(0.01, 0.99, points)
    return np.array([normal.inv_cdf(p) for p in at], np.float32)


TESTS = {
    "lejepa": lejepa,
    "char_function": char_function,
    "reference_points": reference_points,
}


def per_slice(z, slices, valid=None, *, kind="lejepa", **options):
    """Statistic [K] of the projections on each direction, in float32.

    Directions are visited in blocks, recomputed in the backward pass, so that memory
    stays near `ELEMENTS` numbers however many rows and slices there are.

    Args:
        z: [..., D]; everything but the last axis counts as rows.
        slices: [K, D] unit rows.
        valid: [...] bool, rows that count; None counts all.
        kind: a key of `TESTS`; `options` are those of that test.

    Raises:
        UsageError: unknown kind.
    """
    if kind not in TESTS:
        raise errors.UsageError(f"sigreg kind={kind!r}: one of {', '.join(TESTS)}")
    if valid is None:
        valid = jnp.ones(z.shape[:-1], jnp.float32)
    if valid.shape != z.shape[:-1]:
        raise ValueError(f"sigreg: valid {valid.shape} is not {z.shape[:-1]}")
    weight = einops.rearrange(valid, "... -> (...)").astype(jnp.float32)  # [R]
    z = einops.rearrange(z.astype(jnp.float32), "... d -> (...) d")  # [R, D]
    z = jnp.where(weight[:, None] > 0, z, 0.0)

    def test(block):  # [k, D] -> [k]
        # Full float32 products: a GPU's default keeps 10 bits of mantissa.
        return TESTS[kind](
            jnp.matmul(z, block.T, precision="highest"), weight, **options
        )

    # What one slice needs: its rows against t, or against each other.
    each = len(z) * (
        len(z) if kind == "reference_points" else options.get("points", 32)
    )
    return _in_blocks(test, slices, max(1, ELEMENTS // each))


def sigreg(
    z, key=None, *, kind="lejepa", slices=1024, along=None, valid=None, **options
):
    """Mean statistic [] over random directions: 0 for nothing but a perfect Gaussian.

    Args:
        z: [B, D] or [B, N, D] (tokens are rows).
        key: draws `slices` directions; a new one per step, or a constant one for
            fixed slices.
        kind: "lejepa" (published; sees mean and scale), or the originals
            "reference_points" and "char_function" (standardised, blind to both).
        along: [K, D] unit directions instead of `key` and `slices`.
        valid: [B] or [B, N] bool, rows that count.
        **options: of the test of that kind (`points`, `t_max`, ...).
    """
    if along is None:
        if key is None:
            raise ValueError("sigreg: needs a key, or directions in `along`")
        along = directions(key, slices, z.shape[-1])
    return per_slice(z, along, valid, kind=kind, **options).mean()


def two_views(
    za,
    zb,
    key=None,
    valid_a=None,
    valid_b=None,
    *,
    weights=(25.0, 25.0),
    slices=1024,
    along=None,
    **options,
):
    """Invariance of two views plus the mean `sigreg` of both, on the same directions.

    Returns (weighted sum [], terms): "invariance", "sigreg" [] before weighting,
    "sigreg_a", "sigreg_b".

    Args:
        za, zb: [B, D] or [B, N, D] (tokens are rows), row i of both from image i.
        key, slices, along: directions, see `sigreg`.
        valid_a, valid_b: [B] or [B, N] bool, rows that count.
        weights: (invariance, sigreg).
        **options: of `sigreg`.
    """
    both = vicreg.both(valid_a, valid_b)
    invariance = regression.level_loss(za, zb, both, kind="mse", detach=False)
    options |= dict(key=key, slices=slices, along=along)
    a, b = sigreg(za, valid=valid_a, **options), sigreg(zb, valid=valid_b, **options)
    parts = dict(invariance=invariance, sigreg=(a + b) / 2, sigreg_a=a, sigreg_b=b)
    return weights[0] * invariance + weights[1] * parts["sigreg"], parts


def _characteristic_gap(x, weight, t):  # [R, K], [R], [T] -> [K, T]
    """|phi_x(t) - exp(-t^2 / 2)|^2 of the columns of `x`."""
    share = (weight / jnp.maximum(weight.sum(), 1.0))[:, None, None]  # [R, 1, 1]
    angle = x[..., None] * t  # [R, K, T]
    real = (share * jnp.cos(angle)).sum(0) - np.exp(-t * t / 2)  # [K, T]
    return jnp.square(real) + jnp.square((share * jnp.sin(angle)).sum(0))


def _standardise(x, weight, eps):
    """Columns of `x` [R, K] minus their mean, over unbiased deviation + eps."""
    w, count = weight[:, None], weight.sum()
    x = x - (w * x).sum(0) / jnp.maximum(count, 1.0)
    variance = (w * x * x).sum(0) / jnp.maximum(count - 1, 1.0)
    # Clamped far below eps^2: a constant column then has a finite gradient.
    return x / (jnp.sqrt(jnp.maximum(variance, 1e-24)) + eps)


def _kernel(a, b):
    """Gaussian kernel exp(-(a - b)^2 / 2)."""
    return jnp.exp(-jnp.square(a - b) / 2)


def _pairs(x, share):
    """Weighted mean kernel over all pairs of rows: [R, K], [R, 1] -> [K]."""

    def rows(block):  # [k, K + 1] -> [k, K]
        xi, si = block[:, :-1], block[:, -1:]
        return si * (share * _kernel(xi[:, None], x)).sum(1)

    both = jnp.concatenate([x, share], 1)
    return _in_blocks(rows, both, max(1, ELEMENTS // x.size)).sum(0)


def _in_blocks(function, rows, size):
    """Map [k, ...] -> [k, ...] over the rows [R, ...] in blocks of at most `size`.

    Blocks are recomputed in the backward pass instead of stored.
    """
    total = len(rows)
    blocks = math.ceil(total / size)
    if blocks == 1:
        return function(rows)
    size = math.ceil(total / blocks)
    rows = jnp.pad(rows, ((0, blocks * size - total), (0, 0)))
    rows = einops.rearrange(rows, "(n k) d -> n k d", n=blocks)
    out = jax.lax.map(jax.checkpoint(function), rows)
    return einops.rearrange(out, "n k ... -> (n k) ...")[:total]
