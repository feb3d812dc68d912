"""`vitssl train DIR`: plans that every method accepts, and a run."""

import dataclasses
import shlex
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from sklearn import datasets

import vitssl
from tests import runs
from vitssl import cli, errors, main
from vitssl.data import decode, survey
from vitssl.run import experiment, loop, memory
from vitssl.tools import own, own_cost, own_plan, predict

TINY = (
    "model.width=16 model.depth=4 model.heads=2 model.patch=16 decoder.width=16 "
    "decoder.heads=2 stages.blocks=(0,1,2,3) evals.final=('knn',) log.tensorboard=False"
).split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return {name: folder of 300 cuts from two photographs}."""
    base, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    images = datasets.load_sample_images().images
    for i in range(300):
        whole, side = images[i % 2], int(rng.integers(64, 160))
        y, x = (int(rng.integers(0, n - side)) for n in whole.shape[:2])
        cut = whole[y : y + side, x : x + side, ::-1]
        deep = (cut.mean(-1) / 255 * 4095).astype(np.uint16)
        for name, image in (
            (f"classes/{('china', 'flower')[i % 2]}/{i}.jpg", cut),
            (f"flat/{i}.jpg", cut),
            (f"deep/{i}.png", deep),
        ):
            path = base / name
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), image)
    return {path.name: path for path in base.iterdir()}


@pytest.fixture(scope="module")
def found(folders):
    return {name: survey.look(path) for name, path in folders.items()}


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("method", own_plan.METHODS)
def test_every_method_accepts_the_plan_of_every_folder(
    folders, found, method, platform
):
    for name, seen in found.items():
        weights = "untrained" if method == "distill" else ""
        asked = own_plan.Asked(str(folders[name]), method, weights=weights)
        if method in own_plan.LABELLED and not seen.classes:
            with pytest.raises(errors.DataError, match="learns from labels, and there"):
                own_plan.plan(asked, seen, platform)
            continue
        for size in (0, 32, 100):
            sized = dataclasses.replace(asked, size=size)
            made = own_plan.plan(sized, seen, platform)
            checked = made.read()
            s = checked.settings
            assert (s.data.source, s.data.channels) == ("folder", seen.channels)
            assert s.batch_size <= seen.train and checked.training_size >= 24
            # The long command says the same.
            words = shlex.split(made.command().replace("\\\n", ""))
            flags = main.parse(words[2:])
            again = experiment.load(flags["config"], flags["overrides"])
            again = experiment.read(again)
            assert again.config == checked.config


@pytest.mark.parametrize("model", ["vit_mini", "ViT-S/16", "vit_b", "hvit"])
def test_models_go_by_their_names(found, model):
    made = own_plan.plan(
        own_plan.Asked("x", "simclr", model), found["flat"], "cpu"
    ).read()
    wide = {"vit_mini": 192, "ViT-S/16": 384, "vit_b": 768, "hvit": 32}[model]
    assert made.config.model.width == wide
    assert made.config.model.name == ("hvit" if model == "hvit" else "vit")


def test_too_little_memory_is_told_by_what_is_free_and_what_is_held(
    folders, found, monkeypatch
):
    monkeypatch.setattr(memory, "free", lambda: 10 * 2**20)
    monkeypatch.setattr(memory, "resident", lambda: 2**27)
    asked = own_plan.Asked(str(folders["flat"]), "localmim", size=32, overrides=TINY)
    made = own_plan.plan(asked, found["flat"], "cpu")
    text = "135.0 MiB: 70% of the free 10.0 MiB and the 128.0 MiB of this process"
    with pytest.raises(errors.OutOfMemoryError, match=text):
        own_cost.fitted(made)


def test_what_compiling_leaves_behind_is_part_of_what_is_promised(
    folders, found, monkeypatch
):
    held = iter((2**27, 2**31))  # Before the step is compiled, and after it.
    monkeypatch.setattr(memory, "free", lambda: 2**33)
    monkeypatch.setattr(memory, "resident", lambda: next(held))
    asked = own_plan.Asked(str(folders["flat"]), "localmim", size=32, overrides=TINY)
    cost = own_cost.fitted(own_plan.plan(asked, found["flat"], "cpu"))[2]
    assert cost.limit == int(own_cost.ROOM * 2**33) + 2**27
    step = cost.memory - own_cost.BESIDE - 2**31
    assert 0 < step < 2**27


def test_what_is_asked_wins_and_what_cannot_be_is_one_line(folders, found, capsys):
    flat = folders["flat"]
    asked, dry = own.parse(
        [str(flat), "--epochs=3", "--config.optim.lr=0.5", "--config.batch_size=8"]
    )
    s = own_plan.plan(asked, found["flat"], "cpu").read().settings
    assert (s.epochs, s.optim.lr, s.batch_size, dry) == (3.0, 0.5, 8, False)
    assert s.optim.warmup_epochs == 0.15
    for words, text in (
        ([flat, "--method=hjeba"], "--method=hjeba: one of localmim"),
        ([flat, "--model=vit_x"], "--model=vit_x: one of vit_mini"),
        ([flat, "--method=mae", "--model=hvit"], "--method=mae needs a ViT"),
        ([flat, "--method=distill"], "needs a teacher, --weights=WEIGHTS"),
        ([flat, "--method=dino", "--weights=x"], "--weights: of localmim, hjepa"),
        ([flat, "--weights=gone"], "gone: no complete checkpoint"),
        ([flat, "--epochs=-1"], "--epochs=-1.0: above 0"),
        ([flat, "--epoch=1"], "unrecognized arguments: --epoch=1"),
        ([flat, "--config.optim.lrr=1"], "optim.lrr: no such key; did you mean"),
        ([flat / "gone"], "gone: no such folder; give a folder of images"),
        (["hjepa:smoke"], "a recipe is given as --config=hjepa:smoke"),
    ):
        assert cli.main(["train", *map(str, words)]) > 1
        assert text in capsys.readouterr().err, words
    with pytest.raises(errors.UsageError, match="did you mean 'epochs'"):
        vitssl.train(flat, epoch=3)


def test_weights_bring_their_model_and_normalisation(found, tmp_path):
    words = ["steps=1", "evals.final=()", "evals.every_epochs=0", "log.pictures=False"]
    recipe = experiment.load(f"{runs.ROOT}/configs/hjepa.py:smoke", words)
    loop.run(experiment.read(recipe), tmp_path, name="first")
    seen = dataclasses.replace(found["deep"], channels=1)
    for method in ("hjepa", "localmim", "finetune"):
        seen = found["classes"] if method == "finetune" else seen
        asked = own_plan.Asked("x", method, weights=str(tmp_path))
        made = own_plan.plan(asked, seen, "cpu")
        if method == "localmim":  # Its decoders need deeper networks.
            continue
        c = made.read().config
        assert (c.model.width, c.model.patch, c.init["from"]) == (32, 4, str(tmp_path))
        assert c.data.mean == (0.5,) and c.data.channels == 1
    with pytest.raises(errors.UsageError, match="--model is theirs"):
        own_plan.plan(dataclasses.replace(asked, model="vit_s"), seen, "cpu")


def test_a_run_keeps_the_memory_it_promised_and_ends_with_what_to_do_next(
    folders, tmp_path
):
    words = [f"--config.{word}" for word in TINY]
    code = (
        "import sys; from vitssl import cli; code = cli.main(sys.argv[1:]);"
        "(peak,) = [x for x in open('/proc/self/status') if x.startswith('VmHWM')];"
        "print('peak', peak.split()[1]); exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(folders["classes"]), "--steps=4"]
        + ["--size=64", f"--workdir={tmp_path}", *words],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=runs.ROOT,
        env=runs.environment(),
    )
    said = done.stdout
    assert done.returncode == 0, said + done.stderr
    assert "needs no labels" in said and "china 150, flower 150" in said
    assert "vitssl train --config=localmim:folder \\\n" in said and "  time  " in said
    assert "| trained " in said
    after = said.partition("\nnext:\n")[2]
    for word in ("report", "extract", "convert export", "--method=finetune"):
        assert f"vitssl {word}" in after or word in after
    number, unit = said.partition("at most ")[2].split()[:2]
    promised = float(number) * {"MiB": 2**10, "GiB": 2**20}[unit]
    assert int(said.rpartition("peak ")[2]) < promised


def test_a_table_of_several_labels_is_found_learned_and_predicted(
    folders, tmp_path, caplog
):
    caplog.set_level("INFO")
    flat = shutil.copytree(folders["flat"], tmp_path / "flat")
    rows = [
        f"{i}.jpg,{int(i % 2 == 0)},{int(i % 2)},{int(i % 3 == 0)}" for i in range(300)
    ]
    (flat / "labels.csv").write_text("\n".join(["file,china,flower,third", *rows]))
    (flat / "notes.csv").write_text("when,what\n1,2\n")
    seen = survey.look(flat)
    assert seen.several and seen.classes == {"china": 150, "flower": 150, "third": 100}
    assert "labels    china 150, flower 150, third 100; by " in str(seen)
    with pytest.raises(errors.DataError, match="--method=parts learns one an image"):
        own_plan.plan(own_plan.Asked(str(flat), "parts"), seen, "cpu")
    made = own_plan.plan(own_plan.Asked(str(flat), "simclr"), seen, "cpu")
    assert made.overrides["checkpoint.best"] == "knn/map"
    for model in ("hvit", "vit_ti"):
        made = own_plan.plan(own_plan.Asked(str(flat), "finetune", model), seen, "cpu")
        settings = made.read().settings
        assert settings.checkpoint.best.endswith("_map" if model == "hvit" else "/map")
    words = "model.width=16 model.depth=2 model.heads=2 log.pictures=False"
    words += " evals.final=('knn','linear') log.tensorboard=False"
    asked = own_plan.Asked(
        str(flat), "finetune", size=32, steps=6, batch_size=64,
        workdir=str(tmp_path / "run"), overrides=tuple(words.split()),
    )  # fmt: skip
    values = own.run(asked, show=lambda line: None)
    assert 0.3 < values["final/test/map"] <= 1 and 0.3 < values["final/trained/knn/map"]
    assert 0.3 < values["final/shares_of_labels/linear/map"] < 0.6
    assert "average precision: " in caplog.text and "third " in caplog.text
    rows = predict.run(
        tmp_path / "run", flat, tmp_path / "out.csv", top=2, threshold=0.3,
        show=lambda line: None,
    )  # fmt: skip
    assert list(rows[0])[:4] == ["file", "labels", "class", "probability"]
    found = vitssl.load(tmp_path / "run").predict(
        [decode.read(flat / "0.jpg", channels=3)]
    )
    row = next(r for r in rows if r["file"] == "0.jpg")
    share = dict(
        zip(("china", "flower", "third"), found["probability"][0], strict=True)
    )
    assert {*filter(None, row["labels"].split("|"))} == {
        k for k, p in share.items() if p > 0.3
    }
    assert found["classes"] == [[k for k, p in share.items() if p > 0.5]]
    assert row["probability"] == pytest.approx(max(share.values()), abs=1e-3)
    single = ["finetune", "objective.loss=cross_entropy"]
    bad = dataclasses.replace(asked, overrides=(*asked.overrides, single[1]))
    with pytest.raises(
        errors.UsageError, match="objective.loss=binary of method=class"
    ):
        own.run(bad, show=lambda line: None)
