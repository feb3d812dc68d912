"""epochs=0 scores what the checkpoint holds, and never a head that nobody trained."""

import json

import pytest

from tests import runs
from vitssl import main

SMALL = (
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
    "data.threads=1",
    "data.workers=0",
    "log.tensorboard=False",
    "evals.every_epochs=0",
)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A classifier trained for six steps, and its final scores."""
    workdir = tmp_path_factory.mktemp("runs") / "tuned"
    assert _run("finetune_vit.py:smoke", workdir, "steps=6", "optim.lr=3e-3") == 0
    return workdir, _final(workdir)


def _run(config, workdir, *overrides):
    words = [f"--config.{word}" for word in (*SMALL, *overrides)]
    spec = f"--config={runs.ROOT}/configs/{config}"
    return main.main([spec, f"--workdir={workdir}", *words])


def _final(workdir):
    status = json.loads((workdir / "status.json").read_text())
    return {k: v for k, v in status["metrics"].items() if k.startswith("final/")}


def test_a_skipped_head_is_not_scored(tuned, tmp_path, capsys):
    start = f"init.from={tuned[0]}"
    only = ("epochs=0", "steps=0", start)
    assert _run("finetune_vit.py:smoke", tmp_path / "a", *only) == 2
    said = capsys.readouterr().err
    assert "the test scores need head/" in said and "init.skip" in said
    # Its features are the backbone's: they can be measured, and the head is left out.
    knn = (*only, "evals.features=cls", "evals.final=knn", "evals.knn_k=5")
    assert _run("finetune_vit.py:smoke", tmp_path / "b", *knn) == 0
    assert "no test scores: they need head/" in capsys.readouterr().out
    found = _final(tmp_path / "b")
    assert "final/trained/knn/top1" in found and "final/test/top1" not in found
    # What the head sees went through its own norm.
    assert _run("finetune_vit.py:smoke", tmp_path / "c", *knn[:3], *knn[4:]) == 2
    assert "evals.features=pooled need head/" in capsys.readouterr().err


def test_all_of_a_classifier_is_scored_as_it_was(tuned, tmp_path):
    workdir, before = tuned
    words = ("epochs=0", "steps=0", f"init.from={workdir}", "init.skip=()")
    words += ("optim.warmup_epochs=3.0",)  # Does not matter to what trains nothing.
    assert _run("finetune_vit.py:smoke", tmp_path / "all", *words) == 0
    assert _final(tmp_path / "all")["final/test/top1"] == before["final/test/top1"]
    assert _final(tmp_path / "all")["final/test/loss"] == before["final/test/loss"]
    # The average of the weights is the run's, where it is asked for.
    average = (*words, "init.part=ema")
    assert _run("finetune_vit.py:smoke", tmp_path / "ema", *average) == 0
    found = _final(tmp_path / "ema")
    assert found["final/test/loss"] == before["final/test/ema_loss"]
    assert before["final/test/loss"] != before["final/test/ema_loss"]
