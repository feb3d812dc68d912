"""GELU and LayerNorm with their derivatives written out.

What automatic differentiation makes of them keeps more tensors for the backward pass
than there need be, and evaluates the error function in several passes. Values are
those of the plain forms to float32 rounding. Forward-mode differentiation of these
functions is not defined.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vitssl.ops import accelerator

_SQRT_HALF = float(np.sqrt(0.5))
_NORMAL = float(1.0 / np.sqrt(2.0 * np.pi))  # Density of the normal at 0.


@jax.custom_vjp
def gelu(x):
    """Exact GELU, x times the normal distribution function at x; any shape.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    return _gelu(x)[0]


def _cdf(x):
    return 0.5 + 0.5 * jax.lax.erf(x * _SQRT_HALF)


def _gelu(x):
    wide = x.astype(jnp.float32)
    y = (wide * _cdf(wide)).astype(x.dtype)
    # Of the two an accelerator reads the one: there memory is slower than another erf.
    return y, (x, y if accelerator.on_cpu() else None)


def _gelu_vjp(saved, g):
    x, y = saved
    wide = x.astype(jnp.float32)
    if y is None:
        cdf = _cdf(wide)
    else:
        # y = x cdf(x) is stored for the next layer anyway: dividing beats another erf.
        y = y.astype(jnp.float32)
        cdf = jnp.where(wide == 0.0, 0.5, y / jnp.where(wide == 0.0, 1.0, wide))
    slope = cdf + wide * (_NORMAL * jnp.exp(-0.5 * wide * wide))
    return ((g * slope).astype(g.dtype),)


gelu.defvjp(_gelu, _gelu_vjp)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x, scale, bias, eps):
    """LayerNorm of the last axis in float32: [..., D], [D], [D] -> [..., D]."""
    return _layer_norm(x, scale, bias, eps)[0]


def _layer_norm(x, scale, bias, eps):
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + eps)
    y = (wide - mean) * rstd * scale + bias
    return y, (x, scale, mean, rstd)


def _layer_norm_vjp(eps, saved, g):
    x, scale, mean, rstd = saved
    z = (x.astype(jnp.float32) - mean) * rstd  # [..., D]
    rows = tuple(range(x.ndim - 1))
    h = g * scale
    dx = h - h.mean(-1, keepdims=True) - z * (h * z).mean(-1, keepdims=True)
    return (dx * rstd).astype(x.dtype), (g * z).sum(rows), g.sum(rows)


layer_norm.defvjp(_layer_norm, _layer_norm_vjp)
