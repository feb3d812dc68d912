import pathlib

import jax
import numpy as np
import pytest

from vitssl.data import pipeline
from vitssl.methods.hjepa import pictures
from vitssl.pictures import attention, features
from vitssl.run import experiment

RECIPE = pathlib.Path(__file__).parents[3] / "configs" / "hjepa.py"


SMALL = (
    "model.width=16",
    "model.depth=2",
    "model.image_size=16",
    "multicrop.global_crop_size=16",
    "multicrop.num_local_crops=0",
    "masking.strategy=global_only",
    "masking.num_hierarchies=2",
    "objective.type=mse",
    "objective.weights=(1.0, 0.5)",
)


def run(*overrides):
    """Return (method, its losses, fields, batch) of a small network, untrained."""
    c = experiment.load(f"{RECIPE}:smoke", [*SMALL, *overrides])
    built = experiment.read(c)
    method = built.method(built.run())
    source = built.settings.data.open("train")
    with pipeline.train(source, method.transform(), batch_size=3, seed=0) as stream:
        batch = next(stream)
    params, extra = jax.jit(method.init)(jax.random.key(0), batch)

    @jax.jit
    def losses(params, extra, batch):
        net = method.networks(params, extra, train=False)
        return method.terms(net, batch).near.losses

    image = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 1), np.uint8)
    fields = pictures.arrays(method, params, extra, batch, image)
    return method, losses(params, extra, batch), fields, batch


@pytest.fixture(scope="module")
def per_level():
    return run("masking.levels=per_level")


def test_prediction_maps_are_those_of_the_loss(per_level):
    _, losses, fields, batch = per_level
    images, predicted, target, valid = fields["prediction"]
    np.testing.assert_array_equal(images, batch["global"][:, 0])
    assert [v.shape for v in valid] == [(3, 16), (3, 4)]
    for k, (p, t, v) in enumerate(zip(predicted, target, valid, strict=True)):
        error = features.errors(p, t)[v].mean()
        np.testing.assert_allclose(error, losses[0, k], rtol=1e-4)
    np.testing.assert_array_equal(valid[0], batch["global_targets"][:, 0, 0])


def test_groups_that_have_no_place_in_the_image_are_left_out():
    *_, fields, batch = run("masking.levels=finest", "levels.pooling=sequence")
    _, predicted, _, valid = fields["prediction"]
    assert len(predicted) == len(valid) == 1
    np.testing.assert_array_equal(valid[0], batch["global_targets"][:, 0, 0])


def test_attention_is_of_every_layer_and_head(per_level):
    method, _, fields, _ = per_level
    found = fields["attention"]
    assert fields["grid"] == (6, 6)
    assert found.shape[:3] == (2, 2, method.model.heads)
    assert found.shape[3] == 36 + method.model.prefix
    np.testing.assert_allclose(found.sum(-1), 1.0, rtol=1e-4)
    assert (found[0] != found[1]).any()
    assert attention.infer_grid(found.shape[-1]) == fields["grid"]


def test_masks_are_drawn_as_the_config_says(per_level):
    method, _, fields, _ = per_level
    context, targets = fields["draws"]
    assert context.shape == (pictures.DRAWS, 2, 16)
    blocks = method.masking.num_target_masks
    assert targets.shape == (pictures.DRAWS, 2, blocks, 16)
    assert not (context & targets.any(2)).any()
    np.testing.assert_array_equal(fields["crop_masks"][1], targets[0])
    assert set(fields["samplers"]) == {"original", "multiblock", "ijepa"}
