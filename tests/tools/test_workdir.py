"""Workdirs are found and read, whatever state their run is in."""

import os
import subprocess
import sys

import pytest

from tests.tools import made
from vitssl import errors
from vitssl.tools import workdir


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
