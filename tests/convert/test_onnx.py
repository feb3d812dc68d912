"""ONNX graphs of ViTs give what the networks give, by onnxruntime."""

import jax
import numpy as np
import pytest

from tests.convert import published
from vitssl import errors
from vitssl.convert import __main__ as command
from vitssl.convert import backbone, exporter, onnxgraph

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

QUICK = {"xla_backend_optimization_level": 0}
KINDS = {
    "plain": {},
    "no class token": dict(pool="mean", cls=False, positions="sincos"),
    "registers": dict(registers=2, class_position=False, layerscale=0.1),
    "all": dict(registers=1, qk_norm=True, positions="learned_sincos", norm_eps=1e-5),
    "rotary": dict(rope=True, positions="none", mlp_ratio=2.0, pool="mean"),
    "rotary, unit": dict(rope=True, rope_unit=True, registers=2),
}


def _run(file, images):
    session = onnxruntime.InferenceSession(str(file))
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_gives_the_features_of_its_network(tmp_path, kind):
    net = published.network(classes=3, **KINDS[kind])
    file = exporter.write(net, tmp_path / "vit.onnx", "onnx")
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    want = jax.jit(net.encode(), compiler_options=QUICK)(net.variables(), images)
    want["logits"] = (
        want["pooled"] @ net.leaves["head/kernel"] + net.leaves["head/bias"]
    )
    found = _run(file, images)
    assert found.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_allclose(found[name], array, atol=1e-4, rtol=1e-4)
    # Any number of images.
    for name, array in _run(file, images[:2]).items():
        np.testing.assert_allclose(array, found[name][:2], atol=1e-5)


def test_images_may_be_oblong_and_deep_networks_large(tmp_path, monkeypatch):
    monkeypatch.setattr(onnxgraph, "_WHOLE", 1000)
    shapes = published.network(channels=1)
    leaves = dict(shapes.leaves)
    leaves["encoder/pos_embed"] = leaves["encoder/pos_embed"][:, :9]
    model = dict(shapes.about.model) | dict(image_size=(32, 16))
    about = backbone.About(model, (0.4,), (0.3,), "cls")
    net = backbone.Backbone(about, leaves)
    file = exporter.write(net, tmp_path, "onnx")
    assert (tmp_path / "model.onnx.data").stat().st_size > 1000
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 16, 1), np.uint8)
    want = jax.jit(net.encode(), compiler_options=QUICK)(net.variables(), images)
    found = _run(file, images)
    for name, array in want.items():
        np.testing.assert_allclose(found[name], array, atol=1e-4, rtol=1e-4)


def test_the_command_writes_a_graph_and_refuses_what_is_no_vit(
    tmp_path, capsys, monkeypatch
):
    backbone.write(tmp_path / "w", published.network())
    monkeypatch.chdir(tmp_path)
    assert command.main(["export", "w", "--to=onnx"]) == 0
    out = capsys.readouterr().out
    assert "onnx/model.onnx: layout onnx, card onnx/model.md" in out
    lines = out.partition("\n")[2]
    images = np.zeros((1, 32, 32, 3), np.uint8)
    monkeypatch.chdir(tmp_path / "onnx")
    exec(lines, {"images": images})  # The lines that it shows run.
    monkeypatch.chdir(tmp_path)
    for words, told in (
        (["--to=x.onnx", "--layout=timm"], "want a folder or *.safetensors"),
        (["--to=x.onnx", "--dtype=float16"], "--dtype=float16: of --layout=vitssl"),
    ):
        assert command.main(["export", "w", *words]) == 2
        assert told in capsys.readouterr().err
    for name in ("hvit", "resnet"):
        about = backbone.About({"name": name}, (0.5,), (0.5,), "mean")
        other = backbone.Backbone(about, {})
        monkeypatch.setattr(backbone.Backbone, "check", lambda self: None)
        with pytest.raises(
            errors.UsageError, match=f"--layout=onnx: cannot hold a model '{name}'; use"
        ):
            exporter.write(other, tmp_path / "x.onnx", "onnx")


def test_half_a_file_is_read_as_float32(tmp_path):
    net = published.network()
    whole = exporter.write(net, tmp_path / "a.safetensors", "vitssl")
    half = exporter.write(net, tmp_path / "b.safetensors", "vitssl", "float16")
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    for name, leaf in backbone.read(half).leaves.items():
        np.testing.assert_array_equal(leaf, net.leaves[name].astype(np.float16))
    beyond = dict(net.leaves) | {"encoder/norm/bias": np.full(32, 1e6, np.float32)}
    with pytest.raises(errors.CheckpointError, match="beyond float16"):
        large = backbone.Backbone(net.about, beyond)
        exporter.write(large, tmp_path / "c.safetensors", "vitssl", "float16")
