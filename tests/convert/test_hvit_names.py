"""HierarchialViT: checkpoints there and back, what is found and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import runs, whole_hvit
from tests.convert import pth
from tests.golden.checks.hvit_model import original
from vitssl import convert, errors, tree
from vitssl.convert import backbone, exporter, family, hvit_names, importer, reader
from vitssl.models import hvit
from vitssl.run import inference, warmstart

SIZE = dict(width=8, depths=(1, 2), heads=(2, 4), patch=4, image_size=16)
BOTH = dict(spectral_channels=2, spectral_width=4, dfca_heads=4)
HEADS = family.Options(heads=2)
TOLD = {"model_backbone_init_config": {"dfca_num_heads": 4}}


def _net(**fields):
    """Return a model with every head that the original has."""
    inner = hvit.HViT(**SIZE | fields)
    mae = 4 if len(inner.depths) == 1 else 0
    return whole_hvit.HViTModel(
        inner, 3, consistency=True, projector=(5, 6, 7), mae=mae, mae_hides=False
    )


def _random(net):
    both = net.backbone.spectral_channels
    image = jax.ShapeDtypeStruct((1, 16, 16, 3 + both), jnp.float32)
    like = jax.eval_shape(net.init, jax.random.key(0), image)["params"]
    rng = np.random.default_rng(0)
    draw = {
        k: rng.normal(size=x.shape).astype(np.float32)
        for k, x in tree.flat(like).items()
    }
    return tree.nest(draw)


MODELS = {
    "rgb": {},
    "one stage": dict(depths=(2,), heads=(2,)),
    "dfca": BOTH,
    "dfca in the spectral width": BOTH | dict(dfca_width="spectral"),
    "concat": dict(spectral_channels=2, fusion="concat"),
    "no qkv bias": dict(qkv_bias=False, **BOTH),
    "no mask": dict(disease_mask=False, **BOTH),
}


@pytest.mark.parametrize("kind", MODELS)
def test_there_and_back_without_a_bit_lost(kind):
    net = _net(**MODELS[kind])
    params = _random(net)
    state = convert.export(params, hvit_names.table(net.backbone.depths))
    assert hvit_names.depths(state) == net.backbone.depths
    again = original(state, params)
    jax.tree.map(np.testing.assert_array_equal, params, again)


def _state(kind="dfca"):
    net = _net(**MODELS[kind])
    return net, convert.export(_random(net), hvit_names.table(net.backbone.depths))


def test_names_are_the_originals():
    _, state = _state()
    shapes = {
        "rgb_patch_embed.proj.weight": (8, 3, 4, 4),
        "rgb_stages.1.blocks.1.attn.qkv.weight": (48, 16),
        "rgb_stages.0.downsample_layer.reduction.weight": (16, 32),
        "spectral_stages.0.blocks.0.mlp.fc1.weight": (16, 4),
        "norm_spectral_final_encoder.weight": (8,),
        "spectral_to_dfca_proj.weight": (16, 8),
        "dfca_module.cross_attention.in_proj_weight": (48, 16),
        "dfca_module.disease_mask_param": (1, 1, 16),
        "classifier_head.weight": (3, 16),
        "aux_head_spectral.weight": (3, 8),
        "contrastive_projector.4.weight": (7, 6),
    }
    assert {k: state[k].shape for k in shapes} == shapes


@pytest.mark.parametrize("kind", ["rgb", "dfca", "concat", "no qkv bias"])
def test_a_checkpoint_is_found_and_read_bit_by_bit(kind, tmp_path):
    net, state = _state(kind)
    old = {k: x + 1 for k, x in state.items()}
    saved = {"model_state_dict": old, "ema_state_dict": state, "epoch": 3} | TOLD
    pth.write(tmp_path / "a.pth", saved)
    found = importer.read(tmp_path / "a.pth", options=HEADS)
    assert found.about.family == "hvit" and found.about.model["name"] == "hvit"
    assert "read from 'ema_state_dict' of the file" in found.about.notes
    assert "left aside: aux_head_rgb (2 keys)" in found.about.notes
    for field in ("width", "depths", "heads", "patch", "image_size", "qkv_bias"):
        assert getattr(found.module(), field) == getattr(net.backbone, field)
    image = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
    if net.backbone.spectral_channels:
        image = np.concatenate([image, image[..., :2]], axis=-1)
    params = original(state, _random(net))
    want = net.apply({"params": params}, image)
    got = found.module().apply({"params": found.encoder()}, image)
    np.testing.assert_array_equal(got["tokens"], want["tokens"])
    head = {k: x for k, x in found.leaves.items() if k.startswith("head/")}
    assert sorted(head) == [
        f"head/{k}" for k in ("bias", "kernel", "norm/bias", "norm/scale")
    ]
    # And out again, under the names it had.
    file = exporter.write(found, tmp_path / "out", "hvit")
    names = reader.read(file).tree
    aside = ("aux_head", "contrastive", "mae")
    want = {k: x for k, x in state.items() if not k.startswith(aside)}
    assert sorted(names) == sorted(want)
    for name, x in want.items():
        np.testing.assert_array_equal(names[name], x)


def test_a_checkpoint_of_the_original_tells_its_heads(tmp_path):
    _, state = _state("rgb")
    told = {"num_heads": [1, 2], "patch_size": 4}
    head = {"0.weight": np.zeros((3, 3), np.float32)}
    saved = {
        "model_backbone_state_dict": state,
        "model_backbone_init_config": told,
        "projection_head_state_dict": head,
    }
    pth.write(tmp_path / "a.pth", saved)
    assert importer.read(tmp_path / "a.pth").module().heads == (1, 2)
    saved = {"ema_state_dict": state, "config": {"model": {"hvt_params": told}}}
    pth.write(tmp_path / "a.pth", saved)
    assert importer.read(tmp_path / "a.pth").module().heads == (1, 2)


def test_heads_are_asked_for_where_nothing_tells_them(tmp_path):
    _, state = _state("rgb")
    pth.write(tmp_path / "a.pth", {"model_state_dict": state})
    with pytest.raises(errors.UsageError, match="width of 8 .* say --heads=N"):
        importer.read(tmp_path / "a.pth")
    with pytest.raises(errors.UsageError, match="3 does not divide"):
        importer.read(tmp_path / "a.pth", options=family.Options(heads=3))


def test_another_size_resamples_both_tables(tmp_path):
    _, state = _state("dfca")
    pth.write(tmp_path / "a.pth", {"model_state_dict": state} | TOLD)
    options = family.Options(heads=2, image_size=32)
    found = importer.read(tmp_path / "a.pth", options=options)
    shapes = {k: x.shape for k, x in found.leaves.items() if k.endswith("pos_embed")}
    assert shapes == {
        "encoder/pos_embed": (1, 64, 8),
        "encoder/spectral/pos_embed": (1, 64, 4),
    }
    assert found.module().image_size == 32
    options = family.Options(heads=2, channels=4)
    with pytest.raises(errors.UsageError, match="channels=4: this model takes 5"):
        importer.read(tmp_path / "a.pth", options=options)


def test_an_import_fills_a_method_and_gives_features(tmp_path):
    _, state = _state("rgb")
    pth.write(tmp_path / "a.pth", {"model_state_dict": state})
    found = importer.read(tmp_path / "a.pth", options=HEADS)
    backbone.write(tmp_path / "ours", found)
    net = found.module()
    image = jnp.zeros((1, 16, 16, 3))
    params = jax.eval_shape(net.init, jax.random.key(0), image)["params"]
    head = {"kernel": jnp.zeros((16, 3)), "bias": jnp.zeros(3)}
    head["norm"] = {"scale": jnp.zeros(16), "bias": jnp.zeros(16)}
    mine = jax.tree.map(
        lambda x: jnp.zeros(x.shape), {"backbone": params, "head": head}
    )
    spec = warmstart.Init(from_=str(tmp_path / "ours"))
    filled = runs.start(spec, mine)
    want = state["classifier_head_norm.weight"]
    np.testing.assert_array_equal(filled["head"]["norm"]["scale"], want)
    loaded = inference.load(tmp_path / "ours")
    pixels = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    got = loaded(pixels)
    out = net.apply({"params": filled["backbone"]}, pixels)
    np.testing.assert_allclose(got["pooled"], out["pooled"], atol=1e-5)
    with pytest.raises(errors.UsageError, match="there is no class token"):
        inference.load(tmp_path / "ours", pool="cls")


@pytest.mark.parametrize("layout", ["timm", "hf", "bigvision"])
def test_other_codes_have_no_such_model(layout, tmp_path):
    _, state = _state("rgb")
    pth.write(tmp_path / "a.pth", {"model_state_dict": state})
    found = importer.read(tmp_path / "a.pth", options=HEADS)
    with pytest.raises(errors.UsageError, match="'hvit'; use hvit or vitssl"):
        exporter.write(found, tmp_path / "b", layout)
