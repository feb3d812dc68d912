"""Pixels to patches and back; packing, gathering and scattering of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl.models import patches


def _draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 3, 4, 12])
def test_normalise_standardises_8_bit_pixels(channels):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 5, 4, channels), dtype=np.uint8)
    mean, std = rng.uniform(0.2, 0.8, (2, channels))
    got = patches.normalise(image, tuple(mean), tuple(std))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, (image / 255.0 - mean) / std, atol=2e-6)


def test_normalise_leaves_floats_alone():
    image = _draw(0, 2, 3, 3, 1)
    got = patches.normalise(image, (0.5,), (0.1,))
    np.testing.assert_array_equal(got, image)


def test_normalise_wants_one_number_per_channel():
    image = np.zeros((1, 2, 2, 4), np.uint8)
    with pytest.raises(ValueError, match="mean has 3 and std 3 .* 4 channels"):
        patches.normalise(image, (0.5,) * 3, (0.1,) * 3)


def test_patchify_lists_patches_in_raster_order():
    y, x = np.mgrid[:6, :4]
    image = np.stack([y, x], axis=-1)[None]  # Every pixel holds its coordinates.
    got = np.asarray(patches.patchify(image, 2)).reshape(6, 2, 2, 2)
    for i, patch in enumerate(got):
        top, left = 2 * (i // 2), 2 * (i % 2)
        np.testing.assert_array_equal(patch, image[0, top : top + 2, left : left + 2])


def test_a_patch_that_does_not_divide_the_image_is_named():
    with pytest.raises(ValueError, match="patch=4 does not divide .* 8x10 pixels"):
        patches.patchify(np.zeros((1, 8, 10, 3)), 4)


def test_pack_lists_members_in_raster_order_and_pads_with_the_rest():
    mask = np.array([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    keep, count = patches.pack(mask, 4)
    np.testing.assert_array_equal(keep[0], [1, 3, 4, 0])
    np.testing.assert_array_equal(keep[1], [0, 1, 2, 3])
    np.testing.assert_array_equal(keep[2], [0, 1, 2, 3])  # The fifth has no slot.
    np.testing.assert_array_equal(count, [3, 1, 4])
    assert keep.dtype == count.dtype == jnp.int32


def test_pack_takes_any_leading_axes():
    mask = np.random.default_rng(0).random((2, 3, 4, 10)) < 0.4
    keep, count = jax.jit(patches.pack, static_argnums=1)(mask, 10)
    assert keep.shape == (2, 3, 4, 10) and count.shape == (2, 3, 4)
    for index in np.ndindex(2, 3, 4):
        members = np.flatnonzero(mask[index])
        assert count[index] == len(members)
        np.testing.assert_array_equal(keep[index][: len(members)], members)
        np.testing.assert_array_equal(np.sort(keep[index]), np.arange(10))


@pytest.mark.parametrize("slots", [0, 6])
def test_pack_refuses_slots_that_cannot_be_filled(slots):
    with pytest.raises(ValueError, match=f"slots={slots} must be in 1..5"):
        patches.pack(np.ones((2, 5), bool), slots)


def test_take_gathers_tokens_of_each_sample_or_of_one_table():
    tokens, keep = _draw(0, 2, 5, 3), np.array([[4, 0], [2, 2]])
    got = patches.take(tokens, keep)
    np.testing.assert_array_equal(
        got, np.stack([t[k] for t, k in zip(tokens, keep, strict=False)])
    )
    table = patches.take(tokens[:1], keep)
    np.testing.assert_array_equal(table, tokens[0][keep])


def test_put_is_the_inverse_of_take_where_slots_are_filled():
    tokens, into = _draw(0, 3, 6, 2), _draw(1, 3, 6, 2)
    mask = np.array([[1, 0, 1, 1, 0, 0], [1] * 6, [0] * 6], bool)
    keep, count = patches.pack(mask, 6)
    got = patches.put(patches.take(tokens, keep), keep, count, into)
    np.testing.assert_array_equal(got, np.where(mask[..., None], tokens, into))


def test_put_without_a_count_fills_every_slot():
    tokens, keep = _draw(0, 2, 2, 3), np.array([[3, 0], [1, 2]])
    got = np.asarray(patches.put(tokens, keep, None, np.zeros((2, 4, 3), np.float32)))
    np.testing.assert_array_equal(got[0, [3, 0]], tokens[0])
    np.testing.assert_array_equal(got[1, [1, 2]], tokens[1])
    assert not got[0, [1, 2]].any() and not got[1, [0, 3]].any()


def test_valid_marks_the_filled_slots():
    got = patches.valid(jnp.array([[0, 2], [3, 1]]), 3)
    want = [[[0, 0, 0], [1, 1, 0]], [[1, 1, 1], [1, 0, 0]]]
    np.testing.assert_array_equal(got, np.array(want, bool))
