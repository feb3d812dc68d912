import numpy as np
import pytest
from PIL import Image

from tests.data.test_colour import gap, picture
from vitssl.data import geometry, resample, views


@pytest.mark.parametrize("size", [(60, 84), (84, 60), (50, 50), (20, 90)])
def test_evaluation_is_resize_and_centre_crop_by_pil(size):
    image = picture(size)
    got = views.Evaluate(32)({"image": image, "label": 2, "index": 5})
    side = 36  # int(1.14 * 32)
    short = min(size)
    rows, columns = (int(side * n / short) for n in size)
    pil = Image.fromarray(image).resize((columns, rows), Image.Resampling.BICUBIC)
    top, left = round((rows - 32) / 2), round((columns - 32) / 2)
    want = np.asarray(pil)[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(got["image"], want)
    assert got["label"] == 2 and got["index"] == 5
    assert got["label"].dtype == np.int32


def test_evaluation_ratio_of_one_takes_the_largest_square():
    image = picture((32, 50))
    got = views.Evaluate(32, ratio=1.0)({"image": image})["image"]
    np.testing.assert_array_equal(got, image[:, 9:41])
    assert views.Evaluate(224).size * 1.14 // 1 == 255


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("size", [(8, 8), (1, 1), (3, 70), (100, 33)])
@pytest.mark.parametrize("interpolation", ["bicubic", "fast"])
def test_every_image_becomes_a_square(channels, size, interpolation):
    view = views.Evaluate(24, interpolation=interpolation)
    got = view({"image": picture(size, channels)})["image"]
    assert got.shape == (24, 24, channels) and got.dtype == np.uint8


def test_small_images_are_enlarged_smoothly():
    image = np.zeros((8, 8, 1), np.uint8)
    image[:, 4:] = 200
    got = views.Evaluate(32, ratio=1.0)({"image": image})["image"][16, :, 0]
    assert got[2] == 0 and got[-3] == 200
    edge = got[13:19].astype(int)
    assert (np.diff(edge) > 5).all()  # No block of the source has flat sides.


def test_evaluation_is_not_random():
    image = picture((40, 50))
    a = views.Evaluate(24)({"image": image}, np.random.default_rng(0))
    b = views.Evaluate(24)({"image": image}, np.random.default_rng(1))
    np.testing.assert_array_equal(a["image"], b["image"])
    assert a["label"] == -1


def test_a_single_crop_is_a_crop_and_nothing_else():
    transform = views.SingleCrop(24, (0.3, 1.0), flip=0.0)
    image = picture((60, 60))
    rows = [transform({"image": image}, np.random.default_rng(i)) for i in range(200)]
    boxes = np.array([row["global_box"][0] for row in rows])
    assert not boxes[:, 4].any()
    area = boxes[:, 2] * boxes[:, 3]
    assert 0.28 < area.min() < 0.36 and area.max() > 0.9
    # The pixels are those of the box, untouched.
    top, left, height, width = (boxes[0, :4] * 60).round().astype(int)
    cut = Image.fromarray(image[top : top + height, left : left + width])
    want = cut.resize((24, 24), Image.Resampling.BICUBIC)
    assert gap(rows[0]["global"][0], want).max() == 0


@pytest.mark.parametrize("shape", [(2, 900), (900, 2), (3, 1001)])
def test_a_line_of_pixels_is_cut_before_it_is_resized(shape, monkeypatch):
    image, sizes = picture(shape), []
    whole = geometry.centre_crop(geometry.resize_over(image, (36, 36)), 32)
    resize = resample.resize

    def watched(image, size, *args):
        sizes.append(size)
        return resize(image, size, *args)

    monkeypatch.setattr(resample, "resize", watched)
    got = views.Evaluate(32)({"image": image})["image"]
    assert max(sizes[0]) <= 36 * 9
    assert np.abs(got.astype(int) - whole).max() <= 2


def test_an_image_eight_times_as_long_as_wide_is_not_cut():
    image = picture((10, 80))
    assert geometry.middle(image.shape[:2], (36, 36)) == (0, 0, *image.shape[:2])
    assert geometry.middle((10, 82), (36, 36)) == (0, 1, 10, 80)
    assert geometry.middle((80, 10), (36, 72)) == (20, 0, 40, 10)
