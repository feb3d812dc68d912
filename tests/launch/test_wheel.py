"""The wheel, without its clone: recipes, training, predictions and weights."""

import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests import runs

# One process runs every command: half the time of each is its imports.
SCRIPT = """
import json, sys
import vitssl
from vitssl import cli
codes = [cli.main(words) for words in json.load(open(sys.argv[1]))]
print("RESULT", json.dumps([vitssl.__file__, codes]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return a folder with what the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=runs.ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder / "site")
    return folder / "site"


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
    assert "configs/hjepa.py:smoke" in done.stdout
    assert "hjepa, knn" in done.stderr.partition("there is: ")[2]
    assert len((tmp_path / "classes.csv").read_text().splitlines()) == 4
