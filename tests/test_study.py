"""Studies: arms and seeds, resumed like runs, one table."""

import json

import ml_collections
import pytest

from tests import runs
from vitssl import errors, experiment, study


def _config(tmp_path, **arms):
    words = runs.arguments(tmp_path, steps=2)
    overrides = [w.removeprefix("--config.") for w in words if "--config." in w]
    c = experiment.load(words[0].removeprefix("--config="), overrides)
    c.evals.final = ("knn",)
    c.study = ml_collections.ConfigDict(
        dict(seeds=(0, 1), arms=arms, columns=("final/trained/knn/top1",))
    )
    return c


def test_every_arm_and_seed_runs_once_and_the_table_has_their_values(tmp_path):
    c = _config(tmp_path, slow=("optim.lr=1e-6",), fast=("optim.lr=1e-2",))
    plan = study.read(c)
    assert set(plan.runs) == {(a, s) for a in ("slow", "fast") for s in (0, 1)}
    assert plan.runs["fast", 1].settings.optim.lr == 1e-2
    assert plan.runs["slow", 1].settings.seed == 1
    found = study.run(plan, tmp_path, name="test")
    assert set(found) == {"slow", "fast"}
    assert len(found["slow"]["final/trained/knn/top1"]) == 2
    stored = json.loads((tmp_path / "study.json").read_text())
    assert stored == found
    before = (tmp_path / "fast" / "seed1" / "final.json").stat().st_mtime_ns
    study.run(plan, tmp_path, name="test")
    assert (tmp_path / "fast" / "seed1" / "final.json").stat().st_mtime_ns == before


def test_faults_of_arms_are_found_before_the_first_run(tmp_path):
    c = _config(tmp_path, a=("optim.lrr=1.0",), b=("model.heads=3",))
    with pytest.raises(errors.UsageError) as caught:
        study.read(c)
    assert "study.arms.a" in str(caught.value) and "did you mean" in str(caught.value)
    assert "study.arms.b" in str(caught.value) and "heads=3" in str(caught.value)


def test_the_table_shows_mean_spread_and_every_seed():
    text = study.table({"one": {"x": [0.5, 0.7]}, "two": {"x": [None, 0.25]}}, ("x",))
    assert text.splitlines()[2:] == [
        "| one | 0.6 ± 0.14 (0.5, 0.7) |",
        "| two | 0.25 (0.25) |",
    ]
