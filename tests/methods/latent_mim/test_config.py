"""configs/latent_mim.py: what is refused, in one line, and what the recipes are."""

import jax
import numpy as np
import pytest

from tests import runs
from vitssl import errors
from vitssl.run import build, experiment

CONFIG = str(runs.ROOT / "configs" / "latent_mim.py")
FAULTS = {
    "output_patch_size=3 does not divide processing_patch_size=8; one of 1, 2, 4, 8": (
        "hybrid.output_patch_size=3",
    ),
    "output_patch_size=16 does not divide processing_patch_size=8": (
        "hybrid.output_patch_size=16",
    ),
    "evals.image_size=30: must be a multiple of the patch that is processed, p=8": (
        "evals.image_size=30",
    ),
    "upsampler=skip: nothing trains it with decoder=mixed": (
        "hybrid.visible_loss_weight=0.0",
    ),
    "upsampler=pixel_shuffle: nothing trains it with decoder=processing": (
        "hybrid.upsampler=pixel_shuffle",
        "hybrid.decoder=processing",
        "hybrid.visible_loss_weight=0.0",
    ),
    "modality 'sentinel3': one of": (
        "inputs.modalities=('sentinel2_l2a', 'sentinel3')",
    ),
    "modality 'sentinel1' has no band 'hh': vv, vh": (
        "inputs.groups=(('sentinel1', (('vv', 'hh'),)),)",
    ),
    "sampling.token_budget=60: one time step of 4 x 4 patches takes 96 tokens": (
        "sampling.token_budget=60",
    ),
    "sampling.min_side=4: patches of 8 px do not fit into sampling.tile=16": (
        "sampling.tile=16",
    ),
    "mask.decode_only: leaves none of": (
        "mask.decode_only=('sentinel2_l2a', 'sentinel1', 'worldcover', 'srtm')",
    ),
    "readout.q=3 does not divide readout.p=8": ("readout.q=3",),
    "augment.views=1: objective.contrast_weight compares two views": (
        "augment.views=1",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_work_is_one_line(fault):
    with pytest.raises(errors.UsageError) as e:
        experiment.read(experiment.load(CONFIG, FAULTS[fault]))
    lines = str(e.value).splitlines()
    assert len(lines) == 2 and fault in lines[1], str(e.value)


def test_a_source_of_pictures_is_refused_with_what_it_lacks():
    c = experiment.load(f"{CONFIG}:smoke", ["data.source=digits"])
    c.data.options = {}
    with pytest.raises(errors.DataError, match="a sample lacks sentinel2_l2a"):
        build.build(experiment.read(c))


@pytest.mark.parametrize(
    "recipe, width, patches, times",
    [("nano_ps8_ps1", 128, {(8, 1)}, 12), ("rgb_vitb_p16_q4", 768, {(16, 4)}, 1)],
)
def test_recipes_without_their_data_can_be_sized(recipe, width, patches, times):
    checked = experiment.read(experiment.load(f"{CONFIG}:{recipe}"))
    parts = build.build(experiment.with_noise(checked))
    drawn = {parts.method.phase(i) for i in range(0, 2000, 8)}
    assert {(s.p, s.q) for s in drawn} == patches
    assert max(s.times for s in drawn) == times
    params, extra = jax.eval_shape(parts.method.init, parts.rng(), parts.shapes(0))
    assert params["encoder"]["norm"]["scale"].shape == (width,)
    one = jax.tree.map(np.shape, params["encoder"]["patch_embed"])
    assert one == jax.tree.map(np.shape, extra["target"])
