"""The wheel, without its clone: recipes, training, predictions and weights."""

import email
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile

import markdown_it
import numpy as np
import pytest
import trove_classifiers
from packaging import requirements, specifiers
from PIL import Image

import vitssl
from tests import runs

# One process runs every command: half the time of each is its imports.
SCRIPT = """
import json, sys
import vitssl
from vitssl import cli
codes = [cli.main(words) for words in json.load(open(sys.argv[1]))]
print("RESULT", json.dumps([vitssl.__file__, codes]))
"""


def _build(root, folder, kind="wheel", ending="*.whl"):
    """Build the wheel of a clone, or its sdist, into a folder; return it."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", folder]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (made,) = folder.glob(ending)
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return _build(runs.ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel):
    """Return a folder with what the wheel installs."""
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(wheel.parent / "site")
    return wheel.parent / "site"


@pytest.fixture(scope="module")
def about(site):
    (folder,) = site.glob("*.dist-info")
    return email.message_from_string((folder / "METADATA").read_text("utf-8"))


def test_the_metadata_are_those_of_the_package(about):
    assert (about["Name"], about["Version"]) == ("vitssl", vitssl.__version__)
    assert about["License-Expression"] == "Apache-2.0"
    known = set(trove_classifiers.classifiers)
    said = about.get_all("Classifier")
    assert set(said) <= known
    lowest = specifiers.SpecifierSet(about["Requires-Python"])
    tried = [c.rpartition(" ")[2] for c in said if re.search(r"3\.\d+$", c)]
    assert tried == ["3.11", "3.12"] and all(version in lowest for version in tried)
    needs = map(requirements.Requirement, about.get_all("Requires-Dist"))
    assert all(need.specifier for need in needs)


def test_the_readme_renders_on_a_package_index(about):
    assert about["Description-Content-Type"] == "text/markdown"
    parsed = markdown_it.MarkdownIt("commonmark").enable("table")
    tokens = parsed.parse(about.get_payload())
    inside = [token for block in tokens for token in block.children or ()]
    assert [t.content for t in tokens if t.type == "inline"][0] == "vitssl"
    assert "table_open" in {t.type for t in tokens}
    assert not [t for t in (*tokens, *inside) if t.type.startswith("html")]
    targets = [str(t.attrs.get("href") or t.attrs.get("src") or "") for t in inside]
    assert not [t for t in targets if t and not t.startswith(("https://", "#"))]
    assert "docs/images.md" in about.get_payload()  # The words of a link stay.


def test_the_sdist_builds_the_same_wheel(wheel, tmp_path):
    command = [
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "-t",
        "sdist",
        "-d",
        tmp_path,
    ]
    subprocess.run(command, cwd=runs.ROOT, check=True, capture_output=True)
    (packed,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path, filter="data")
    (clone,) = (path for path in tmp_path.iterdir() if path.is_dir())
    again = _build(clone, tmp_path)
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        sums = [{i.filename: i.CRC for i in x.infolist()} for x in (first, second)]
    assert sums[0] == sums[1]
    for name in ("CITATION.cff", "CONTRIBUTING.md", "tests/runs.py", ".ci/run"):
        assert (clone / name).is_file()


def test_the_wheel_carries_configs_the_batch_script_and_types(site):
    names = {p.relative_to(site).as_posix() for p in site.rglob("*") if p.is_file()}
    assert {"vitssl/py.typed", "vitssl/__init__.pyi"} <= names
    assert "vitssl/launch/slurm.sbatch" in names
    assert "vitssl/run/accelerators/h200.json" in names
    wanted = {p.relative_to(runs.ROOT) for p in (runs.ROOT / "configs").glob("*.py")}
    assert {f"vitssl/{path.as_posix()}" for path in wanted} <= names
    assert not [n for n in names if n.startswith(("tests", "configs"))]


@pytest.mark.slow
def test_the_wheel_trains_predicts_and_converts_from_any_folder(site, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        grey = np.full((24, 24), 40 * i, np.uint8)
        Image.fromarray(grey).save(images / f"{i}.png")
    commands = [
        ["recipes"],
        ["train", "--config=hjepa:smoke", "--workdir=ours"],
        ["--config", "configs/finetune_vit.py:smoke", "--workdir=tuned"],
        ["predict", "tuned", "--images=images", "--to=classes.csv"],
        ["convert", "export", "ours", "--to=encoder.safetensors"],
        ["convert", "import", "encoder.safetensors", "--to=back"],
        ["train", "--config=nothing:smoke"],
    ]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "commands.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "RESULT" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    file, codes = json.loads(done.stdout.rpartition("RESULT ")[2])
    assert file == str(site / "vitssl/__init__.py")
    assert codes == [0, 0, 0, 0, 0, 0, 2], done.stderr[-3000:]
    assert "hjepa:folder" in done.stdout
    assert "hjepa, knn" in done.stderr.partition("there is: ")[2]
    assert len((tmp_path / "classes.csv").read_text().splitlines()) == 4
