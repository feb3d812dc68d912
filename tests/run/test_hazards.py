"""What may happen to a run while it trains, in this process: nothing is lost or hidden.

Non-finite steps at every boundary of the loop, a workdir that is removed, an evaluation
that crashes, two thousand steps.
"""

import json
import os
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from tests import runs
from tests.methods import test_every_option
from tests.run import test_faults, test_loop
from vitssl import errors
from vitssl.run import build, evaluation, guard, log, loop, seals

ONLINE = dict(
    evals__online_samples_train=16,
    evals__online_samples_test=16,
    evals__knn_k="(3,)",
    evals__batch_size=16,
)


def _train(workdir, **changes):
    return loop.run(test_loop._read(workdir, **changes), workdir, name="test")


def _status(workdir):
    return json.loads((workdir / "status.json").read_text())


def _at_step(monkeypatch, step, call):
    """Call something when so many steps are dispatched."""
    push = log.Metrics.push

    def wrapped(self, at, *args):
        push(self, at, *args)
        if at == step:
            call()

    monkeypatch.setattr(log.Metrics, "push", wrapped)


# The first update with this rate makes weights whose products overflow: steps 1, 2 and
# 3 are non-finite, and the third is seen when the fourth update is logged, evaluated,
# saved or the last; or else one step later.
DIVERGES = dict(optim__lr=1e30, optim__clip_norm=0.0, log__every_steps=100)
DIVERGES |= dict(checkpoint__every_epochs=100 / 89)


@pytest.mark.parametrize(
    "where, last",
    [
        (dict(), 5),
        (dict(log__every_steps=4), 4),
        (dict(checkpoint__every_epochs=4 / 89), 4),
        (dict(evals__every_epochs=4 / 89, **ONLINE), 4),
        (dict(steps=4), 4),
        (dict(log__nonfinite_limit=1), 3),
        (dict(log__nonfinite_limit=1, log__every_steps=2), 2),
    ],
    ids=["step", "log", "save", "evaluation", "end", "limit 1", "limit 1 at a log"],
)
def test_the_last_finite_state_is_saved_wherever_the_last_nan_is_seen(
    where, last, tmp_path
):
    with pytest.raises(errors.NonFiniteError, match="the last finite state is saved"):
        _train(tmp_path, **(DIVERGES | where))
    assert seals.sealed(tmp_path / "checkpoints")[-1] == last
    state = runs.state(tmp_path, last)
    assert int(state["step"]) == last
    assert all(np.isfinite(v).all() for v in state.values())
    # One update was made: what is saved is no initial state.
    assert max(abs(v).max() for k, v in state.items() if "params" in k) > 1e20
    assert _status(tmp_path)["state"] == "failed"


def test_a_removed_workdir_is_made_anew_and_the_status_says_so(tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    _at_step(monkeypatch, 5, lambda: workdir.rename(tmp_path / "gone"))
    _train(workdir)
    status = _status(workdir)
    assert status["state"] == "finished"
    assert "the workdir was removed before step" in status["faults"][0]
    assert seals.sealed(workdir / "checkpoints")[-1] == 12
    # What is there is a run like others: it can be opened, and knows that it is over.
    assert json.loads((workdir / "config.json").read_text())["steps"] == 12
    assert [m["step"] for m in runs.metrics(workdir)][-1] == 12


def test_a_removed_workdir_that_another_run_has_taken_is_left_alone(
    tmp_path, monkeypatch
):
    workdir, other = tmp_path / "run", []

    def replaced():
        workdir.rename(tmp_path / "gone")
        other.append(guard.lock(workdir))
        other[0].__enter__()

    _at_step(monkeypatch, 5, replaced)
    with pytest.raises(errors.UsageError, match="in use by a live run"):
        _train(workdir)
    assert not (workdir / "status.json").exists()
    other[0].__exit__(None, None, None)


@pytest.mark.parametrize(
    "wrong, error",
    [
        (dict(model__width=48, model__heads=3), errors.CheckpointError),
        (dict(data__split="no such"), errors.VitsslError),
        (dict(data__options__classes=3), errors.VitsslError),
    ],
    ids=["another model", "no data", "other classes"],
)
def test_a_command_that_cannot_begin_leaves_what_a_saved_run_says(
    tmp_path, wrong, error
):
    _train(tmp_path, steps=2)
    files = ("status.json", "config.json", "metrics.jsonl")
    before = [(tmp_path / name).read_bytes() for name in files]
    with pytest.raises(error):
        _train(tmp_path, **wrong)
    assert [(tmp_path / name).read_bytes() for name in files] == before


def test_a_run_that_fails_says_how_far_it_was(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("a bug")

    _at_step(monkeypatch, 5, broken)
    with pytest.raises(RuntimeError):
        _train(tmp_path, log__every_steps=1)
    status = _status(tmp_path)
    assert (status["state"], status["error"]) == ("failed", "RuntimeError: a bug")
    assert (status["step"], status["total_steps"]) == (5, 12)


def test_a_crashed_evaluation_is_in_the_final_status(tmp_path, monkeypatch):
    def broken(self, state):
        raise RuntimeError("an evaluator has a bug\nin its second line")

    monkeypatch.setattr(evaluation.Evaluation, "online", broken)
    _train(tmp_path, steps=4, evals__every_epochs=2 / 89)
    status = _status(tmp_path)
    assert status["state"] == "finished"
    fault = "the evaluation after step {} failed: RuntimeError: an evaluator has a bug"
    assert status["faults"] == [fault.format(at) for at in (0, 2, 4)]
    # A part of a run that comes later does not forget them.
    _train(tmp_path, steps=4, evals__every_epochs=2 / 89)
    assert _status(tmp_path)["faults"] == status["faults"]


def test_a_run_that_goes_on_at_step_0_has_one_line_of_it(tmp_path, monkeypatch):
    keys = dict(steps=3, log__every_steps=1, evals__every_epochs=100 / 89, **ONLINE)

    whole = tmp_path / "whole"
    _train(whole, **keys)
    assert [m["step"] for m in runs.metrics(whole)] == [0, 1, 2, 3]
    _train(whole, **keys)
    assert [m["step"] for m in runs.metrics(whole)] == [0, 1, 2, 3]
    # As a kill leaves it when the first checkpoint is sealed, and when it is not.
    first = whole / "checkpoints"
    for step in seals.sealed(first)[1:]:
        shutil.rmtree(first / str(step))
    _train(whole, **keys)
    assert [m["step"] for m in runs.metrics(whole)] == [0, 1, 2, 3]
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (whole / "metrics.jsonl").write_text(lines[0])
    shutil.rmtree(first)
    _train(whole, **keys)
    assert [m["step"] for m in runs.metrics(whole)] == [0, 1, 2, 3]
    assert not list(whole.glob("metrics.jsonl.*"))


@pytest.mark.slow
def test_two_thousand_steps_use_no_more_memory_files_or_compilations(
    tmp_path, monkeypatch
):
    seen, compiled = {}, []

    def on_event(name, seconds, **unused):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    push = log.Metrics.push

    def wrapped(self, at, *args):
        push(self, at, *args)
        if at in (620, 1995):  # Long after a save, which has files open.
            with open("/proc/self/statm") as f:
                pages = int(f.read().split()[1])
            seen[at] = pages, len(os.listdir("/proc/self/fd")), len(compiled)

    monkeypatch.setattr(log.Metrics, "push", wrapped)
    jax.monitoring.register_event_duration_secs_listener(on_event)
    _train(
        tmp_path,
        steps=2000,
        batch_size=8,
        log__every_steps=50,
        log__tensorboard=True,
        checkpoint__every_epochs=250 / 179,
    )
    (pages, files, programs), (pages_after, files_after, programs_after) = (
        seen[620],
        seen[1995],
    )
    assert compiled, "the listener heard nothing; is its event renamed?"
    assert programs_after == programs
    assert files_after <= files + 1
    assert pages_after < 1.02 * pages


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    short = dict(steps=4, checkpoint__every_epochs=2 / 89)
    _train(tmp_path / "plain", **short)
    jump, real = [0.0], time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump[0])
    _at_step(monkeypatch, 3, lambda: jump.append(jump.pop() - 86400.0))
    _train(tmp_path / "jumps", **short)
    assert runs.digest(tmp_path / "jumps", 4) == runs.digest(tmp_path / "plain", 4)
    assert runs.metrics(tmp_path / "jumps") == runs.metrics(tmp_path / "plain")


@pytest.mark.skipif(not test_faults._can_mount(), reason="needs user namespaces")
def test_a_run_needs_no_network(tmp_path):
    done = subprocess.run(
        ["unshare", "-rn", *runs.command(tmp_path, steps=2)],
        **dict(capture_output=True, text=True, timeout=400, cwd=runs.ROOT),
        env=runs.environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert _status(tmp_path)["state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted({"dinov2", "simmim"} ^ {*test_every_option.ALL})
)
def test_kill_9_changes_nothing_of_any_method_with_online_evaluation(name, tmp_path):
    config, small = test_every_option.SMALL[name]
    words = [*small.split(), *test_every_option.RUN]
    base = dict(word.split("=", 1) for word in words)
    base |= {k.replace("__", "."): v for k, v in ONLINE.items() if k != "evals__knn_k"}
    base |= {"evals.knn_k": "(3,)", "log.every_steps": 1}
    made = test_loop._read(tmp_path, name=config, base=base)
    per_epoch = build.build(made).run.steps_per_epoch
    base |= {"evals.every_epochs": 2 / per_epoch, "evals.final": "()"}
    base |= {"checkpoint.every_epochs": 2 / per_epoch}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    own = dict(name=config, base=base)
    for workdir, fault, code in (
        (whole, "none", 0),
        (killed, "kill_after_step=3", -signal.SIGKILL),
        (killed, "none", 0),
    ):
        done = runs.run(workdir, fault, **own)
        assert done.returncode == code, done.said
    assert runs.digest(killed, 4) == runs.digest(whole, 4)
    assert runs.metrics(killed) == runs.metrics(whole)
    evaluated = [m["step"] for m in runs.metrics(whole) if "loss" not in m]
    assert evaluated[:2] == [0, 2]
