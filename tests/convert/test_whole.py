"""Whole methods of others: converted, then features and part maps like a run's."""

import pathlib

import cv2
import jax
import numpy as np
import pytest

import vitssl
from tests import layouts
from tests.convert import pth
from vitssl import errors
from vitssl.convert import __main__ as command
from vitssl.convert import backbone, exporter, importer
from vitssl.data import modalities, sources
from vitssl.run import opened
from vitssl.tools import extract

CASES = pathlib.Path(__file__).parents[1] / "golden" / "cases"


def _arrays(case) -> dict:
    return dict(np.load(CASES / f"{case}.npz"))


def _imported(case, to, *flags, also=()):
    """Return the folder of an import of a golden case's state dict."""
    arrays = _arrays(case)
    state = {k[6:]: x for k, x in arrays.items() if k.startswith("param/")}
    pth.write(to / "a.pth", {"model": state | dict(also)})
    given = ["import", str(to / "a.pth"), f"--to={to / 'w'}", *flags]
    assert command.main(given) == 0
    return to / "w"


# Of one and two stages, on a ViT of timm or Hugging Face, a ResNet or a ConvNeXt.
FOUND = {  # case: (heads, what PyTorch computed without noise, by its name there).
    "ifam/pdisconet_resnet_stride32": (0, dict(maps="maps", logits="logits")),
    "ifam/pdisconet_convnext": (0, {}),
    "ifam/pdiscoformer_vit_original": (4, dict(maps="maps", logits="logits")),
    "ifam/hf_twostage_soft": (4, dict(maps="maps")),
    "ifam/twostage_hard_zero_noise": (3, dict(maps="maps", logits="stage2_logits")),
}


@pytest.mark.parametrize("case", FOUND)
def test_part_maps_are_those_of_the_method_and_of_the_original(case, tmp_path):
    arrays = _arrays(case)
    heads, computed = FOUND[case]
    folder = _imported(case, tmp_path, f"--heads={heads}")
    image = arrays["in/x"].transpose(0, 2, 3, 1)
    made = vitssl.load(folder)
    got = made(image)
    method, past = made.method, opened.past(folder)
    found = jax.jit(method.predict)(*made.state, image)
    np.testing.assert_allclose(got["maps"], found.found.maps, atol=1e-5)
    want = jax.jit(method.features)(*made.state, image)
    for name in ("pooled", "tokens"):
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)
    count = len(past.weights.about.classes)
    assert found.logits.shape == (len(image), count) and count > 1
    for name, theirs in computed.items():
        ours = dict(maps=got["maps"], logits=found.logits)
        original = arrays[f"out/{theirs}"]
        original = np.moveaxis(original, 1, -1) if name == "maps" else original
        np.testing.assert_allclose(ours[name], original, atol=1e-4, err_msg=name)
    # The way back is exact, batch statistics included.
    layout = "parts_hf" if "/hf_" in case else "parts"
    file = exporter.write(backbone.read(folder), tmp_path / "b.safetensors", layout)
    again = importer.reader.read(file).tree
    for key, x in again.items():
        np.testing.assert_array_equal(x, arrays[f"param/{key}"], err_msg=key)


def test_extract_writes_the_maps_of_a_folder(tmp_path):
    folder = _imported("ifam/pdiscoformer_vit_original", tmp_path, "--heads=4")
    made = vitssl.load(folder)
    side = made.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    for i, image in enumerate(pixels):
        (tmp_path / "images/a").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / f"images/a/{i}.png"), image[..., ::-1])
    to = tmp_path / "f.npz"
    given = [str(folder), f"--images={tmp_path / 'images'}", f"--to={to}"]
    assert extract.main([*given, "--names=pooled,maps"]) == 0
    want = made(pixels)
    with np.load(to) as found:
        for name in ("pooled", "maps"):
            np.testing.assert_allclose(found[name], want[name], atol=1e-4)
    assert made.predict(pixels)["class"][0] in made.classes


def test_what_a_whole_method_cannot_is_one_line(tmp_path, capsys):
    folder = _imported("ifam/pdiscoformer_vit_original", tmp_path, "--heads=2")
    with pytest.raises(errors.UsageError, match="pool=cls: .* holds a whole method"):
        vitssl.load(folder, pool="cls")
    with pytest.raises(errors.UsageError, match="not a dict"):
        vitssl.load(folder)({"rgb": np.zeros((1, 8, 8, 1, 3))})
    # A leaf that is not there is named.
    found = backbone.read(folder)
    leaves = {k: v for k, v in found.leaves.items() if k != "stage_1/head/prototypes"}
    backbone.write(tmp_path / "cut", backbone.Backbone(found.about, leaves))
    assert extract.main([str(tmp_path / "cut"), "--images=x", "--to=y.npz"]) == 4
    told = capsys.readouterr().err
    assert "does not hold" in told and "prototypes" in told and told.count("\n") == 1


def test_a_file_that_tells_no_heads_is_imported_and_says_so(tmp_path, capsys):
    folder = _imported("ifam/pdiscoformer_vit_original", tmp_path)
    assert "no features of its own: a width of 32" in capsys.readouterr().out
    with pytest.raises(errors.CheckpointError, match="no config; .* say --heads=N"):
        vitssl.load(folder)


@pytest.fixture(scope="module")
def olmo(tmp_path_factory):
    """Return the features of an imported encoder of several sensors."""
    to = tmp_path_factory.mktemp("olmo")
    case = "hybrid/encoder_registers_p8"
    return vitssl.load(_imported(case, to, "--heads=2", "--image_size=16"))


def _samples(made):
    """Return a user's samples in the sensors' own units."""
    rng = np.random.default_rng(0)
    found = {}
    for kind in made.method.read:
        offset, divisor = modalities.scale(kind.name)
        shape = (2, *kind.shape(16, 3))
        found[kind.name] = (offset + divisor * rng.uniform(size=shape)).astype("f4")
    found["timestamps"] = np.tile([[1, 0, 2020], [1, 5, 2020], [1, 9, 2020]], (2, 1, 1))
    return found


def test_raw_values_give_the_features_of_the_normalised_ones(olmo):
    samples = _samples(olmo)
    got = olmo(samples, raw=True)
    plain = {
        k: modalities.normalise(k, x) if k in modalities.MODALITIES else x
        for k, x in samples.items()
    }
    want = jax.jit(olmo.method.features)(*olmo.state, plain)
    again = olmo(plain)
    for name in ("pooled", "tokens"):
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)
        np.testing.assert_allclose(again[name], want[name], atol=1e-5)
    assert got["tokens"].shape[:2] == (2, 16)  # Patches of 4 pixels.
    assert np.abs(np.asarray(got["pooled"][0] - got["pooled"][1])).max() > 1e-3


def test_sensors_may_lack_but_not_all_and_shapes_are_checked(olmo):
    samples = _samples(olmo)
    first, *others = (k.name for k in olmo.method.read)
    fewer = {k: x for k, x in samples.items() if k not in others}
    gone = {
        k: np.full_like(x, modalities.MISSING) if k in others else x
        for k, x in samples.items()
    }
    a, b = olmo(fewer, raw=True), olmo(gone, raw=True)
    np.testing.assert_allclose(a["pooled"], b["pooled"], atol=1e-6)
    for change, told in (
        ({"timestamps": np.zeros((2, 3))}, r"timestamps \(2, 3\): want \[2, T, 3\]"),
        ({first: samples[first][..., :1]}, rf"{first} \(2, 16, 16, 3, 1\): want"),
    ):
        with pytest.raises(errors.UsageError, match=told):
            olmo(samples | change)
    with pytest.raises(errors.UsageError, match="lacks timestamps"):
        olmo({first: samples[first]}, raw=True)
    with pytest.raises(errors.UsageError, match="rows and columns"):
        olmo({"timestamps": samples["timestamps"]}, raw=True)


def test_extract_reads_the_samples_of_a_data_set(olmo, tmp_path):
    root = layouts.make("olmoearth", tmp_path / "data")
    names = ("pooled", "tokens")
    options = dict(names=names, kind="olmoearth", show=lambda line: None)
    found = extract.run(olmo, root, tmp_path / "f.npz", **options)
    source = sources.open("olmoearth", root, "test", **olmo.method.reads)
    row = olmo.method.evaluation_transform(16)(source[1])
    sample = {k[6:]: x[None] for k, x in row.items() if k.startswith("image/")}
    want = olmo(sample)
    for name in names:
        np.testing.assert_allclose(found[name][1], want[name][0], atol=1e-4)
    assert len(found["pooled"]) == len(source)
