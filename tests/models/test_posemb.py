"""Position tables on other grids, and rotary angles."""

import jax.numpy as jnp
import numpy as np
import pytest

from vitssl.models import posemb


def _draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _cubic(old, new):
    """Weights [new, old] of antialiased bicubic resampling, by its definition."""
    stretch = max(1.0, old / new)
    weights = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for j in range(old):
            x = abs(centre - j) / stretch
            if x <= 1:
                weights[i, j] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                weights[i, j] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("new", [(4, 4), (9, 3), (2, 5), (1, 1)])
def test_resample_is_antialiased_bicubic(new):
    table = _draw(0, 2, 6 * 5, 3)
    got = posemb.resample(jnp.asarray(table), (6, 5), new)
    rows, columns = _cubic(6, new[0]), _cubic(5, new[1])
    want = np.einsum("ph,qw,bhwd->bpqd", rows, columns, table.reshape(2, 6, 5, 3))
    np.testing.assert_allclose(got, want.reshape(2, -1, 3), atol=2e-5)


def test_resample_to_the_same_grid_is_the_table_itself():
    table = jnp.asarray(_draw(0, 6, 3))
    assert posemb.resample(table, (2, 3), (2, 3)) is table
    other = posemb.resample(table, (2, 3), (3, 2))  # As many patches, another grid.
    assert np.abs(other - table).max() > 0.1


def test_rope_angles_are_row_first_then_column():
    angles = posemb.rope_angles((2, 3), 8, 100.0)
    assert angles.shape == (6, 4)
    omega = [1.0, 100.0**-0.5]
    for i, row in enumerate(angles):
        y, x = divmod(i, 3)
        want = [y * omega[0], y * omega[1], x * omega[0], x * omega[1]]
        np.testing.assert_allclose(row, want, rtol=1e-6)


def test_rope_wants_four_channels_per_frequency():
    with pytest.raises(ValueError, match="head_dim=6 must be divisible by 4"):
        posemb.rope_angles((2, 2), 6, 1e4)


def test_rotate_multiplies_neighbouring_channels_as_complex_numbers():
    x, angles = _draw(0, 2, 5, 3, 8), _draw(1, 1, 5, 4)
    got = np.asarray(posemb.rotate(jnp.asarray(x), *posemb.rotation(angles)))
    want = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, :, None]
    np.testing.assert_allclose(got[..., 0::2], want.real, atol=1e-5)
    np.testing.assert_allclose(got[..., 1::2], want.imag, atol=1e-5)


def test_rotated_products_depend_on_the_shift_alone():
    grid, dim = (5, 7), 8
    cos, sin = posemb.rotation(posemb.rope_angles(grid, dim, 10.0)[None])
    q, k = _draw(0, 2, 1, 1, 1, dim)
    everywhere = (1, 35, 1, dim)
    q = posemb.rotate(jnp.broadcast_to(q, everywhere), cos, sin)[0, :, 0]
    k = posemb.rotate(jnp.broadcast_to(k, everywhere), cos, sin)[0, :, 0]
    product = np.asarray(q @ k.T).reshape(5, 7, 5, 7)
    for dy, dx in [(0, 0), (1, 0), (0, 1), (2, -3)]:
        same = [
            product[y, x, y + dy, x + dx]
            for y in range(5 - max(dy, 0))
            for x in range(7)
            if 0 <= x + dx < 7
        ]
        np.testing.assert_allclose(same, same[0], atol=2e-5)
    shifts = [product[0, 0, 0, 0], product[0, 0, 1, 0], product[0, 0, 0, 1]]
    assert np.ptp(shifts) > 0.1  # And it does depend on it.
