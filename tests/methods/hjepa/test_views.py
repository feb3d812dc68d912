"""Multi-crop: crops, boxes and masks of one example, and the section."""

import dataclasses
import pickle

import numpy as np
import pytest

from tests.data.test_colour import gap, picture
from tests.methods.hjepa.test_masks import HJEPA
from vitssl import config
from vitssl.data import crops
from vitssl.data import views as plain
from vitssl.methods.hjepa import masks, views
from vitssl.run import experiment

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
    transform = views.MultiCropTransform(section, masks, 4) if masks else section
    return transform(example(image, **extra), np.random.default_rng(seed))


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
    got = views.MultiCropTransform(SMALL, CROSS, 4)(example(), rng)
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


def test_blur_and_solarisation_depend_on_the_kind_and_the_number_of_the_crop():
    section = change(blur_prob=(1.0, 0.1, 0.5), solarize_prob=0.2, grayscale_prob=0.3)
    first, second, third = (section.recipe("global", i) for i in range(3))
    assert first == dict(
        strength=0.4, prob=1.0, grayscale_prob=0.3, blur_prob=1.0, solarize_prob=0.0
    )
    assert (second["blur_prob"], second["solarize_prob"]) == (0.1, 0.2)
    assert (third["blur_prob"], third["solarize_prob"]) == (0.1, 0.0)
    for i in (0, 1, 5):
        local = section.recipe("local", i)
        assert (local["blur_prob"], local["solarize_prob"]) == (0.5, 0.0)


def test_section_reports_every_bad_value():
    given, found = dataclasses.asdict(SMALL), config.Problems()
    assert config.section(crops.MultiCrop, given, "c", found) == SMALL and not found
    bad = dict(
        num_global_crops=0,
        num_local_crops=-2,
        global_crop_size=0,
        local_crop_scale=(0.5, 1.2),
        local_color_jitter=6.0,
        color_jitter_prob=-0.1,
        horizontal_flip_prob=1.5,
        blur_prob=(0.0, 2.0, 0.0),
        adaptive_warmup_epochs=-1,
    )
    config.section(crops.MultiCrop, given | bad, "c", found)
    assert {line.split("=")[0] for line in found} == {f"c.{key}" for key in bad}
    assert "c.num_global_crops=0: 1 or more" in found
    less = change(
        adaptive=True,
        min_local_crops=3,
        max_local_crops=2,
        global_crop_scale=(0.9, 0.4),
    )
    assert list(less.check()) == [
        "global_crop_scale=(0.9, 0.4): smallest <= largest",
        "min_local_crops=3: 0 to max_local_crops=2",
    ]


def test_adaptive_crops_that_could_never_grow_are_refused():
    grow = change(adaptive=True, min_local_crops=2, max_local_crops=10)
    (line,) = grow.check()
    assert line.startswith("adaptive_warmup_epochs=0: adaptive=True never leaves min_")
    assert not list(dataclasses.replace(grow, adaptive_warmup_epochs=30).check())


def test_the_plain_single_crop_is_one_global_crop_and_nothing_else():
    section = change(
        num_global_crops=1,
        num_local_crops=0,
        global_color_jitter=0.0,
        global_crop_scale=(0.3, 1.0),
    )
    view = plain.SingleCrop(32, (0.3, 1.0), flip=0.5)
    for seed in range(8):
        want = run(section, seed)
        got = view(example(), np.random.default_rng(seed))
        assert set(got) == set(want)
        for key, value in want.items():
            np.testing.assert_array_equal(got[key], value)


def test_transform_can_be_pickled():
    transform = views.MultiCropTransform(SMALL, CROSS, 4)
    assert pickle.loads(pickle.dumps(transform)) == transform


@pytest.mark.parametrize("spec", ["hjepa", "hjepa:cifar10_vitb", "dino", "dino:folder"])
def test_the_documented_override_of_adaptive_crops_reaches_its_number(spec):
    words = ["multicrop.adaptive=True", "multicrop.max_local_crops=10"]
    one = experiment.read(experiment.load(spec, words))
    made, epochs = one.sections["multicrop"], one.settings.epochs
    assert made.locals_at(0) == 2 and made.locals_at(int(epochs) - 1) == 10


def test_crops_and_masks_have_the_published_defaults():
    made = crops.MultiCrop(2, 6, 224)
    assert (made.local_crop_size, made.local_crop_scale) == (96, (0.05, 0.4))
    assert not list(made.check()) and not made.adaptive
    found = views.MultiCropTransform()(example(), np.random.default_rng(0))
    assert found["global"].shape == (2, 224, 224, 3)
    assert found["local"].shape == (6, 96, 96, 3)
    assert found["global_targets"].shape == (2, 3, 196)
    drawn = masks.Masking(num_hierarchies=2, num_target_masks=3, min_keep=1)
    assert drawn == masks.Masking(
        strategy="global_only",
        sampler="original",
        num_hierarchies=2,
        num_target_masks=3,
        scale_progression="geometric",
        base_scale=(0.05, 0.15),
        aspect_ratio_range=(0.75, 1.5),
        max_attempts=10,
        min_keep=1,
        targets_per_level="constant",
        levels="per_level",
        mode="drop",
    )


@pytest.mark.parametrize("spec", ["cifar10_vitb", "imagenet_vits", "imagenet_vitl"])
def test_coarse_levels_of_published_recipes_have_the_largest_blocks(spec):
    c = experiment.load(f"hjepa:{spec}")
    masking = experiment.read(c).sections["masking"]
    _, targets = masks.hierarchical(np.random.default_rng(0), masking, (14, 14), 100)
    size = targets.sum(-1)  # [crops, H, T]
    median = [np.median(size[:, k][size[:, k] > 0]) for k in range(3)]
    assert median[0] < median[1] < median[2]
