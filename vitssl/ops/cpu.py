"""The inside of a transformer block, in the forms that XLA compiles well for a CPU.

What automatic differentiation makes of these operations costs a CPU twice the time:
XLA recomputes cheap producers once per consumer, keeps several copies of the map of
attention, and evaluates the error function in three passes. The derivatives are
therefore written out. Values are those of the plain forms to float32 rounding. On
other devices the plain forms are used (see `models.layers`).

Forward-mode differentiation of these functions is not defined.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

_SQRT_HALF = float(np.sqrt(0.5))
_NORMAL = float(1.0 / np.sqrt(2.0 * np.pi))  # Density of the normal at 0.


def compiler_options(dtype: str) -> dict:
    """Return the options of `jax.jit` under which a step runs fastest on a CPU.

    XLA hands float32 products to YNNPACK by default, which is slower at them than
    its own kernels; in reductions it is faster. {} on other devices and for other
    dtypes.
    """
    if jax.default_backend() != "cpu" or dtype != "float32":
        return {}
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


@jax.custom_vjp
def gelu(x):
    """Exact GELU, x times the normal distribution function at x; any shape.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    return _gelu(x)[0]


def _gelu(x):
    wide = x.astype(jnp.float32)
    y = wide * (0.5 + 0.5 * jax.lax.erf(wide * _SQRT_HALF))
    y = y.astype(x.dtype)
    return y, (x, y)


def _gelu_vjp(saved, g):
    x, y = (t.astype(jnp.float32) for t in saved)
    # y = x cdf(x) is stored for the next layer anyway: dividing beats another erf.
    cdf = jnp.where(x == 0.0, 0.5, y / jnp.where(x == 0.0, 1.0, x))
    slope = cdf + x * (_NORMAL * jnp.exp(-0.5 * x * x))
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


@jax.custom_vjp
def attention(q, k, v, length=None):
    """Softmax attention over a prefix of at least 1 key; see `models.layers.attend`."""
    return _attention(q, k, v, length)[0]


def _dot(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _attention(q, k, v, length):
    dtype, scale = v.dtype, q.shape[-1] ** -0.5
    q, k, v = (x.swapaxes(1, 2) for x in (q * scale, k, v))  # [B, heads, T, c]
    logits = _dot("bhqc,bhkc->bhqk", q, k)
    if length is not None:
        seen = jnp.arange(k.shape[2]) < length[:, None, None, None]
        logits = jnp.where(seen, logits, -1e30)
    # The map stays without its denominator, which divides the short side instead.
    e = jnp.exp(logits - logits.max(-1, keepdims=True))  # [B, heads, T, T]
    total = e.sum(-1, keepdims=True)
    e = e.astype(dtype)
    y = _dot("bhqk,bhkc->bhqc", e, v) / total  # [B, heads, T, c]
    return y.swapaxes(1, 2).astype(dtype), (q, k, v, e, total, y, length)


def _attention_vjp(saved, g):
    q, k, v, e, total, y, length = saved
    dtype = v.dtype
    g = g.swapaxes(1, 2) / total  # [B, heads, T, c] float32
    inner = (g * y).sum(-1, keepdims=True)
    g = g.astype(dtype)
    dv = _dot("bhqk,bhqc->bhkc", e, g)
    d = (e * (_dot("bhqc,bhkc->bhqk", g, v) - inner)).astype(dtype)
    dq = _dot("bhqk,bhkc->bhqc", d, k) * q.shape[-1] ** -0.5
    dk = _dot("bhqk,bhqc->bhkc", d, q)
    grads = (x.swapaxes(1, 2).astype(dtype) for x in (dq, dk, dv))
    return (
        *grads,
        None if length is None else np.zeros(length.shape, jax.dtypes.float0),
    )


attention.defvjp(_attention, _attention_vjp)
