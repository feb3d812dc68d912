"""The parts of a block: initial values, drop path, attention on other devices."""

import logging as python_logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl.models import layers


def _draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _qkv():
    return tuple(_draw(0, 3, 2, 6, 2, 4))  # q, k, v of [B, T, heads, c].


def test_dense_starts_from_a_normal_of_0_02_and_zero_bias():
    params = layers.Dense(300).init(jax.random.key(0), jnp.zeros((1, 200)))["params"]
    kernel = np.asarray(params["kernel"])
    assert kernel.shape == (200, 300) and not params["bias"].any()
    assert abs(kernel.std() - 0.02) < 2e-4 and abs(kernel.mean()) < 3e-4
    assert np.abs(kernel).max() > 0.07  # Not cut at two standard deviations.


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_dense_maps_the_last_axis(axes):
    x, kernel, bias = _draw(0, *(2, 3, 4)[:axes], 5), _draw(1, 5, 7), _draw(2, 7)
    got = layers.linear(x, kernel, bias, "float32")
    np.testing.assert_allclose(got, x @ kernel + bias, atol=1e-5)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("eps", [1e-6, 1.0])
def test_layer_norm_uses_its_eps_and_float32_statistics(monkeypatch, on_cpu, eps):
    monkeypatch.setattr(layers, "_on_cpu", lambda: on_cpu)
    x = jnp.asarray(200 + _draw(0, 3, 64), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    want = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(
        wide.var(-1, keepdims=True) + eps
    )
    params = {"scale": np.full(64, 2.0, "f"), "bias": np.full(64, 0.5, "f")}
    norm = layers.LayerNorm(eps, "float32")
    np.testing.assert_allclose(
        norm.apply({"params": params}, x), 2 * want + 0.5, atol=1e-3
    )
    norm = layers.LayerNorm(eps, "bfloat16")
    assert norm.apply({"params": params}, x).dtype == jnp.bfloat16


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = jnp.ones((4000, 2, 3))
    rngs = {"drop_path": jax.random.key(0)}
    got = np.asarray(layers.DropPath(0.3).apply({}, x, True, rngs=rngs))
    assert set(np.unique(got)) == {0.0, np.float32(1 / 0.7)}
    assert (got == got[:, :1, :1]).all()  # One draw per sample.
    dropped = (got[:, 0, 0] == 0).mean()
    assert abs(dropped - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5


def test_drop_path_does_nothing_in_evaluation_and_needs_no_key():
    x = _draw(0, 5, 2)
    np.testing.assert_array_equal(layers.DropPath(0.9).apply({}, x, False), x)
    np.testing.assert_array_equal(layers.DropPath(0.0).apply({}, x, True), x)


def test_the_layerscale_of_a_dropped_path_is_not_skipped():
    # Every branch is dropped or scaled by 1 / keep: with gains of 0 nothing is left.
    block = layers.Block(2, 8, drop_path=0.5, layerscale=1e-5)
    x = _draw(0, 64, 3, 4)
    params = block.init(jax.random.key(0), x)["params"]
    assert (params["ls1"] == np.float32(1e-5)).all()
    zero = dict(params, ls1=jnp.zeros(4), ls2=jnp.zeros(4))
    rngs = {"drop_path": jax.random.key(1)}

    def run(p):
        return block.apply({"params": p}, x, None, None, True, rngs=rngs)

    np.testing.assert_array_equal(run(zero), x)
    one = dict(params, ls1=jnp.ones(4), ls2=jnp.zeros(4))
    same = (np.asarray(run(one)) == x).all((1, 2))
    assert 10 < same.sum() < 54  # About half of 64 samples skip the branch.


@pytest.mark.parametrize("length", [None, [6, 2]])
def test_every_implementation_gives_the_same_attention(monkeypatch, length):
    length = None if length is None else np.array(length, np.int32)
    q, k, v = _qkv()
    want, probs = layers.softmax_attention(q, k, v, length)
    np.testing.assert_allclose(probs.sum(-1), 1.0, atol=1e-6)
    for name in ("auto", "xla"):
        np.testing.assert_allclose(
            layers.attend(q, k, v, length, name), want, atol=1e-6
        )
    monkeypatch.setattr(layers, "_on_cpu", lambda: False)
    np.testing.assert_allclose(layers.attend(q, k, v, length), want, atol=1e-6)


def test_attention_ignores_keys_behind_the_length():
    q, k, v = _qkv()
    length = np.array([2, 5], np.int32)
    want = layers.attend(q, k, v, length)
    for row, n in enumerate(length):
        alone = layers.attend(q[row : row + 1], *(x[row : row + 1, :n] for x in (k, v)))
        np.testing.assert_allclose(want[row], alone[0], atol=1e-6)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to be a GPU; record what is asked of dot_product_attention."""
    asked = []
    plain = jax.nn.dot_product_attention

    def attention(*args, implementation, **kwargs):
        asked.append(implementation)
        if implementation == "cudnn" and refuse:
            raise NotImplementedError("head dim")
        return plain(*args, **kwargs)

    refuse = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    return asked, refuse


def test_auto_takes_cudnn_on_a_gpu_in_half_precision_only(gpu):
    asked, _ = gpu
    q, k, v = _qkv()
    layers.attend(q, k, v)
    layers.attend(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)))
    assert asked == ["xla", "cudnn"]


def test_auto_falls_back_to_xla_with_one_warning(gpu, caplog):
    asked, refuse = gpu
    refuse.append(True)
    half = [jnp.asarray(x, jnp.bfloat16) for x in _qkv()]
    want, _ = layers.softmax_attention(*half)
    with caplog.at_level(python_logging.WARNING, logger="absl"):
        for _ in range(3):
            got = layers.attend(*half)
    assert asked == ["cudnn", "xla"] * 3
    np.testing.assert_allclose(got.astype("f"), want.astype("f"), atol=0.02)
    assert len([r for r in caplog.records if "cuDNN" in r.getMessage()]) == 1


def test_asking_for_cudnn_never_falls_back(gpu):
    _, refuse = gpu
    refuse.append(True)
    half = [jnp.asarray(x, jnp.bfloat16) for x in _qkv()]
    with pytest.raises(NotImplementedError):
        layers.attend(*half, implementation="cudnn")


def test_heads_that_do_not_divide_the_width_are_named():
    with pytest.raises(ValueError, match="heads=3 does not divide the width 8"):
        layers.Attention(3).init(jax.random.key(0), jnp.zeros((1, 2, 8)))
