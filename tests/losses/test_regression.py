import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl import errors
from vitssl.losses import regression

# Compiled whole: operation by operation is ten times slower on a first run.
LEVEL_LOSS = jax.jit(
    regression.level_loss, static_argnames=("kind", "normalize", "detach")
)


def _penalty(d, kind, delta, beta):
    size = abs(d)
    if kind == "mse":
        return d * d
    if kind == "smoothl1":
        return d * d / (2 * beta) if size < beta else size - beta / 2
    return d * d / 2 if size <= delta else delta * (size - delta / 2)


def _level_by_loops(p, t, valid, kind, normalize, delta=1.0, beta=1.0):
    total, count = 0.0, 0
    for b, n in np.ndindex(*valid.shape):
        if valid[b, n]:
            x, y = p[b, n].astype(np.float64), t[b, n].astype(np.float64)
            if normalize:
                x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
            total += sum(_penalty(d, kind, delta, beta) for d in x - y)
            count += len(x)
    return total / count


def _arrays(seed=0, shape=(3, 5, 4)):
    rng = np.random.default_rng(seed)
    p, t = rng.normal(scale=1.5, size=(2, *shape)).astype(np.float32)
    return p, t, rng.random(shape[:2]) < 0.6


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "kind, knee", [("mse", {}), ("smoothl1", {"beta": 0.7}), ("huber", {"delta": 0.3})]
)
def test_level_loss_is_the_mean_over_valid_tokens_and_width(kind, knee, normalize):
    p, t, valid = _arrays()
    for mask in (valid, np.ones_like(valid)):
        got = LEVEL_LOSS(p, t, mask, kind=kind, normalize=normalize, **knee)
        want = _level_by_loops(p, t, mask, kind, normalize, **knee)
        np.testing.assert_allclose(got, want, rtol=1e-5)
    without = LEVEL_LOSS(p, t, kind=kind, normalize=normalize, **knee)
    np.testing.assert_allclose(without, want, rtol=1e-5)


def test_a_full_mask_changes_nothing_where_the_original_was_width_times_larger():
    p, t = np.ones((2, 3, 8), np.float32), np.zeros((2, 3, 8), np.float32)
    assert LEVEL_LOSS(p, t, np.ones((2, 3)), kind="mse") == 1.0


def test_the_mean_is_over_the_batch_not_over_samples():
    p, t = np.zeros((2, 4, 1), np.float32), np.zeros((2, 4, 1), np.float32)
    p[0, 0] = 2.0  # One valid token of squared error 4, beside four of error 0.
    valid = np.array([[1, 0, 0, 0], [1, 1, 1, 1]], bool)
    got = LEVEL_LOSS(p, t, valid, kind="mse")
    np.testing.assert_allclose(got, 4 / 5)


def test_weights_between_zero_and_one_count_in_proportion():
    p, t = np.array([[[1.0], [3.0]]], np.float32), np.zeros((1, 2, 1), np.float32)
    got = LEVEL_LOSS(p, t, np.array([[0.3, 0.1]]), kind="mse")
    np.testing.assert_allclose(got, (0.3 * 1 + 0.1 * 9) / 0.4, rtol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", regression.KINDS)
def test_masked_out_rows_are_never_read(kind, normalize):
    p, t, valid = _arrays()
    spoiled = [np.where(valid[..., None], x, np.nan) for x in (p, t)]

    def loss(p, t):
        return LEVEL_LOSS(p, t, valid, kind=kind, normalize=normalize)

    grad = jax.jit(jax.value_and_grad(loss))
    want, slope = jax.device_get(grad(p, t))
    got, spoiled_slope = jax.device_get(grad(*spoiled))
    assert got == want
    np.testing.assert_array_equal(spoiled_slope, slope)
    assert (slope[~valid] == 0).all() and (slope[valid] != 0).any()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", regression.KINDS)
@pytest.mark.parametrize("valid", [None, np.zeros((2, 3)), np.eye(2, 3)])
def test_gradients_are_finite_at_zero(kind, normalize, valid):
    zeros = np.zeros((2, 3, 4))

    def loss(p, t):
        return LEVEL_LOSS(p, t, valid, kind=kind, normalize=normalize, detach=False)

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    for t in (zeros, zeros + 1):
        value, slopes = jax.device_get(grad(zeros, t))
        assert np.isfinite(value)
        assert all(np.isfinite(s).all() for s in slopes)


def test_no_valid_token_is_a_loss_of_zero():
    p, t, valid = _arrays()
    assert LEVEL_LOSS(p, t, np.zeros_like(valid), kind="mse") == 0


@pytest.mark.parametrize("kind", regression.KINDS)
def test_equal_features_are_the_optimum(kind):
    p, _, valid = _arrays()

    def loss(x):
        return LEVEL_LOSS(x, p, valid, kind=kind)

    value, slope = jax.device_get(jax.jit(jax.value_and_grad(loss))(p))
    assert value == 0 and (slope == 0).all()
    # Scale is invisible after normalisation, and only then.
    scaled = LEVEL_LOSS(3 * p, p, valid, kind=kind, normalize=True)
    np.testing.assert_allclose(scaled, 0, atol=1e-12)
    assert LEVEL_LOSS(3 * p, p, valid, kind=kind) > 0.1


def test_normalised_mse_at_chance_is_two_over_width():
    # Independent directions are orthogonal on average: |x - y|^2 = 2.
    p, t, _ = _arrays(shape=(64, 32, 16))
    got = LEVEL_LOSS(p, t, kind="mse", normalize=True)
    np.testing.assert_allclose(got, 2 / 16, rtol=0.02)


def test_targets_get_a_gradient_only_when_asked():
    p, t, valid = _arrays()

    def loss(t, detach):
        return LEVEL_LOSS(p, t, valid, kind="mse", detach=detach)

    assert not np.any(jax.grad(loss)(t, True))
    slope = jax.device_get(jax.grad(loss)(t, False))
    np.testing.assert_allclose(slope[valid], 2 * (t - p)[valid] / valid.sum() / 4)


def test_bfloat16_features_are_compared_in_float32():
    p, t, valid = _arrays()
    p, t = jnp.asarray(p, jnp.bfloat16), jnp.asarray(t, jnp.bfloat16)
    got = LEVEL_LOSS(p, t, valid, kind="mse")
    assert got.dtype == jnp.float32
    exact = LEVEL_LOSS(*(x.astype(jnp.float32) for x in (p, t)), valid, kind="mse")
    assert got == exact


def test_order_of_samples_does_not_matter():
    p, t, valid = _arrays()
    want = LEVEL_LOSS(p, t, valid, kind="huber", delta=0.5)
    flip = LEVEL_LOSS(p[::-1], t[::-1], valid[::-1], kind="huber", delta=0.5)
    np.testing.assert_allclose(flip, want, rtol=1e-6)


def test_wrong_options_say_what_is_allowed():
    p, t, valid = _arrays()
    with pytest.raises(errors.UsageError, match="cosine.*mse, smoothl1, huber"):
        regression.level_loss(p, t, kind="cosine")
    with pytest.raises(ValueError, match=r"\(3, 5, 4\).*\(3, 4, 4\)"):
        regression.level_loss(p, t[:, :4], kind="mse")
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 5\)"):
        regression.level_loss(p, t, valid[:, :4], kind="mse")
