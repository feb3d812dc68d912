"""What others save, in the wrappings, folders and words they save it in."""

import contextlib
import dataclasses
import json
import resource

import cv2
import ml_dtypes
import numpy as np
import pytest

import vitssl
from tests.convert import checkpoints, pth, published
from vitssl import errors
from vitssl.convert import __main__ as command
from vitssl.convert import backbone, beside, exporter, family, importer, safetensors
from vitssl.tools import extract

HEADS = family.Options(heads=2)
TOLD = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def _net(**fields):
    net = published.network(**dict(heads=4, norm_eps=1e-5) | fields)
    return backbone.Backbone(dataclasses.replace(net.about, **TOLD), net.leaves)


def _guessed(found):
    """Return the values that a network's notes call guesses."""
    notes = filter(beside.is_guess, found.about.notes)
    return {note.split(" ")[1].split("=")[0] for note in notes}


def _bare(path, **fields):
    """Write timm's state dict without a word about it."""
    safetensors.write(path, published.timm(published.network(**fields)))
    return path


def _beside(folder, name, **said):
    (folder / name).write_text(json.dumps(said))


@pytest.mark.parametrize("kind", checkpoints.WRAPPINGS)
def test_a_wrapping_comes_off_and_is_told(kind, tmp_path):
    make, prefix = checkpoints.WRAPPINGS[kind]
    pth.write(tmp_path / "a.pth", make())
    if prefix is None:
        said = "--prefix=left. or --prefix=right." if "two" in kind else "a.weight, b.w"
        with pytest.raises(errors.CheckpointError, match=said):
            importer.read(tmp_path / "a.pth", options=HEADS)
        return
    found = importer.read(tmp_path / "a.pth", options=HEADS)
    for name, leaf in published.network(classes=3).leaves.items():
        np.testing.assert_array_equal(found.leaves[name], leaf)
    notes = "\n".join(found.about.notes)
    assert prefix in notes and ("prefix" in notes or not prefix or "taken off" in notes)
    if kind == "backbone and head":
        assert "outside of the prefix, left aside: projector (1 keys)" in notes


def test_a_prefix_can_be_said(tmp_path):
    pth.write(tmp_path / "a.pth", checkpoints.WRAPPINGS["two of a kind"][0]())
    options = dataclasses.replace(HEADS, prefix="right")
    found = importer.read(tmp_path / "a.pth", options=options)
    for name, leaf in published.network(9).leaves.items():
        np.testing.assert_array_equal(found.leaves[name], leaf)
    with pytest.raises(errors.CheckpointError, match="below --prefix=middle"):
        importer.read(tmp_path / "a.pth", options=family.Options(2, prefix="middle"))


def test_keys_too_many_can_be_left_aside_by_name(tmp_path):
    more = {"masked_embed": checkpoints.noise(1, 32), "logit_scale": np.ones((), "f4")}
    more["text.blocks.0.weight"] = checkpoints.noise(2)
    pth.write(tmp_path / "a.pth", checkpoints.wrapped("", **more))
    with pytest.raises(errors.CheckpointError, match="--ignore=masked_embed,logit_sc"):
        importer.read(tmp_path / "a.pth", options=HEADS)
    options = dataclasses.replace(HEADS, ignore=("masked_*", "logit_scale", "text"))
    found = importer.read(tmp_path / "a.pth", options=options)
    assert any("--ignore=text: 1 keys" in note for note in found.about.notes)
    options = dataclasses.replace(HEADS, ignore=("nothing",))
    with pytest.raises(errors.UsageError, match="--ignore=nothing: no such key"):
        importer.read(tmp_path / "a.pth", options=options)


@pytest.mark.parametrize(
    "layout, fields",
    [
        ("timm", {}),
        ("timm", dict(cls=False)),
        ("hf", dict(layerscale=0.1)),
        ("hf", dict(rope=True, rope_unit=True, positions="none", layerscale=0.1)),
        ("vitssl", {}),
    ],
)
def test_nothing_of_our_own_exports_is_guessed_when_they_come_back(
    layout, fields, tmp_path
):
    net = _net(**fields)
    if "rope" in fields:  # Keys have no bias there.
        leaves = {
            k: x * (np.arange(96) // 32 != 1) if k.endswith("qkv/bias") else x
            for k, x in net.leaves.items()
        }
        net = backbone.Backbone(net.about, leaves)
    file = exporter.write(net, tmp_path / "x.safetensors", layout)
    for other in tmp_path.glob("*.json"):
        other.unlink()
    found = importer.read(file)
    module, about = found.module(), found.about
    assert (module.heads, module.norm_eps, module.image_size) == (4, 1e-5, 32)
    assert (about.mean, about.std) == (TOLD["mean"], TOLD["std"])
    assert about.pool == ("cls" if module.cls else "mean") and not _guessed(found)
    said = json.loads(safetensors.read(file)[1]["vitssl.facts"])
    assert said["activation"] == "gelu" and said["eps"] == 1e-5 and said["heads"] == 4


def test_a_guess_stays_one_through_an_export(tmp_path):
    first = importer.read(_bare(tmp_path / "a.safetensors"), options=HEADS)
    assert _guessed(first) == {"mean", "std", "eps", "activation"}
    file = exporter.write(first, tmp_path / "b.safetensors", "timm")
    assert _guessed(importer.read(file)) == {"mean", "std", "eps", "activation"}


def test_what_timm_says_beside_its_weights_is_read(tmp_path):
    file = _bare(tmp_path / "model.safetensors", width=384, heads=6, image_size=32)
    cfg = dict(mean=[0.5] * 3, std=[0.5] * 3, input_size=[3, 64, 64])
    said = dict(architecture="vit_small_patch8_32", global_pool="avg")
    for config in (said | {"pretrained_cfg": cfg}, said | cfg):  # New and old.
        _beside(tmp_path, "config.json", **config)
        found = importer.read(file)
        assert found.about.mean == found.about.std == (0.5, 0.5, 0.5)
        assert found.module().heads == 6 and found.about.pool == "mean"
        assert _guessed(found) == {"eps", "activation"}
        assert any("64 px" in note and "32 px" in note for note in found.about.notes)
    _beside(tmp_path, "config.json", **said, model_args=dict(num_heads=12))
    assert importer.read(file).module().heads == 12


def test_mo_co_v3_has_twelve_heads_where_others_have_six(tmp_path):
    state = published.timm(published.network(width=384, heads=12))
    both = published.prefixed(state, "module.base_encoder.")
    pth.write(tmp_path / "a.pth", {"state_dict": both})
    pth.write(tmp_path / "vit-s-300ep.pth", {"state_dict": state})
    for name in ("a.pth", "vit-s-300ep.pth"):
        found = importer.read(tmp_path / name)
        assert found.module().heads == 12 and "heads" not in _guessed(found)
    pth.write(tmp_path / "b.pth", state)
    found = importer.read(tmp_path / "b.pth")
    assert found.module().heads == 6 and "heads" in _guessed(found)


@pytest.mark.parametrize(
    "said, mean, std",
    [
        (dict(image_mean=[0.1, 0.2, 0.3], image_std=0.5), (0.1, 0.2, 0.3), (0.5,) * 3),
        (dict(do_normalize=False), (0.0,) * 3, (1.0,) * 3),
        (
            dict(image_mean=[127.5] * 3, image_std=[127.5] * 3, do_rescale=False),
            (0.5,) * 3,
            (0.5,) * 3,
        ),
        (
            dict(image_mean=[1.0] * 3, image_std=[1.0] * 3, rescale_factor=2 / 255),
            (0.5,) * 3,
            (0.5,) * 3,
        ),
    ],
)
def test_what_transformers_say_of_pixels_is_read(said, mean, std, tmp_path):
    file = _bare(tmp_path / "model.safetensors")
    _beside(tmp_path, "preprocessor_config.json", **said)
    found = importer.read(file, options=HEADS)
    np.testing.assert_allclose((found.about.mean, found.about.std), (mean, std))
    assert not {"mean", "std"} & _guessed(found)


def test_files_beside_that_say_what_cannot_be_are_refused(tmp_path):
    file = _bare(tmp_path / "model.safetensors")
    of_pixels = "preprocessor_config.json"
    for name, said, fault in (
        ("config.json", dict(num_attention_heads=0), "heads=0: 1 or more.*--heads"),
        ("config.json", dict(num_attention_heads="2"), "config.json: heads=2: want"),
        ("config.json", dict(num_attention_heads=2, layer_norm_eps=-1), "eps=-1"),
        ("config.json", dict(num_attention_heads=2, hidden_act="relu"), "act=relu"),
        (of_pixels, dict(image_mean=[127.5] * 3, image_std=[0.5] * 3), "mean=127.5"),
        (of_pixels, dict(image_mean=[0.5] * 3, image_std=[0.0] * 3), "std=0,0,0"),
    ):
        _beside(tmp_path, name, **said)
        with pytest.raises(errors.CheckpointError, match=fault):
            importer.read(file)
        (tmp_path / name).unlink()
    (tmp_path / "config.json").write_bytes(b"\xff{")
    notes = importer.read(file, options=HEADS).about.notes
    assert any("config.json beside the file cannot be read" in n for n in notes)
    _beside(tmp_path, "config.json", num_attention_heads=8, hidden_size=768)
    found = importer.read(file, options=HEADS)
    assert any("of another model (width 768, here 32)" in n for n in found.about.notes)


def test_a_flag_that_contradicts_a_file_decides_and_is_told(tmp_path, capsys):
    file = _bare(tmp_path / "model.safetensors")
    said = dict(num_attention_heads=2, layer_norm_eps=1e-6, hidden_act="relu")
    _beside(tmp_path, "config.json", **said)
    flags = ["--heads=4", "--eps=1e-5", "--activation=gelu", "--mean=0.1", "--std=0.2"]
    assert command.main(["import", str(file), f"--to={tmp_path}/w", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = backbone.read(tmp_path / "w")
    assert (found.module().heads, found.module().norm_eps) == (4, 1e-5)
    assert found.about.mean == (0.1,) * 3 and found.about.std == (0.2,) * 3
    for what in ("heads=4 by --heads contradicts 2 of config.json", "contradicts relu"):
        assert any(what in line for line in lines)
    assert not any(line.startswith("GUESSED") for line in lines)
    (tmp_path / "config.json").unlink()
    assert command.main(["import", str(file), f"--to={tmp_path}/w", "--heads=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for flag in ("mean", "std", "eps", "activation"):
        own = [x for x in lines if x.startswith(f"GUESSED {flag}=")]
        assert len(own) == 1 and f"--{flag}=" in own[0]
    for flag in (
        "--mean=127.5",
        "--std=0",
        "--eps=2",
        "--mean=1,2",
        "--activation=relu",
    ):
        assert command.main(["import", str(file), f"--to={tmp_path}/v", flag]) == 2
        assert flag.split("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "v").exists()


def test_a_flag_cannot_contradict_the_tensors(tmp_path):
    file = _bare(tmp_path / "a.safetensors", qk_norm=True)
    with pytest.raises(errors.UsageError, match="--heads=4: the tensors' shapes say 2"):
        importer.read(file, options=family.Options(heads=4))
    found = importer.read(file)
    assert found.module().heads == 2 and "heads" not in _guessed(found)


def test_folders_and_shards_come_in(tmp_path, capsys):
    net = published.network(classes=3)
    state = published.timm(net)
    folder = tmp_path / "models--a--b" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    names, places = list(state), {}
    for i, own in enumerate((names[::2], names[1::2])):
        name = f"model-{i + 1}-of-2.safetensors"
        safetensors.write(folder / name, {k: state[k] for k in own})
        places |= dict.fromkeys(own, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    for path in (index, folder, tmp_path / "models--a--b"):
        given = ["import", str(path), f"--to={tmp_path}/w", "--heads=2"]
        assert command.main(given) == 0
        for name, leaf in net.leaves.items():
            got = backbone.read(tmp_path / "w").leaves[name]
            np.testing.assert_array_equal(got, leaf)
    capsys.readouterr()
    for text, told in (
        ("{", "no index of shards"),
        (json.dumps({"weight_map": {"a": "../x.safetensors"}}), "leads out"),
        (
            json.dumps({"weight_map": places | {"z": "model-1-of-2.safetensors"}}),
            "z: not in its shard",
        ),
        (json.dumps({"weight_map": {"a": "none.safetensors"}}), "no such file"),
    ):
        index.write_text(text)
        assert command.main(["import", str(index), f"--to={tmp_path}/w"]) == 4
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.CheckpointError, match="give one file"):
        importer.read(tmp_path / "empty")


def test_the_distillation_token_of_dei_t_is_a_register(tmp_path):
    net = published.network(classes=3, registers=1)
    state, rng = published.timm(net), np.random.default_rng(3)
    position = rng.normal(size=(1, 1, 32)).astype(np.float32)
    token = state.pop("reg_token")
    first = np.zeros((1, 1, 32), np.float32)
    state["dist_token"] = token - position
    state["pos_embed"] = np.concatenate([first, position, state["pos_embed"]], 1)
    state |= {"head_dist.weight": state["head.weight"], "head_dist.bias": np.ones(3)}
    state["head_dist.bias"] = state["head_dist.bias"].astype(np.float32)
    pth.write(tmp_path / "a.pth", {"model": state})
    found = importer.read(tmp_path / "a.pth", options=HEADS)
    notes = "\n".join(found.about.notes)
    assert "dist_token" in notes and "left aside: head_dist (2 keys)" in notes
    image = rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
    want, got = published.tokens(net, image), published.tokens(found, image)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers_go_neither_in_nor_out(bad, tmp_path, capsys):
    net = published.network()
    leaves = {k: x.copy() for k, x in net.leaves.items()}
    leaves["encoder/norm/bias"][3] = bad
    broken = backbone.Backbone(net.about, leaves)
    for layout in ("timm", "hf", "bigvision", "vitssl"):
        with pytest.raises(errors.CheckpointError, match=r"1 of 32 values are not fin"):
            exporter.write(broken, tmp_path / layout, layout)
    assert not list(tmp_path.rglob("*.safetensors")) + list(tmp_path.rglob("*.npz"))
    state = published.timm(net) | {"norm.bias": leaves["encoder/norm/bias"]}
    pth.write(tmp_path / "a.pth", state)
    given = ["import", str(tmp_path / "a.pth"), f"--to={tmp_path}/w", "--heads=2"]
    assert command.main(given) == 4
    assert "encoder/norm/bias: 1 of 32" in capsys.readouterr().err
    assert not (tmp_path / "w" / backbone.FILE).exists()


def test_quantised_weights_without_scales_are_refused(tmp_path):
    state = published.timm(published.network())
    state["blocks.1.mlp.fc1.weight"] = np.ones((64, 32), np.int8)
    safetensors.write(tmp_path / "a.safetensors", state)
    with pytest.raises(errors.CheckpointError, match="block_1/mlp/fc1.*int8.*scales"):
        importer.read(tmp_path / "a.safetensors", options=HEADS)
    half = {k: x.astype(ml_dtypes.bfloat16) for k, x in state.items()}
    safetensors.write(tmp_path / "a.safetensors", half)
    importer.read(tmp_path / "a.safetensors", options=HEADS)
    pth.write(tmp_path / "a.pth", {"x": pth.Raw(pth.name("torch.float8_e4m3fn"))})
    with pytest.raises(errors.CheckpointError, match="8-bit floats"):
        importer.read(tmp_path / "a.pth")


@pytest.mark.parametrize("lost", ["blocks.0.mlp.fc1.weight", "blocks.0.norm1.bias"])
def test_a_checkpoint_that_lacks_a_part_is_named(lost, tmp_path):
    state = published.timm(published.network())
    del state[lost]
    pth.write(tmp_path / "a.pth", state)
    with pytest.raises(errors.CheckpointError, match=lost):
        importer.read(tmp_path / "a.pth", options=HEADS)


def test_a_file_of_ours_that_lacks_a_block_is_neither_read_nor_exported(tmp_path):
    net = published.network()
    leaves = {k: x for k, x in net.leaves.items() if "block_1" not in k}
    file = backbone.write(tmp_path / "w", backbone.Backbone(net.about, leaves))
    with pytest.raises(errors.CheckpointError, match="block_1/.* is missing"):
        vitssl.load(file)
    with pytest.raises(errors.CheckpointError, match="block_1/.* is missing"):
        exporter.write(backbone.read(file), tmp_path / "x.safetensors")


def test_normalisation_that_no_pixel_has_is_refused(tmp_path):
    net = published.network()
    about = dataclasses.replace(net.about, mean=(127.5,) * 3)
    with pytest.raises(errors.UsageError, match="mean=.*127.5"):
        backbone.write(tmp_path / "w", backbone.Backbone(about, net.leaves))
    texts = {backbone.KEY: backbone.describe(about)}
    safetensors.write(tmp_path / "w.safetensors", net.leaves, texts)
    with pytest.raises(errors.CheckpointError, match="mean=.*127.5"):
        backbone.read(tmp_path / "w.safetensors")


@contextlib.contextmanager
def _files_of_at_most(size):
    """Let no file grow beyond a size: a full disk for those who write more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_faults_of_the_file_system_are_one_line(tmp_path, capsys):
    taken, full = tmp_path / "taken", tmp_path / "full"
    taken.write_text("x")
    (tmp_path / "d.safetensors").mkdir()
    file = _bare(tmp_path / "a.safetensors")
    given = ["import", str(file), "--heads=2"]
    with _files_of_at_most(20_000):
        for to in (taken, taken / "w", "/proc/no/w", full):
            assert command.main([*given, f"--to={to}"]) == 2
            said = capsys.readouterr().err
            assert said.startswith("UsageError: --to=") and said.count("\n") == 1
    assert "File too large" in said and not list(full.iterdir())
    for to in (tmp_path / "d.safetensors", tmp_path / "x.npz", taken / "x.safetensors"):
        assert command.main(["export", str(tmp_path), f"--to={to}"]) == 2
        assert capsys.readouterr().err.startswith("UsageError: --to=")
    assert command.main(["import", f"{tmp_path}/{'x' * 300}.pth", "--to=w"]) == 4
    assert "File name too long" in capsys.readouterr().err


def test_a_disk_too_small_is_seen_before_the_work(tmp_path, monkeypatch, capsys):
    file = _bare(tmp_path / "a.safetensors")
    usage = type("Usage", (), dict(free=1000))
    monkeypatch.setattr("vitssl.convert.place.shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr(backbone, "write", lambda *_: pytest.fail("it was begun"))
    given = ["import", str(file), "--heads=2", f"--to={tmp_path}/w"]
    assert command.main(given) == 2
    assert "are free" in capsys.readouterr().err and not (tmp_path / "w").exists()


def test_extract_looks_at_its_flags_before_its_weights(tmp_path, capsys):
    (tmp_path / "x.npz").mkdir()
    images = f"--images={tmp_path}"
    for flags in (
        [images, "--to=x.npz", "--batch_size=0"],
        [images, f"--to={tmp_path}/x.npz"],
        [images, "--to=/proc/no/x.npz"],
        ["--program=/proc/no/x"],
    ):
        assert extract.main([str(tmp_path / "none"), *flags]) == 2
        said = capsys.readouterr().err
        assert said.startswith("UsageError: --") and said.count("\n") == 1


def test_names_that_are_no_text_can_be_extracted(tmp_path, capsys):
    about = published.network().about
    notes = (beside.guess("mean", (0.5,), "for a test"),)
    net = published.network()
    net = backbone.Backbone(dataclasses.replace(about, notes=notes), net.leaves)
    folder = backbone.write(tmp_path / "w", net).parent
    images = tmp_path / "images" / "a\udcff"
    images.mkdir(parents=True)
    pixels = np.full((20, 24, 3), 9, np.uint8)
    (images / "b\udcfe.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    for ending in (".npz", ".parquet"):
        to = f"{tmp_path}/f\udcff{ending}"
        given = [str(folder), f"--images={images.parent}", f"--to={to}"]
        code = extract.main(given)
        said = capsys.readouterr()
        assert code == 0 or "needs pyarrow" in said.err
    assert "GUESSED mean=" in said.out and "the images are grey" in said.out
    assert "at most 20 px" in said.out and "32 px: they are enlarged" in said.out
    to = tmp_path / "g.npz"
    with _files_of_at_most(500):
        assert (
            extract.main([str(folder), f"--images={images.parent}", f"--to={to}"]) == 2
        )
    assert "File too large" in capsys.readouterr().err and not to.exists()
    assert not list(tmp_path.glob(".vitssl*"))
