"""Sizes of images: rectangles, one key that the others follow, what is said of them."""

import logging

import numpy as np
import pytest

from tests import runs
from vitssl import errors, sizes
from vitssl.data import geometry, views
from vitssl.methods.classify import views as leaves
from vitssl.methods.simclr import views as augments
from vitssl.run import experiment
from vitssl.run import loop as train

RECTANGLE = (48, 96)


def _read(config, *overrides):
    path = runs.ROOT / "configs" / config
    return experiment.read(experiment.load(str(path), overrides))


def _ramp(height, width):
    """An image [H, W, 3] whose first channel is the row and second the column."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(height)[:, None]
    image[..., 1] = np.arange(width)
    return image


@pytest.mark.parametrize("shape", [(100, 100), (60, 200), (200, 60)])
def test_an_evaluation_view_keeps_the_shape_of_things(shape):
    image = views.Evaluate(RECTANGLE, 1.0)(dict(image=_ramp(*shape)))["image"]
    assert image.shape == (*RECTANGLE, 3)
    # The largest central cut of that shape: as steep in rows as in columns.
    scale = min(shape[0] / 48, shape[1] / 96)
    middle = image.astype(float)[4:-4, 8:-8]
    np.testing.assert_allclose(np.diff(middle[..., 0], axis=0).mean(), scale, rtol=0.05)
    np.testing.assert_allclose(np.diff(middle[..., 1], axis=1).mean(), scale, rtol=0.05)
    centre = middle.mean((0, 1))[:2]
    np.testing.assert_allclose(centre, [(n - 1) / 2 for n in shape], atol=1.5)


def test_224_of_256_holds_for_the_shorter_side():
    assert views.classifier_evaluation((112, 224)) == views.Evaluate(
        (112, 224), 128 / 112
    )
    assert views.classifier_evaluation((256, 512)).ratio == 1.0


@pytest.mark.parametrize(
    "transform, key",
    [
        (views.Supervised(RECTANGLE, (0.2, 0.3), 0.0), "image"),
        (views.Supervised(RECTANGLE, (0.2, 0.3), 0.0, crop="clipped"), "image"),
        (augments.Views(RECTANGLE, (0.2, 0.3), flip=0.0, colour="device"), "global"),
    ],
)
def test_training_crops_have_the_shape_of_the_result(transform, key):
    example, rng = dict(image=_ramp(200, 240)), np.random.default_rng(0)
    logs = []
    for _ in range(200):
        image = transform(example, rng)[key].astype(float).reshape(-1, *RECTANGLE, 3)[0]
        rows, columns = (
            np.diff(image[..., i], axis=i)[4:-4, 4:-4].mean() for i in (0, 1)
        )
        logs.append(np.log(columns / rows))
    # Stretched by up to 4 / 3 either way, and by nothing in the mean.
    assert np.abs(logs).max() < np.log(4 / 3) + 0.1
    assert abs(np.mean(logs)) < 0.05


def test_leaves_crop_and_warp_to_the_rectangle():
    example, rng = dict(image=_ramp(90, 120)), np.random.default_rng(0)
    for severity in ("minimal", "light", "aggressive"):
        image = leaves.Leaves(RECTANGLE, severity)(example, rng)["image"]
        assert image.shape == (*RECTANGLE, 3), severity
    np.testing.assert_allclose(geometry.shaped(RECTANGLE), (1.5, 8 / 3))
    assert geometry.shaped(48) == geometry.RATIO
    assert augments.Views(RECTANGLE).kernel == augments.Views(48).kernel


@pytest.mark.parametrize(
    "config, size",
    [
        ("simclr_hvit.py:smoke", "(24, 48)"),
        ("finetune_hvit.py:smoke", "(24, 48)"),
        ("finetune_vit.py:smoke", "(16, 24)"),
    ],
)
def test_two_steps_on_rectangles(config, size, tmp_path):
    quiet = "batch_size=8", "log.tensorboard=False"
    checked = _read(config, f"augment.size={size}", *quiet)
    found = checked.settings.evals.image_size
    assert found == checked.sections["model"].image_size == checked.training_size
    assert found == tuple(map(int, size.strip("()").split(",")))
    train.run(checked, tmp_path, name="test")
    lines = runs.metrics(tmp_path)
    assert [m["step"] for m in lines if "loss" in m][-1] == 2
    assert all(np.isfinite(m["loss"]) for m in lines if "loss" in m)


def test_a_vit_trains_on_rectangles_by_simclr():
    checked = _read("simclr_hvit.py:vit", "augment.size=(48, 96)", "batch_size=2")
    method = checked.method(checked.run())
    view = method.transform()(dict(image=_ramp(64, 64)), np.random.default_rng(0))
    assert view["global"].shape == (2, 48, 96, 3)
    assert method.model.table_grid == (8, 16)


@pytest.mark.parametrize(
    "config, override, says",
    [
        ("hjepa.py", "multicrop.global_crop_size=(24, 48)", "want int"),
        (
            "localmim.py:digits",
            "augment.size=(24, 48)",
            "augment.size=(24, 48): want int",
        ),
        ("parts.py", "augment.size=(48, 96)", "augment.size=(48, 96): want int"),
        (
            "hjepa.py",
            "evals.image_size=(24, 48)",
            "evals.image_size=(24, 48): method=hjepa takes squares; give one number",
        ),
        (
            "localmim.py:digits",
            "model.image_size=(24, 48)",
            "model.image_size=(24, 48): method=localmim takes squares; give one number",
        ),
        (
            "latent_mim.py",
            "evals.image_size=(16, 32)",
            "evals.image_size=(16, 32): method=latent_mim takes squares; give one "
            "number",
        ),
        (
            "finetune_hvit.py",
            "augment.size=(48, 95)",
            "augment.size=(48, 95): must be a multiple of model.patch=6; nearest to 95 "
            "are 90 and 96",
        ),
    ],
)
def test_rectangles_that_cannot_be_are_one_line(config, override, says):
    with pytest.raises(errors.UsageError) as caught:
        _read(config, override)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 1 and says in lines[0], lines


def test_what_needs_squares_says_so():
    overrides = "augment.size=(48, 96)", "scoring.tta=six", "resolution.start=24"
    with pytest.raises(errors.UsageError) as caught:
        _read("finetune_hvit.py", *overrides)
    assert "augment.size=(48, 96): resolution needs a square" in str(caught.value)
    with pytest.raises(errors.UsageError, match="tta=six turns squares; use flip"):
        _read("finetune_hvit.py", *overrides[:2])


FOLLOWED = {
    "hjepa.py": ("multicrop.global_crop_size=60", 60),
    "parts.py": ("augment.size=64", 64),
    "finetune_vit.py:digits": ("augment.size=32", 32),
    "simclr_hvit.py": ("augment.size=72", 72),
    "localmim.py:digits": ("augment.size=32", 32),
    "dino.py": ("multicrop.global_crop_size=60", 60),
    "mae.py": ("augment.size=60", 60),
    "latent_mim.py": ("sampling.max_side=5", 40),
}


@pytest.mark.parametrize("config", FOLLOWED)
def test_other_sizes_follow_the_one_that_is_set(config):
    override, size = FOLLOWED[config]
    checked = _read(config, override)
    assert checked.training_size == checked.settings.evals.image_size == size
    assert checked.config.evals.image_size == size  # What config.json will say.
    if "model" in checked.sections:
        assert checked.config.model.image_size == size
        assert checked.sections["model"].image_size == size
    apart = _read(config, override, "evals.image_size=24")
    assert apart.settings.evals.image_size == 24 and apart.training_size == size


def test_sizes_of_a_study_follow_those_of_their_arm():
    from vitssl.tools import study

    c = experiment.load(str(runs.ROOT / "configs" / "simclr_hvit.py"))
    c.study = dict(seeds=(0,), arms=dict(a=("augment.size=72",)), columns=())
    assert study.read(c).runs["a", 0].settings.evals.image_size == 72


@pytest.mark.parametrize(
    "config, override, says",
    [
        (
            "hjepa.py",
            "multicrop.global_crop_size=50",
            "multicrop.global_crop_size=50: must be a multiple of model.patch=6; "
            "nearest are 48 and 54",
        ),
        *(
            (
                f"{config}.py",
                "augment.size=50",
                f"augment.size=50: must be a multiple of model.patch={patch}; nearest "
                f"are 48 and {48 + patch}",
            )
            for config, patch in (
                ("parts", 4),
                ("finetune_vit", 6),
                ("simclr_hvit", 6),
                ("localmim", 6),
            )
        ),
        *(
            (
                f"{config}.py",
                "evals.image_size=50",
                f"evals.image_size=50: must be a multiple of model.patch={patch}; "
                f"nearest are 48 and {48 + patch}",
            )
            for config, patch in (
                ("hjepa", 6),
                ("parts", 4),
                ("finetune_vit", 6),
                ("simclr_hvit", 6),
                ("localmim", 6),
            )
        ),
    ],
)
def test_a_size_that_the_patch_does_not_divide_is_said_once(config, override, says):
    with pytest.raises(errors.UsageError) as caught:
        _read(config, override)
    assert str(caught.value) == f"config:\n  {says}"


def test_a_run_says_at_its_start_if_it_evaluates_at_another_size(tmp_path, caplog):
    caplog.set_level(logging.INFO, "vitssl")
    quiet = "log.tensorboard=False", "evals.every_epochs=0.0", "evals.final=()"
    checked = _read("finetune_vit.py:smoke", "evals.image_size=32", *quiet)
    train.run(checked, tmp_path, name="test")
    line = "  sizes     trained at 24 px, evaluated at 32 px (evals.image_size)"
    assert line in caplog.text
    assert sizes.written(RECTANGLE) == "48 x 96 px"
