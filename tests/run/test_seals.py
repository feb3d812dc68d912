"""Checkpoints of other versions, without their seal, damaged: said, and never lost."""

import json
import logging
import os
import shutil

import pytest

from tests import runs
from tests.run import test_loop
from vitssl import disk, errors
from vitssl.run import loop, opened, seals

SEAL = seals.MANIFEST


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with the checkpoints 2 and 4."""
    workdir = tmp_path_factory.mktemp("seals") / "run"
    _train(workdir)
    return workdir


def _train(workdir, **options):
    keys = dict(steps=4, log__every_steps=2, checkpoint__every_epochs=2 / 89)
    checked = test_loop._read(workdir, **keys)
    return loop.run(checked, workdir, name="test", **options)


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of that run, its checkpoints folder and (name -> path) of its seals."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def said(caplog):
    """What is said, also after a command has taken the log for itself."""
    package = logging.getLogger("vitssl")
    package.propagate, before = True, package.propagate
    caplog.set_level(logging.INFO, "vitssl")
    yield caplog
    package.propagate = before


def _names(workdir):
    return sorted(p.name for p in (workdir / "checkpoints").iterdir())


def _edit(workdir, step, **values):
    path = workdir / "checkpoints" / str(step) / SEAL
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("version, age", [(0, "an older"), (2, "a newer")])
@pytest.mark.parametrize("step", [2, 4])
def test_another_format_is_refused_with_both_versions(version, age, step, copy):
    _edit(copy, step, format=version)
    before = runs.digest(copy, step)
    with pytest.raises(errors.CheckpointError) as caught:
        _train(copy)
    text = str(caught.value)
    assert f"format {version}, this version of vitssl reads format 1" in text
    assert f"go on with {age} version" in text and "another --workdir" in text
    assert _names(copy) == ["2", "4"] and runs.digest(copy, step) == before
    with pytest.raises(errors.CheckpointError, match=f"format {version}"):
        opened.past(f"{copy}@{step}")


def test_a_workdir_copied_without_its_seals_keeps_everything(copy, said):
    for seal in (copy / "checkpoints").glob(f"*/{SEAL}"):
        seal.unlink()
    digests = {step: runs.digest(copy, step) for step in (2, 4)}
    for call in (lambda: _train(copy), lambda: opened.past(copy)):
        with pytest.raises(
            errors.CheckpointError, match=f"no {SEAL} in 2, 4.*--reseal"
        ):
            call()
        assert _names(copy) == ["2", "4"]
    _train(copy, reseal=True)
    assert "checkpoint 4 was read and is sealed anew" in said.text
    assert "already complete (4 steps)" in said.text
    assert {step: runs.digest(copy, step) for step in (2, 4)} == digests
    assert opened.past(copy).step == 4


def test_what_cannot_be_read_is_not_sealed_anew(copy):
    for step in (2, 4):
        (copy / "checkpoints" / str(step) / SEAL).unlink()
    shutil.rmtree(copy / "checkpoints" / "2" / "state")
    with pytest.raises(errors.CheckpointError, match="/2: cannot be read .*_METADATA"):
        _train(copy, reseal=True)
    assert _names(copy) == ["2", "4"]


def test_a_step_without_a_seal_is_kept_beside_those_that_have_one(copy, said):
    before = runs.digest(copy, 4)
    (copy / "checkpoints" / "4" / SEAL).unlink()
    (copy / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
    _train(copy)
    assert "resuming after step 2 of 4" in said.text and "kept as" in said.text
    assert _names(copy) == ["2", "4", "4.unsealed"]
    assert runs.digest(copy, 4) == before


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "it is empty"),
        (b'{"format": 1, "files"', "it is no JSON"),
        (b"[1, 2]", "it holds a list, not an object"),
        (b"\xff\xfe{}", "it is no UTF-8 text"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"format": 1}', 'it lacks a table "files"'),
        (b'{"format": 1, "files": {}}', 'it lacks a table "files"'),
        (b'{"format": 1, "files": [1]}', 'it lacks a table "files"'),
        (b'{"files": {"a": "b"}}', 'it lacks a number "format"'),
        (b'{"format": 1, "files": {"a": 3}}', "a is missing"),
    ],
)
def test_a_damaged_seal_is_a_reason_in_one_line(content, says, tmp_path):
    step = tmp_path / "7"
    step.mkdir()
    (step / SEAL).write_bytes(content)
    seals.check_format(step)
    text = seals.damage(step)
    assert says in text and "\n" not in text


def test_a_damaged_checkpoint_is_kept_under_another_name(copy, said):
    (copy / "checkpoints" / "4" / SEAL).write_text("[]")
    before = runs.digest(copy, 4)
    _train(copy)
    assert "checkpoint 4 is damaged" in said.text
    assert _names(copy) == ["2", "4", "4.damaged"]
    assert runs.digest(copy, 4) == before


def test_a_seal_that_may_not_be_read_is_no_damage(copy, monkeypatch):
    def refuse(path):
        raise disk.Damaged("Permission denied") from PermissionError(13, "denied")

    monkeypatch.setattr(disk, "read", refuse)
    with pytest.raises(errors.CheckpointError, match="cannot be read .Permission den"):
        _train(copy)
    assert _names(copy) == ["2", "4"]


def test_no_checkpoints_beside_metrics_is_said_and_the_lines_are_kept(copy, said):
    lines = (copy / "metrics.jsonl").read_text()
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    _train(copy)
    assert "it reaches step 4, of which there is no checkpoint" in said.text
    assert (copy / "metrics.jsonl.before").read_text() == lines
    steps = [m["step"] for m in runs.metrics(copy)]
    assert steps == [2, 4]


def test_weights_that_were_damaged_are_one_line_where_they_are_opened(copy):
    for path in (copy / "checkpoints" / "4" / "state").iterdir():
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(errors.CheckpointError, match="cannot be read") as caught:
        opened.past(copy).params()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config, metrics, status",
    [
        (b"", b"", b""),
        (b'{"seed": 0,', b'{"st', b"[]"),
        (b"[]", b"[]\n", b"\xff"),
        (b"\xff\xfe\x00", b"\xff\xfe\n", b"{"),
        (b'{"a": 1}', b'{"step": "x"}\n', b"{}"),
        (b"[" * 9999, b"[" * 9999, b"[" * 9999),
    ],
)
def test_a_run_goes_on_with_its_own_files_damaged(config, metrics, status, copy, said):
    original = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_bytes(config)
    (copy / "metrics.jsonl").write_bytes(metrics)
    (copy / "status.json").write_bytes(status)
    (copy / "versions.json").write_bytes(status)
    with pytest.raises(errors.CheckpointError, match="config.json: "):
        opened.past(copy).experiment  # noqa: B018
    _train(copy)
    assert "already complete (4 steps)" in said.text
    assert json.loads((copy / "config.json").read_text()) == original
    assert json.loads((copy / "status.json").read_text())["state"] == "finished"
    if metrics:
        assert "no line of it can be read" in said.text
        assert (copy / "metrics.jsonl.before").read_bytes() == metrics


def test_files_that_are_right_are_not_written_again(copy):
    paths = [copy / "config.json", copy / "versions.json"]
    before = [os.stat(p).st_ino for p in paths]
    _train(copy)
    assert [os.stat(p).st_ino for p in paths] == before


def test_a_killed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    disk.write(path, "old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        disk.write(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["config.json"]
