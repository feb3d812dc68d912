"""Run a notebook from top to bottom, and keep what it shows.

    python -m tests.notebooks colabs/quickstart.ipynb [--store]

Cells are run in order by Python itself; what a cell prints and the picture that it ends
with are its outputs, as Jupyter would store them. --store writes them into the file.
"""

import ast
import base64
import contextlib
import io
import json
import os
import pathlib
import sys


def run(path) -> dict:
    """Return a notebook with the outputs of a run.

    Raises:
        AssertionError: a cell shows a picture that is empty.
    """
    path = pathlib.Path(path).absolute()
    made, space = json.loads(path.read_text()), {"__name__": "__main__"}
    os.chdir(path.parent)
    code = [cell for cell in made["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        cell["outputs"], cell["execution_count"] = _outputs(cell, space), number
    return made


def _outputs(cell, space) -> list:
    """Run a cell; return its outputs."""
    name, text = f"cell {cell['id']}", io.StringIO()
    tree = ast.parse("".join(cell["source"]), name)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(text):
        exec(compile(tree, name, "exec"), space)
        shown = None
        if last is not None:
            shown = eval(compile(ast.Expression(last.value), name, "eval"), space)
    outputs, said = [], _lines(text.getvalue())
    if said:
        outputs.append(dict(name="stdout", output_type="stream", text=said))
    if shown is not None:
        print(f"{name} shows a {type(shown).__name__}")
        png = shown._repr_png_()
        assert len(png) > 2000, f"{name}: an empty picture"
        data = {"image/png": base64.b64encode(png).decode()}
        outputs.append(dict(data=data, metadata={}, output_type="display_data"))
    return outputs


def _lines(text) -> list[str]:
    """Return the lines of a text as a terminal ends up with them, without paths."""
    home, runs = pathlib.Path(__file__).parents[1], os.environ.get("VITSSL_RUNS_DIR")
    lines = [line.rpartition("\r")[2].rstrip() for line in text.split("\n")]
    text = "\n".join(lines).replace(f"{home}/", "").strip("\n")
    text = text.replace(runs, "runs") if runs else text
    return (text + "\n").splitlines(keepends=True) if text else []


def write(path, made) -> None:
    """Write a notebook as Jupyter does."""
    text = json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True)
    pathlib.Path(path).write_text(text + "\n")


if __name__ == "__main__":
    where = pathlib.Path(sys.argv[1]).absolute()
    found = run(where)
    if "--store" in sys.argv[2:]:
        write(where, found)
