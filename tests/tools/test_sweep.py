"""Sweeps: the file, the runs on this machine, the Slurm array, the table."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests import runs
from tests.launch import test_slurm
from vitssl import cli, errors
from vitssl.tools import sweep

SMOKE = f"--config={runs.ROOT}/configs/hjepa.py:smoke"


def _overrides(text):
    return {one.name: one.overrides for one in sweep.parse(text)}


def test_a_line_is_a_run_and_braces_are_a_grid():
    found = _overrides(
        "# comment\n--config=c.py:x\nall: epochs=1.0\n"
        "optim.lr={1e-3,3e-3} seed={0,1}  # four\n"
        "wide: model.width=64\n"
        "deep: model.depth={2,4} seed=3\n"
    )
    assert found == {
        "lr=1e-3-seed=0": ("epochs=1.0", "optim.lr=1e-3", "seed=0"),
        "lr=1e-3-seed=1": ("epochs=1.0", "optim.lr=1e-3", "seed=1"),
        "lr=3e-3-seed=0": ("epochs=1.0", "optim.lr=3e-3", "seed=0"),
        "lr=3e-3-seed=1": ("epochs=1.0", "optim.lr=3e-3", "seed=1"),
        "wide": ("epochs=1.0", "model.width=64"),
        "deep-depth=2": ("epochs=1.0", "model.depth=2", "seed=3"),
        "deep-depth=4": ("epochs=1.0", "model.depth=4", "seed=3"),
    }


def test_tuples_dicts_and_quotes_are_values_not_grids():
    found = _overrides(
        "--config=c.py\na: data.mean={(0.1,0.2),(0.3,0.4)}\n"
        "b: data.options={'a':1,'b':2}\nc: \"data.root=a b\"\nevals.final=()\n"
    )
    assert found == {
        "a-mean=0.1_0.2": ("data.mean=(0.1,0.2)",),
        "a-mean=0.3_0.4": ("data.mean=(0.3,0.4)",),
        "b": ("data.options={a:1,b:2}",),
        "c": ("data.root=a b",),
        "final=": ("evals.final=()",),
    }


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "no run in it"),
        ("seed=0", "line 1: no --config=FILE line"),
        ("--config=c.py\nseed 0", "line 2: seed: want KEY=VALUE"),
        ("--config=c.py\nseed=0\n\nseed=0", "lines 2, 4: two runs are called 'seed=0'"),
        ("--config=c.py\nx: 'a", "line 2: No closing quotation"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_by_line(text, says):
    with pytest.raises(errors.UsageError) as caught:
        sweep.parse(text)
    assert says in str(caught.value)


def test_every_config_is_checked_before_the_first_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "RUN", ("false",))
    path = tmp_path / "s.sweep"
    path.write_text(f"{SMOKE}\nseed=0\noptim.lrr=1\nmodel.heads=3\n")
    assert cli.main(["sweep", str(path), f"--workdir={tmp_path}/w"]) == 2
    said = capsys.readouterr().err
    assert "line 3 (lrr=1)" in said and "did you mean 'lr'" in said
    assert "line 4 (heads=3)" in said and "heads=3" in said
    assert not (tmp_path / "w").exists()


def test_the_example_is_valid():
    found = sweep.parse((runs.ROOT / "launch" / "example.sweep").read_text())
    assert [one.name for one in found][-1] == "bigger" and len(found) == 5
    one = found[0]
    sweep.check([sweep.One(one.name, str(runs.ROOT / one.spec), one.overrides, 1)])


def _scripted(tmp_path, monkeypatch, body):
    """Make runs a script; $workdir is that of the run."""
    path = tmp_path / "run.sh"
    head = 'for w in "$@"; do case $w in --workdir=*) workdir=${w#*=};; esac; done\n'
    path.write_text(head + body)
    monkeypatch.setattr(sweep, "RUN", ("bash", str(path)))
    file = tmp_path / "s.sweep"
    file.write_text(f"{SMOKE}\nseed={{0,1,2}}\n")
    return str(file)


def test_a_failed_run_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    body = 'echo "broken: $workdir"; case $workdir in *=1) exit 5;; esac\n'
    file = _scripted(tmp_path, monkeypatch, body)
    assert cli.main(["sweep", file, f"--workdir={tmp_path}/w"]) == 5
    said = capsys.readouterr().out
    assert "seed=1: exit code 5\n  broken: " in said
    assert "seed=2: exit code 0" in said


def test_a_preempted_run_starts_again(tmp_path, monkeypatch, capsys):
    body = 'test -e "$workdir/seen" || { touch "$workdir/seen"; exit 75; }\n'
    file = _scripted(tmp_path, monkeypatch, body)
    assert cli.main(["sweep", file, f"--workdir={tmp_path}/w"]) == 0
    assert capsys.readouterr().out.count(": started") == 6


def test_jobs_share_the_gpus(tmp_path, monkeypatch):
    body = 'echo "$CUDA_VISIBLE_DEVICES" >"$workdir/gpus"; sleep 1\n'
    file = _scripted(tmp_path, monkeypatch, body)
    flags = [f"--workdir={tmp_path}/w", "--jobs=2", "--gpus=4"]
    assert cli.main(["sweep", file, *flags]) == 0
    said = [(tmp_path / "w" / f"seed={i}" / "gpus").read_text() for i in range(3)]
    assert set(said[:2]) == {"0,1\n", "2,3\n"} and said[2] in said[:2]
    assert cli.main(["sweep", file, "--jobs=2", "--gpus=3"]) == 2


def test_sigterm_reaches_the_runs_and_the_sweep_exits_75(tmp_path, monkeypatch):
    file = _scripted(
        tmp_path,
        monkeypatch,
        'trap "touch $workdir/told; exit 75" TERM\n'
        'touch "$workdir/ready"; while :; do sleep 0.1; done\n',
    )
    code = (
        "import sys; from vitssl import cli; from vitssl.tools import sweep\n"
        f"sweep.RUN = {sweep.RUN!r}\n"
        f"sys.exit(cli.main(['sweep', {file!r}, '--workdir={tmp_path}/w', '--jobs=2']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=runs.ROOT)
    ready = [tmp_path / "w" / f"seed={i}" / "ready" for i in range(2)]
    deadline = time.monotonic() + 60
    while not all(p.exists() for p in ready) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert all(p.with_name("told").exists() for p in ready)
    assert not (tmp_path / "w" / "seed=2").exists()


@pytest.mark.slow
def test_a_sweep_of_smoke_runs_ends_in_one_table(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    small = [w.removeprefix("--config.") for w in runs.arguments("", steps=1)[2:]]
    words = " ".join(f'"{w}"' for w in small)
    path = tmp_path / "s.sweep"
    path.write_text(f"{SMOKE}\nall: {words}\noptim.lr={{1e-3,2e-3}}\n")
    argv = ["sweep", str(path), f"--workdir={tmp_path}/w"]
    assert cli.main(argv) == 0
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert all("finished" in row and "1/1" in row for row in rows)
    assert (tmp_path / "w" / "sweep.md").read_text().splitlines()[-2:] == rows
    # Again: nothing is left to do.
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.count("finished already") == 2


def test_a_slurm_array_runs_every_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", f"{test_slurm.FAKE}:{os.environ['PATH']}")
    root = test_slurm.echoing_root(tmp_path / "root")
    monkeypatch.setenv("FAKE_ROOT", root)
    monkeypatch.setenv("FAKE_QUEUE", str(tmp_path / "queue"))
    path = tmp_path / "s.sweep"
    path.write_text(f"{SMOKE}\nseed={{0,1}} data.mean=(0.5,)\n")
    flags = [f"--workdir={tmp_path}/w", "--slurm", "--jobs=4", "--sbatch=--time=1:00"]
    assert cli.main(["sweep", str(path), *flags]) == 0
    said = capfd.readouterr().out
    assert "--array=0-1%4" in said and "--time=1:00" in said
    for seed in (0, 1):
        assert f"--config.seed={seed} --config.data.mean=(0.5,)\n" in said
    (listed,) = (tmp_path / "w").glob("array-*.txt")
    lines = listed.read_text().splitlines()
    assert len(lines) == 2 and "'--config.data.mean=(0.5,)'" in lines[1]


def test_without_slurm_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    path = tmp_path / "s.sweep"
    path.write_text(f"{SMOKE}\nseed=0\n")
    flags = [f"--workdir={tmp_path}/w", "--slurm"]
    assert cli.main(["sweep", str(path), *flags]) == 2
    assert "sbatch: not found" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, says",
    [
        ("../../x: seed=0", "line 2: a run called '../../x': want a letter or digit"),
        ("/etc/x: seed=0", "line 2: a run called '/etc/x': want a letter"),
        ("..: seed=0", "line 2: a run called '..': want a letter"),
        ("optim./../../x=3", "line 2: a run called '/x=3': want a letter"),
        (f"{'n' * 201}: seed=0", "want at most 200 bytes"),
        (
            " ".join(f"k{i}={{{','.join('0123456789')}}}" for i in range(7)),
            "line 2: 10000000 runs up to here; at most 1000 in one file",
        ),
    ],
)
def test_a_sweep_stays_in_its_folder_and_is_of_a_size_to_run(line, says):
    start = time.monotonic()
    with pytest.raises(errors.UsageError) as caught:
        sweep.parse(f"--config=c.py\n{line}\n")
    assert says in str(caught.value) and len(str(caught.value).splitlines()) == 2
    assert time.monotonic() - start < 1


def test_a_file_that_is_no_text_is_one_line(tmp_path):
    path = tmp_path / "a.sweep"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(errors.UsageError, match="cannot be read: it is no UTF-8 text"):
        sweep.main([str(path)])


def test_a_run_with_a_damaged_config_is_run_again(tmp_path, capsys):
    one = sweep.One("a", "c.py", (), 1)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_bytes(b"\xff")
    assert not sweep._finished(one, tmp_path)
    assert "config.json: damaged" in capsys.readouterr().out
