"""`vitssl recipes`: every recipe of every config, read from the configs themselves.

A config's docstring says what its arguments are, in a block that begins with a line
"Arguments ...:": a line of four spaces holds one name or several, and what they are;
deeper lines go on with it. A block "One override away:" lists overrides that are
worth knowing.
"""

import dataclasses
import functools
import pathlib
import re

from vitssl import config, errors, experiment

BEGIN = (
    "<!-- Made by `vitssl recipes --write`; a test compares it with the configs. -->"
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One recipe of a config.

    Attributes:
        spec: what --config gets, "configs/hjepa.py:smoke".
        text: what it is.
        method, model, data, batch, length: as in the table.
    """

    spec: str
    text: str
    method: str
    model: str
    data: str
    batch: str
    length: str


@dataclasses.dataclass(frozen=True)
class File:
    """A config file.

    Attributes:
        path: the file.
        title: first line of its docstring.
        recipes: in the order of its RECIPES.
        overrides: ["--config.KEY=VALUE ...    (remark)"] worth knowing.
    """

    path: pathlib.Path
    title: str
    recipes: tuple[Recipe, ...]
    overrides: tuple[str, ...]


def read(folder) -> list[File]:
    """Return all configs of a folder, by name.

    Raises:
        UsageError: there is none; a recipe that its docstring does not explain, or
            one that is explained and not there.
    """
    paths = sorted(pathlib.Path(folder).glob("*.py"))
    if not paths:
        raise errors.UsageError(f"{folder}: no config (*.py) in it")
    return [_file(path) for path in paths]


def _file(path) -> File:
    module = config.module(str(path))
    names = list(module.RECIPES)
    lines = (module.__doc__ or "").splitlines()
    said = arguments(lines)
    for name in sorted(set(names) ^ set(said)):
        what = "explained, but not there" if name in said else "not explained"
        raise errors.UsageError(
            f"{path}: recipe {name or '(none)'!r} is {what}; RECIPES and the block "
            '"Arguments" of the docstring must agree'
        )
    recipes = tuple(_recipe(path, name, said[name]) for name in names)
    overrides = tuple(x.strip() for x in block(lines, "One override away"))
    return File(path, lines[0].rstrip("."), recipes, overrides)


def block(lines, heading) -> list[str]:
    """Return the indented lines below the line that begins with `heading`."""
    found, inside = [], False
    for line in lines:
        if line.startswith(heading):
            inside = True
        elif inside and line.startswith("    "):
            found.append(line)
        elif inside and line.strip():
            break
    return found


def arguments(lines) -> dict[str, str]:
    """Return {recipe: what it is} of a docstring's lines; "" is the one of no name."""
    found, current = {}, []
    for line in block(lines, "Arguments"):
        entry = re.fullmatch(r" {4}(\S.*?)(?: {2,}(\S.*))?", line)
        if entry:
            names = [n.strip() for n in entry[1].split(",")]
            current = ["" if n == "(none)" else n for n in names]
            found |= {name: entry[2] or "" for name in current}
        else:
            for name in current:
                found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _recipe(path, name, text) -> Recipe:
    spec = f"{path.parent.name}/{path.name}" + (f":{name}" if name else "")
    c = experiment.load(f"{path}:{name}" if name else str(path))
    length = f"{c.steps} steps" if c.steps else f"{c.epochs:g} epochs"
    if "study" in c:
        runs = len(c.study.arms) * len(c.study.seeds)
        length = f"{runs} runs, see `study`"
        c = config.without(c, "study")
    data = experiment.read(c).settings.data
    source = data.source + (" (give `data.root`)" if _needs_root(data) else "")
    model = c.get("model", {})
    shape = [model.get("name", "vit")]
    for key, unit in (("width", "wide"), ("depth", "deep"), ("patch", "px patches")):
        if key in model:
            shape.append(f"{_plain(model[key])} {unit}")
    return Recipe(
        spec, text, c.method, ", ".join(shape), source, str(c.batch_size), length
    )


def _plain(value) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _needs_root(data) -> bool:
    return _opens_without_root(data.source) is False and not data.root


@functools.cache
def _opens_without_root(source) -> bool:
    from vitssl.data import sources

    if source == "mixture":
        return True  # Its parts name theirs.
    try:
        sources.open(source, "", "train")
    except (errors.VitsslError, ImportError):
        return False
    return True


def markdown(files) -> str:
    """Return configs/README.md."""
    lines = ["# Recipes", "", BEGIN, ""]
    lines += [
        "`vitssl train --config=configs/FILE.py:NAME`; in a fresh clone",
        "`launch/local.sh --config=...` does the same and installs what it needs.",
        "Any value is one override away: `--config.optim.lr=1e-3`; `--dry_run` prints",
        "all of them, and the memory of a step. Recipes that need `data.root` need the",
        "data set, and the published ones a GPU.",
    ]
    for file in files:
        lines += ["", f"## `{file.path.name}`: {file.title}", ""]
        lines += ["| `--config=` | what | model | data | batch | length |"]
        lines += ["| --- " * 6 + "|"]
        for r in file.recipes:
            cells = (f"`{r.spec}`", r.text, r.model, r.data, r.batch, r.length)
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        if file.overrides:
            shown = [_as_shell(line) for line in file.overrides]
            lines += ["", "One override away:", "", "```sh", *shown, "```"]
    return "\n".join(lines) + "\n"


def _as_shell(line) -> str:
    """Return "--config.X=1    (remark)" as "--config.X=1  # remark"."""
    words, _, remark = line.partition("  ")
    return words + (f"  # {remark.strip(' ()')}" if remark.strip() else "")


def text(files) -> str:
    """Return the recipes for the terminal."""
    lines = []
    for file in files:
        lines += [f"{file.path}: {file.title}"]
        for r in file.recipes:
            lines += [f"  {r.spec}", f"      {r.text}"]
            lines += [f"      {r.model}; {r.data}; batch {r.batch}; {r.length}"]
    return "\n".join(lines)
