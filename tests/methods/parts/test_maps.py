"""Masks from maps: ties, dropped parts, thresholds, removal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl.methods.parts import maps as partmaps

# Four patches in a row: part 0, part 1, the background, a tie of part 1 with it.
MAPS = jnp.array(
    [[[[0.7, 0.1, 0.2], [0.1, 0.6, 0.3], [0.1, 0.2, 0.7], [0.2, 0.4, 0.4]]]]
)


def test_foreground_is_the_strongest_part_against_the_background():
    hard, soft = partmaps.masks(MAPS)
    np.testing.assert_allclose(hard[0, 0, :, 0], [1, 1, 0, 1])
    np.testing.assert_allclose(hard[0, 0, :, 1], [0, 0, 1, 0])
    np.testing.assert_allclose(soft[0, 0, :, 0], [0.7, 0.6, 0.2, 0.4])
    np.testing.assert_allclose(soft[0, 0, :, 1], [0.2, 0.3, 0.7, 0.4])


def test_a_dropped_part_hands_its_patches_to_whoever_is_next():
    hard, soft = partmaps.masks(MAPS, jnp.array([[True, False]]))
    np.testing.assert_allclose(hard[0, 0, :, 0], [1, 0, 0, 0])
    # Not scaled up: what is left keeps its own strength.
    np.testing.assert_allclose(soft[0, 0, :, 0], [0.7, 0.1, 0.1, 0.2])


def test_hard_values_are_exact_and_their_gradient_is_that_of_the_sum():
    maps = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 5, 5, 4)))
    hard = partmaps.masks(maps)[0]
    assert set(np.unique(hard)) == {0.0, 1.0}
    grad = jax.grad(lambda m: partmaps.masks(m)[0][..., 0].sum())(maps)
    np.testing.assert_array_equal(grad[..., :-1], 1.0)
    np.testing.assert_array_equal(grad[..., -1], 0.0)


def test_ties_give_their_gradient_to_one_part():
    """As in torch; the gradient of jnp.max would be shared, or 0 / 0."""
    maps = jnp.full((1, 1, 1, 4), 0.25)
    grad = jax.grad(lambda m: partmaps.masks(m)[1][..., 0].sum())(maps)
    np.testing.assert_array_equal(grad[0, 0, 0], [1, 0, 0, 0])


def test_logits_are_minus_squared_distances():
    z = jax.random.normal(jax.random.key(0), (1, 2, 3, 5))
    w = jax.random.normal(jax.random.key(1), (4, 5))
    dot, logits = partmaps.similarities(z, w)
    want = -np.square(np.asarray(z)[..., None, :] - np.asarray(w)).sum(-1)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dot, np.asarray(z) @ np.asarray(w).T, rtol=1e-4)


def test_thresholds_silence_parts_never_the_background():
    dot = jnp.array([[[[0.5, -0.5, 0.1]]]])
    logits = dot - 3.0
    got = partmaps.threshold(dot, logits, [0.6, -1.0])
    np.testing.assert_allclose(got[0, 0, 0], [-np.inf, -0.5, 0.1])
    got = partmaps.threshold(dot, logits, [0.6, -1.0], on_distance=True)
    np.testing.assert_allclose(got[0, 0, 0], [-np.inf, -3.5, -2.9], rtol=1e-6)
    nothing = partmaps.threshold(dot, logits, [9.0, 9.0])
    np.testing.assert_allclose(partmaps.assign(nothing)[0, 0, 0], [0, 0, 1])


@pytest.mark.parametrize(
    "removal, soft",
    [
        ("zero", [0.0, 0.6, 0.2, 0.4]),
        ("keep", [0.1, 0.6, 0.2, 0.4]),
        ("keep_all", [0.7, 0.6, 0.2, 0.4]),
    ],
)
def test_what_removing_part_0_leaves(removal, soft):
    hard, left = partmaps.without_parts(MAPS, (0,), removal)
    np.testing.assert_allclose(hard[0, 0], [0, 1, 0, 1])
    np.testing.assert_allclose(left[0, 0], soft)


def test_pooling_divides_by_the_grid_not_by_the_mass():
    z = jnp.ones((1, 1, 4, 2))
    np.testing.assert_allclose(partmaps.pool(MAPS, z)[0, 0], [1.1 / 4] * 2, rtol=1e-6)
