"""Killed anywhere, started again by the same command: the same run, bit for bit."""

import json
import pathlib
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from tests import runs
from vitssl.run import seals


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    done = runs.run(workdir)
    assert done.returncode == 0, done.said
    return workdir


def _same(workdir, whole):
    assert runs.digest(workdir) == runs.digest(whole)
    assert runs.metrics(workdir) == runs.metrics(whole)


# Steps drawn once from a generator with seed 0; before, at and after a checkpoint.
@pytest.mark.parametrize(
    "fault",
    [
        "kill_after_step=0",
        "kill_after_step=7",
        "kill_after_step=11",
        "kill_in_save=2",
        "kill_in_write=2",
        "kill_in_write=3",
    ],
)
def test_kill_9_changes_nothing(fault, whole, tmp_path):
    workdir = tmp_path / "a b" / "ü"  # Spaces and other alphabets are fine.
    killed = runs.run(workdir, fault)
    assert killed.returncode == -signal.SIGKILL, killed.said
    again = runs.run(workdir)
    assert again.returncode == 0, again.said
    _same(workdir, whole)


@pytest.mark.parametrize("fault", ["term_after_step=4", "term_while_compiling"])
def test_sigterm_saves_exits_75_and_resumes_exactly(fault, whole, tmp_path):
    stopped = runs.run(tmp_path, fault)
    assert stopped.returncode == 75, stopped.said
    assert "Preempted: SIGTERM: saved after step" in stopped.stderr
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "preempted" and status["step"] in (1, 5)
    again = runs.run(tmp_path)
    assert f"resuming after step {status['step']} of 12" in again.said, again.said
    _same(tmp_path, whole)


def test_sigint_from_outside_saves_too(whole, tmp_path):
    process = subprocess.Popen(
        runs.command(tmp_path, "none", steps=4000),
        stdout=subprocess.PIPE,
        text=True,
        cwd=runs.ROOT,
        env=runs.environment(),
    )
    for line in process.stdout:
        if "loss" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(120) == 75, rest


def test_sigterm_in_the_final_evaluation_exits_75_at_once(whole, tmp_path):
    start = time.monotonic()
    stopped = runs.run(tmp_path, "term_in_final")
    assert stopped.returncode == 75 and time.monotonic() - start < 60, stopped.said
    assert "run it again for the final evaluation" in stopped.stderr
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "preempted"
    assert runs.digest(tmp_path) == runs.digest(whole)
    again = runs.run(tmp_path)
    assert again.returncode == 0 and "final evaluation only" in again.stdout
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"


def test_a_finished_run_says_so_and_trains_no_more(whole, tmp_path):
    before = runs.digest(whole)
    again = runs.run(whole)
    assert again.returncode == 0 and "already complete (12 steps)" in again.stdout
    assert runs.digest(whole) == before
    assert json.loads((whole / "status.json").read_text())["state"] == "finished"


def test_another_number_of_devices_goes_on_with_the_same_losses(whole, tmp_path):
    stopped = runs.run(tmp_path, "term_after_step=5", devices=4)
    assert stopped.returncode == 75, stopped.said
    again = runs.run(tmp_path, devices=2)
    assert again.returncode == 0, again.said
    ours, theirs = runs.metrics(tmp_path), runs.metrics(whole)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)


def test_workers_and_threads_do_not_change_the_run(whole, tmp_path):
    done = runs.run(tmp_path, data__workers=1, data__threads=1)
    assert done.returncode == 0, done.said
    _same(tmp_path, whole)


def test_another_seed_is_another_run(whole, tmp_path):
    assert runs.run(tmp_path, seed=1).returncode == 0
    assert runs.digest(tmp_path) != runs.digest(whole)


def _newest_data_file(workdir):
    files = (workdir / "checkpoints" / "12" / "state").rglob("d/*")
    return max((p for p in files if p.is_file()), key=lambda p: p.stat().st_size)


def _flip(path: pathlib.Path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_a_flipped_byte_falls_back_to_the_checkpoint_before(whole, tmp_path):
    assert runs.run(tmp_path).returncode == 0
    _flip(_newest_data_file(tmp_path))
    again = runs.run(tmp_path)
    assert again.returncode == 0, again.said
    assert "checkpoint 12 is damaged" in again.said and "sha256" in again.said
    assert "resuming after step 8" in again.said
    _same(tmp_path, whole)


def test_when_every_checkpoint_is_damaged_the_exit_code_is_4(tmp_path):
    assert runs.run(tmp_path).returncode == 0
    for path in (tmp_path / "checkpoints").rglob("d/*"):
        if path.is_file():
            _flip(path)
    again = runs.run(tmp_path)
    assert again.returncode == 4, again.said
    assert "no checkpoint is intact" in again.stderr
    assert "Traceback" not in again.said


def test_a_checkpoint_of_another_model_is_named_leaf_by_leaf(whole):
    before = runs.digest(whole)
    done = runs.run(whole, model__width=32)
    assert done.returncode == 4, done.said
    assert "params/encoder/block_0/attn/proj/kernel: (16, 16)" in done.stderr
    assert "model (32, 32)" in done.stderr and "Traceback" not in done.said
    assert runs.digest(whole) == before


def test_a_changed_value_is_reported_on_resume(tmp_path):
    assert runs.run(tmp_path, "term_after_step=4").returncode == 75
    again = runs.run(tmp_path, optim__lr=5e-4)
    assert "config changed since this run began: optim.lr" in again.said


def test_retention_keeps_the_last_and_each_nth(tmp_path):
    every = 1 / 89
    done = runs.run(
        tmp_path,
        checkpoint__every_epochs=every,
        checkpoint__keep_every_epochs=5 * every,
    )
    assert done.returncode == 0, done.said
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [0, 5, 10, 11, 12]


def _pair(workdir, faults=("none", "none"), environment=(), **changes):
    """Start a job of two processes on loopback; return them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    return [
        subprocess.Popen(
            runs.command(workdir, fault, **changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=runs.ROOT,
            env=runs.environment()
            | job
            | {"JAX_PROCESS_ID": str(i)}
            | dict(environment),
        )
        for i, fault in enumerate(faults)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2])
def test_two_processes_on_loopback_train_like_one(fsdp, whole, tmp_path):
    split = dict(mesh__fsdp=fsdp, mesh__fsdp_min_size=64)
    cache = tmp_path / "compiled"
    keep = {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    processes = _pair(tmp_path / "run", environment=keep, **split)
    said = [p.communicate(timeout=400)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    assert f"fsdp={fsdp}" in said[0]
    # Programs of a CPU that were kept let the next such job wait for ever.
    assert not cache.exists() or not list(cache.iterdir())
    ours, theirs = runs.metrics(tmp_path / "run"), runs.metrics(whole)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    one, two = runs.state(whole), runs.state(tmp_path / "run")
    kernel = "params/encoder/block_0/mlp/fc1/kernel"
    np.testing.assert_allclose(one[kernel], two[kernel], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_save_that_fails_in_one_process_ends_the_job_with_the_reason(
    process, tmp_path
):
    faults = ["none", "none"]
    faults[process] = "small_files_after_step=2"
    split = dict(mesh__fsdp=2, mesh__fsdp_min_size=64)  # Each writes a half.
    both = _pair(tmp_path, faults, steps=4000, log__stall_seconds=300.0, **split)
    said = [p.communicate(timeout=400)[0] for p in both]
    assert both[process].returncode == 4, said[process]
    (line,) = [x for x in said[process].splitlines() if "could not save" in x]
    assert line.startswith("CheckpointError: ") and "File too large" in line
    assert f"process {process} " in line and "after step 4" in line
    # Told by a device, or by JAX's runtime, which aborts.
    assert both[1 - process].returncode in (7, -signal.SIGABRT), said[1 - process]
    assert "stalled:" not in said[1 - process]
    assert "stalled:" not in said[process]
    assert seals.sealed(tmp_path / "checkpoints") == [0]


@pytest.mark.slow
def test_the_rest_of_a_job_ends_at_once_when_a_process_dies(tmp_path):
    first, second = _pair(tmp_path, ("none", "kill_after_step=5"), steps=4000)
    said = first.communicate(timeout=400)[0]
    assert second.wait(10) == -signal.SIGKILL
    assert first.returncode == 7, said
    (line,) = [x for x in said.splitlines() if x.startswith("StalledError: ")]
    assert "another process of this job has ended" in line
    assert "run the job again" in line and "Traceback" not in said
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed" and "has ended" in status["error"]


@pytest.fixture(scope="module")
def freezing(tmp_path_factory):
    """An uninterrupted run with a freeze event, and what later ones need compiled."""
    place = tmp_path_factory.mktemp("freezing")
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(place / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    own = dict(name="localmim", base=runs.TINY_FREEZING, env=cache)
    done = runs.run(place / "run", **own)
    assert done.returncode == 0, done.said
    return place / "run", own


# The layers are frozen from step 5 on, after the fifth update.
@pytest.mark.parametrize("step", [3, 4, 5])
def test_kill_9_around_a_freeze_event_changes_nothing(step, freezing, tmp_path):
    whole, own = freezing
    killed = runs.run(tmp_path, f"kill_after_step={step}", **own)
    assert killed.returncode == -signal.SIGKILL, killed.said
    again = runs.run(tmp_path, **own)
    assert again.returncode == 0, again.said
    assert runs.digest(tmp_path, 8) == runs.digest(whole, 8)
    assert runs.metrics(tmp_path) == runs.metrics(whole)


def test_the_state_of_frozen_leaves_is_dropped_and_they_stand_still(freezing):
    whole, _ = freezing
    (before, after) = (runs.state(whole, step) for step in (6, 8))
    moments = [k for k in after if k.startswith("opt/")]
    assert not any("encoder/block_0" in k for k in moments)
    assert any("encoder/block_2" in k for k in moments)
    for name in after:
        if name.startswith("params/encoder/block_0/"):
            assert np.array_equal(before[name], after[name])
    lines = runs.metrics(whole)
    assert [x["freeze/layers"] for x in lines if "freeze/layers" in x][-1] == 1
