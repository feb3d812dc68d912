import dataclasses
import math
import pickle

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.data.test_colour import gap, picture
from tests.methods.hjepa.test_masks import HJEPA
from vitssl.data import crops, resample

SMALL = crops.MultiCrop(
    num_global_crops=2,
    num_local_crops=3,
    global_crop_size=32,
    local_crop_size=16,
    global_crop_scale=(0.4, 1.0),
    local_crop_scale=(0.05, 0.4),
    global_color_jitter=0.4,
    local_color_jitter=0.4,
    color_jitter_prob=1.0,
    horizontal_flip_prob=0.5,
    interpolation="bicubic",
    colour="host",
)
CROSS = dataclasses.replace(HJEPA, strategy="cross_crop_prediction", min_keep=4)


def change(**values):
    return dataclasses.replace(SMALL, **values)


def example(image=None, **extra):
    image = picture((60, 84)) if image is None else image
    return {"image": image, "label": np.int32(3), "index": np.int32(7)} | extra


def run(section, seed=0, masks=None, image=None, **extra):
    transform = crops.MultiCropTransform(section, masks, 4)
    return transform(example(image, **extra), np.random.default_rng(seed))


# Boxes.


@pytest.mark.parametrize("size", [(60, 84), (200, 50), (3, 3), (1, 1), (1, 40)])
@pytest.mark.parametrize("scale", [(0.05, 0.4), (0.9, 1.0)])
def test_boxes_lie_inside_the_image(size, scale):
    rng = np.random.default_rng(0)
    for _ in range(300):
        top, left, height, width = crops.draw_box(rng, size, scale)
        assert 0 <= top <= top + height <= size[0] and height >= 1
        assert 0 <= left <= left + width <= size[1] and width >= 1


def test_boxes_cover_uniform_areas_of_log_uniform_shape():
    rng = np.random.default_rng(0)
    boxes = [crops.draw_box(rng, (600, 600), (0.05, 0.4)) for _ in range(8000)]
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
    box = crops.draw_box(np.random.default_rng(0), size, (0.9, 1.0))
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


# The transform.


def test_batch_layout():
    got = run(SMALL, masks=CROSS)
    shapes = {key: (value.shape, value.dtype) for key, value in got.items()}
    assert shapes == {
        "global": ((2, 32, 32, 3), np.uint8),
        "local": ((3, 16, 16, 3), np.uint8),
        "global_box": ((2, 5), np.float32),
        "local_box": ((3, 5), np.float32),
        "label": ((), np.int32),
        "index": ((), np.int32),
        "global_context": ((2, 3, 64), bool),
        "global_targets": ((2, 3, 64), bool),
        "local_context": ((3, 3, 16), bool),
        "local_targets": ((3, 3, 16), bool),
    }
    assert got["label"] == 3 and got["index"] == 7


def test_without_crops_of_a_kind_its_keys_are_absent():
    assert not [k for k in run(change(num_global_crops=0)) if "global" in k]
    assert not [k for k in run(change(num_local_crops=0), masks=CROSS) if "local" in k]


@pytest.mark.parametrize("interpolation", ["bicubic", "fast"])
def test_boxes_and_flips_lead_back_to_the_pixels(interpolation):
    # Values are positions: red is the column, green the row.
    y, x = np.mgrid[:120, :160].astype(np.float32)
    ramp = np.stack([x * 1.5, y * 2, 0 * x], -1).round().astype(np.uint8)
    section = change(
        global_color_jitter=0.0,
        local_color_jitter=0.0,
        interpolation=interpolation,
        num_global_crops=12,
        num_local_crops=12,
    )
    got = run(section, image=ramp)
    flips = set()
    for kind in ("global", "local"):
        for crop, box in zip(got[kind], got[f"{kind}_box"], strict=True):
            top, left, height, width, flipped = box
            s = len(crop)
            at = (np.arange(s) + 0.5) / s  # Centres of pixels, as shares of the box.
            column = left + width * (1 - at if flipped else at)
            row = top + height * at
            want = (column * 160 - 0.5) * 1.5, (row * 120 - 0.5) * 2
            inside = slice(2, -2)  # Resizing bends the ramp at the border.
            for value, line in zip(
                (crop[s // 2, :, 0], crop[:, s // 2, 1]), want, strict=True
            ):
                assert gap(value, line)[inside].max() < 2.5
            flips.add(float(flipped))
    assert flips == {0.0, 1.0}


def test_flip_probability_of_zero_and_one():
    assert not run(change(horizontal_flip_prob=0.0))["global_box"][:, 4].any()
    assert run(change(horizontal_flip_prob=1.0))["global_box"][:, 4].all()


def test_same_generator_same_example_other_generator_other():
    a, b, c = (run(SMALL, seed, CROSS) for seed in (4, 4, 5))
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])
    for key in ("global", "local", "global_targets", "local_targets"):
        assert (a[key] != c[key]).any()


def test_philox_generators_work_as_well():
    rng = np.random.Generator(np.random.Philox(key=3))
    got = crops.MultiCropTransform(SMALL, CROSS, 4)(example(), rng)
    assert (got["global_box"][0] != got["global_box"][1]).any()


def test_number_of_local_crops_changes_nothing_else():
    few, many = (run(change(num_local_crops=n), masks=CROSS) for n in (2, 5))
    for key in few:
        if "global" in key:
            np.testing.assert_array_equal(few[key], many[key])
    np.testing.assert_array_equal(few["local"], many["local"][:2])
    none = run(change(num_local_crops=0), masks=CROSS)
    np.testing.assert_array_equal(none["global"], few["global"])


def test_number_of_global_crops_does_not_change_the_local_ones():
    one, two = (run(change(num_global_crops=n), masks=CROSS) for n in (1, 2))
    np.testing.assert_array_equal(one["local"], two["local"])


def test_masks_change_no_crop():
    with_masks, without = run(SMALL, masks=CROSS), run(SMALL)
    for key in without:
        np.testing.assert_array_equal(with_masks[key], without[key])


def test_crops_of_an_image_differ():
    got = run(change(global_color_jitter=0.0))
    assert (got["global"][0] != got["global"][1]).any()


def test_colour_on_the_device_leaves_the_pixels_alone():
    off = dict(global_color_jitter=0.0, local_color_jitter=0.0)
    plain = run(change(**off, colour="device"))
    host = run(change(**off))
    np.testing.assert_array_equal(plain["global"][0], host["global"][0])
    bright = run(change(grayscale_prob=1.0, colour="device"))["local"]
    assert (bright[..., 0] != bright[..., 1]).any()
    gray = run(change(grayscale_prob=1.0))["local"]
    assert (gray[..., 0] == gray[..., 1]).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("size", [(8, 8), (1, 1), (5, 60)])
@pytest.mark.parametrize("interpolation", ["bicubic", "fast"])
def test_any_image_gives_the_same_shapes(channels, size, interpolation):
    section = change(
        interpolation=interpolation,
        grayscale_prob=0.5,
        blur_prob=(1.0, 1.0, 1.0),
        solarize_prob=1.0,
    )
    got = run(section, image=picture(size, channels))
    assert got["global"].shape == (2, 32, 32, channels)
    assert got["local"].shape == (3, 16, 16, channels)


def test_ijepa_shares_block_sizes_within_a_step():
    section = dataclasses.replace(HJEPA, sampler="ijepa", num_target_masks=1)
    crop = change(num_local_crops=0, num_global_crops=1)

    def areas(step):
        rows = (run(crop, seed, section, step=step) for seed in range(4))
        return [row["global_targets"].sum(-1)[0].tolist() for row in rows]

    same = areas(step=11)
    assert same.count(same[0]) == 4
    assert areas(step=12) != same


# The section.


def test_adaptive_number_of_local_crops_is_cut_off_not_rounded():
    grow = change(
        adaptive=True, min_local_crops=2, max_local_crops=10, adaptive_warmup_epochs=10
    )
    assert [grow.locals_at(e) for e in (0, 1, 2, 5, 9, 10, 50)] == [
        2, 2, 3, 6, 9, 10, 10,
    ]  # fmt: skip
    assert dataclasses.replace(grow, adaptive_warmup_epochs=0).locals_at(99) == 2
    assert SMALL.locals_at(99) == 3
    assert run(grow, epoch=5)["local"].shape[0] == 6
    assert run(grow)["local"].shape[0] == 2


def test_dinov2_preset_is_its_published_recipe():
    section = crops.MultiCrop(**crops.dinov2())
    assert not list(section.check())
    assert section.num_local_crops == 8
    first, second = (section.recipe("global", i) for i in range(2))
    assert first == dict(
        strength=1.0, prob=0.8, grayscale_prob=0.2, blur_prob=1.0, solarize_prob=0.0
    )
    assert (second["blur_prob"], second["solarize_prob"]) == (0.1, 0.2)
    for i in (0, 1, 5):
        local = section.recipe("local", i)
        assert (local["blur_prob"], local["solarize_prob"]) == (0.5, 0.0)


def test_crop_info_counts_patches():
    section = crops.MultiCrop(**crops.dinov2() | {"num_local_crops": 6})
    assert section.get_crop_info(16) == dict(
        global_crop_size=224,
        local_crop_size=96,
        global_num_patches=196,
        local_num_patches=36,
        num_global_crops=2,
        num_local_crops=6,
        total_crops=8,
    )


def test_section_reports_every_bad_value():
    assert not list(SMALL.check())
    bad = change(
        num_global_crops=-1,
        num_local_crops=-2,
        global_crop_size=0,
        local_crop_scale=(0.5, 1.2),
        local_color_jitter=6.0,
        color_jitter_prob=-0.1,
        horizontal_flip_prob=1.5,
        blur_prob=(0.0, 2.0, 0.0),
        adaptive=True,
        min_local_crops=3,
        max_local_crops=2,
        adaptive_warmup_epochs=-1,
    )
    keys = {line.split("=")[0] for line in bad.check()}
    assert keys == {
        "num_global_crops",
        "num_local_crops",
        "global_crop_size",
        "local_crop_scale",
        "local_color_jitter",
        "color_jitter_prob",
        "horizontal_flip_prob",
        "blur_prob",
        "min_local_crops",
        "adaptive_warmup_epochs",
    }
    none = change(num_global_crops=0, num_local_crops=0)
    assert [line.split("=")[0] for line in none.check()] == ["num_global_crops"]


def test_transform_can_be_pickled():
    transform = crops.MultiCropTransform(SMALL, CROSS, 4)
    assert pickle.loads(pickle.dumps(transform)) == transform
