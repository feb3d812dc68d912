"""Weights from and to timm and transformers: the same features on both sides.

Needs the extra [torch]: python -m pytest -m torch tests/convert/test_torch.py
"""

import argparse
import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

import vitssl
from tests.convert import published
from vitssl import errors
from vitssl.convert import backbone, exporter, family, importer, reader
from vitssl.run import inference

pytestmark = pytest.mark.torch

TIMM = dict(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4)
TIMM |= dict(num_classes=5)
KINDS = {
    "plain": {},
    "registers and layerscale": dict(
        reg_tokens=4, no_embed_class=True, init_values=0.1
    ),
    "registers with positions": dict(reg_tokens=2),
    "no class token": dict(class_token=False, global_pool="avg", fc_norm=False),
    "qk-norm, patch 16": dict(qk_norm=True, patch_size=16),
    "patch 14": dict(patch_size=14, img_size=28),
    "no bias": dict(qkv_bias=False),
}
HF = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
HF_KINDS = {
    "ViT": (dict(intermediate_size=256, image_size=32, patch_size=8), 32),
    "Dinov2": (dict(image_size=28, patch_size=14), 28),
    "Dinov2WithRegisters": (dict(image_size=28, patch_size=14), 28),
    "DINOv3ViT": (
        dict(intermediate_size=256, image_size=32, patch_size=8, num_register_tokens=4),
        48,
    ),
    "IJepa": (dict(intermediate_size=256, image_size=32, patch_size=8), 32),
}


def _random(model, seed=0, published=False):
    """Return a model in evaluation mode with weights that matter.

    Args:
        model: of timm or transformers.
        seed: of the weights.
        published: matrices of the size that training starts from, so that depth does
            not blow the rounding of float32 up; gains near one.
    """
    torch = pytest.importorskip("torch")
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.3 if p.ndim < 2 else 0.08)
        if published:
            p.data *= 0.25
            if p.ndim == 1 and not name.endswith("bias"):
                p.data += 1
    return model.eval()


def _image(size, channels=3):
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, size, size, channels)).astype(np.float32)


def _theirs(model, image):
    """Return the last tokens of a model of timm or transformers."""
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        if hasattr(model, "forward_features"):
            return model.forward_features(x).numpy()
        return model(pixel_values=x).last_hidden_state.numpy()


def _ours(found, image):
    """Return the last tokens of ours."""
    apply = jax.jit(found.module().apply)
    return np.asarray(apply({"params": found.encoder()}, image)[0])


def _close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_timm_there_and_back(kind, tmp_path):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    from safetensors.torch import load_file

    given = TIMM | KINDS[kind]
    model = _random(timm.models.VisionTransformer(**given))
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "a.pth")
    found = importer.read(tmp_path / "a.pth", options=family.Options(heads=4))
    image = _image(given["img_size"])
    theirs = _theirs(model, image)
    _close(_ours(found, image), theirs)
    file = exporter.write(found, tmp_path / "b.safetensors", "timm")
    recipe = exporter.timm(found).recipe
    again = timm.models.VisionTransformer(**recipe).eval()
    again.load_state_dict(load_file(str(file)))
    _close(_theirs(again, image), theirs)


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_224",
        "vit_base_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch14_reg4_dinov2",
    ],
)
def test_published_sizes_of_timm_there_and_back(name, tmp_path):
    """Whole models, each at its own depth; 518 px for DINOv2."""
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    from safetensors.torch import load_file

    model = _random(timm.create_model(name, num_classes=0), published=True)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    found = importer.read(tmp_path / "a.pth")
    image = _image(model.patch_embed.img_size[0])[:1]
    theirs = _theirs(model, image)
    _close(_ours(found, image), theirs)
    file = exporter.write(found, tmp_path / "b.safetensors", "timm")
    again = timm.create_model(name, num_classes=0).eval()
    again.load_state_dict(load_file(str(file)))
    _close(_theirs(again, image), theirs)


def test_the_published_size_of_transformers_there_and_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig()  # ViT-B/16.
    model = transformers.ViTModel(config, add_pooling_layer=False)
    model = _random(model, published=True)
    model.save_pretrained(tmp_path)
    found = importer.read(tmp_path / "model.safetensors")
    image = _image(224)[:1]
    theirs = _theirs(model, image)
    _close(_ours(found, image), theirs)
    exporter.write(found, tmp_path / "again", "hf")
    load = transformers.ViTModel.from_pretrained
    again = load(tmp_path / "again", add_pooling_layer=False).eval()
    _close(_theirs(again, image), theirs)


def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path):
    torch = pytest.importorskip("torch")
    x = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    saved = {
        "turned": x.transpose(0, 2),
        "part": x[1, 1:],
        "parameter": torch.nn.Parameter(x.clone()),
        "half": x.half(),
        "brain": x.bfloat16(),
        "whole": x.long(),
        "yes": x > 3,
        "none": torch.zeros(0, 4),
        "one": torch.tensor(2.5),
    }
    args = argparse.Namespace(lr=0.1, path=pathlib.PosixPath("/a/b"))
    shape, kind = torch.Size([1, 2]), torch.float16
    tree = {"model": saved, "args": args, "shape": shape, "dtype": kind}
    torch.save(tree, tmp_path / "a.pth")
    found = reader.read(tmp_path / "a.pth").tree
    assert found["args"] == {"lr": 0.1, "path": "/a/b"} and found["shape"] == (1, 2)
    for name, want in saved.items():
        got = found["model"][name]
        assert got.shape == tuple(want.shape)
        assert str(want.dtype) == f"torch.{got.dtype}"
        want = want.detach().float().numpy()
        np.testing.assert_array_equal(got.astype(np.float32), want)
    torch.save(tree, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(errors.CheckpointError, match="legacy format"):
        reader.read(tmp_path / "old.pth")


def test_dinov3_of_timm(tmp_path):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    options = dict(depth=2, embed_dim=64, num_heads=2, img_size=48)
    model = _random(timm.create_model("vit_small_patch16_dinov3", **options))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    found = importer.read(tmp_path / "a.pth", options=family.Options(heads=2))
    _close(_ours(found, _image(48)), _theirs(model, _image(48)))


@pytest.mark.parametrize("spelling", ["file", "memory"])
@pytest.mark.parametrize("kind", HF_KINDS)
def test_transformers_there_and_back(kind, spelling, tmp_path):
    """`memory`: the names its modules have while they run (`_MODERN`)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    own, size = HF_KINDS[kind]
    config = getattr(transformers, f"{kind}Config")(**HF, **own)
    model = _random(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if spelling == "memory":
        file = tmp_path / "pytorch_model.bin"
        torch.save(model.state_dict(), file)
    found = importer.read(file)
    image = _image(size)
    theirs = _theirs(model, image)
    _close(_ours(found, image), theirs)
    exporter.write(found, tmp_path / "again", "hf")
    load = getattr(transformers, f"{kind}Model").from_pretrained
    again, told = load(tmp_path / "again", output_loading_info=True)
    assert not told["unexpected_keys"]
    assert all("pooler" in key for key in told["missing_keys"])
    _close(_theirs(again.eval(), image), theirs)


def test_timm_at_another_size(tmp_path):
    """The stored table is resampled as timm resamples it."""
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    model = _random(timm.models.VisionTransformer(**TIMM))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    options = family.Options(heads=4, image_size=48)
    found = importer.read(tmp_path / "a.pth", options=options)
    model.set_input_size(img_size=48)
    _close(_ours(found, _image(48)), _theirs(model, _image(48)))


def test_transformers_at_another_size(tmp_path):
    """Dinov2Model interpolates its table in its forward pass."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(**HF, image_size=70, patch_size=14)
    model = _random(transformers.Dinov2Model(config))
    model.save_pretrained(tmp_path)
    options = family.Options(image_size=42)
    found = importer.read(tmp_path / "model.safetensors", options=options)
    _close(_ours(found, _image(42)), _theirs(model, _image(42)))


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_change_as_timm_changes_them(channels):
    torch = pytest.importorskip("torch")
    manipulate = pytest.importorskip("timm.models._manipulate")
    kernel = np.random.default_rng(0).normal(size=(8, 8, 3, 16)).astype(np.float32)
    theirs = manipulate.adapt_input_conv(
        channels, torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    )
    ours = importer.channels(kernel, channels).transpose(3, 2, 0, 1)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6, atol=1e-6)


def test_features_of_an_export_are_those_of_the_notebook(tmp_path):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    from safetensors.torch import load_file

    model = _random(timm.models.VisionTransformer(**TIMM))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    found = importer.read(tmp_path / "a.pth", options=family.Options(heads=4))
    backbone.write(tmp_path / "w", found)
    pooled = np.asarray(vitssl.load(tmp_path / "w")(_image(32))["pooled"])
    file = exporter.write(found, tmp_path / "b.safetensors", "timm")
    recipe = exporter.timm(found).recipe
    again = timm.models.VisionTransformer(**recipe).eval()
    again.load_state_dict(load_file(str(file)))
    x = torch.from_numpy(_image(32).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        theirs = again.forward_head(again.forward_features(x), pre_logits=True)
    _close(pooled, theirs.numpy())
    assert json.dumps(recipe)  # The recipe is data, so a card can print it.
    assert inference.NAMES == ("pooled", "tokens")


@pytest.mark.parametrize("kind", ["plain", "registers and layerscale", "qk-norm"])
def test_a_folder_of_the_hub_loads_by_its_name_alone(kind, tmp_path):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    fields = {"plain": dict(classes=5), "qk-norm": dict(qk_norm=True)}
    fields |= {"registers and layerscale": dict(registers=2, layerscale=0.1)}
    net = published.network(**fields[kind])
    about = dataclasses.replace(net.about, mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.25))
    net = backbone.Backbone(about, net.leaves)
    image = _image(net.module().image_size)
    ours = _ours(net, image)
    exporter.write(net, tmp_path / "timm", "timm")
    model = timm.create_model(f"local-dir:{tmp_path}/timm", pretrained=True).eval()
    assert model.num_classes == (5 if kind == "plain" else 0)
    assert list(model.pretrained_cfg["mean"]) == list(net.about.mean)
    _close(ours, _theirs(model, image))
    wrapped = transformers.AutoModel.from_pretrained(tmp_path / "timm").eval()
    _close(ours, _theirs(wrapped, image))
    again = importer.read(tmp_path / "timm" / "model.safetensors")
    assert (again.about.mean, again.about.std) == (about.mean, about.std)
    told = " ".join(again.about.notes)
    assert "GUESSED" not in told and "contradicts" not in told
    _close(ours, _ours(again, image))
    if kind == "qk-norm":  # transformers has no such ViT of its own.
        return
    exporter.write(net, tmp_path / "hf", "hf")
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    _close(ours, _theirs(model, image))
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert list(pixels.image_mean) == list(net.about.mean)
    side = net.module().image_size
    grey = np.full((side, side, 3), 51, np.uint8)
    got = pixels(grey, return_tensors="pt")["pixel_values"]
    want = (0.2 - np.array(net.about.mean)) / np.array(net.about.std)
    np.testing.assert_allclose(got[0, :, 3, 3], want, atol=1e-5)
    assert torch.isfinite(got).all()
