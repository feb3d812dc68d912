"""Affine warps with known results."""

import jax
import numpy as np
import pytest

from vitssl import config
from vitssl.methods.parts import affine

IMAGE = np.arange(2 * 6 * 6 * 1, dtype=np.float32).reshape(2, 6, 6, 1) + 1


@pytest.mark.parametrize("warp", [affine.bilinear, affine.nearest])
def test_warps_whose_result_is_known(warp):
    same = warp(IMAGE, affine.Warp(0.0, 0.0, 0.0, 1.0))
    np.testing.assert_allclose(same, IMAGE, rtol=1e-6)
    # Positive angles turn clockwise, as torchvision's do.
    turned = warp(IMAGE, affine.Warp(90.0, 0.0, 0.0, 1.0))
    np.testing.assert_allclose(turned, np.rot90(IMAGE, -1, (1, 2)), atol=1e-3)
    moved = np.asarray(warp(IMAGE, affine.Warp(0.0, 2.0, -1.0, 1.0)))
    np.testing.assert_allclose(moved[:, :-1, 2:], IMAGE[:, 1:, :-2], rtol=1e-6)
    assert (moved[:, -1] == 0).all() and (moved[:, :, :2] == 0).all()


def test_scale_above_one_enlarges():
    large = np.asarray(affine.nearest(IMAGE, affine.Warp(0.0, 0.0, 0.0, 3.0)))
    # Two pixels in the middle of six, each three times as wide.
    np.testing.assert_array_equal(large[0, 0, :, 0], np.repeat(IMAGE[0, 2, 2:4, 0], 3))


def test_maps_are_brought_back_where_the_warp_loses_nothing():
    maps = np.zeros((1, 12, 12, 2), np.float32)
    maps[0, 4:8, 5:8, 0] = 1.0
    warp = affine.Warp(90.0, 8.0, -4.0, 1.0)  # On an image four times as large.
    there = affine.nearest(maps, affine.Warp(90.0, 2.0, -1.0, 1.0))
    assert np.abs(np.asarray(there) - maps).max() == 1.0
    np.testing.assert_allclose(affine.undo(there, warp, 48), maps, atol=1e-6)


def test_draws_stay_in_their_range_and_shift_by_whole_pixels():
    made = affine.Affine(30.0, (0.1, 0.2), (0.5, 2.0))
    keys = jax.random.split(jax.random.key(0), 500)
    warps = jax.vmap(lambda k: made.draw(k, 50))(keys)
    assert np.abs(warps.angle).max() <= 30 and np.abs(warps.angle).max() > 28
    assert np.abs(warps.x).max() == 5 and np.abs(warps.y).max() == 10
    assert (warps.x == np.round(warps.x)).all()
    assert 0.5 <= warps.scale.min() < 0.52 and 1.97 < warps.scale.max() <= 2.0


def test_ranges_that_cannot_be():
    values = dict(degrees=200.0, translate=(1.0, 0.0), scale=(0.0, 1.0))
    problems = config.Problems()
    config.section(affine.Affine, values, "affine", problems)
    assert problems == [
        "affine.degrees=200.0: in [0, 180]",
        "affine.translate=(1.0, 0.0): every value in [0, 1)",
        "affine.scale=(0.0, 1.0): every value above 0",
    ]
    config.section(affine.Affine, dict(scale=(2.0, 1.0)), "affine", problems)
    assert problems[3:] == ["affine.scale=(2.0, 1.0): ascending, the least first"]
