"""What is checked before the first step, each with its one line."""

import os

import numpy as np
import pytest

from tests import runs
from vitssl import errors, main
from vitssl.data import dataset
from vitssl.data.sources import wrappers
from vitssl.run import beginning, build, evaluation, experiment, guard
from vitssl.run import loop as train
from vitssl.tools import study


def _read(config, *overrides, **options):
    c = experiment.load(str(runs.ROOT / "configs" / config), overrides)
    if options:
        c.data.options = options
    return experiment.read(c)


@pytest.fixture
def no_steps(monkeypatch):
    """Fail the test if a run goes on to its first step."""
    monkeypatch.setattr(
        beginning, "first_state", lambda *a, **k: pytest.fail("it would train")
    )


def _says(line, kind, call, *args, **kwargs):
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    assert str(caught.value) == line


def test_a_test_split_that_is_not_there(no_steps, tmp_path, capsys):
    argv = [
        f"--config={runs.ROOT / 'configs' / 'finetune_vit.py'}:smoke",
        f"--workdir={tmp_path}",
        "--config.batch_size=16",
        "--config.data.test_split=tset",
    ]
    assert main.main(argv) in (2, 3)
    said = capsys.readouterr().err
    assert "tset" in said and "Traceback" not in said


def test_a_test_split_of_one_image(no_steps, tmp_path, monkeypatch):
    whole = dataset.Data.open

    def few(self, split, seed=0):
        source = whole(self, split, seed)
        return wrappers.Subset(source, np.arange(1)) if split == "test" else source

    monkeypatch.setattr(dataset.Data, "open", few)
    checked = _read("finetune_vit.py:smoke", "batch_size=16")
    line = "data.test_split='test': 1 image(s) of digits; evaluations need 2 or more"
    _says(line, errors.DataError, train.run, checked, tmp_path, name="test")


def test_splits_that_no_evaluation_reads_are_not_opened():
    off = "evals.every_epochs=0", "evals.final=()", "log.pictures=False"
    checked = _read("localmim.py:smoke", *off, "data.test_split=tset")
    method = checked.method(checked.run())
    evaluation.check(checked.settings, method)
    each = evaluation.Evaluation(
        checked.settings.evals, checked.settings.data, method, None
    )
    assert each.final(None, None) == (
        {},
        "no final evaluation (evals.final is empty)",
    )
    checked = _read("localmim.py:smoke", *off[:1], "data.test_split=tset")
    with pytest.raises(errors.VitsslError, match="tset"):
        evaluation.check(checked.settings, method)


@pytest.mark.parametrize("config", ["finetune_vit.py:smoke", "parts.py:smoke"])
def test_classes_are_needed_where_labels_teach(config, monkeypatch):
    checked = _read(config, "batch_size=16")
    s = checked.settings
    source = s.data.open(s.data.split)
    classes, needs = len(source.classes), f"method={s.method} needs 2 or more"
    for labels, seen in ((-1, 0), (1, 1)):
        bare = _Labelled(source, np.full(len(source), labels))
        monkeypatch.setattr(dataset.Data, "open", lambda *a, bare=bare: bare)
        line = (
            f"data.split='train': {source.name} has images of {seen} of {classes} "
            f"classes with labels; {needs}"
        )
        _says(line, errors.DataError, build.build, checked)


class _Labelled:
    """A source with other labels."""

    def __init__(self, source, labels):
        self._source, self.labels = source, labels

    def __getattr__(self, key):
        return getattr(self._source, key)

    def __len__(self):
        return len(self._source)

    def __getitem__(self, i):
        return self._source[i] | {"label": int(self.labels[i])}


@pytest.mark.parametrize(
    "name, folder, fault",
    [
        ("checkpoints", False, "a file is in its place"),
        ("metrics.jsonl", True, "a folder is in its place"),
        ("config.json", False, "no permission"),
    ],
)
def test_what_is_in_the_way_in_a_workdir(
    name, folder, fault, no_steps, tmp_path, monkeypatch
):
    path = tmp_path / name
    path.mkdir() if folder else path.write_text("")
    if fault == "no permission":
        allowed = os.access
        monkeypatch.setattr(os, "access", lambda p, how: p != path and allowed(p, how))
    checked = _read("hjepa.py:smoke")
    line = (
        f"--workdir={tmp_path}: {name} cannot be written ({fault}); move it, or give "
        "another"
    )
    _says(line, errors.UsageError, train.run, checked, tmp_path, name="test")
    assert errors.UsageError.code == 2


def test_a_workdir_that_is_a_file_or_read_only(no_steps, tmp_path, monkeypatch):
    path = tmp_path / "run"
    path.write_text("")
    checked, line = _read("hjepa.py:smoke"), f"--workdir={path}: cannot be written "
    exists = line + "(File exists); give another"
    _says(exists, errors.UsageError, train.run, checked, path, name="test")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(guard.pathlib.Path, "mkdir", refuse)
    denied = line + "(Permission denied); give another"
    _says(denied, errors.UsageError, train.run, checked, path, name="test")


def test_the_table_of_a_study_can_be_written(tmp_path):
    (tmp_path / "study.md").mkdir()
    plan = study.Plan({}, ())
    line = (
        f"--workdir={tmp_path}: study.md cannot be written (a folder is in its place); "
        "move it, or give another"
    )
    _says(line, errors.UsageError, study.run, plan, tmp_path, name="test")


def test_the_largest_seed_runs_through_every_generator():
    checked = _read("hjepa.py:smoke", f"seed={2**63 - 1}")
    parts = build.build(checked)
    assert parts.stream(0).load(0)["global"].shape[0] == checked.settings.batch_size
    assert parts.rng().shape == ()


def test_samples_of_sensors_for_a_method_of_pictures(tmp_path):
    options = dict(count=64, modalities=("sentinel1",))
    given = ("data.source=fields",)
    checked = _read("hjepa.py:smoke", *given, **options)
    line = (
        "data.source=fields: samples of sensors, without an image; method=hjepa wants "
        "images, method=latent_mim reads such samples (configs/latent_mim.py)"
    )
    _says(line, errors.UsageError, train.run, checked, tmp_path, name="test")
