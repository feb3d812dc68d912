"""Every command of README.md and docs/ is valid, or run by the test named here."""

import ast
import builtins
import re
import shlex

import pytest

from tests import runs
from vitssl import config
from vitssl.run import experiment
from vitssl.tools import study

PAGES = [runs.ROOT / "README.md", *sorted((runs.ROOT / "docs").glob("*.md"))]
README = "\n".join(page.read_text() for page in PAGES)
TRAIN = ("launch/local.sh", "vitssl train", "python -m vitssl.main")
# Commands that do something else than train, and the file whose tests run them.
TESTED = {
    "launch/test.sh": "conftest.py",  # It runs these tests.
    "vitssl recipes": "tools/test_recipes.py",
    "vitssl doctor": "tools/test_cli.py",
    "vitssl runs": "tools/test_cli.py",
    "vitssl compare": "tools/test_cli.py",
    "vitssl report": "tools/test_cli.py",
    "vitssl convert import": "convert/test_commands.py",
    "vitssl convert export": "convert/test_commands.py",
    "vitssl convert families": "convert/test_families.py",
    "vitssl extract": "convert/test_commands.py",
    "vitssl predict": "tools/test_predict.py",
    "vitssl sweep": "tools/test_sweep.py",
    "python -m vitssl.bench hybrid": "bench/test_hybrid_time.py",
    "python -m vitssl.bench parts": "bench/test_parts_time.py",
    "python -m vitssl.bench freeze": "bench/test_freeze_time.py",
    "python -m vitssl.bench data": "bench/test_data_time.py",
    "python -m vitssl.bench knn": "bench/test_knn_time.py",
    "vitssl pack": "data/test_pieces.py",
    "vitssl prepare": "tools/test_prepare.py",
    "python -m tests.fuzz": "test_fuzz.py",
    "python -m pytest tests/run/test_lowered.py": "run/test_lowered.py",
    "vitssl bench aot": "bench/test_aot.py",
    "python -m vitssl.bench growth": "bench/test_growth_time.py",
    "vitssl freeze-plan": "tools/test_freeze_plan.py",
    "vitssl train DIR": "tools/test_own.py",
    "vitssl train --dry_run --on": "bench/test_aot.py",
    "vitssl store": "methods/localmim/test_prefix.py",
}
# Timings with a partner of their own (torch), or too long for a test.
UNTESTED = ("python -m vitssl.bench step", "python -m pytest -m torch")


def _commands():
    """Yield the commands of sh blocks and of code spans, one string each."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    text = re.sub(r"```.*?```", "", README, flags=re.S)
    spans = [" ".join(s.split()) for s in re.findall(r"`([^`]+)`", text)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    begin = (*TRAIN, *TESTED, *UNTESTED, "vitssl ", "python -m ")
    for line in [*lines, *spans]:
        line = line.partition("  #")[0].strip()
        if line.startswith(begin) and "..." not in line and " | " not in line:
            yield line


COMMANDS = sorted(set(_commands()))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_valid_or_run_elsewhere(command):
    if command.startswith(UNTESTED):
        return
    if not command.startswith(TRAIN) or any(command.startswith(k) for k in TESTED):
        known = [k for k in TESTED if command.startswith(k)]
        assert known, f"name the test that runs it: {command}"
        assert (runs.ROOT / "tests" / TESTED[known[0]]).exists()
        return
    words = [w for w in shlex.split(command) if w.startswith("--config")]
    spec = words[0].removeprefix("--config=")  # Published names need no folder.
    c = experiment.load(spec, [w.removeprefix("--config.") for w in words[1:]])
    study.read(c) if "study" in c else experiment.read(c)


def test_overrides_of_every_block_are_valid():
    """Lines of switches without a command are checked with the demo of H-JEPA."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    lines = [w for b in blocks for w in b.splitlines() if w.startswith("--config.")]
    assert len(lines) > 5
    for line in lines:
        words = shlex.split(line, comments=True)
        given = [w.removeprefix("--config.") for w in words]
        c = experiment.load(f"{runs.ROOT}/configs/hjepa.py", [])
        faults = config.Problems()
        config.override(c, given, faults)
        faults.stop()


def test_python_on_the_pages_has_no_name_out_of_nowhere():
    """Words that a reader has of his own are the images."""
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        names = [n for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Name)]
        known = {n.id for n in names if isinstance(n.ctx, ast.Store)} | {"images"}
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                known |= {(a.asname or a.name).partition(".")[0] for a in node.names}
        used = {n.id for n in names if isinstance(n.ctx, ast.Load)}
        assert used <= known | set(dir(builtins)), block


def test_files_that_the_pages_name_exist():
    absent, count = set(), 0
    for page in PAGES:
        text = page.read_text()
        named = re.findall(r"`((?:tests|configs|launch|vitssl|docs)/[\w/.]+)`", text)
        links = re.findall(r"\]\(([\w/.]+)\)", text)
        absent |= {n for n in named if not (runs.ROOT / n).exists()}
        absent |= {n for n in links if not (page.parent / n).exists()}
        count += len(named) + len(links)
        for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
            if f"def {name}(" not in (runs.ROOT / file).read_text():
                absent.add(f"{file}::{name}")
    assert absent == set() and count > 10


def test_no_page_has_a_blank_to_fill_in():
    blank = re.compile(r"@[A-Z_]+@|\b(?:TODO|TBD|FIXME|XXX)\b")
    pages = [*PAGES, *runs.ROOT.glob("*.md"), *runs.ROOT.glob("configs/**/*.md")]
    found = {page.name: blank.findall(page.read_text()) for page in pages}
    assert not {name: words for name, words in found.items() if words}
