"""The Slurm script, with two processes on loopback and a scheduler of a few lines."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from tests import runs

SCRIPT = runs.ROOT / "launch" / "slurm.sbatch"
FAKE = pathlib.Path(__file__).parent / "fake"


def fake_root(folder):
    """Return a directory whose launch/environment.sh names the Python of the tests.

    With FAULT in its environment, that Python runs with those faults injected.
    """
    (folder / "launch").mkdir(parents=True)
    python = folder / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f"cd {runs.ROOT} && shift 2\n"
        f'exec {sys.executable} -m tests.faults ${{FAULT:-none}} -- "$@"\n'
    )
    python.chmod(0o755)
    text = f'fail() {{ echo "launch: $*" >&2; exit 2; }}\npython={python}\n'
    (folder / "launch" / "environment.sh").write_text(text)
    return folder


def submit(folder, *arguments, tasks=2, job, **variables):
    """Run the script as Slurm does: a copy of it, from elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / "slurm_script"
    copy.write_text(SCRIPT.read_text())
    env = runs.environment()
    # Nothing is timed here; compiling well would take most of the test's time.
    env["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    env |= {
        "PATH": f"{FAKE}:{os.environ['PATH']}",
        "FAKE_QUEUE": str(folder / "queue"),
        "SLURM_JOB_ID": str(job),
        "SLURM_NTASKS": str(tasks),
        **variables,
    }
    return subprocess.run(
        ["bash", str(copy), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        cwd=folder,
        env=env,
    )


def free_job():
    """Return a job id whose port, as JAX computes it, is free."""
    for job in range(os.getpid() % 4096, 2 * 4096):
        with socket.socket() as s:
            try:
                s.bind(("", job % 4096 + 65535 - 4095))
            except OSError:
                continue
        return job
    raise AssertionError("no free port")


def echoing_root(folder):
    """Return a root whose Python only says what it was asked to run."""
    root = fake_root(folder)
    (root / "python").write_text(
        "#!/usr/bin/env bash\n"
        'echo "ids=$JAX_LOCAL_DEVICE_IDS args=$*"\nexit ${CODE:-0}\n'
    )
    return str(root)


@pytest.mark.parametrize("code", [0, 2, 6, 75])
def test_only_75_goes_back_into_the_queue(code, tmp_path):
    root = echoing_root(tmp_path / "root")
    done = submit(tmp_path / "a", "--x", job=7, VITSSL_ROOT=root, CODE=str(code))
    assert done.returncode == (0 if code == 75 else code), done.stdout
    queue = tmp_path / "a" / "queue"
    assert (queue.read_text() if queue.exists() else "") == (
        "requeue 7\n" if code == 75 else ""
    )


def test_one_task_per_node_drives_all_gpus_of_it(tmp_path):
    root = echoing_root(tmp_path / "root")
    gpus = dict(SLURM_JOB_NUM_NODES="2", SLURM_GPUS_ON_NODE="4")
    done = submit(tmp_path / "a", "--x=a b", job=7, VITSSL_ROOT=root, **gpus)
    assert done.stdout.count("ids=0,1,2,3 args=-m vitssl.main --x=a b") == 2
    # With a task per GPU, JAX's own rule is the right one.
    gpus["SLURM_JOB_NUM_NODES"] = "1"
    done = submit(tmp_path / "a", "--x", job=7, VITSSL_ROOT=root, **gpus)
    assert done.stdout.count("ids= args=") == 2


def test_a_task_of_an_array_takes_its_line(tmp_path):
    root = echoing_root(tmp_path / "root")
    listed = tmp_path / "runs.txt"
    listed.write_text("--config=a\n'--config=b c' --config.x='(1, 2)'\n")
    more = dict(VITSSL_ROOT=root, VITSSL_RUNS=str(listed))
    done = submit(tmp_path / "a", tasks=1, job=7, SLURM_ARRAY_TASK_ID="1", **more)
    assert "args=-m vitssl.main --config=b c --config.x=(1, 2)" in done.stdout
    done = submit(tmp_path / "a", tasks=1, job=7, SLURM_ARRAY_TASK_ID="2", **more)
    assert done.returncode == 2 and "has no line 3" in done.stdout


def test_submitted_from_elsewhere_it_says_so(tmp_path):
    done = submit(tmp_path / "a", job=7, SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 2 and "submit from the root" in done.stdout


@pytest.mark.slow
def test_preempted_and_requeued_it_ends_bit_identical(tmp_path):
    root = str(fake_root(tmp_path / "root"))
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def start(folder, **more):
        words = runs.arguments(folder / "run", log__stall_seconds=120.0)
        return submit(folder, *words, job=free_job(), VITSSL_ROOT=root, **more)

    done = start(whole)
    assert done.returncode == 0 and "2 process(es)" in done.stdout, done.stdout
    assert not (whole / "queue").exists()
    first = start(cut, FAULT="slow_steps=300 term_after_step=3")
    assert first.returncode == 0 and "exit code 75" in first.stdout, first.stdout
    assert (cut / "queue").read_text().startswith("requeue ")
    again = start(cut)
    assert again.returncode == 0 and "resuming after step" in again.stdout
    assert runs.digest(cut / "run") == runs.digest(whole / "run")
    assert runs.metrics(cut / "run") == runs.metrics(whole / "run")
