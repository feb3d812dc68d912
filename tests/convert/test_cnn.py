"""ResNet and ConvNeXt of published names: found, used whole, and the same numbers."""

import json
import pathlib

import jax
import numpy as np
import pytest

import vitssl
from tests.convert import pth
from vitssl import errors, tree
from vitssl.convert import __main__ as command
from vitssl.convert import backbone, exporter, family, importer
from vitssl.models import MODELS
from vitssl.run import opened, warmstart

CASES = pathlib.Path(__file__).parents[1] / "golden" / "cases" / "ifam"
HEAD = ("fc_landmarks", "fc_class_landmarks", "modulation")


def _case(name) -> tuple[dict, dict]:
    """Return (state dict of the original, config) of a golden case."""
    arrays = dict(np.load(CASES / f"{name}.npz"))
    state = {k[6:]: x for k, x in arrays.items() if k.startswith("param/")}
    return state, json.loads((CASES / f"{name}.json").read_text())["config"]


def _backbone(name) -> dict:
    state, _ = _case(name)
    return {k: x for k, x in state.items() if not k.startswith(HEAD)}


def _facebook(state) -> dict:
    """Return timm's ConvNeXt by the names of its authors."""
    found = {}
    for key, x in state.items():
        for old, new in (
            ("stem.", "downsample_layers.0."),
            ("stages.1.downsample.", "downsample_layers.1."),
            ("stages.2.downsample.", "downsample_layers.2."),
            ("stages.3.downsample.", "downsample_layers.3."),
            (".blocks.", "."),
            (".conv_dw.", ".dwconv."),
            (".mlp.fc1.", ".pwconv1."),
            (".mlp.fc2.", ".pwconv2."),
        ):
            key = key.replace(old, new)
        found[key] = x
    more = {"norm.weight": 24, "norm.bias": 24, "head.weight": (9, 24), "head.bias": 9}
    return found | {key: np.ones(shape, np.float32) for key, shape in more.items()}


def _torchvision(state) -> dict:
    """Return timm's ConvNeXt by torchvision's names: numbers, and gains [C, 1, 1]."""
    places = {"conv_dw": "block.0", "norm": "block.2"}
    places |= {"mlp.fc1": "block.3", "mlp.fc2": "block.5"}
    found = {}
    for key, x in state.items():
        parts = key.split(".")
        if parts[0] == "stem":
            key = f"features.0.{parts[1]}.{parts[2]}"
        elif parts[2] == "downsample":
            key = f"features.{2 * int(parts[1])}.{parts[3]}.{parts[4]}"
        else:
            stage, inside = 2 * int(parts[1]) + 1, ".".join(parts[4:-1])
            name = "layer_scale" if parts[-1] == "gamma" else ""
            name = name or f"{places[inside]}.{parts[-1]}"
            key = f"features.{stage}.{parts[3]}.{name}"
            x = x[:, None, None] if parts[-1] == "gamma" else x
        found[key] = x
    more = {"classifier.0.weight": 24, "classifier.2.weight": (9, 24)}
    return found | {key: np.ones(shape, np.float32) for key, shape in more.items()}


def _conv_mlp(state) -> dict:
    """Return it with the linear layers as 1x1 convolutions, as timm's small ones."""
    wide = {k: x[:, :, None, None] for k, x in state.items() if _is_linear(k)}
    return state | wide | {"head.fc.weight": np.ones((9, 24), np.float32)}


def _is_linear(key):
    return ".mlp.fc" in key and key.endswith("weight")


def _resnet(state) -> dict:
    aside = {
        "fc.weight": np.ones((9, 24), np.float32),
        "fc.bias": np.ones(9, np.float32),
    }
    return state | aside


FILES = {
    "resnet": ("pdisconet_resnet_stride32", _resnet),
    "convnext": ("pdisconet_convnext", _conv_mlp),
    "convnext_facebook": ("pdisconet_convnext", _facebook),
    "convnext_torchvision": ("pdisconet_convnext", _torchvision),
}


def file(kind) -> dict:
    """Return a checkpoint of a family."""
    case, spelled = FILES[kind]
    return {"model": spelled(_backbone(case))}


@pytest.mark.parametrize("kind", FILES)
def test_every_spelling_is_found_and_read_bit_by_bit(kind, tmp_path):
    state = _backbone(FILES[kind][0])
    pth.write(tmp_path / "a.pth", file(kind))
    found = importer.read(tmp_path / "a.pth")
    assert found.about.family == kind and found.about.pool == "mean"
    module = found.module()
    assert module.depths == (1, 1, 1, 1) and module.widths == (8, 12, 16, 24)
    assert module.width == 40
    # The way back is timm's names, without what is counted and what comes after.
    back = exporter.write(found, tmp_path / "b.safetensors", "timm")
    again = importer.reader.read(back).tree
    want = {k: x for k, x in state.items() if not k.endswith("num_batches_tracked")}
    assert sorted(again) == sorted(want)
    for key, x in want.items():
        np.testing.assert_array_equal(again[key], x, err_msg=key)
    assert sorted(importer.read(back).leaves) == sorted(found.leaves)


# A forward pass in torch's layout, [B, C, H, W] and [O, I, h, w], by numpy alone.


def _conv(x, weight, stride=1):
    pad = weight.shape[-1] // 2
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    seen = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (2, 3))
    return np.einsum("bchwij,ocij->bohw", seen[:, :, ::stride, ::stride], weight)


def _norm(x, state, name):
    weight, bias, mean, var = (
        state[f"{name}.{key}"][:, None, None]
        for key in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / np.sqrt(var + 1e-5) * weight + bias


def _relu(x):
    return np.maximum(x, 0)


def _bottleneck(x, state, name, stride):
    y = _relu(_norm(_conv(x, state[f"{name}.conv1.weight"]), state, f"{name}.bn1"))
    y = _conv(y, state[f"{name}.conv2.weight"], stride)
    y = _relu(_norm(y, state, f"{name}.bn2"))
    y = _norm(_conv(y, state[f"{name}.conv3.weight"]), state, f"{name}.bn3")
    if f"{name}.downsample.0.weight" in state:
        x = _conv(x, state[f"{name}.downsample.0.weight"], stride)
        x = _norm(x, state, f"{name}.downsample.1")
    return _relu(x + y)


def _forward(x, state, depths):
    """Return the last two stages [B, C, h, w]."""
    x = _relu(_norm(_conv(x, state["conv1.weight"], 2), state, "bn1"))
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))[:, :, ::2, ::2]
    x, stages = x.max((-2, -1)), []
    for s, depth in enumerate(depths):
        for i in range(depth):
            stride = 2 if s and not i else 1
            x = _bottleneck(x, state, f"layer{s + 1}.{i}", stride)
        stages.append(x)
    return stages[-1], stages[-2]


def _bottlenecks(depths, widths, stem) -> dict:
    """Return a state dict of torchvision's names and shapes, random."""
    rng = np.random.default_rng(0)
    state = {}

    def conv(name, out, held, side):
        std = (held * side * side) ** -0.5
        state[f"{name}.weight"] = rng.normal(0, std, (out, held, side, side))

    def norm(name, width):
        for key in ("weight", "running_var"):
            state[f"{name}.{key}"] = rng.uniform(0.5, 1.5, width)
        for key in ("bias", "running_mean"):
            state[f"{name}.{key}"] = rng.normal(0, 0.3, width)
        state[f"{name}.num_batches_tracked"] = np.array(7)

    conv("conv1", stem, 3, 7)
    norm("bn1", stem)
    held = stem
    for s, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        for i in range(depth):
            name = f"layer{s + 1}.{i}"
            for k, (out, side) in enumerate(((width, 1), (width, 3), (4 * width, 1))):
                before = width if k else held
                conv(f"{name}.conv{k + 1}", out, before, side)
                norm(f"{name}.bn{k + 1}", out)
            if i == 0:
                conv(f"{name}.downsample.0", 4 * width, held, 1)
                norm(f"{name}.downsample.1", 4 * width)
            held = 4 * width
    floats = {k: x.astype(np.float32) for k, x in state.items() if x.ndim}
    return state | floats


@pytest.fixture(scope="module")
def fifty(tmp_path_factory):
    """Return (state dict, folder of the import) of a narrow ResNet of bottlenecks."""
    folder = tmp_path_factory.mktemp("resnet")
    state = _bottlenecks((2, 1, 2, 1), (4, 6, 8, 10), 8)
    pth.write(folder / "a.pth", state)
    to = folder / "weights"
    assert command.main(["import", str(folder / "a.pth"), f"--to={to}"]) == 0
    return state, to


def test_bottlenecks_give_the_numbers_of_another_forward_pass(fifty):
    state, folder = fifty
    image = np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float32)
    load = vitssl.load(folder)(image)
    made = np.reshape(load["tokens"], (2, 4, 4, 40 + 32))
    want, third = _forward(image.transpose(0, 3, 1, 2), state, (2, 1, 2, 1))
    np.testing.assert_allclose(made[..., 40:], third.transpose(0, 2, 3, 1), atol=1e-4)
    # The last stage is enlarged from 2 x 2 to 4 x 4, which keeps its mean.
    got = made[..., :40].mean((1, 2))
    np.testing.assert_allclose(got, want.mean((2, 3)), rtol=1e-4, atol=1e-4)
    # Corners of a bilinear enlargement between centres are the corners themselves.
    np.testing.assert_allclose(made[:, 0, 0, :40], want[:, :, 0, 0], atol=1e-4)
    np.testing.assert_allclose(load["pooled"], made.mean((1, 2)), atol=1e-5)


def test_a_run_starts_with_the_batch_statistics_too(fifty):
    state, folder = fifty
    net = backbone.read(folder).module()
    fresh = MODELS["resnet"](net.depths, net.widths, net.stem, net.kind)
    image = np.zeros((1, 64, 64, 3), np.float32)
    made = jax.eval_shape(fresh.init, jax.random.key(0), image)
    made = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), made)
    params = {"stage_1": {"backbone": made["params"], "head": {"x": np.zeros(2)}}}
    extra = {"stats": {"stage_1": {"backbone": made["batch_stats"]}}}
    spec = warmstart.Init(
        str(folder),
        skip=("stage_1/head/.*",),
        rename=(("stage_[12]/backbone/(.*)", r"encoder/\1"),),
    )
    past = opened.past(folder)
    params, skipped = warmstart.load(spec, past, params)
    assert skipped == ("stage_1/head/x",)
    stats = tree.flat(warmstart.statistics(spec, past, params, extra)["stats"])
    for ours, theirs in (
        ("bn1", "bn1"),
        ("layer3_1/bn2", "layer3.1.bn2"),
        ("layer4_0/down_norm", "layer4.0.downsample.1"),
    ):
        mean, var = (stats[f"stage_1/backbone/{ours}/{k}"] for k in ("mean", "var"))
        np.testing.assert_array_equal(mean, state[f"{theirs}.running_mean"])
        np.testing.assert_array_equal(var, state[f"{theirs}.running_var"])
        got = params["stage_1"]["backbone"]
        for part in ours.split("/"):
            got = got[part]
        np.testing.assert_array_equal(got["scale"], state[f"{theirs}.weight"])


def test_statistics_that_a_loaded_layer_lacks_are_an_error(fifty):
    _, folder = fifty
    past = opened.past(folder)
    ones = np.ones(3, np.float32)
    params = {"stage_1": {"backbone": {"bn1": {"scale": np.ones(3)}}}}
    extra = {"stats": {"stage_1": {"backbone": {"bn1": {"mean": ones, "var": ones}}}}}
    spec = warmstart.Init(str(folder))
    with pytest.raises(errors.CheckpointError, match="stats/stage_1/backbone/bn1/mean"):
        warmstart.statistics(spec, past, params, extra)
    # Another method's statistics of a layer without a gain are not taken.
    bare = {"stats": {"mean": ones}}
    params = {"head": {"kernel": ones}}
    spec = warmstart.Init(str(folder), skip=("head/.*",))
    assert warmstart.statistics(spec, past, params, bare) == bare


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda s: s.pop("layer2.0.bn2.running_mean"), "layer2.0.bn2.running_mean"),
        (lambda s: s.pop("layer4.0.conv1.weight"), "layer4.0.conv1.weight: missing"),
        (
            lambda s: s.update({"layer1.0.se.fc1.weight": np.ones(2, np.float32)}),
            "layer1.0.se.fc1.weight",
        ),
        (
            lambda s: s.update({"layer1.0.conv2.weight": np.ones((4, 2, 3, 3))}),
            "grouped ResNets",
        ),
    ],
)
def test_what_is_missing_extra_or_otherwise_is_named(change, told, fifty, tmp_path):
    state = {k: x for k, x in fifty[0].items() if not k.endswith("tracked")}
    change(state)
    pth.write(tmp_path / "a.pth", {k: np.float32(x) for k, x in state.items()})
    with pytest.raises(errors.CheckpointError, match=told):
        importer.read(tmp_path / "a.pth")


def test_grey_images_are_converted_and_sizes_refused(fifty, tmp_path):
    state, folder = fifty
    one = importer.read(
        folder / backbone.FILE, options=family.Options(channels=1)
    ).leaves["encoder/conv1/kernel"]
    want = state["conv1.weight"].sum(1, keepdims=True).transpose(2, 3, 1, 0)
    np.testing.assert_allclose(one, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(errors.UsageError, match="any size"):
        importer.read(folder / backbone.FILE, options=family.Options(image_size=64))
    with pytest.raises(errors.UsageError, match="layout=hf: cannot hold"):
        exporter.write(backbone.read(folder), tmp_path / "x", "hf")
