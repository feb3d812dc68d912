"""How large the package is and what stands on what, by `ast`: `python -m tests.house`.

`python -m tests.house "arrows up"` lists what a row counts. `CEILINGS` holds every row
to what has been reached; `tests/test_house.py` fails where one is passed. The numbers
under "was" are those of 2026-11-27, before the rooms.
"""

import ast
import collections
import dataclasses
import functools
import pathlib
import sys
from typing import NamedTuple

from tests import sources

ROOT = pathlib.Path(__file__).parents[1]
ROOMY = {"method", "objective", "masks", "views", "names", "pictures"}
JAX = {"jax", "flax", "optax", "orbax", "chex"}

# An import goes down, or stays on its level. "" is `vitssl/__init__.py`.
LEVELS = (
    ("errors", "config", "disk", "progress", "ranges", "sizes", "tree"),
    ("ops", "data"),
    ("losses", "optim"),
    ("models",),
    ("evals", "pictures"),
    ("methods", "convert"),
    ("run",),
    ("tools", "bench"),
    ("", "cli", "main", "__main__"),
)
LEVEL = {name: level for level, row in enumerate(LEVELS) for name in row}

# From the command to a method's loss, and on to H-JEPA's scalar. A function that only
# hands its arguments on counts; a lambda inside one does not.
TO_LOSS = (
    "main:main",
    "main:_run",
    "run.loop:run",
    "run.loop:_Loop.go",
    "run.step:Compiled.get",
    "run.step:make.step",
    "methods.base:Embedding.loss",
)
TO_SCALAR = (
    *TO_LOSS,
    "methods.hjepa.method:HJEPA.compare",
    "methods.hjepa.forward:measure",
    "methods.hjepa.forward:compare",
    "losses.regression:level_loss",
)


class Row(NamedTuple):
    """A number before the rooms, the most it may be now, and what it shall reach."""

    was: int
    ceiling: int
    target: int | None = None


CEILINGS = {
    "lines": Row(40_928, 55_147, 31_000),
    "code lines": Row(25_232, 35_226, 20_500),
    "files": Row(237, 300, 165),
    "files at the top": Row(31, 11),
    "modules with one importer": Row(101, 96, 45),
    "functions with one reference": Row(565, 811, 300),
    "floors": Row(13, 19, 9),
    "floors, imports in functions too": Row(14, 17),
    "circles": Row(1, 0, 0),
    "arrows up": Row(8, 0, 0),
    "host modules that reach jax": Row(1, 0, 0),
    "base names in several folders": Row(25, 1, 3),
    "calls from main to method.loss": Row(9, 6, 6),
    "calls from main to H-JEPA's scalar": Row(14, 10, 10),
    "lines of check()": Row(1_058, 759, 350),
    "lines of configs": Row(2_346, 3_075, 1_400),
    "lines of the largest file": Row(446, 492),
    "lines of the largest function": Row(74, 77),
}


@dataclasses.dataclass(frozen=True)
class House:
    """A package, measured.

    Args:
        package: its folder.
        configs: folder of the config files.
    """

    package: pathlib.Path
    configs: pathlib.Path

    @functools.cached_property
    def modules(self) -> dict[str, sources.Module]:
        found = {}
        for path in sorted(self.package.rglob("*.py")):
            file = path.relative_to(self.package)
            parts = file.with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = sources.Module(name, file, path.read_text())
        return found

    def own(self, name: str) -> str | None:
        """Return the module of this package that an imported name is, or is in."""
        first, _, rest = name.partition(".")
        if first != self.package.name:
            return None
        return rest if rest in self.modules else rest.rpartition(".")[0]

    def graph(self, *, inside=False) -> dict[str, set[str]]:
        """Return {module: those it imports}; `inside`: those in functions too.

        Imports under `if TYPE_CHECKING` count; that a submodule runs the `__init__` of
        its packages does not.
        """
        found = {}
        for m in self.modules.values():
            names = (self.own(i.name) for i in m.imports if inside or not i.inside)
            found[m.name] = {n for n in names if n is not None} - {m.name}
        return found

    # Rows: a number, or the list of what is counted.

    def lines(self):
        return sum(len(m.text.splitlines()) for m in self.modules.values())

    def code(self):
        return sum(m.code for m in self.modules.values())

    def files(self):
        return [str(m.file) for m in self.modules.values()]

    def at_the_top(self):
        """Files that lie directly in the package's folder."""
        return [name for name in self.files() if "/" not in name]

    def single_importer(self):
        """Modules that one other module imports, anywhere in it."""
        importers = collections.defaultdict(set)
        for name, others in self.graph(inside=True).items():
            for other in others:
                importers[other].add(name)
        return [
            f"{name} <- {min(found)}"
            for name, found in sorted(importers.items())
            if len(found) == 1
        ]

    def one_reference(self):
        """Functions and methods whose name is used once beside its definition.

        A private name (`_x`) is counted in its own file, any other in the whole
        package, whatever it stands for there. Functions in functions and `__x__`
        do not count.
        """
        total = sum(
            (m.references for m in self.modules.values()), collections.Counter()
        )
        found = []
        for m in self.modules.values():
            for f in m.functions:
                name = f.node.name
                nested = isinstance(f.parent, ast.FunctionDef)
                count = m.references if name.startswith("_") else total
                if not nested and not name.startswith("__") and count[name] == 1:
                    found.append(f"{m.file}:{f.node.lineno} {f.path}")
        return found

    def floors(self):
        """Modules on the longest way down the imports at the heads of modules."""
        return sources.longest(self.graph())

    def floors_inside(self):
        """The same, with imports in functions."""
        return sources.longest(self.graph(inside=True))

    def circles(self):
        """Sets of modules that import each other, at their heads."""
        circles = [sorted(c) for c in sources.components(self.graph()) if len(c) > 1]
        return [" <-> ".join(c) for c in circles]

    def arrows_up(self):
        """Imports, in functions too, from a lower level of `LEVELS` to a higher one."""
        found = []
        for m in self.modules.values():
            for i in m.imports:
                target = self.own(i.name)
                if target is not None and _level(target) > _level(m.name):
                    found.append(f"{m.file}:{i.line} -> {target}")
        return found

    def reach_jax(self):
        """Modules of `data` and `masks`, `views` of rooms whose import imports jax.

        Only heads of modules count, of the packages that they are in too.
        """
        return [
            f"{name}: {how}"
            for name in self.modules
            if _host_side(name)
            if (how := self._way_to_jax(name, set()))
        ]

    def _way_to_jax(self, name, seen) -> str:
        """Return "a > b > jax", how importing a module imports jax, or ""."""
        seen.add(name)
        parts = name.split(".")
        above = [".".join(parts[:k]) for k in range(1, len(parts))]
        heads = [i.name for i in self.modules[name].imports if not i.inside]
        if any(h.partition(".")[0] in JAX for h in heads):
            return f"{name} > jax"
        for other in [*above, *map(self.own, heads)]:
            if other in self.modules and other not in seen:
                if way := self._way_to_jax(other, seen):
                    return f"{name} > {way}"
        return ""

    def repeated_names(self):
        """File names in two folders or more, but for those every room may have."""
        folders = collections.defaultdict(set)
        for m in self.modules.values():
            stem, folder = m.file.stem, m.file.parent
            in_room = len(folder.parts) == 2 and folder.parts[0] == "methods"
            if not stem.startswith("__") and not (in_room and stem in ROOMY):
                folders[stem].add(str(folder))
        return [
            f"{stem}: {', '.join(sorted(found))}"
            for stem, found in sorted(folders.items())
            if len(found) > 1
        ]

    def calls(self, path):
        """The calls along `path`; every function on it must exist."""
        for step in path:
            module, _, function = step.partition(":")
            known = self.modules.get(module)
            if known is None or function not in {f.path for f in known.functions}:
                raise LookupError(f"{step}: moved? write the way as it is now")
        return list(path[1:])

    def check_lines(self):
        """Lines of methods named `check*` or `_check*`: the faults of configs."""
        return sum(
            f.lines
            for m in self.modules.values()
            for f in m.functions
            if isinstance(f.parent, ast.ClassDef)
            and f.node.name.lstrip("_").startswith("check")
        )

    def config_lines(self):
        """Lines of `configs/*.py`."""
        paths = self.configs.glob("*.py")
        return sum(len(path.read_text().splitlines()) for path in paths)

    def largest_file(self):
        return max(len(m.text.splitlines()) for m in self.modules.values())

    def largest_function(self):
        return max(f.lines for m in self.modules.values() for f in m.functions)

    def measure(self) -> dict:
        """Return {row of `CEILINGS`: a number, or the list of what is counted}."""
        return {
            "lines": self.lines(),
            "code lines": self.code(),
            "files": self.files(),
            "files at the top": self.at_the_top(),
            "modules with one importer": self.single_importer(),
            "functions with one reference": self.one_reference(),
            "floors": self.floors(),
            "floors, imports in functions too": self.floors_inside(),
            "circles": self.circles(),
            "arrows up": self.arrows_up(),
            "host modules that reach jax": self.reach_jax(),
            "base names in several folders": self.repeated_names(),
            "calls from main to method.loss": self.calls(TO_LOSS),
            "calls from main to H-JEPA's scalar": self.calls(TO_SCALAR),
            "lines of check()": self.check_lines(),
            "lines of configs": self.config_lines(),
            "lines of the largest file": self.largest_file(),
            "lines of the largest function": self.largest_function(),
        }


def _level(name: str) -> int:
    """Return the level of the room that a module is in."""
    # `python -m vitssl.convert` is a command, whatever room it is in.
    room = "__main__" if name.endswith(".__main__") else name.partition(".")[0]
    if room not in LEVEL:
        raise LookupError(f"{name}: no level; write {room!r} into LEVELS")
    return LEVEL[room]


def _host_side(name: str) -> bool:
    parts = name.split(".")
    in_room = parts[0] == "methods" and len(parts) == 3
    return parts[0] == "data" or (in_room and parts[-1] in ("masks", "views"))


def number(value) -> int:
    """Return a row's number."""
    return value if isinstance(value, int) else len(value)


def table(found: dict) -> str:
    """Return all rows as text."""
    lines = [f"{'':34}{'was':>8}{'now':>8}{'ceiling':>9}{'target':>8}"]
    for name, row in CEILINGS.items():
        target = "" if row.target is None else row.target
        now = number(found[name])
        lines.append(f"{name:34}{row.was:8}{now:8}{row.ceiling:9}{target:>8}")
    return "\n".join(lines)


def measure() -> dict:
    """Return the rows of this project's package."""
    return House(ROOT / "vitssl", ROOT / "configs").measure()


if __name__ == "__main__":
    rows = measure()
    if sys.argv[1:]:
        listed = rows[sys.argv[1]]
        print(listed if isinstance(listed, int) else "\n".join(listed))
    else:
        print(table(rows))
