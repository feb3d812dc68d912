"""Transforms of an image together with its masks, keypoints and boxes."""

import cv2
import numpy as np
import pytest

from vitssl import config
from vitssl.methods.parts import views


def _frame(rows=40, columns=56, at=(20.0, 12.0)):
    """A bright square at a keypoint, marked in the mask as well."""
    image = np.zeros((rows, columns, 3), np.uint8)
    mask = np.zeros((rows, columns), np.uint8)
    x, y = (int(v) for v in at)
    image[y - 3 : y + 3, x - 3 : x + 3] = 255
    mask[y - 3 : y + 3, x - 3 : x + 3] = 1
    return dict(
        image=image,
        mask=mask,
        parts=2 * mask,
        keypoints=np.array([[*at, 1.0], [0.0, 0.0, 0.0]], np.float32),
        box=np.array([x - 3, y - 3, 6, 6], np.float32),
    )


def _middle(mask):
    ys, xs = np.nonzero(mask)
    return np.array([xs.mean() + 0.5, ys.mean() + 0.5])


MOVES = {
    "resize": lambda f: views.resize(f, (80, 84)),
    "resize_short": lambda f: views.resize_short(f, 60),
    "centre_crop": lambda f: views.centre_crop(f, 34),
    "crop": lambda f: views.crop(f, 3, 7, 30),
    "mirror": views.mirror,
    "upend": views.upend,
}


@pytest.mark.parametrize("name", MOVES)
def test_image_mask_keypoint_and_box_move_together(name):
    before = _frame()
    copy = {k: v.copy() for k, v in before.items()}
    got = MOVES[name](before)
    for key in copy:  # Nothing is changed in place.
        np.testing.assert_array_equal(before[key], copy[key])
    middle = _middle(got["image"][..., 0] > 127)
    np.testing.assert_allclose(middle, got["keypoints"][0, :2], atol=0.8)
    np.testing.assert_allclose(_middle(got["mask"]), middle, atol=0.8)
    np.testing.assert_allclose(_middle(got["parts"]), middle, atol=0.8)
    box = got["box"]
    np.testing.assert_allclose(box[:2] + box[2:] / 2, middle, atol=0.8)
    assert got["keypoints"][0, 2] == 1 and got["keypoints"][1, 2] == 0


def test_affine_moves_mask_and_image_alike():
    got = views.affine(_frame(), 40.0, (5, -4), 1.1)
    bright = got["image"][..., 0] > 0
    np.testing.assert_array_equal(bright, got["mask"] > 0)
    assert bright.any() and "keypoints" not in got and "box" not in got


def test_a_keypoint_that_leaves_the_crop_is_invisible():
    got = views.crop(_frame(), 20, 0, 20)
    np.testing.assert_array_equal(got["keypoints"][0], [20.0, 0.0, 0.0])


@pytest.mark.parametrize("recipe", ["cub_original", "timm", "siim_acr", "given_mask"])
def test_every_recipe_gives_squares_and_repeats_itself(recipe):
    spec = views.Augment(24, recipe, flip_vertical=0.5)
    view = views.Training(spec, masked=True)
    example = _frame() | dict(label=3, index=7)
    one, two = (view(example, np.random.default_rng(5)) for _ in range(2))
    other = view(example, np.random.default_rng(6))
    for key, value in one.items():
        np.testing.assert_array_equal(value, two[key])
    assert one["image"].shape == (24, 24, 3) and one["image"].dtype == np.uint8
    assert one["mask"].shape == (24, 24) and one["label"] == 3 and one["index"] == 7
    assert (one["image"] != other["image"]).any()
    assert "mask" not in views.Training(spec)(example, np.random.default_rng(5))


def test_given_mask_always_shows_some_of_the_mask():
    view = views.Training(views.Augment(12, "given_mask"), masked=True)
    example = _frame(12, 80, at=(70.0, 6.0)) | dict(label=0, index=0)
    for seed in range(30):
        assert view(example, np.random.default_rng(seed))["mask"].any()


@pytest.mark.parametrize("evaluation", ["crop", "warp", "timm"])
def test_evaluation_hands_on_what_the_scores_need(evaluation):
    spec = views.Augment(24, evaluation=evaluation)
    example = _frame() | dict(label=1, index=2, group=5, swap_same=_frame()["image"])
    got = views.Evaluation(spec, 24)(example)
    shapes = {k: np.shape(v) for k, v in got.items()}
    assert shapes == dict(
        image=(24, 24, 3),
        mask=(24, 24),
        parts=(24, 24),
        keypoints=(2, 3),
        box=(4,),
        swap_same=(24, 24, 3),
        group=(),
        label=(),
        index=(),
    )
    np.testing.assert_array_equal(got["swap_same"], got["image"])


def test_planckian_jitter_keeps_green_and_grey_images_and_never_overflows():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for index in (0, 24):
        lit = views.relight(image, index)
        np.testing.assert_array_equal(lit[..., 1], image[..., 1])
    assert views.relight(image, 0)[..., 2].max() <= 1  # 3000 K has no blue.
    assert (views.relight(image, 0)[..., 0] >= image[..., 0]).all()
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    np.testing.assert_array_equal(views.relight(grey, 3), grey)


def test_ranges_that_cannot_be():
    problems = config.Problems()
    config.section(views.Augment, dict(size=0, flip=1.5), "augment", problems)
    want = ["augment.size=0: 1 or more", "augment.flip=1.5: in [0, 1]"]
    assert problems == want
    values = dict(size=8, scale=(1.0, 0.5))
    config.section(views.Augment, values, "augment", problems)
    assert problems[2:] == ["augment.scale=(1.0, 0.5): smallest <= largest"]
