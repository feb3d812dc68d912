import pickle

import numpy as np
import pytest
from sklearn import neighbors

from vitssl import errors
from vitssl.data import sources
from vitssl.data.sources import digits, scenes


def _pixels(world, count):
    made = [world.scene(i) for i in range(count)]
    return np.stack([s.image.reshape(-1) for s in made]), [s.label for s in made]


def test_a_scene_is_a_pure_function_of_seed_and_index():
    world = scenes.Scenes()
    one = world.scene(5)
    for _ in range(3):
        world.scene(6)
    again = pickle.loads(pickle.dumps(world)).scene(5)
    for a, b in zip(one, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (world.scene(6).image != one.image).any()
    assert (scenes.Scenes(seed=1).scene(5).image != one.image).any()
    assert world.label(5) == one.label


def test_the_digits_of_train_and_test_scenes_are_different_scans():
    train = {scenes.Scenes(split="train").scene(i).digit for i in range(1438)}
    test = {scenes.Scenes(split="test").scene(i).digit for i in range(359)}
    # One pass shows every scan of the split once, so the classes are balanced.
    assert train == set(digits.members("train"))
    assert test == set(digits.members("test"))
    assert not train & test


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [24, 64])
def test_the_digit_is_where_the_truth_says(size, channels):
    options = dict(fragments=0, shapes=0, noise=0, slant=45.0, scale_max=1.0)
    world = scenes.Scenes(size=size, channels=channels, **options)
    for i in range(40):
        scene = world.scene(i)
        assert scene.image.shape == (size, size, channels)
        assert scene.label == digits.pixels()[1][scene.digit]
        y, x, h, w = scene.box
        assert min(y, x) >= -1e-4
        assert max(y + h, x + w) <= size + 1e-4
        # Where there is no ink the background is one plane, tilted a little; the ink
        # differs from it by the contrast, less that tilt and the soft edge.
        ink = scene.mask > 0.9
        assert ink.any()
        seen = scene.image.astype(float)
        clear = seen[scene.mask == 0]
        assert np.abs(clear - clear.mean(0)).max() < 0.3 * 255
        difference = np.abs(seen[ink].mean(0) - clear.mean(0))
        assert difference.min() > 0.1 * 255
        # The ink's centre is inside the box, turned or not.
        rows, columns = np.nonzero(ink)
        assert y <= rows.mean() + 0.5 <= y + h
        assert x <= columns.mean() + 0.5 <= x + w


@pytest.mark.parametrize("slant", [0.0, 45.0])
def test_the_whole_digit_is_drawn(slant):
    world = scenes.Scenes(slant=slant, scale_min=0.5, scale_max=0.6)
    for i in range(40):
        scene = world.scene(i)
        ink = digits.pixels()[0][scene.digit].sum() / 255 * (scene.box[2] / 8) ** 2
        assert abs(scene.mask.sum() / ink - 1) < 0.08


def test_ink_keeps_its_distance_from_the_background():
    world = scenes.Scenes(contrast=0.4)
    u = iter(np.random.default_rng(0).random(4000).tolist())
    for base in np.linspace(0, 1, 200):
        ink = world._ink([base] * 3, u)
        assert all(0 <= v <= 255 for v in ink)
        assert min(abs(v / 255 - base) for v in ink) >= 0.4 - 1e-6


def test_clutter_is_there_and_is_never_a_whole_digit():
    bare = scenes.Scenes(fragments=0, shapes=0, noise=0)
    full = scenes.Scenes(fragments=3, shapes=2, noise=0)
    assert full.scene(0).clutter.shape == (3, 4)
    changed = [(bare.scene(i).image != full.scene(i).image).mean() for i in range(20)]
    assert np.mean(changed) > 0.2
    u = iter(np.random.default_rng(0).random(3000).tolist())
    whole = np.full((32, 32), 255, np.uint8)
    left = [(scenes._piece(whole, u) > 0).mean() for _ in range(500)]
    assert set(left) == {0.25, 0.5}


def test_raw_pixels_do_not_solve_the_scenes():
    train = _pixels(scenes.Scenes(split="train"), 2000)
    test = _pixels(scenes.Scenes(split="test"), 300)
    score = neighbors.KNeighborsClassifier(5).fit(*train).score(*test)
    assert score < 0.4  # The same scans, aligned, give 0.98.


def test_every_scene_uses_the_range_of_its_type():
    images = np.stack([scenes.Scenes().scene(i).image for i in range(50)])
    assert images.dtype == np.uint8
    assert images.min() == 0
    assert images.max() == 255
    assert images.std() > 40


def test_impossible_worlds_are_refused_with_every_fault():
    with pytest.raises(errors.UsageError) as error:
        sources.open("scenes", "", "train", size=8, channels=2, fragments=99)
    for said in ("size=8: 16 or more", "channels=2: want", "fragments=99: in [0, 32]"):
        assert f"data.options.{said}" in str(error.value)
    with pytest.raises(errors.UsageError, match=r"scale_min=0\.9: at most scale_max"):
        sources.open("scenes", "", "train", scale_min=0.9, scale_max=0.5)


def test_masks_of_other_birds_are_a_placebo_that_changes_nothing_else():
    few = dict(count=5)
    own = sources.open("birds", "", "train", **few)
    placebo = sources.open("birds", "", "train", masks="other", **few)
    for i in range(5):
        mine, other = own.example(i), placebo.example(i)
        np.testing.assert_array_equal(
            other.pop("mask"), own.example((i + 1) % 5)["mask"]
        )
        assert (mine.pop("mask") == (mine["parts"] > 0)).all()
        assert set(mine) == set(other)
        for key, value in mine.items():
            np.testing.assert_array_equal(other[key], value)
