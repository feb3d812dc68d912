"""State dicts of iFAM in timm's and Hugging Face's names, there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import ifam_names
from vitssl import errors
from vitssl.convert import huggingface
from vitssl.methods.parts import heads, networks
from vitssl.models import vit


def _net(hf=False, width=8, **head):
    given = dict(width=width, depth=2, heads=2, patch=4, image_size=8, layerscale=1e-5)
    if not hf:
        given |= dict(registers=4, class_position=False)
    first = networks.PartNet(
        vit.ViT(**given), heads.PartHead(**dict(parts=2, classes=3) | head)
    )
    return networks.TwoStage(first, networks.MaskedClassifier(vit.ViT(**given), 3))


def _random(net):
    image = jnp.zeros((1, 8, 8, 3))
    like = jax.eval_shape(net.init, jax.random.key(0), image)["params"]
    rng = np.random.default_rng(0)
    fill = lambda s: rng.normal(size=s.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(fill, like)


@pytest.mark.parametrize("hf", [False, True])
@pytest.mark.parametrize(
    "head",
    [
        dict(),
        dict(modulation="original"),
        dict(modulation="parallel_mlp", classifier="independent_mlp"),
        dict(modulation="none"),
    ],
)
def test_there_and_back_without_a_bit_lost(hf, head):
    params = _random(_net(hf, **head))
    state = ifam_names.export(params, hf=hf)
    assert huggingface.is_hf(state) == hf
    again = ifam_names.load(state, params)
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_names_are_the_originals():
    state = ifam_names.export(_random(_net()))
    assert state["stage_1.fc_landmarks.weight"].shape == (3, 8, 1, 1)
    assert state["stage_1.modulation.weight"].shape == (8, 3)
    assert state["stage_2.head.weight"].shape == (3, 8)
    assert state["stage_1.pos_embed"].shape == (1, 4, 8)
    state = ifam_names.export(_random(_net(hf=True)), hf=True)
    key = "stage_2.encoder.layer.1.attention.attention.query.weight"
    assert state[key].shape == (8, 8)
    assert state["stage_2.embeddings.position_embeddings"].shape == (1, 5, 8)


def test_buffers_are_laid_aside_and_a_mask_token_is_too():
    params = _random(_net())
    state = ifam_names.export(params) | {"stage_2.prefix_attn_mask": np.ones(5)}
    ifam_names.load(state, params)
    params = _random(_net(hf=True))
    state = ifam_names.export(params, hf=True)
    state["stage_1.embeddings.mask_token"] = np.zeros((1, 8))
    ifam_names.load(state, params)


def test_a_file_of_another_width_names_what_does_not_fit():
    state = ifam_names.export(_random(_net(width=16)))
    with pytest.raises(
        errors.CheckpointError, match=r"stage_1/head/prototypes \(3, 8\)"
    ):
        ifam_names.load(state, _random(_net(width=8)))


def test_a_missing_key_of_three_is_named():
    state = ifam_names.export(_random(_net(hf=True)), hf=True)
    gone = "stage_1.encoder.layer.0.attention.attention.key.bias"
    del state[gone]
    with pytest.raises(errors.CheckpointError, match=gone):
        ifam_names.load(state, _random(_net(hf=True)))
