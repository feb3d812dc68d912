"""The Dockerfile, read: there is no docker where the tests run."""

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from tests import runs

FILE = runs.ROOT / "launch" / "Dockerfile"
TEXT = FILE.read_text()
PROJECT = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())["project"]


def _steps():
    """Return [(instruction, arguments)]."""
    bare = re.sub(r"^\s*#.*\n", "", TEXT, flags=re.M).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in bare.splitlines() if line.strip()]


STEPS = _steps()
COPIED = [rest.split()[:-1] for step, rest in STEPS if step == "COPY"]


def test_it_has_a_python_that_the_package_is_tested_on():
    (base,) = [rest for step, rest in STEPS if step == "FROM"]
    version = re.fullmatch(r"python:(3\.\d+)-slim", base)[1]
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


def test_its_extras_are_those_of_the_package():
    about = TEXT.partition("\nFROM")[0]
    named = set(re.findall(r"EXTRAS=(\w+)", about))
    listed = re.search(r"by commas: (.*?) \.\.\.", about.replace("\n#", ""))[1]
    named |= set(re.findall(r"[a-z]\w+", re.sub(r"\(.*?\)|older drivers", "", listed)))
    assert {"cuda", "cuda12", "dicom"} <= named
    assert named <= PROJECT["optional-dependencies"].keys()
    assert ("ARG", 'EXTRAS=""') in STEPS  # Without a word it is for CPUs.
    (install,) = [rest for step, rest in STEPS if step == "RUN"]
    assert install.endswith('".${EXTRAS:+[$EXTRAS]}"')


@pytest.mark.parametrize("extras, want", [("", "."), ("cuda,dicom", ".[cuda,dicom]")])
def test_the_extras_become_what_pip_understands(extras, want):
    (install,) = [rest for step, rest in STEPS if step == "RUN"]
    word = f"EXTRAS={extras}; echo {install.split()[-1]}"
    done = subprocess.run(["sh", "-c", word], capture_output=True, text=True)
    assert done.stdout.strip() == want


def test_what_it_copies_is_sent_and_is_enough_for_the_wheel(tmp_path):
    rules = (FILE.with_name("Dockerfile.dockerignore")).read_text().split()
    sent = [rule[1:] for rule in rules if rule.startswith("!")]
    assert rules[0] == "*"
    for name in (name for names in COPIED for name in names):
        source, to = runs.ROOT / name, tmp_path / name
        assert any(fnmatch.fnmatch(name, rule) for rule in sent), name
        to.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, to, ignore=skip)
        else:
            shutil.copy(source, to)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_starts_the_command_and_the_jobset_runs_it():
    (entry,) = [rest for step, rest in STEPS if step == "ENTRYPOINT"]
    assert entry == '["vitssl"]' and "vitssl" in PROJECT["scripts"]
    jobset = (runs.ROOT / "launch/kubernetes/jobset.yaml").read_text()
    assert "docker build -f launch/Dockerfile" in jobset
    assert 'command: ["python", "-m", "vitssl.main"]' in jobset
