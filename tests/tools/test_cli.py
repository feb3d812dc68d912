"""The command `vitssl`: tables, pages, and one line for every mistake."""

import json
import pathlib
import tomllib

import pytest

from tests import runs
from tests.tools import made
from vitssl import cli, config
from vitssl.tools import compare, doctor


def _rows(text):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ") and "---" not in line
    ]


@pytest.mark.parametrize("command", sorted({*cli.COMMANDS} - {"train", "bench"}))
def test_a_command_calls_itself_what_one_types(command, capsys):
    with pytest.raises(SystemExit) as over:
        cli.main([command, "--help"])
    assert over.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: vitssl {command} ")


def test_runs_shows_states_steps_and_last_values(tmp_path, capsys):
    made.run(tmp_path / "a", knn=0.5)
    made.run(tmp_path / "b", knn=0.75, state="training", eta_seconds=90.0, step=10)
    assert cli.main(["runs", str(tmp_path)]) == 0
    heads, a, b = _rows(capsys.readouterr().out)
    assert heads[:5] == ["run", "state", "step", "loss", "k-NN"]
    assert a[1:5] == ["finished", "40/40", "0.02439", "50.0%"]
    assert b[1:3] == ["training", "40/40"] and b[heads.index("left")] == "1m30s"
    assert a[heads.index("left")] == "-"


def test_runs_sorts_and_selects(tmp_path, capsys):
    made.run(tmp_path / "a", knn=0.5)
    made.run(tmp_path / "b", knn=0.75)
    argv = ["runs", str(tmp_path), "--metrics=knn/top1", "--sort=knn/top1"]
    assert cli.main(argv) == 0
    heads, *rows = _rows(capsys.readouterr().out)
    assert heads[3] == "knn/top1" and [r[3] for r in rows] == ["0.75", "0.5"]
    assert cli.main(["runs", str(tmp_path), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [x["metrics"]["knn/top1"] for x in lines] == [0.5, 0.75]


def test_compare_shows_what_differs_and_nothing_else(tmp_path, capsys):
    made.run(tmp_path / "a")
    made.run(tmp_path / "b", lr=0.01, knn=0.75)
    out = tmp_path / "c" / "page.html"
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert cli.main(["compare", *runs, f"--out={out}"]) == 0
    said = capsys.readouterr().out
    rows = _rows(said)
    assert rows[:2] == [["key", "a", "b"], ["optim.lr", "0.003", "0.01"]]
    assert ["knn/top1", "50.0%", "75.0% *"] in rows
    # What is the same, or nobody's own, is left out.
    assert not any(row[0] == "loss" or "raw_pixels" in row[0] for row in rows)
    assert "a: Not decided: k-NN 50.0%" in said and "b: Not decided: k-NN 75" in said
    page = out.read_text()
    assert "<td><b>75.0%</b></td>" in page and "<td><b>50.0%" not in page
    assert not any(row[0] == "optim.wd" for row in rows)
    assert "optim.lr" in out.read_text() and out.read_text().count("<path") >= 4


def test_the_page_is_there_before_the_text_is_read(tmp_path, monkeypatch):
    def gone(*unused):
        raise BrokenPipeError

    runs = [str(made.run(tmp_path / name)) for name in "ab"]
    monkeypatch.setattr("builtins.print", gone)
    monkeypatch.setattr("sys.stderr", (tmp_path / "err").open("w"))
    assert cli.main(["compare", *runs, f"--out={tmp_path}/page.html"]) == 0
    assert "Comparison of" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "key, high",
    [
        ("final/trained/knn/top1", True),
        ("test/f1_macro", True),
        ("test/miou", True),
        ("loss_h0", False),
        ("time/step_seconds", False),
        ("lr", None),
        ("quality/std", None),
        ("time/data_wait_percent", None),
    ],
)
def test_better_is_higher_or_lower_or_nothing(key, high):
    assert compare.better(key) is high


def test_runs_say_what_came_of_them(tmp_path, capsys):
    made.run(tmp_path / "a")
    run = made.run(tmp_path / "b", knn=0.2)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "quality/collapsed": 1.0}\n')
        file.write('{"step": 40, "final/trained/knn/images": 500, "knn/images": 500}\n')
    assert cli.main(["runs", str(tmp_path)]) == 0
    heads, a, b = _rows(capsys.readouterr().out)
    assert heads[-1] == "verdict" and b[-1] == "collapsed since step 20"
    assert a[-1] == "-"  # Nobody knows of how many images its accuracy is.
    assert b[heads.index("final k-NN")] == "20.0% (16.7-23.7)"


@pytest.mark.parametrize(
    "argv, says",
    [
        (["rnus"], "no such command; did you mean runs?"),
        (["zzz"], "no such command; one of train, recipes"),
        (["runs", "nowhere"], "nowhere: no such directory"),
        (["runs", "--metrics"], "expected one argument (vitssl runs --help)"),
        (["runs", "RUNS", "--metrics=knn"], "no run has the metric 'knn'; there is: "),
        (["compare", "a"], "two runs or more"),
        (["compare", "nowhere", "b"], "nowhere: no such directory; want the workdir"),
        (["report"], "required: RUN"),
        (["report", "nowhere"], "nowhere: no such directory"),
        (["report", "RUNS/a", "--out=/proc/no/report.html"], "--out=/proc/no/report"),
        (["doctor", "--wrkdir=x"], "unrecognized arguments: --wrkdir=x"),
        (["train"], "--config=NAME is missing"),
        (["--config=nowhere.py"], "nowhere.py: no such file"),
        (["sweep", "nowhere.txt"], "nowhere.txt: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, says, tmp_path, capsys):
    made.run(tmp_path / "a")
    assert cli.main([word.replace("RUNS", str(tmp_path)) for word in argv]) == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
    assert len(said.splitlines()) == (2 if says.startswith("--config") else 1), said


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    try:
        assert cli.main([command, "--help"]) == 0
    except SystemExit as e:  # argparse exits itself.
        assert e.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 4


def test_help_names_every_command(capsys):
    assert cli.main([]) == 2 and cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {command} " in said for command in cli.COMMANDS)


def test_doctor_is_content_here(tmp_path, capsys):
    assert cli.main(["doctor", f"--workdir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "running should work" in said and "FAIL" not in said
    for part in ("python", "devices", "attention", "images", "workdir"):
        assert f"  ok  {part} " in said


def test_doctor_names_what_is_broken_and_the_cure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", {"wandb": ("no_such_module", "nothing")})

    def broken():
        raise RuntimeError("no decoder")

    monkeypatch.setattr(doctor, "images", broken)
    broken.__name__ = "images"
    (tmp_path / "file").write_text("")
    assert cli.main(["doctor", f"--workdir={tmp_path / 'file' / 'x'}"]) == 2
    said = capsys.readouterr().out
    assert f"FAIL  {'images':<19} RuntimeError: no decoder" in said
    assert "no_such_module" in said and "[wandb]'" in said


@pytest.mark.parametrize("extra, wanted", [("", ""), ("dicom", "[dicom]")])
def test_the_cure_is_for_the_kind_of_installation(extra, wanted, monkeypatch, tmp_path):
    clone = runs.ROOT
    said = doctor.install(extra)
    assert f"{clone}/launch/local.sh ..., or pip install -e '{clone}{wanted}'" in said
    assert said.startswith("VITSSL_EXTRAS=dicom ") == bool(extra)
    inside = pathlib.Path(config.__file__).with_name("configs")
    monkeypatch.setattr(config, "home", lambda: inside)  # As in a wheel.
    assert doctor.install(extra) == f"pip install 'vitssl{wanted}'"


def test_doctor_knows_every_extra_that_a_user_may_want():
    project = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())["project"]
    builders = {"dev", "docs", "cuda", "cuda12", "aot-cuda", "aot-tpu"}
    assert doctor.EXTRAS.keys() == project["optional-dependencies"].keys() - builders


def test_doctor_finds_wrong_attention(monkeypatch):
    from vitssl.models import layers

    right = layers.attend
    monkeypatch.setattr(layers, "attend", lambda *a, **k: right(*a, **k) * 1.01)
    assert [f.level for f in doctor.attention()] == [doctor.BAD]
