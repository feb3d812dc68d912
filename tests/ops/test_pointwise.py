"""GELU and LayerNorm: values in float64, derivatives against the plain forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl.ops import pointwise


def _draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _cdf(x):
    return np.array([0.5 * math.erfc(-t / math.sqrt(2.0)) for t in x])


def _gelu_points():
    return np.concatenate([np.linspace(-12, 12, 481), [1e-30, -1e-30, 1e-6, 300.0]])


def test_gelu_is_exact_to_float32():
    x = _gelu_points()
    got = pointwise.gelu(x.astype(np.float32))
    np.testing.assert_allclose(got, x * _cdf(x), atol=5e-7, rtol=2e-7)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_gelu_has_the_exact_derivative_everywhere(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x = _gelu_points()
    want = _cdf(x) + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    got = jax.vmap(jax.grad(pointwise.gelu))(x.astype(np.float32))
    np.testing.assert_allclose(got, want, atol=4e-7, rtol=2e-6)
    assert jax.grad(pointwise.gelu)(jnp.zeros(())) == 0.5


def test_gelu_in_bfloat16_is_rounded_once():
    x = jnp.asarray(_draw(0, 100), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    got = pointwise.gelu(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, float), wide * _cdf(wide), rtol=2**-8)


def _plain_norm(x, scale, bias, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale + bias


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_layer_norm_and_its_derivatives_are_those_of_the_plain_form(eps):
    x, scale, bias, g = (
        _draw(0, 2, 5, 8) + 3,
        _draw(1, 8),
        _draw(2, 8),
        _draw(3, 2, 5, 8),
    )
    with jax.enable_x64(True):
        wide = [jnp.asarray(t, jnp.float64) for t in (x, scale, bias)]
        want, pull = jax.vjp(lambda *a: _plain_norm(*a, eps), *wide)
        want_grads = pull(jnp.asarray(g, jnp.float64))
    got, pull = jax.vjp(lambda *a: pointwise.layer_norm(*a, eps), x, scale, bias)
    np.testing.assert_allclose(got, want, atol=3e-6)
    for a, b in zip(pull(g), want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("backend, kept", [("cpu", 2), ("gpu", 1)])
def test_gelu_keeps_its_input_alone_where_memory_is_slow(monkeypatch, backend, kept):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    _, pull = jax.vjp(pointwise.gelu, _draw(0, 5))
    assert len(jax.tree.leaves(pull)) == kept
