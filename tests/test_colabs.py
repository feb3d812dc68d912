"""Notebooks: valid, and they run from top to bottom; some keep what they showed."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest

from tests import runs

NOTEBOOKS = sorted((runs.ROOT / "colabs").glob("*.ipynb"))


def _cells(path, kind):
    cells = json.loads(path.read_text())["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_clean_and_installs_in_its_first_cell(path):
    stored = json.loads(path.read_text())
    assert stored["nbformat"] == 4 and stored["metadata"]["kernelspec"]
    ids = [c["id"] for c in stored["cells"]]
    assert len(set(ids)) == len(ids)
    code = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        ast.parse("".join(cell["source"]))
        # What they showed is kept, to be read where they are not run.
        assert cell["execution_count"] == number
        text = json.dumps([o for o in cell["outputs"] if "text" in o])
        assert "Error" not in text.replace("UsageError", "")
        assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", text)
    assert path.stat().st_size < 1_500_000
    kinds = {o["output_type"] for cell in code for o in cell["outputs"]}
    assert kinds == {"stream", "display_data"}
    head = _cells(path, "markdown")[0]
    assert head.startswith("# ")
    assert '"pip", "install"' in _cells(path, "code")[0]
    # The first cell is the same in all of them.
    assert _cells(path, "code")[0] == _cells(NOTEBOOKS[0], "code")[0]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.notebooks", str(path)],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=runs.ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(runs.ROOT),
            "XLA_FLAGS": "",
            "VITSSL_RUNS_DIR": str(tmp_path),
        },
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "shows a" in done.stdout
