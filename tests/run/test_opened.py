"""Weights out of a run of ours: its features, its encoder, a program of it."""

import json

import jax
import numpy as np
import pytest

import vitssl
from tests import runs as make
from tests.convert import published
from vitssl import errors
from vitssl.convert import backbone, exporter, importer
from vitssl.run import experiment, opened
from vitssl.tools import program


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run of two steps."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    done = make.run(path, steps=2, optim__lr=0.1)
    assert done.returncode == 0, done.said
    return path


def _images():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (3, 16, 16, 1), dtype=np.uint8)


def test_a_run_is_opened_without_a_warning(workdir, caplog):
    past = opened.past(workdir)
    assert past.trees("params")["params"] and past.meta["classes"]
    past.state()
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == []


def test_parts_of_a_run_are_its_trees(workdir):
    stored = make.state(workdir, 2)
    for part, prefix in (("", "extra/target"), ("encoder", "params/encoder")):
        found = opened.past(workdir).encoder(part)
        assert found.about.model["width"] == 16 and found.about.pool == "mean"
        for name, leaf in found.leaves.items():
            want = stored[name.replace("encoder", prefix, 1)]
            np.testing.assert_array_equal(leaf, want)
    differs = [
        name
        for name, leaf in opened.past(workdir).encoder("encoder").leaves.items()
        if np.any(leaf != opened.past(workdir).encoder("target").leaves[name])
    ]
    assert differs  # The parts are not the same thing under two names.
    with pytest.raises(errors.UsageError, match="target, encoder"):
        opened.past(workdir).encoder("teacher")


def test_a_run_and_its_export_give_the_same_features(workdir, tmp_path):
    image = _images()
    want = vitssl.load(workdir)(image)
    for path in (workdir, workdir / "checkpoints" / "2"):
        got = vitssl.load(path, part="target")(image)
        np.testing.assert_allclose(got["tokens"], want["tokens"], atol=1e-6)
        np.testing.assert_allclose(got["pooled"], want["pooled"], atol=1e-6)
    exporter.write(opened.past(workdir).encoder(), tmp_path / "w", "vitssl")
    got = vitssl.load(tmp_path / "w")(image)
    np.testing.assert_allclose(got["pooled"], want["pooled"], atol=1e-6)
    found = opened.past(workdir).encoder()
    file = exporter.write(found, tmp_path / "t.safetensors", "timm")
    found = importer.read(file, options=importer.family.Options(heads=2))
    assert found.about.family == "timm"
    for name, leaf in backbone.read(tmp_path / "w").leaves.items():
        np.testing.assert_array_equal(found.leaves[name], leaf)


def test_finer_tokens_are_those_of_the_shifted_image(workdir):
    """With p = 4 and q = 2: every other token of the image moved by a pixel."""
    image = _images()
    plain = vitssl.load(workdir, part="target")
    patch = plain.apply.module.patch
    q, side = patch // 2, 16 // patch
    pad, rest = (patch - q) // 2, patch - q - (patch - q) // 2
    sides = ((0, 0), (pad, rest), (pad, rest), (0, 0))
    moved = np.pad(image, sides, mode="reflect")
    finer = vitssl.load(workdir, output_patch=q)(image)
    fine = np.asarray(finer["tokens"]).reshape(3, 2 * side, 2 * side, -1)
    for a, b in ((0, 0), (0, 1), (1, 1)):
        window = moved[:, a * q : a * q + 16, b * q : b * q + 16]
        want = np.asarray(plain(window)["tokens"]).reshape(3, side, side, -1)
        np.testing.assert_allclose(fine[:, a::2, b::2], want, atol=1e-5)
    near = vitssl.load(workdir, output_patch=q, upsampling="nearest")(image)
    whole = plain(image)
    np.testing.assert_allclose(near["pooled"], whole["pooled"], atol=1e-6)
    same = np.asarray(near["tokens"]).reshape(3, side, 2, side, 2, -1)
    want = np.asarray(whole["tokens"]).reshape(3, side, side, -1)
    np.testing.assert_allclose(same[:, :, 1, :, 1], want, atol=1e-6)


@pytest.mark.parametrize(
    "own, words",
    [
        (dict(output_patch=3), "output patch q=3: must divide"),
        (dict(output_patch=2, upsampling="skip"), "one of shift, bilinear, nearest"),
    ],
)
def test_finer_tokens_that_cannot_be_are_one_line(workdir, own, words):
    with pytest.raises(errors.UsageError, match=words):
        vitssl.load(workdir, **own)


def test_a_run_becomes_a_program(workdir, tmp_path):
    made = vitssl.load(workdir)
    program.export(made, tmp_path, platforms=("cpu",))
    stored = jax.export.deserialize((tmp_path / "features.jax").read_bytes())
    weights = importer.reader.read(tmp_path / "weights.safetensors").tree
    got = stored.call({k: np.array(v) for k, v in weights.items()}, _images())
    want = made(_images())
    np.testing.assert_allclose(got["pooled"], want["pooled"], rtol=1e-5, atol=1e-6)


def test_a_folder_that_is_no_run_says_so(tmp_path):
    with pytest.raises(errors.CheckpointError, match="no complete checkpoint"):
        vitssl.load(tmp_path)


RUN = opened.Past("run", make.ROOT / "run" / "checkpoints", 7)


def _stored(monkeypatch, config, params, extra=()):
    """Let `RUN` have these trees and this config; return the config."""
    checked = experiment.read(experiment.load(f"{make.ROOT}/configs/{config}"))
    trees = {"params": dict(params), "extra": dict(extra)}
    monkeypatch.setattr(opened.Past, "experiment", checked)
    monkeypatch.setattr(opened.Past, "trees", lambda self, *keys: trees)
    return checked.config


def _leaf(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _classifier(net, prefix="", classes=3):
    width = net.module().width
    leaves = {
        f"{prefix}{name.replace('encoder/', 'backbone/')}": leaf
        for name, leaf in net.leaves.items()
    }
    head = {"kernel": _leaf(1, width, classes), "bias": _leaf(2, classes)}
    return leaves | {f"{prefix}head/{k}": x for k, x in head.items()}


@pytest.mark.parametrize("pool", ["cls", "mean", "gap"])
def test_a_fine_tuned_run_is_exported(pool, monkeypatch, tmp_path):
    net, average = published.network(1), published.network(2)
    extra = _classifier(average, "ema/")
    settings = _stored(monkeypatch, "finetune_vit.py:smoke", _classifier(net), extra)
    settings.model.update(published.MODEL)
    settings.head.pool = pool
    for part, want in (("", net), ("encoder", net), ("ema", average)):
        found = RUN.encoder(part)
        assert found.about.pool == ("cls" if pool == "cls" else "mean")
        got = {k: x for k, x in found.leaves.items() if k.startswith("encoder/")}
        assert got.keys() == want.leaves.keys()
        for name, leaf in want.leaves.items():
            np.testing.assert_array_equal(got[name], leaf)
        assert ("head/kernel" in found.leaves) == (pool != "gap")
        assert any("head.pool=gap" in n for n in found.about.notes) == (pool == "gap")
    file = exporter.write(RUN.encoder(), tmp_path / "t.safetensors", "timm")
    assert ("head.weight" in importer.reader.read(file).tree) == (pool != "gap")
    with pytest.raises(errors.UsageError, match="the run has encoder, ema"):
        RUN.encoder("target")


def test_a_run_that_is_no_encoder_is_exported_whole(monkeypatch, tmp_path):
    params = {"encoder/patch_embed/rgb_0/kernel": _leaf(0, 4, 4, 3, 16)}
    params["predictor/mask_token"] = _leaf(1, 16)
    target = {"target/rgb_0/kernel": _leaf(2, 4, 4, 3, 16), "step": np.int32(3)}
    _stored(monkeypatch, "latent_mim.py:smoke", params, target)
    found = RUN.encoder()
    target.pop("step")
    assert found.leaves == params | target
    file = exporter.write(found, tmp_path / "o.safetensors", "olmoearth")
    again = importer.read(file)
    for name, leaf in found.leaves.items():
        np.testing.assert_array_equal(again.leaves[name], leaf)
    assert "7" in file.with_suffix(".md").read_text()
    with pytest.raises(errors.UsageError, match="exported whole"):
        RUN.encoder("encoder")
    first = {"stage_1/head/prototypes": _leaf(0, 2, 8)}
    average = {"average/stage_1/head/prototypes": _leaf(1, 2, 8)}
    _stored(monkeypatch, "parts.py:smoke", first, average)
    got = RUN.encoder().leaves  # What the run's own evaluations use.
    np.testing.assert_array_equal(*got.values(), *average.values())


def test_a_run_is_opened_in_every_form(tmp_path):
    # Such a rate destroys the features: the untrained network is the best.
    path = tmp_path / "early"
    done = make.run(
        path,
        optim__lr=3.0,
        optim__clip_norm=0.0,
        checkpoint__keep_best=1,
        evals__every_epochs=4 / 89,
        evals__online_samples_train=200,
        evals__online_samples_test=100,
    )
    assert done.returncode == 0, done.said
    scores = {
        line["step"]: line["knn/top1"]
        for line in make.metrics(path)
        if "knn/top1" in line
    }
    best = max(scores, key=lambda step: (scores[step], step))
    assert best < 12
    steps = {"": 12, "@last": 12, "@best": best, "@8": 8, f"/checkpoints/{best}": best}
    for form, step in steps.items():
        past = opened.past(f"{path}{form}")
        assert (past.step, past.workdir) == (step, path)
        stored = make.state(path, step)
        for name, leaf in past.params().items():
            np.testing.assert_array_equal(leaf, stored[f"params/{name}"])
        target = past.params("target")
        for name in stored:
            if name.startswith("extra/target/"):
                inner = name.removeprefix("extra/target/")
                np.testing.assert_array_equal(target[f"encoder/{inner}"], stored[name])
    with pytest.raises(errors.CheckpointError, match="no such step; there is"):
        opened.past(f"{path}@7")
    with pytest.raises(errors.UsageError, match="no part 'ema'; the run has params"):
        opened.past(path).params("ema")
    different = [
        vitssl.load(f"{path}{form}")(_images())["pooled"] for form in ("", "@best")
    ]
    assert not np.allclose(*different)


def test_the_final_evaluation_can_be_of_the_best(tmp_path):
    # As above: the untrained network is the best, and its numbers are the final ones.
    path = tmp_path / "early"
    changes = dict(
        optim__lr=3.0,
        optim__clip_norm=0.0,
        checkpoint__keep_best=1,
        evals__every_epochs=4 / 89,
        evals__online_samples_train=200,
        evals__online_samples_test=100,
        evals__final="('knn',)",
        evals__final_samples_train=200,
        evals__final_samples_test=100,
    )
    found = {}
    for of in ("best", "last"):
        done = make.run(path / of, evals__final_of=of, **changes)
        assert done.returncode == 0, done.said
        found[of] = make.metrics(path / of)[-1]["final/trained/knn/top1"]
    rows = make.metrics(path / "best")
    online = {row["step"]: row["knn/top1"] for row in rows if "knn/top1" in row}
    assert found["best"] == max(online.values()) > found["last"]
    status = json.loads((path / "best" / "status.json").read_text())
    assert status["best"]["value"] == found["best"] and status["best"]["step"] < 12
    changes |= dict(checkpoint__keep_best=0, evals__final_of="best")
    refused = make.run(path / "y", **changes)
    assert refused.returncode == 2 and "needs checkpoint.keep_best" in refused.said
