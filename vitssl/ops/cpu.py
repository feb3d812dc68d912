"""Attention in the form that XLA compiles well for a CPU.

What automatic differentiation makes of it costs a CPU twice the time: XLA recomputes
cheap producers once per consumer and keeps several copies of the map of attention. The
derivative is therefore written out. Values are those of the plain form to float32
rounding. Other devices have other forms (see `models.layers.attend`).

Forward-mode differentiation of `attention` is not defined.
"""

import jax
import jax.numpy as jnp
import numpy as np


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
