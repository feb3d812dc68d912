"""Faults a run must survive, or end from with its exit code and one clear message."""

import json
import shlex
import subprocess
import sys

import numpy as np
import pytest

from tests import runs
from vitssl.run import guard


def test_one_nan_is_skipped_and_counted(tmp_path):
    done = runs.run(tmp_path, "nan_at_step=4")
    assert done.returncode == 0, done.said
    assert "step 4: non-finite loss or gradient" in done.stdout
    assert "samples [" in done.stdout
    lines = runs.metrics(tmp_path)
    assert [m["nonfinite_steps"] for m in lines] == [0, 1, 1, 1]
    assert all(np.isfinite(v).all() for v in runs.state(tmp_path).values())


def test_persistent_nan_ends_with_5_and_a_finite_checkpoint(tmp_path):
    done = runs.run(tmp_path, "nan_from_step=5")
    assert done.returncode == 5, done.said
    assert "3 non-finite steps in a row" in done.stderr
    assert "lower optim.lr" in done.stderr and "Traceback" not in done.said
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    state = runs.state(tmp_path, steps[-1])
    assert all(np.isfinite(v).all() for v in state.values())


def test_a_failed_save_is_retried_at_the_next(tmp_path):
    done = runs.run(tmp_path, "full_disk_at_save=2")
    assert done.returncode == 0, done.said
    assert "No space left on device" in done.stdout
    assert (tmp_path / "checkpoints" / "12").is_dir()


def test_a_disk_that_stays_full_ends_with_4(tmp_path):
    done = runs.run(tmp_path, "full_disk_at_save=0")
    assert done.returncode == 4, done.said
    assert "3 saves in a row failed" in done.stderr and "Traceback" not in done.said


def test_a_stall_ends_with_7_and_the_stacks(tmp_path):
    done = runs.run(tmp_path, "slow_data=4", log__stall_seconds=20.0)
    assert done.returncode == 7, done.said
    assert "stalled: step" in done.stderr and "stacks of all threads" in done.stderr
    assert "tests/faults.py" in done.stderr, "no stack shows where it hangs"
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stalled"


def test_out_of_memory_ends_with_6_and_advice(tmp_path):
    done = runs.run(tmp_path, "out_of_memory")
    assert done.returncode == 6, done.said
    for word in ("123456789", "batch_size=16", "accumulate", "remat", "bfloat16"):
        assert word in done.stderr
    assert "Traceback" not in done.said


def test_a_broken_evaluation_does_not_stop_training(tmp_path):
    done = runs.run(tmp_path, "broken_evaluation", evals__every_epochs=1)
    assert done.returncode == 0, done.said
    assert "an evaluator has a bug" in done.said
    assert (tmp_path / "checkpoints" / "12").is_dir()


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    done = runs.run(tmp_path / "file" / "run")
    assert done.returncode == 2, done.said
    assert "cannot be written" in done.stderr and "Traceback" not in done.said


def test_a_workdir_in_use_by_a_live_run(tmp_path):
    with guard.lock(tmp_path):
        done = runs.run(tmp_path)
    assert done.returncode == 2, done.said
    assert "in use by a live run (pid" in done.stderr
    assert not (tmp_path / "checkpoints").exists()


def test_the_lock_of_a_dead_process_is_no_lock(tmp_path):
    code = (
        "import os; from vitssl.run import guard\n"
        f"with guard.lock({str(tmp_path)!r}): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT).returncode == 9
    with guard.lock(tmp_path):
        pass


def test_data_problems_end_with_3(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {
        str(tmp_path / "nowhere"): "nowhere",
        str(empty): "empty",
    }
    for root, says in cases.items():
        done = runs.run(
            tmp_path / "run",
            data__source="folder",
            data__root=root,
        )
        assert done.returncode == 3, done.said
        assert says in done.stderr and "Traceback" not in done.said


def test_fewer_images_than_a_batch_end_with_3(tmp_path):
    done = runs.run(tmp_path / "run", batch_size=2048)
    assert done.returncode == 3, done.said
    assert "1438 images" in done.stderr and "lower batch_size" in done.stderr


def test_a_batch_that_does_not_split_over_the_devices(tmp_path):
    done = runs.run(tmp_path / "run", devices=3)
    assert done.returncode == 2, done.said
    assert "batch_size=16 does not split over 3 devices" in done.stderr
    assert "15, 18" in done.stderr


# A network of two megabytes, so that a checkpoint is what fills a disk.
SMALL = dict(model__width=128, model__heads=4, predictor__heads=4)


def _on_a_small_disk(workdir, size, *faults, **changes):
    """Run on a file system of its own of so many bytes: a full disk, not a patch."""
    command = shlex.join(runs.command(workdir / "disk", *faults, **changes))
    script = (
        f"mount -t tmpfs -o size={size} tmpfs {workdir} && {command}; code=$?; "
        f"ls {workdir}/disk/checkpoints > {workdir}.list; "
        f"cp {workdir}/disk/status.json {workdir}.status; exit $code"
    )
    workdir.mkdir()
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=runs.ROOT,
        env=runs.environment(),
    )
    done.said = done.stdout + done.stderr
    return done


def _can_mount() -> bool:
    try:
        return not subprocess.run(["unshare", "-rm", "true"]).returncode
    except OSError:
        return False


@pytest.mark.skipif(not _can_mount(), reason="needs user namespaces")
@pytest.mark.parametrize("faults", [(), ("term_after_step=5",)])
def test_saved_is_said_only_of_what_is_on_a_real_full_disk(tmp_path, faults):
    # Checkpoint 0 fits, with 300 kB more; none after it does.
    whole = runs.run(tmp_path / "whole", steps=1, **SMALL)
    assert whole.returncode == 0, whole.said
    files = (tmp_path / "whole").rglob("*")
    size = sum(-(-f.stat().st_size // 4096) * 4096 for f in files if f.is_file())
    done = _on_a_small_disk(
        tmp_path / "small", int(size / 2) + 300_000, *faults, **SMALL
    )
    assert done.returncode == 4, done.said
    assert "could not be saved" in done.stderr or "saves in a row" in done.stderr
    assert "Preempted" not in done.stderr, done.said
    status = json.loads((tmp_path / "small.status").read_text())
    assert status["state"] == "failed"


def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(tmp_path):
    # The error of orbax's thread must not come up again at the next save.
    done = runs.run(tmp_path, "full_disk_in_thread=2")
    assert done.returncode == 0, done.said
    assert done.stdout.count("No space left on device") == 1
    steps = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert "4" not in steps and {"8", "12"} <= steps


@pytest.mark.parametrize("fault", ["full_disk_in_thread=4"])
def test_a_last_save_that_fails_is_made_once_more(tmp_path, fault):
    done = runs.run(tmp_path, fault)
    assert done.returncode == 0, done.said
    assert "checkpoint of step 12 failed" in done.stdout
    assert (tmp_path / "checkpoints" / "12").is_dir()
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "finished"
