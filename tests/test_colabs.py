"""Notebooks: valid, without outputs, and they run from top to bottom."""

import ast
import json
import os
import subprocess
import sys

import pytest

from tests import runs

NOTEBOOKS = sorted((runs.ROOT / "colabs").glob("*.ipynb"))
# Runs the code cells of a notebook in order, showing what a cell ends with.
RUNNER = """
import ast, json, sys
space = {"__name__": "__main__"}
for i, cell in enumerate(json.load(open(sys.argv[1]))["cells"]):
    if cell["cell_type"] != "code":
        continue
    tree = ast.parse("".join(cell["source"]), f"cell {i}")
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {i}", "exec"), space)
    if last is not None:
        shown = eval(compile(ast.Expression(last.value), f"cell {i}", "eval"), space)
        if shown is not None:
            print(f"cell {i} shows a {type(shown).__name__}")
            assert len(shown._repr_png_()) > 2000, f"cell {i}: an empty picture"
"""


def _cells(path, kind):
    cells = json.loads(path.read_text())["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_clean_and_installs_in_its_first_cell(path):
    stored = json.loads(path.read_text())
    assert stored["nbformat"] == 4 and stored["metadata"]["kernelspec"]
    ids = [c["id"] for c in stored["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in stored["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            ast.parse("".join(cell["source"]))
    assert _cells(path, "markdown")[0].startswith("# ")
    assert '"pip", "install"' in _cells(path, "code")[0]
    # The first cell is the same in all of them.
    assert _cells(path, "code")[0] == _cells(NOTEBOOKS[0], "code")[0]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(path)],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=path.parent,
        env={
            **os.environ,
            "PYTHONPATH": str(runs.ROOT),
            "XLA_FLAGS": "",
            "VITSSL_RUNS_DIR": str(tmp_path),
        },
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "shows a" in done.stdout
