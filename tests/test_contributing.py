"""The examples of CONTRIBUTING.md are real: each one trains, or measures."""

import json
import re
import sys
import types

import cv2
import jax
import numpy as np
import pytest

from tests import runs
from vitssl import main, models, tree
from vitssl.data import sources
from vitssl.evals import suite
from vitssl.methods import table

TEXT = (runs.ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", TEXT, flags=re.S))
SMALL = (
    "data.threads=1",
    "data.workers=0",
    "model.width=16",
    "model.depth=1",
    "log.tensorboard=False",
    "evals.online_samples_train=40",
    "evals.online_samples_test=20",
    "evals.final_samples_train=40",
    "evals.final_samples_test=20",
    "evals.knn_k=3",
)


def _module(path, monkeypatch):
    """Return a block of the page as the module it is said to be."""
    name = path.removesuffix(".py").replace("/", ".")
    made = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    exec(compile(BLOCKS[path], path, "exec"), made.__dict__)  # noqa: S102
    return made


@pytest.fixture
def rotation(monkeypatch, tmp_path):
    """The method of the page is in the table; its config is a file."""
    made = _module("vitssl/methods/rotation/method.py", monkeypatch)
    monkeypatch.setitem(table.METHODS, "rotation", made.Rotation)
    file = tmp_path / "configs" / "rotation.py"
    file.parent.mkdir()
    file.write_text(BLOCKS["configs/rotation.py"])
    base = (runs.ROOT / "configs" / "base.py").read_text()
    (file.parent / "base.py").write_text(base)
    return file


def _train(file, tmp_path, *overrides):
    words = [f"--config.{word}" for word in (*SMALL, *overrides)]
    argv = [f"--config={file}:smoke", f"--workdir={tmp_path / 'run'}", *words]
    assert main.main(argv) == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows]


@pytest.mark.parametrize("option", ["accumulate=2", "freeze.schedule=linear"])
def test_the_method_trains_with_the_trainers_options(rotation, tmp_path, option):
    rows = _train(rotation, tmp_path, option)
    losses = [row["loss"] for row in rows if "loss" in row]
    np.testing.assert_allclose(losses, np.log(4), atol=0.7)
    assert 0 <= rows[-1]["final/trained/knn/top1"] <= 1


def test_the_evaluator_measures_at_the_end(rotation, tmp_path, monkeypatch):
    made = _module("vitssl/evals/spread.py", monkeypatch)
    monkeypatch.setitem(suite.EVALS, "spread", made.Spread)
    vector = np.array([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0], [4.0, 2.0]])
    query = {"vector": vector, "label": np.array([0, 0, 1, 1])}
    assert made.Spread()({}, query, 3) == {"r2": pytest.approx(16 / 20)}


def test_the_data_set_holds_whole_films_out(monkeypatch, tmp_path):
    made = _module("vitssl/data/sources/frames.py", monkeypatch)
    monkeypatch.setitem(sources.SOURCES, "frames", made.open)
    for film in range(6):
        (tmp_path / f"film{film}").mkdir()
        for i in range(2):
            image = np.full((9, 8, 3), 40 * film, np.uint8)
            cv2.imwrite(str(tmp_path / f"film{film}" / f"{i}.jpg"), image)
    train, test = (
        sources.open("frames", str(tmp_path), split) for split in ("train", "test")
    )
    assert sorted(set(test.labels)) == [0, 5] and len(train) == 8
    assert test[2]["image"].mean() == pytest.approx(200, abs=2)
    assert sources.options_of("frames") == dict(channels=3, every=5)


def test_the_backbone_has_what_methods_ask_of_one(monkeypatch):
    made = _module("vitssl/models/mixer.py", monkeypatch)
    net = made.Mixer(width=16, depth=2, patch=4, image_size=16)
    assert isinstance(net, models.Backbone)
    image = np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype(np.float32)
    params = net.init(jax.random.key(0), image)
    found = net.apply(params, image, method="features")
    assert found["tokens"].shape == (2, 16, 16)
    pooled = net.apply(params, image, "mean", method="pooled")
    np.testing.assert_allclose(pooled, found["tokens"].mean(1), rtol=1e-6)
    patterns = [re.compile(pattern) for pattern, _ in net.freeze_layers()]
    for name in tree.flat(params["params"]):
        assert any(pattern.fullmatch(name) for pattern in patterns), name
