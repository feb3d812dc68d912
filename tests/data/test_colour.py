import itertools

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from vitssl.data import colour


def picture(size=(40, 48), channels=3, seed=0):
    """Smooth blobs over the whole range of values, with some noise on top."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*size, channels)).astype(np.float32)
    image = cv2.GaussianBlur(image, (0, 0), 3).reshape(*size, channels)
    image = (image - image.mean()) * 6 + 128 + rng.normal(0, 3, image.shape)
    return image.clip(0, 255).astype(np.uint8)


def gap(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b, float))


@pytest.mark.parametrize("factor", [0.3, 0.84, 1.0, 1.16, 1.9])
def test_factors_do_what_pil_does(factor):
    image = picture() // 2
    pil = Image.fromarray(image)
    for ours, theirs in (
        (colour.brightness, ImageEnhance.Brightness),
        (colour.contrast, ImageEnhance.Contrast),
        (colour.saturation, ImageEnhance.Color),
    ):
        want = theirs(pil).enhance(factor)
        assert gap(ours(image, factor), want).max() <= 1


@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.03, 0.0, 0.04, 0.3])
def test_hue_is_pils_quantised_hue(turn):
    image = picture()
    h, s, v = Image.fromarray(image).convert("HSV").split()
    h = Image.fromarray(np.asarray(h) + np.uint8(int(turn * 255) % 256))
    want = np.asarray(Image.merge("HSV", (h, s, v)).convert("RGB"))
    off = gap(colour.hue(image, turn), want)
    assert off.mean() < 0.3
    assert np.quantile(off, 0.995) <= 4


def test_a_third_of_a_turn_makes_red_green():
    red = np.full((4, 4, 3), (200, 0, 0), np.uint8)
    assert (colour.hue(red, 1 / 3) == (0, 200, 0)).all()
    grey = np.full((4, 4, 3), 77, np.uint8)
    assert (colour.hue(grey, 0.2) == 77).all()


def test_grayscale_and_solarize_are_pils():
    image = picture()
    pil = Image.fromarray(image)
    gray = colour.grayscale(image)
    assert gap(gray[..., 0], pil.convert("L")).max() <= 1
    assert (gray == gray[..., :1]).all()
    np.testing.assert_array_equal(colour.solarize(image), ImageOps.solarize(pil, 128))


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_the_gaussian_sum(sigma):
    image = picture((12, 15))
    x = np.arange(-4, 5)
    kernel = np.exp(-0.5 * (x / sigma) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(image.astype(float), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    want = sum(
        kernel[i] * kernel[j] * padded[i : i + 12, j : j + 15]
        for i, j in itertools.product(range(9), range(9))
    )
    assert gap(colour.blur(image, sigma), want).max() <= 1.01


@pytest.mark.parametrize("channels", [1, 2, 4, 12])
def test_other_channel_numbers_keep_hue_and_are_still_lit(channels):
    image = picture((9, 7), channels)
    for operation in (colour.saturation, colour.hue):
        np.testing.assert_array_equal(operation(image, 0.4), image)
    np.testing.assert_array_equal(colour.grayscale(image), image)
    assert gap(colour.brightness(image, 0.5), image // 2).max() <= 1
    mean = np.floor(image.mean() + 0.5)
    want = np.clip(mean + 1.5 * (image.astype(float) - mean), 0, 255)
    assert gap(colour.contrast(image, 1.5), want).max() <= 1
    assert colour.blur(image, 1.0).shape == image.shape
    assert (colour.solarize(image) == np.minimum(image, 255 - image)).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (2, 2)])
def test_tiny_images_pass_through_every_operation(size):
    image = picture(size)
    for operation, value in zip(colour.OPERATIONS, (1.1, 0.9, 1.2, 0.05), strict=True):
        assert operation(image, value).shape == image.shape
    assert colour.blur(image, 2.0).shape == image.shape


def test_operations_leave_their_input_alone():
    image = picture()
    before = image.copy()
    colour.jitter(image, (1.3, 0.7, 1.4, 0.2), (3, 1, 2, 0))
    colour.blur(image, 1.0)
    colour.solarize(image)
    np.testing.assert_array_equal(image, before)


def test_jitter_applies_the_operations_in_order():
    image = picture()
    factors = (1.5, 1.6, 0.4, 0.2)
    a = colour.jitter(image, factors, (0, 1, 2, 3))
    want = colour.brightness(image, 1.5)
    want = colour.contrast(want, 1.6)
    want = colour.hue(colour.saturation(want, 0.4), 0.2)
    np.testing.assert_array_equal(a, want)
    assert gap(a, colour.jitter(image, factors, (3, 2, 1, 0))).mean() > 2


@pytest.mark.parametrize(
    "strength, reach", [(0.4, (0.16, 0.16, 0.08, 0.04)), (1.0, (0.4, 0.4, 0.2, 0.1))]
)
def test_factors_are_uniform_within_the_strength(strength, reach):
    rng = np.random.default_rng(0)
    draws = [colour.draw_jitter(rng, strength) for _ in range(6000)]
    factors = np.array([f for f, _ in draws]) - (1, 1, 1, 0)  # [6000, 4]
    np.testing.assert_allclose(factors.max(0), reach, rtol=0.01)
    np.testing.assert_allclose(factors.min(0), np.negative(reach), rtol=0.01)
    np.testing.assert_allclose(factors.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(factors.std(0), np.array(reach) / 3**0.5, rtol=0.03)
    counts = np.unique([o for _, o in draws], axis=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 180  # 250 each.


def test_a_strength_beyond_two_and_a_half_never_inverts():
    rng = np.random.default_rng(0)
    factors = np.array([colour.draw_jitter(rng, 4.0)[0] for _ in range(500)])
    assert factors[:, :3].min() >= 0 and factors[:, :2].max() > 2


def augment(image, seed, **values):
    off = dict(
        strength=0.0, prob=1.0, grayscale_prob=0.0, blur_prob=0.0, solarize_prob=0.0
    )
    return colour.augment(image, np.random.default_rng(seed), **off | values)


def test_everything_off_changes_nothing():
    image = picture()
    np.testing.assert_array_equal(augment(image, 0), image)
    np.testing.assert_array_equal(augment(image, 0, strength=1.0, prob=0.0), image)


@pytest.mark.parametrize(
    "key", ["prob", "grayscale_prob", "blur_prob", "solarize_prob"]
)
def test_each_operation_happens_as_often_as_it_should(key):
    image = picture((8, 8))
    strength = 1.0 if key == "prob" else 0.0
    changed = [
        (augment(image, seed, strength=strength, **{key: 0.3}) != image).any()
        for seed in range(1500)
    ]
    # Blur of a very small sigma changes nothing after rounding.
    assert 0.23 < np.mean(changed) < 0.34


def test_one_switch_does_not_move_the_draws_of_the_others():
    image = picture()
    for seed in range(20):
        one = augment(image, seed, strength=0.4)
        two = augment(image, seed, strength=0.4, solarize_prob=1.0)
        np.testing.assert_array_equal(colour.solarize(one), two)
