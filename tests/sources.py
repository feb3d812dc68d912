"""Source files as `ast` sees them, and graphs: what `tests.house` measures with."""

import ast
import collections
import dataclasses
import functools
import pathlib
from typing import NamedTuple


class Import(NamedTuple):
    """One name that a module imports: "jax", "vitssl.methods.hjepa.masks"."""

    name: str
    line: int
    inside: bool  # A function: done when it is called.


class Function(NamedTuple):
    """A function, a method or a function in a function ("make.step")."""

    path: str
    node: ast.FunctionDef
    parent: ast.AST

    @property
    def lines(self) -> int:
        return self.node.end_lineno - self.node.lineno + 1


@dataclasses.dataclass(frozen=True)
class Module:
    """A file of the package.

    Attributes:
        name: dotted, without the package: "data.masks"; "data" of its `__init__`.
        file: path from the package.
        text: its source.
    """

    name: str
    file: pathlib.PurePath
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @functools.cached_property
    def imports(self) -> tuple[Import, ...]:
        """`from vitssl.data import masks` imports "vitssl.methods.hjepa.masks"."""
        return tuple(_imports(self.tree, inside=False))

    @functools.cached_property
    def functions(self) -> tuple[Function, ...]:
        return tuple(_functions(self.tree, ""))

    @functools.cached_property
    def references(self) -> collections.Counter:
        """How often a name stands in the code, bare or behind a dot; not in imports."""
        nodes = list(ast.walk(self.tree))
        found = collections.Counter(n.id for n in nodes if isinstance(n, ast.Name))
        found.update(n.attr for n in nodes if isinstance(n, ast.Attribute))
        return found

    @functools.cached_property
    def code(self) -> int:
        """Lines that are not blank, a comment alone or part of a docstring."""
        documented = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                first = node.body[0] if node.body else None
                if ast.get_docstring(node, clean=False) is not None:
                    documented |= set(range(first.lineno, first.end_lineno + 1))
        lines = enumerate(map(str.strip, self.text.splitlines()), 1)
        return sum(
            1 for i, x in lines if x and not x.startswith("#") and i not in documented
        )


def _imports(node, inside):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(a.name, child.lineno, inside) for a in child.names)
        elif isinstance(child, ast.ImportFrom):
            names = (f"{child.module}.{a.name}" for a in child.names)
            yield from (Import(name, child.lineno, inside) for name in names)
        else:
            within = inside or isinstance(child, ast.FunctionDef | ast.Lambda)
            yield from _imports(child, within)


def _functions(node, path):
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.FunctionDef | ast.ClassDef)
        inner = f"{path}.{child.name}".lstrip(".") if named else path
        if isinstance(child, ast.FunctionDef):
            yield Function(inner, child, node)
        yield from _functions(child, inner)


def components(graph) -> list[set[str]]:
    """Return the strongly connected components of a graph (Tarjan), callees first."""
    number, low, stack, found = {}, {}, [], []

    def visit(v):
        number[v] = low[v] = len(number)
        stack.append(v)
        for w in sorted(graph[v]):
            if w not in number:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in stack:
                low[v] = min(low[v], number[w])
        if low[v] == number[v]:
            at = stack.index(v)
            found.append(set(stack[at:]))
            del stack[at:]

    for v in sorted(graph):
        if v not in number:
            visit(v)
    return found


def longest(graph) -> list[str]:
    """Return the longest path of a graph; a circle is one stop of it."""
    best = {}
    for component in components(graph):
        below = {w for v in component for w in graph[v]} - component
        rest = max((best[w] for w in sorted(below)), key=len, default=[])
        path = [" <-> ".join(sorted(component)), *rest]
        best |= dict.fromkeys(component, path)
    return max(best.values(), key=len)
