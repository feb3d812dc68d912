"""Attention on a CPU: values in float64, derivatives against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl.ops import cpu


def _draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _plain_attention(q, k, v, length):
    s = jnp.einsum("bqhc,bkhc->bhqk", q, k) / q.shape[-1] ** 0.5
    if length is not None:
        seen = jnp.arange(k.shape[1]) < length[:, None]
        s = jnp.where(seen[:, None, None], s, -jnp.inf)
    return jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(s), v)


@pytest.mark.parametrize("length", [None, [7, 1, 4]])
def test_attention_and_its_derivatives_are_those_of_the_plain_form(length):
    length = None if length is None else np.array(length, np.int32)
    q, k, v, g = 2 * _draw(0, 4, 3, 7, 2, 4)
    with jax.enable_x64(True):
        wide = [jnp.asarray(t, jnp.float64) for t in (q, k, v)]
        want, pull = jax.vjp(lambda *a: _plain_attention(*a, length), *wide)
        want_grads = pull(jnp.asarray(g, jnp.float64))
    got, pull = jax.vjp(lambda *a: cpu.attention(*a, length), q, k, v)
    np.testing.assert_allclose(got, want, atol=3e-6)
    for a, b in zip(pull(g), want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_attention_survives_huge_logits():
    q, k, v = 1e3 * _draw(0, 3, 1, 4, 1, 4)
    got, pull = jax.vjp(cpu.attention, q, k, v)
    assert np.isfinite(got).all()
    assert all(np.isfinite(t).all() for t in pull(got)[:3])


def test_attention_in_bfloat16_is_close_to_float32():
    q, k, v, g = _draw(0, 4, 2, 6, 2, 8)
    half = [jnp.asarray(t, jnp.bfloat16) for t in (q, k, v)]
    want, wide = jax.vjp(cpu.attention, *(t.astype(jnp.float32) for t in half))
    got, pull = jax.vjp(cpu.attention, *half)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, float), want, atol=0.02)
    g = jnp.asarray(g, jnp.bfloat16)
    for a, b in zip(pull(g)[:3], wide(g.astype(jnp.float32))[:3], strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, float), b, atol=0.06)
