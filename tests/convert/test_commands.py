"""python -m vitssl.convert, vitssl.load and vitssl extract."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest
import safetensors.numpy

import vitssl
from tests import runs
from tests.convert import pth, published
from vitssl import errors, tree
from vitssl.convert import __main__ as command
from vitssl.convert import backbone, exporter, importer, positions
from vitssl.convert import safetensors as ours
from vitssl.data import views
from vitssl.run import inference, warmstart
from vitssl.tools import extract, writing


@pytest.fixture
def weights(tmp_path):
    """(a network, the folder of its weights)."""
    net = published.network(classes=3)
    backbone.write(tmp_path / "w", net)
    return net, tmp_path / "w"


def _pixels(count=3, size=32, channels=3):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def test_weights_there_and_back(weights):
    net, folder = weights
    for path in (folder, folder / backbone.FILE):
        found = backbone.read(path)
        assert found.about == net.about
        assert sorted(found.leaves) == sorted(net.leaves)
        for name, leaf in net.leaves.items():
            np.testing.assert_array_equal(found.leaves[name], leaf)


@pytest.mark.parametrize("layout", ["timm", "hf"])
def test_a_folder_of_the_hub_has_its_card_and_configs(tmp_path, capsys, layout):
    exporter.write(published.network(classes=3), tmp_path / "w", "vitssl")
    to = tmp_path / "my-vit"
    given = ["export", str(tmp_path / "w"), f"--to={to}", f"--layout={layout}"]
    assert command.main(given) == 0
    assert "README.md" in capsys.readouterr().out
    names = {"model.safetensors", "config.json", "README.md"}
    names |= {"preprocessor_config.json"} if layout == "hf" else set()
    assert {p.name for p in to.iterdir()} == names
    front, body = (to / "README.md").read_text().split("---\n")[1:]
    library, task = {
        "timm": ("timm", "image-classification"),  # With its head.
        "hf": ("transformers", "image-feature-extraction"),
    }[layout]
    assert f"library_name: {library}\npipeline_tag: {task}\n" in front
    assert body.startswith("\n# my-vit\n")
    config = json.loads((to / "config.json").read_text())
    if layout == "timm":
        assert config["model_args"]["embed_dim"] == 32 and config["num_classes"] == 3
        assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    else:
        assert (config["model_type"], config["hidden_size"]) == ("vit", 32)


def test_a_card_names_no_folder_of_the_machine(tmp_path):
    made, secret = published.network(classes=3), "/home/someone/their photos/cats"
    config = {
        "data": {"root": "their/own/cats", "options": {"parts": [{"root": secret}]}},
        "init": {"from": "~/runs/first"},
        "teacher": {"from": "C:\\\\Users\\\\someone\\\\run"},
        "optim": {
            "wd_rules": [[".*/(bias|scale)", 0.0], ["encoder/block_[0-2]/.*", 1]]
        },
    }
    notes = ("read /home/someone/w.pth, below the prefix 'model/'",)
    about = dataclasses.replace(made.about, config=config, source=secret, notes=notes)
    made = dataclasses.replace(made, about=about)
    backbone.write_card(tmp_path / "w.safetensors", made, "timm", "", digested=False)
    card = (tmp_path / "w.md").read_text()
    assert "someone" not in card and "their" not in card and "runs" not in card
    assert '"root": "cats"' in card and '"from": "first"' in card
    assert '".*/(bias|scale)"' in card and '"encoder/block_[0-2]/.*"' in card
    assert "read w.pth, below the prefix 'model/'" in card


def test_a_norm_that_timm_cannot_say_has_no_config_of_its_hub(tmp_path):
    net = published.network(norm_eps=1e-5)
    exporter.write(net, tmp_path, "timm")
    assert not (tmp_path / "config.json").exists()
    assert "norm_layer=lambda" in (tmp_path / "README.md").read_text()


def test_large_transposes_are_copied_right():
    x = np.random.default_rng(0).normal(size=(700, 600)).astype(np.float32)
    got = backbone.contiguous(x.T)
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, x.T)


def test_import_then_export_from_the_command_line(tmp_path, capsys):
    state = published.timm(published.network(classes=3))
    pth.write(tmp_path / "a.pth", {"state_dict": state})
    folder, file = str(tmp_path / "w"), tmp_path / "b.safetensors"
    given = ["import", str(tmp_path / "a.pth"), f"--to={folder}", "--heads=2"]
    assert command.main(given) == 0
    told = capsys.readouterr().out
    assert "timm" in told and "state_dict" in told and "init.from" in told
    assert command.main(["export", folder, f"--to={file}", "--layout=timm"]) == 0
    again = safetensors.numpy.load_file(file)
    assert sorted(again) == sorted(state)
    for name, x in state.items():
        np.testing.assert_array_equal(again[name], x)
    card = file.with_suffix(".md").read_text()
    for part in (backbone.digest(file), "VisionTransformer(", "num_classes=3"):
        assert part in card
    about = backbone.read(folder).about
    assert about.sha256 == backbone.digest(tmp_path / "a.pth") and about.sha256 in card


def test_faults_of_the_command_line_are_one_line_and_exit_codes(tmp_path, capsys):
    missing = str(tmp_path / "no.pth")
    for given, code, told in (
        ([], 2, "required"),
        (["import", missing], 2, "--to"),
        (["import", missing, "--to=x"], 4, "no such file"),
        (["export", str(tmp_path), "--to=x.safetensors"], 4, "no complete checkpoint"),
    ):
        assert command.main(given) == code
        assert told in capsys.readouterr().err
    assert command.main(["families"]) == 0
    assert "dinov2" in capsys.readouterr().out


def test_layouts_refuse_what_they_cannot_say(tmp_path):
    to = tmp_path / "x.safetensors"
    rope = published.network(rope=True)
    for net, layout, told in (
        (rope, "timm", "no rotary positions"),
        (rope, "hf", "not these"),
        (published.network(qk_norm=True), "hf", "qk_norm"),
        (published.network(layerscale=0.1, cls=False), "hf", "class token"),
        (published.network(registers=1), "bigvision", "registers"),
        (published.network(), "torch", "one of timm"),
    ):
        with pytest.raises(errors.UsageError, match=told):
            exporter.write(net, to, layout)
    assert not to.exists()


def test_published_files_are_not_taken_for_converted_ones(tmp_path):
    file = exporter.write(published.network(), tmp_path / "x.safetensors", "timm")
    with pytest.raises(errors.CheckpointError, match="not converted yet"):
        vitssl.load(file)
    leaves = {"encoder/x": np.ones(2, np.float32)}
    for text, told in (("{", "damaged"), ('{"format": 99}', "format 99")):
        ours.write(file, leaves, {backbone.KEY: text})
        with pytest.raises(errors.CheckpointError, match=told):
            backbone.read(file)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_load_gives_the_tokens_and_their_pool(weights, pool):
    net, folder = weights
    image = _pixels()
    found = vitssl.load(folder, pool=pool)(image)
    want = published.tokens(net, (image / np.float32(255) - 0.5) / 0.5)
    np.testing.assert_allclose(found["tokens"], want[:, 1:], rtol=1e-5, atol=1e-5)
    pooled = want[:, 0] if pool == "cls" else want[:, 1:].mean(1)
    np.testing.assert_allclose(found["pooled"], pooled, rtol=1e-5, atol=1e-5)


def test_load_refuses_images_and_options_that_do_not_fit(weights):
    _, folder = weights
    made = vitssl.load(folder)
    for bad in (_pixels()[0], _pixels(channels=4), _pixels().astype(np.int32)):
        with pytest.raises(errors.UsageError):
            made(bad)
    for options in (dict(pool="max"), dict(image_size=33)):
        with pytest.raises(errors.UsageError):
            vitssl.load(folder, **options)
    headless = published.network(cls=False, pool="mean")
    with pytest.raises(errors.UsageError, match="no class token"):
        inference.of_backbone(headless, pool="cls")


def test_load_at_another_size_resamples_by_the_rule(weights):
    net, folder = weights
    made = vitssl.load(folder, image_size=48)
    assert made.image_size == 48
    image = _pixels(size=48)
    got = made(image)["tokens"]
    # The rule of this network is the one its ViT has at run time.
    want = vitssl.load(folder)(image)["tokens"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert got.shape == (3, 36, net.module().width)


def _folder_of_images(path):
    for i, name in enumerate(("cat/1", "cat/2", "dog/1", "dog/2", "dog/3")):
        file = path / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), _pixels(5, 40)[i])
    return path


def test_extract_writes_every_image_once_with_its_class_and_path(weights, tmp_path):
    _, folder = weights
    images, to = _folder_of_images(tmp_path / "images"), tmp_path / "f.npz"
    given = [str(folder), f"--images={images}", f"--to={to}", "--batch_size=2"]
    assert extract.main([*given, "--names=pooled,tokens"]) == 0
    with np.load(to, allow_pickle=False) as found:
        assert found["pooled"].shape == (5, 32) and found["tokens"].shape == (5, 16, 32)
        assert found["label"].tolist() == [0, 0, 1, 1, 1]
        assert found["classes"].tolist() == ["cat", "dog"]
        paths = [pathlib.Path(p).stem for p in found["path"]]
        assert paths == ["1", "2", "1", "2", "3"]
        one = vitssl.load(folder)
        pixels = cv2.imread(found["path"][3])[..., ::-1]
        pixels = views.Evaluate(32, 1.0)(dict(image=pixels))["image"][None]
        want = one(pixels)["pooled"][0]
        np.testing.assert_allclose(found["pooled"][3], want, rtol=1e-4, atol=1e-5)


def test_extract_takes_what_lies_in_no_class_too(weights, tmp_path):
    images = _folder_of_images(tmp_path / "images")
    cv2.imwrite(str(images / "loose.png"), _pixels(1, 40)[0])
    made = vitssl.load(weights[1])
    got = extract.run(made, images, tmp_path / "f.npz", show=lambda line: None)
    assert got["label"].tolist() == [0, 0, 1, 1, 1, -1]
    assert pathlib.Path(got["path"][5]).name == "loose.png"
    (images / "train/a").mkdir(parents=True)
    cv2.imwrite(str(images / "train/a/6.png"), _pixels(1, 40)[0])
    with pytest.raises(errors.DataError, match="extract has --divided"):
        extract.run(made, images, tmp_path / "f.npz", show=lambda line: None)
    options = dict(divided="no", show=lambda line: None)
    got = extract.run(made, images, tmp_path / "f.npz", **options)
    assert got["classes"].tolist() == ["cat", "dog", "train"]
    assert got["label"].tolist() == [0, 0, 1, 1, 1, 2, -1]


def test_floats_that_no_pixel_becomes_are_refused(weights):
    made = vitssl.load(weights[1])
    pixels = _pixels(2)
    said = r"floats up to 2\d\d.*mean=\(0\.\d+.*or uint8 pixels"
    with pytest.raises(errors.UsageError, match=said):
        made(pixels.astype(np.float32))
    standard = (pixels / 255 - np.array(made.mean)) / np.array(made.std)
    want, got = made(pixels), made(standard.astype(np.float32))
    np.testing.assert_allclose(got["pooled"], want["pooled"], rtol=1e-4, atol=1e-4)
    jax.jit(lambda x: made(x)["pooled"])(standard.astype(np.float32))


def test_progress_counts_images_not_batches():
    told = []
    got = list(writing.watched(iter("abc"), 5, 2, told.append, every=0.0))
    assert got == ["a", "b", "c"]
    assert [line.split(" ")[0] for line in told] == ["2/5", "4/5", "5/5"]


def test_parquet_holds_what_npz_holds(weights, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")  # The extra [parquet].
    _, folder = weights
    made, images = vitssl.load(folder), _folder_of_images(tmp_path / "images")
    names = ("pooled", "tokens")
    told = []
    want = extract.run(made, images, tmp_path / "f.npz", names=names, show=told.append)
    extract.run(made, images, tmp_path / "f.parquet", names=names, show=told.append)
    assert "f.parquet: 5 images, pooled (5, 32), tokens (5, 16, 32)" in told[-1]
    found = parquet.read_table(tmp_path / "f.parquet")
    shapes = json.loads(found.schema.metadata[b"shapes"])
    for name in names:
        got = np.array(found[name].to_pylist(), np.float32)
        np.testing.assert_array_equal(got.reshape(5, *shapes[name]), want[name])
    assert found["class"].to_pylist() == ["cat", "cat", "dog", "dog", "dog"]
    assert found["label"].to_pylist() == want["label"].tolist()
    assert found["path"].to_pylist() == want["path"].tolist()
    for image in (tmp_path / "images").glob("*/*"):  # Without classes.
        image.rename(tmp_path / "images" / f"{image.parent.name}{image.name}")
    extract.run(made, images, tmp_path / "flat.parquet", show=told.append)
    found = parquet.read_table(tmp_path / "flat.parquet")
    assert found["class"].to_pylist() == [""] * 5


def test_parquet_without_pyarrow_is_one_line(weights, tmp_path, capsys, monkeypatch):
    _, folder = weights
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    given = [str(folder), f"--images={tmp_path}", f"--to={tmp_path}/f.parquet"]
    assert extract.main(given) == 2
    told = capsys.readouterr().err
    assert "pip install 'vitssl[parquet]'" in told and told.count("\n") == 1


def test_extract_says_what_is_wrong(weights, tmp_path, capsys):
    _, folder = weights
    images = _folder_of_images(tmp_path / "images")
    for given, code, told in (
        ([f"--images={images}"], 2, "--program"),
        ([f"--images={images}", "--to=x.csv"], 2, "must end in"),
        ([f"--images={images}", "--to=/proc/no/x.npz"], 2, "--to=/proc/no/x.npz"),
        ([f"--images={images}", "--to=x.npz", "--names=logits"], 2, "--names=logits"),
        ([f"--images={tmp_path}/none", "--to=x.npz"], 3, "none"),
    ):
        assert extract.main([str(folder), *given]) == code
        assert told in capsys.readouterr().err


def test_a_program_runs_without_this_package(weights, tmp_path):
    _, folder = weights
    to = tmp_path / "program"
    assert extract.main([str(folder), f"--program={to}"]) == 0
    about = json.loads((to / "program.json").read_text())
    assert about["platforms"] == ["cpu", "cuda"]
    images = _pixels(5)
    np.save(tmp_path / "images.npy", images)
    script = (to / "README.md").read_text().split("```python\n")[1].split("```")[0]
    script = "import numpy\nimages = numpy.load('../images.npy')\n" + script
    script += "\nimport sys\nassert not any('vitssl' in name for name in sys.modules)"
    script += "\nnumpy.save('../pooled.npy', found['pooled'])"
    subprocess.run([sys.executable, "-c", script], cwd=to, check=True, timeout=120)
    want = vitssl.load(folder)(images)["pooled"]
    got = np.load(tmp_path / "pooled.npy")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def _params(seed=1, **fields):
    """Return parameters of a method whose encoder is the network's, and more."""
    net = published.network(seed, **fields)
    leaves = {k: x for k, x in net.leaves.items() if k.startswith("encoder/")}
    leaves["predictor/kernel"] = np.ones((2, 2), np.float32)
    return jax.tree.map(jax.numpy.asarray, tree.nest(leaves))


def test_a_run_starts_from_converted_weights(weights):
    net, folder = weights
    for path in (folder, folder / backbone.FILE):
        spec = warmstart.Init(from_=str(path), skip=("predictor/.*",))
        got = tree.flat(runs.start(spec, _params()))
        np.testing.assert_array_equal(got["predictor/kernel"], np.ones((2, 2)))
        for name in got:
            if name.startswith("encoder/"):
                np.testing.assert_array_equal(got[name], net.leaves[name])


def test_a_run_of_another_image_size_resamples_the_positions(weights):
    net, folder = weights
    spec = warmstart.Init(from_=str(folder), skip=("predictor/.*",))
    got = tree.flat(runs.start(spec, _params(image_size=48)))
    table = net.leaves["encoder/pos_embed"]
    want = positions.resample(table, 1, 6, net.about.rule)
    np.testing.assert_array_equal(got["encoder/pos_embed"], want)


def test_what_a_run_cannot_take_is_listed_with_both_shapes(weights):
    _, folder = weights
    with pytest.raises(errors.CheckpointError) as told:
        runs.start(warmstart.Init(from_=str(folder)), _params(mlp_ratio=4.0))
    assert "predictor/kernel: not in the checkpoint" in str(told.value)
    assert "(32, 64) stored, (32, 128) here" in str(told.value)
    assert "init.skip" in str(told.value)


def test_an_encoder_fills_every_backbone_of_a_method(weights):
    net, folder = weights
    encoder = {k: x for k, x in _params().items() if k == "encoder"}["encoder"]
    params = {"stage_1": {"backbone": encoder}, "stage_2": {"backbone": encoder}}
    got = tree.flat(runs.start(warmstart.Init(from_=str(folder)), params))
    for stage in ("stage_1", "stage_2"):
        for name, leaf in tree.flat(encoder).items():
            want = net.leaves[f"encoder/{name}"]
            np.testing.assert_array_equal(got[f"{stage}/backbone/{name}"], want)
            assert np.any(np.asarray(leaf) != want)


@pytest.mark.parametrize("positions_of", ["sincos", "none"])
def test_positions_that_are_no_parameter_are_written_out(positions_of, tmp_path):
    net = published.network(positions=positions_of)
    file = exporter.write(net, tmp_path / "x.safetensors", "timm")
    options = importer.family.Options(heads=2)
    found = importer.read(file, options=options)
    image = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    got, want = published.tokens(found, image), published.tokens(net, image)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
