"""What users import says its types, to them and to their checkers."""

import ast
import tomllib

import pytest

import vitssl
from tests import runs

CHECKED = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
FILES = [
    file
    for name in CHECKED["files"]
    for file in sorted((runs.ROOT / name).rglob("*.py")) or [runs.ROOT / name]
]


def _bare(tree, of=""):
    """Yield public functions of a module or class that lack a type."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _bare(node, f"{node.name}.")
        if not isinstance(node, ast.FunctionDef):
            continue
        if node.name.startswith("_") and node.name not in ("__call__", "__init__"):
            continue
        marks = [d.id for d in node.decorator_list if isinstance(d, ast.Name)]
        a = node.args
        given = [*a.posonlyargs, *a.args]
        if of and "staticmethod" not in marks:
            del given[0]
        given += [*a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        missing = [x.arg for x in given if x.annotation is None]
        if node.returns is None and node.name != "__init__":
            missing.append("what it returns")
        if missing:
            yield f"{of}{node.name}: {', '.join(missing)}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_public_functions_say_all_their_types(file):
    assert list(_bare(ast.parse(file.read_text()))) == []


def test_checkers_see_the_names_that_there_are():
    stub = ast.parse((runs.ROOT / "vitssl/__init__.pyi").read_text())
    seen = {
        name.asname: f"{node.module}.{name.name}"
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    real = {name: getattr(vitssl, name) for name in vitssl.__all__}
    assert seen == {n: f"{x.__module__}.{x.__qualname__}" for n, x in real.items()}
    with pytest.raises(AttributeError, match="'vitssl' has no attribute 'lod'"):
        vitssl.lod  # noqa: B018
