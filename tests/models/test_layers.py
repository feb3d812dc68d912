"""The parts of a block: initial values, drop path, attention on other devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl import errors
from vitssl.bench import hlo
from vitssl.models import layers
from vitssl.ops import accelerator


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


@pytest.mark.parametrize("eps", [1e-6, 1.0])
def test_layer_norm_uses_its_eps_and_float32_statistics(eps):
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
    monkeypatch.setattr(accelerator, "on_cpu", lambda: False)
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

    def attention(q, k, v, *, implementation, **kwargs):
        asked.append((implementation, q.shape[1], k.shape[1], q.shape[3]))
        return plain(q, k, v, implementation="xla", **kwargs)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(accelerator, "capability", lambda: (9, 0))
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    return asked


def _half(*arrays):
    return [jnp.asarray(x, jnp.bfloat16) for x in arrays]


def test_auto_takes_cudnn_on_a_gpu_in_half_precision_only(gpu):
    q, k, v = _qkv()
    layers.attend(q, k, v)
    layers.attend(*_half(q, k, v))
    layers.attend(*_half(q, k, v), implementation="xla")
    assert [name for name, *_ in gpu] == ["xla", "cudnn", "xla"]


@pytest.mark.parametrize("queries, keys, channels", [(5, 5, 8), (4, 7, 8), (3, 6, 12)])
@pytest.mark.parametrize("length", [None, 3])
def test_cudnn_gets_even_rows_and_channels_by_8(gpu, queries, keys, channels, length):
    q = 2 * _draw(0, 2, queries, 2, channels)
    k, v = 2 * _draw(1, 2, 2, keys, 2, channels)
    length = None if length is None else np.array([length, 1], np.int32)
    g = jnp.asarray(_draw(2, *q.shape), jnp.bfloat16)
    want, pull = jax.vjp(lambda *x: layers.softmax_attention(*x, length)[0], q, k, v)
    got, mine = jax.vjp(lambda *x: layers.attend(*x, length), *_half(q, k, v))
    even = (queries + queries % 2, keys + keys % 2, channels + -channels % 8)
    assert gpu == [("cudnn", *even)] and got.shape == q.shape
    np.testing.assert_allclose(got.astype("f"), want, atol=0.05)
    for a, b in zip(mine(g), pull(g.astype("f")), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype("f"), b, atol=0.12)


@pytest.mark.parametrize(
    "found, most", [((0, 0), 0), ((7, 5), 0), ((8, 6), 128), ((9, 0), 256)]
)
def test_cudnn_is_left_out_where_it_has_no_kernel(gpu, monkeypatch, found, most):
    monkeypatch.setattr(accelerator, "capability", lambda: found)
    for channels in (64, 128, 129, 256, 257):
        q = jnp.zeros((1, 2, 1, channels), jnp.bfloat16)
        layers.attend(q, q, q)
        assert gpu[-1][0] == ("cudnn" if channels <= most else "xla")


def test_asking_for_cudnn_where_it_is_not_is_refused_in_a_line(gpu):
    with pytest.raises(errors.UsageError, match="attention=cudnn: .*not float32 and 4"):
        layers.attend(*_qkv(), implementation="cudnn")


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("tokens", [197, 63, 64])
def test_a_block_in_half_precision_is_fused_for_a_gpu_at_any_length(tokens, remat):
    block = layers.block(remat, heads=2, hidden=16, dtype="bfloat16")
    x = jax.ShapeDtypeStruct((2, tokens, 16), jnp.bfloat16)
    init = lambda key, x: block.init(key, x, None, None, True)  # noqa: E731
    params = jax.eval_shape(init, jax.random.key(0), x)

    def loss(params, x):
        return block.apply(params, x, None, None, True).astype(jnp.float32).sum()

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    found = hlo.count(hlo.lowered(step, params, x))
    assert (found.forward, found.backward, found.maps) == (1 + remat, 1, 0)


def test_gradients_of_weights_are_summed_in_float32_in_half_precision():
    x, kernel, bias, g = _draw(0, 999, 8), _draw(1, 8, 4), _draw(2, 4), _draw(3, 999, 4)
    half = [jnp.asarray(t, jnp.bfloat16) for t in (x, g)]
    _, pull = jax.vjp(lambda *a: layers.linear(*a, "bfloat16"), half[0], kernel, bias)
    dx, *got = pull(half[1])
    wide = [np.asarray(t, np.float64) for t in half]
    for a, b in zip(got, (wide[0].T @ wide[1], wide[1].sum(0)), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # 4e-3 in bfloat16.
    want = wide[1] @ np.asarray(jnp.asarray(kernel, jnp.bfloat16), float).T
    assert dx.dtype == jnp.bfloat16
    np.testing.assert_allclose(dx.astype("f"), want, rtol=0.01, atol=0.01)


def test_heads_that_do_not_divide_the_width_are_named():
    with pytest.raises(ValueError, match="heads=3 does not divide the width 8"):
        layers.Attention(3).init(jax.random.key(0), jnp.zeros((1, 2, 8)))
