"""Faults a run must survive, or end from with its exit code and one clear message."""

import errno
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import filelock
import numpy as np
import pytest

from tests import runs
from tests.run import test_loop
from vitssl import disk, errors
from vitssl.run import build, devices, guard, log, loop
from vitssl.tools import doctor


def test_one_nan_is_skipped_and_counted(tmp_path):
    done = runs.run(tmp_path, "nan_at_step=4")
    assert done.returncode == 0, done.said
    assert "step 4: non-finite loss or gradient" in done.stdout
    assert "samples [" in done.stdout
    lines = runs.metrics(tmp_path)
    assert [m["nonfinite_steps"] for m in lines] == [0, 1, 1, 1]
    assert all(np.isfinite(v).all() for v in runs.state(tmp_path).values())


def test_a_failed_save_is_retried_at_the_next(tmp_path):
    done = runs.run(tmp_path, "full_disk_at_save=2")
    assert done.returncode == 0, done.said
    assert "No space left on device" in done.stdout
    assert (tmp_path / "checkpoints" / "12").is_dir()


def test_no_library_is_imported_first_while_a_checkpoint_is_written(tmp_path):
    done = runs.run(tmp_path, "slow_lazy_imports=3")
    assert done.returncode == 0, done.said
    assert "LazyModule" not in done.said


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


def test_a_step_that_never_ends_on_the_device_ends_with_7(tmp_path):
    done = runs.run(tmp_path, "stuck_step=4", log__stall_seconds=30.0)
    assert done.returncode == 7, done.said
    assert "stalled: " in done.stderr and "stacks of all threads" in done.stderr
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stalled"


WATCHED = """
import sys
from vitssl.run import guard
with guard.Watchdog(sys.argv[1], 8.0) as dog:
    dog.beat("a step")
    print("begun", flush=True)
    sys.stdin.readline()
print("ended", flush=True)
"""


def test_a_job_that_was_suspended_has_not_stalled(tmp_path):
    command = [sys.executable, "-c", WATCHED, str(tmp_path)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=runs.ROOT, **pipes) as job:
        assert job.stdout.readline() == "begun\n"
        job.send_signal(signal.SIGSTOP)
        time.sleep(10.0)
        job.send_signal(signal.SIGCONT)
        time.sleep(2.0)  # In which the watchdog looks.
        said, _ = job.communicate("\n")
    assert (said, job.returncode) == ("ended\n", 0)


def test_the_watchdog_watches_from_the_first_second(tmp_path, monkeypatch):
    beats = []
    monkeypatch.setattr(guard.Watchdog, "beat", lambda self, what: beats.append(what))

    def hang(*unused):
        assert threading.active_count() and beats == ["opening the data"]
        assert "watchdog" in {t.name for t in threading.enumerate()}
        raise errors.DataError("a disk that does not answer")

    monkeypatch.setattr(build, "build", hang)
    with pytest.raises(errors.DataError):
        loop.run(test_loop._read(tmp_path), tmp_path, name="test")
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["error"] == "DataError: a disk that does not answer"


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


def test_a_file_system_without_locks_is_gone_on_with_and_doctor_says_so(
    tmp_path, monkeypatch
):
    def refuse(fd, **_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock, "lock_descriptor", refuse)
    with guard.lock(tmp_path), guard.lock(tmp_path):
        pass
    assert "no file locks here" in doctor.writing(tmp_path)[-1].text


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


_WRITES = """
import os, sys, pathlib
from vitssl import disk
from vitssl.run import log
place = pathlib.Path(sys.argv[1])
log.to_terminal()
log.write_status(place, state="training")
disk.write(place / "config.json", "old")
writers = log.Writers(place, log.Log(every_steps=1), 0, {}, "x")
writers.scalars(1, {"loss": 1.0})
fill = (place / "fill").open("wb", buffering=0)
for size in (65536, 1):
    try:
        while fill.write(b"x" * size) == size:
            pass
    except OSError:
        pass
for step in range(2, 40):
    writers.scalars(step, {"loss": 2.0, "text": "x" * 5000})
log.write_status(place, state="finished", metrics={"text": "x" * 9000})
try:
    with disk.faults(place):
        disk.write(place / "config.json", "new" * 5000)
except ValueError as e:
    print("refused:", e)
fill.close()
os.unlink(place / "fill")
writers.scalars(40, {"loss": 3.0})
writers.close()
log.write_status(place, state="over")
for name in sorted(os.listdir(place)):
    if not name.startswith("events"):
        print(name, (place / name).read_text())
"""


@pytest.mark.skipif(not _can_mount(), reason="needs user namespaces")
def test_small_files_on_a_real_full_disk_are_whole_or_old(tmp_path):
    script = (
        f"mount -t tmpfs -o size=256k tmpfs {tmp_path} && "
        f"{shlex.quote(sys.executable)} -c {shlex.quote(_WRITES)} {tmp_path}"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        **dict(capture_output=True, text=True, timeout=100, cwd=runs.ROOT),
        env=runs.environment(),
    )
    said = done.stdout
    assert done.returncode == 0, said + done.stderr
    assert "this line is lost" in said and "status.json: [Errno 28]" in said
    assert (
        "config.json: No space left on device; free space"
        in said.partition("refused:")[2]
    )
    # The lines after the loss are whole; nothing is torn, and no temporary is left.
    files = said.partition("refused:")[2].splitlines()[1:]
    assert files[0] == "config.json old"
    lines = [json.loads(line.removeprefix("metrics.jsonl ")) for line in files[1:3]]
    assert [line["step"] for line in lines] in ([1, 2], [1, 40])
    assert '"state": "over"' in "\n".join(files)
    assert not any(".tmp" in line for line in files)


def test_a_full_disk_at_the_start_is_one_line(tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(disk, "write", full)
    with pytest.raises(errors.CheckpointError) as caught:
        loop.run(test_loop._read(tmp_path), tmp_path, name="test")
    line = f"{tmp_path}/config.json: No space left on device; free space, or give "
    assert str(caught.value).startswith(line)


def test_a_limit_of_the_address_space_that_jax_would_die_of_is_one_line(monkeypatch):
    import resource

    for limit, refused in ((2**31, True), (devices.LEAST_SPACE, False), (-1, False)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, n=limit: (n, n))
        if refused:
            with pytest.raises(errors.OutOfMemoryError, match="limited to 2 GiB .ulim"):
                devices.start()
        else:
            devices.start()


def test_a_workdir_whose_name_is_no_utf8_is_one_line(tmp_path):
    # As Python reads an accent where the locale is C and its UTF-8 mode is off.
    path = tmp_path / b"\xc3\xa9".decode("ascii", "surrogateescape")
    with pytest.raises(errors.UsageError) as caught:
        loop.run(test_loop._read(tmp_path), path, name="test")
    assert "is no UTF-8 text" in str(caught.value)
    assert "LC_ALL=C.UTF-8" in str(caught.value)
    str(caught.value).encode("ascii")


@pytest.mark.parametrize("name", [*guard.FILES, guard.LOCK])
def test_a_pipe_in_the_place_of_a_file_of_ours_does_not_hang(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(errors.UsageError, match=f"{name}.*no regular file"):
        with guard.lock(tmp_path):
            guard.writable(tmp_path)


def test_a_line_with_an_accent_is_shown_where_the_terminal_has_none(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    log.to_terminal()
    log.logger.warning("runs/é")
    sys.stdout.flush()
    assert raw.getvalue() == b"runs/\\xe9\n"
