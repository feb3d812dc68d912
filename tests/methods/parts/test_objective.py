"""Losses on part maps, at values that can be known, and where gradients are at risk."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl.methods.parts import objective


def _maps(b=4, h=6, w=6, k=3, seed=0):
    x = jax.random.normal(jax.random.key(seed), (b, h, w, k + 1))
    return jax.nn.softmax(3.0 * x, axis=-1)


def _one_hot(owner, k):
    return jax.nn.one_hot(jnp.asarray(owner), k + 1)


def _halves():
    """Part 0 on the left, the background on the right: [2, 6, 6, 2]."""
    owner = np.zeros((2, 6, 6), int)
    owner[:, :, 3:] = 1
    return _one_hot(owner, 1)


def test_total_variation_counts_edges_of_all_channels():
    assert objective.total_variation(jnp.ones((2, 4, 4, 3))) == 0.0
    # One vertical edge of six pixels, in both channels, over 36 pixels.
    np.testing.assert_allclose(objective.total_variation(_halves()), 12 / 36, rtol=1e-6)


def test_concentration_of_a_single_pixel_is_zero_and_grows_with_spread():
    owner = np.full((1, 6, 6), 1)
    owner[0, 2, 3] = 0
    np.testing.assert_allclose(
        objective.concentration(_one_hot(owner, 1)), 0, atol=1e-6
    )
    owner[0, 0, 0] = 0
    assert objective.concentration(_one_hot(owner, 1)) > 0.001


def test_a_part_that_is_nowhere_has_no_spread_and_a_finite_gradient():
    owner = np.full((1, 40, 40), 2)
    owner[0, 2, 3] = owner[0, 4, 3] = 0  # Part 1 is 0 everywhere.
    maps = _one_hot(owner, 2)
    value, grad = jax.value_and_grad(objective.concentration)(maps)
    # Two patches, each one row from their centre.
    np.testing.assert_allclose(value, 2 * (1 / 40) ** 2 / (2 * 1600), rtol=1e-5)
    assert np.isfinite(grad).all()


def test_presence_is_about_the_batch_and_a_group_makes_it_stricter():
    owner = np.full((4, 6, 6), 2)
    owner[0, :3, :3], owner[3, :3, :3] = 0, 1  # Each part in one image only.
    maps = _one_hot(owner, 2)
    np.testing.assert_allclose(objective.presence(maps), 0.0, atol=1e-6)
    # In groups of two, each group lacks one of the two parts.
    np.testing.assert_allclose(objective.presence(maps, group=2), 0.5, atol=1e-6)
    np.testing.assert_allclose(objective.presence(maps, group=1), 0.75, atol=1e-6)


@pytest.mark.parametrize("kind", typing.get_args(objective.Presence))
def test_absent_parts_have_a_known_cost_and_a_finite_gradient(kind):
    nowhere = _one_hot(np.full((2, 5, 5), 2), 2)
    value, grad = jax.value_and_grad(objective.presence)(nowhere, kind)
    assert np.isfinite(value) and np.isfinite(grad).all()
    # The pull of soft_constraint is weakest where it pulls from furthest away.
    want = {"tanh": 100.0, "soft_constraint": 0.1}.get(kind, 1.0)
    np.testing.assert_allclose(value, want, rtol=1e-5)


def test_background_is_wanted_at_the_border_not_in_the_middle():
    border, middle = np.zeros((2, 7, 7), int), np.zeros((2, 7, 7), int)
    border[:, :3, :3], middle[:, 2:5, 2:5] = 1, 1
    near, far = (
        objective.background_presence(_one_hot(o, 1)) for o in (border, middle)
    )
    np.testing.assert_allclose(near, 0.0, atol=1e-6)
    assert far > 1.0


@pytest.mark.parametrize("lead", [60.0, 85.0, 88.0, 92.0, 100.0, 110.0])
@pytest.mark.parametrize("kind", ["enforced_presence", "log"])
def test_a_background_on_the_verge_of_float32_has_a_finite_gradient(kind, lead):
    def loss(logit):
        x = jnp.stack([jnp.full((1, 4, 4), lead), jnp.zeros((1, 4, 4)) + logit], -1)
        return objective.background_presence(jax.nn.softmax(x, axis=-1), kind)

    value, grad = jax.value_and_grad(loss)(0.0)
    assert np.isfinite(value) and np.isfinite(grad)
    if lead < 86:  # Beyond, a CPU rounds the softmax to 0, another device may not.
        np.testing.assert_allclose(value, lead, rtol=0.05)
    if lead < 80:  # One more of logit is one less of surprise.
        np.testing.assert_allclose(grad, -1.0, rtol=1e-3)


@pytest.mark.parametrize("kind", typing.get_args(objective.Background))
def test_no_background_at_all_has_a_finite_gradient(kind):
    none = _one_hot(np.zeros((2, 5, 5), int), 1)
    value, grad = jax.value_and_grad(objective.background_presence)(none, kind)
    assert np.isfinite(value) and np.isfinite(grad).all()
    want = {"linear": 1.0, "mse": 1.0}.get(kind, 100.0)
    np.testing.assert_allclose(value, want)


def test_entropy_of_even_and_of_decided_maps():
    even = jnp.full((2, 4, 4, 5), 0.2)
    np.testing.assert_allclose(objective.pixel_entropy(even), np.log(5), rtol=1e-6)
    value, grad = jax.value_and_grad(objective.pixel_entropy)(_halves())
    np.testing.assert_allclose(value, 0.0, atol=1e-5)
    assert np.isfinite(grad).all()


def test_orthogonality_of_orthogonal_equal_and_zero_vectors():
    eye = jnp.tile(3.0 * jnp.eye(4, 8), (2, 1, 1))
    np.testing.assert_allclose(objective.orthogonality(eye), 0.0, atol=1e-6)
    same = jnp.ones((2, 4, 8))
    np.testing.assert_allclose(objective.orthogonality(same), 12 / 16, rtol=1e-5)
    value, grad = jax.value_and_grad(objective.orthogonality)(jnp.zeros((2, 4, 8)))
    np.testing.assert_allclose(value, 4 / 16)
    assert np.isfinite(grad).all()
    # A D x D Gram matrix of K+1 < D vectors cannot be the identity.
    assert objective.orthogonality(eye, "channels") >= 0.99 * (1 / 4 - 1 / 8) / 2


def test_equivariance_is_zero_for_equal_maps_and_one_where_a_map_is_lost():
    maps = _maps()
    np.testing.assert_allclose(objective.equivariance(maps, 2 * maps), 0.0, atol=1e-6)
    lost = jnp.zeros_like(maps)
    value, grads = jax.value_and_grad(objective.equivariance, (0, 1))(maps, lost)
    np.testing.assert_allclose(value, 1.0)
    assert all(np.isfinite(g).all() for g in grads)


def test_equivariance_leaves_the_background_out():
    maps = _maps()
    other = maps.at[..., -1].set(0.0)
    np.testing.assert_allclose(objective.equivariance(maps, other), 0.0, atol=1e-6)


def test_cross_entropy_at_chance_and_that_of_smoothed_targets():
    labels = jnp.array([0, 3, 1])
    chance = objective.cross_entropy(jnp.zeros((3, 4)), labels)
    np.testing.assert_allclose(chance, np.log(4), rtol=1e-6)
    logits = jax.random.normal(jax.random.key(0), (3, 4))
    target = 0.8 * jax.nn.one_hot(labels, 4) + 0.2 / 4
    want = -(target * jax.nn.log_softmax(logits)).sum(-1).mean()
    got = objective.cross_entropy(logits, labels, smoothing=0.2)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_maps_too_small_to_smooth_are_refused():
    with pytest.raises(ValueError, match="3x3 or more, not 2x6"):
        objective.presence(_maps(h=2))
