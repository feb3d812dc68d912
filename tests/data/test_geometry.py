"""Boxes of crops, and resizing."""

import math

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.data.test_colour import gap, picture
from vitssl.data import geometry, resample


@pytest.mark.parametrize("size", [(60, 84), (200, 50), (3, 3), (1, 1), (1, 40)])
@pytest.mark.parametrize("scale", [(0.05, 0.4), (0.9, 1.0)])
def test_boxes_lie_inside_the_image(size, scale):
    rng = np.random.default_rng(0)
    for _ in range(300):
        top, left, height, width = geometry.draw_box(rng, size, scale)
        assert 0 <= top <= top + height <= size[0] and height >= 1
        assert 0 <= left <= left + width <= size[1] and width >= 1


def test_boxes_cover_uniform_areas_of_log_uniform_shape():
    rng = np.random.default_rng(0)
    boxes = [geometry.draw_box(rng, (600, 600), (0.05, 0.4)) for _ in range(8000)]
    top, left, height, width = np.array(boxes, float).T
    area, shape = height * width / 600**2, np.log(width / height)
    # No draw is refused here, so these are the exact distributions.
    quantiles = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(
        np.quantile(area, quantiles), 0.05 + 0.35 * quantiles, atol=0.01
    )
    bound = math.log(4 / 3)
    np.testing.assert_allclose(
        np.quantile(shape, quantiles), bound * (2 * quantiles - 1), atol=0.02
    )
    free = top / (600 - height), left / (600 - width)
    for place in free:
        np.testing.assert_allclose(np.quantile(place, quantiles), quantiles, atol=0.02)
    # Rows and columns are placed independently.
    assert abs(np.corrcoef(free)[0, 1]) < 0.05


@pytest.mark.parametrize(
    "size, want", [((30, 300), (0, 130, 30, 40)), ((300, 30), (130, 0, 40, 30))]
)
def test_a_strip_falls_back_to_its_largest_central_box(size, want):
    box = geometry.draw_box(np.random.default_rng(0), size, (0.9, 1.0))
    assert box == want


# Resizing.


@pytest.mark.parametrize("size", [(24, 24), (40, 20), (130, 90)])
def test_bicubic_is_pils(size):
    image = picture((60, 84))
    got = resample.resize(image, size, (5, 7, 50, 61))
    pil = Image.fromarray(image).crop((7, 5, 68, 55))
    want = pil.resize(size[::-1], Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "rows, columns", [(45, 52), (70, 64), (80, 90), (40, 100), (20, 26), (8, 8)]
)
@pytest.mark.parametrize("size", [32, 12])
def test_fast_resize_is_nearly_bicubic(rows, columns, size):
    image = picture((rows, columns), seed=rows)
    got = resample.resize(image, (size, size), None, "fast")
    want = resample.resize(image, (size, size), None, "bicubic")
    assert gap(got, want).mean() < (1.0 if size == 32 else 2.0)  # Mostly border.
    # Plain cubic interpolation does not smooth before it picks pixels.
    if min(rows, columns) >= 2 * size:
        plain = cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)
        assert gap(plain, want).mean() > 1.5 * gap(got, want).mean()


@pytest.mark.parametrize("scale", [0.2, 0.8, 1.3, 1.9, 2.7])
def test_filter_keeps_flat_images_flat(scale):
    kernel = resample.kernel(round(resample.OCTAVE * math.log2(scale)), 7)
    assert abs(kernel.sum() - 1) < 1e-3
    np.testing.assert_array_equal(kernel, kernel[::-1])
    flat = np.full((50, 50, 3), 200, np.uint8)
    side = round(50 / scale)
    got = resample.resize(flat, (side, side), None, "fast")
    assert (got == 200).all()


@pytest.mark.parametrize("interpolation", ["bicubic", "fast"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12])
def test_channels_do_not_mix(interpolation, channels):
    image = picture((30, 40), channels)
    got = resample.resize(image, (12, 20), (2, 3, 25, 30), interpolation)
    assert got.shape == (12, 20, channels)
    for c in range(channels):
        one = resample.resize(
            image[..., c : c + 1], (12, 20), (2, 3, 25, 30), interpolation
        )
        assert gap(got[..., c : c + 1], one).max() <= 1
