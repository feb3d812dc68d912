"""Workdirs are found and read, whatever state their run is in."""

import base64
import json
import os
import subprocess
import sys

import pytest

from tests.tools import made
from vitssl import errors
from vitssl.tools import compare, listing, page, workdir


def test_runs_are_found_at_and_below_a_directory(tmp_path):
    made.run(tmp_path / "b" / "seed0")
    made.run(tmp_path / "a")
    (tmp_path / "c" / "empty").mkdir(parents=True)
    found = workdir.below(tmp_path)
    assert [r.path.relative_to(tmp_path).as_posix() for r in found] == ["a", "b/seed0"]
    assert [r.name for r in workdir.below(tmp_path / "a")] == ["a"]
    assert found[0].last("knn/top1") == 0.5 and found[0].step == 40
    assert found[0].last("nothing") is None


def _dead_process():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize(
    "status, state",
    [
        ({"state": "finished"}, "finished"),
        ({"state": "training"}, "training"),
        ({"state": "training", "pid": "dead"}, "stopped"),
        ({"state": "starting", "pid": "dead"}, "stopped"),
        ({"state": "preempted", "pid": "dead"}, "preempted"),
        # Long silent on another host.
        ({"state": "training", "host": "elsewhere", "time": 1.0}, "stopped"),
        ({"state": "training", "host": "elsewhere", "time": 1e12}, "training"),
    ],
)
def test_the_state_of_a_run(status, state, tmp_path):
    if status.get("pid") == "dead":
        status = {**status, "pid": _dead_process()}
    assert workdir.workdir(made.run(tmp_path / "a", **status)).state == state


def test_torn_files_are_read_as_far_as_they_go(tmp_path):
    path = made.run(tmp_path / "a")
    (path / "status.json").write_text('{"state": "tra')
    with (path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 41, "lo')
    run = workdir.workdir(path)
    assert run.state == "unknown" and run.step == 40
    os.remove(path / "metrics.jsonl")
    assert workdir.workdir(path).metrics == {}


def test_what_is_no_run_is_one_clear_line(tmp_path):
    cases = {
        (workdir.workdir, tmp_path / "nowhere"): "nowhere: no such directory",
        (workdir.workdir, tmp_path): "no config.json in it",
        (workdir.below, tmp_path / "nowhere"): "nowhere: no such directory",
        (workdir.below, tmp_path): "no run in it",
    }
    for (call, path), says in cases.items():
        with pytest.raises(errors.UsageError, match=says):
            call(path)
    path = made.run(tmp_path / "a")
    (path / "config.json").write_text("{")
    with pytest.raises(errors.UsageError, match="config.json: damaged"):
        workdir.workdir(path)


def _shown(path):
    """Return everything that commands say about a run."""
    run = workdir.workdir(path)
    whole = listing.text(*listing.rows([run])) + listing.as_json([run])
    whole += compare.text([run, run]) + compare.page([run, run]) + page.page(run)
    return whole.encode().decode()


DEEP = "[" * 100_000
DAMAGED = {
    "status.json": ["", "[]", "\xff", DEEP, "9" * 5000, '{"step": "a", "pid": -1}']
    + ['{"state": 3, "step": 1e999, "total_steps": [], "time": "x", "pid": 1e999}']
    + ['{"state": "training", "pid": 99999999999999999999, "time": -5}']
    + ['{"state": "training", "eta_seconds": "soon", "host": 7, "error": [1]}']
    + [f'{{"state": "training", "time": 1{"0" * 400}}}', '{"state": "\\ud800\x1b[2J"}'],
    "versions.json": ["", "[1]", '{"commit": {"a": []}, "vitssl": null, "jax": 1e999}'],
    "metrics.jsonl": ["", "\xff\xfe", DEEP, "[1, 2]\n3\n", '{"step": 1e999, "a": 1}']
    + ['{"step": -1, "a": 1}\n{"step": "4", "a": 1}\n{"step": null, "a": 1}']
    + [f'{{"step": 1, "loss": 1{"0" * 400}}}\n{{"step": 2, "loss": 1e308}}']
    + ['{"step": 1, "loss": 1e-320}\n{"step": 2, "loss": -1e308}']
    + ['{"step": 1, "final/x": 1, "final/": 2, "\\ud800": 3, "a\\u001b": NaN}'],
    "config.json": ['{"evals": [], "data": 3, "method": {}}']
    + ['{"evals": {"knn_k": 3, "features": []}, "data": {"source": ["\\ud800"]}}']
    + ['{"a": NaN, "b": 1e999, "c\\u001b": {"d": [[[]]]}}'],
}


@pytest.mark.parametrize(
    "name, text", [(name, text) for name, each in DAMAGED.items() for text in each]
)
def test_damaged_files_are_shown_as_far_as_they_go(tmp_path, name, text):
    path = made.run(tmp_path / "a", picture=False)
    (path / name).write_bytes(text.encode("latin1"))
    shown = _shown(path)
    assert "\x1b" not in shown
    assert "hjepa" in shown or name == "config.json"


@pytest.mark.parametrize("text", ["", "[]", "\xff\xfe", DEEP, "{", "9" * 5000, "null"])
def test_a_damaged_config_is_one_line_and_leaves_the_others_listed(
    tmp_path, text, caplog
):
    made.run(tmp_path / "a")
    path = made.run(tmp_path / "b")
    (path / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(errors.UsageError, match=r"b/config\.json: damaged") as told:
        workdir.workdir(path)
    assert "\n" not in str(told.value)
    assert [run.name for run in workdir.below(tmp_path)] == ["a"]
    assert "left out" in caplog.text and "b/config.json" in caplog.text
    nested = json.dumps({"a": 1}).replace("1", "[" * 30 + "]" * 30)
    (path / "config.json").write_text(nested)
    with pytest.raises(errors.UsageError, match="nested too deeply"):
        workdir.workdir(path)


def test_pipes_and_links_in_a_workdir_are_passed_over(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"a secret")
    path = made.run(tmp_path / "runs" / "a")
    for name in ("status.json", "metrics.jsonl", "versions.json", "scores.npz"):
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)
    os.mkfifo(path / "pictures" / "pipe.png")
    (path / "pictures" / "link.png").symlink_to(secret)
    shown = _shown(path)
    assert base64.b64encode(b"a secret").decode() not in shown
    assert "no regular file; open it itself" in shown and "neighbours.png" in shown
    (path / "pictures").rename(path / "moved")
    (path / "pictures").symlink_to(tmp_path)
    assert base64.b64encode(b"a secret").decode() not in _shown(path)
    (path / "config.json").unlink()
    os.mkfifo(path / "config.json")
    with pytest.raises(errors.UsageError, match="no config.json"):
        workdir.workdir(path)
    with pytest.raises(errors.UsageError, match="no run in it"):
        workdir.below(tmp_path / "runs")


def test_a_step_that_was_logged_twice_counts_with_its_last_value(tmp_path):
    path = made.run(tmp_path / "a")
    lines = ((2, 1.0), (1, 5.0), (2, 3.0), (0, 7.0), (1, 6.0))
    text = "".join(json.dumps({"step": s, "loss": v}) + "\n" for s, v in lines)
    (path / "metrics.jsonl").write_text(text)
    steps, values = workdir.workdir(path).metrics["loss"]
    assert steps.tolist() == [0, 1, 2] and values.tolist() == [7.0, 6.0, 3.0]
