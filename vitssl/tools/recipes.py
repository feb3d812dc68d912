"""`vitssl recipes`: every recipe of every config, read from the configs themselves.

A config's docstring says what its arguments are, in a block that begins with a line
"Arguments ...:": a line of four spaces holds one name or several, and what they are;
deeper lines go on with it. `freeze_*` and `vitb_{1,4}gpu` stand for several names. What
the block leaves out is taken from the docstring of the recipe's function. A paragraph
"Options ...", and a block "One override away:", are shown as they are.
"""

import dataclasses
import fnmatch
import functools
import inspect
import itertools
import pathlib
import re

from vitssl import config, errors
from vitssl.run import experiment

BEGIN = (
    "<!-- Made by `vitssl recipes --write`; a test compares it with the configs. -->"
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One recipe of a config: the columns of its table."""

    spec: str  # What --config gets, "configs/hjepa.py:smoke".
    text: str  # What it is.
    model: str
    data: str
    batch: str
    length: str


@dataclasses.dataclass(frozen=True)
class File:
    """A config file."""

    path: pathlib.Path
    title: str  # The first line of its docstring.
    recipes: tuple[Recipe, ...]  # In the order of its RECIPES.
    options: str  # What may follow a name, in words.
    overrides: tuple[str, ...]  # "--config.KEY=VALUE ...    (remark)".
    absent: tuple[str, ...]  # Names that are explained, but not there.


def read(folder) -> list[File]:
    """Return all configs of a folder, by name.

    Raises:
        UsageError: there is none.
    """
    paths = config.files(folder)
    if not paths:
        raise errors.UsageError(f"{folder}: no config (*.py) in it")
    return [_file(path) for path in paths]


def _file(path) -> File:
    module = config.module(str(path))
    lines = (module.__doc__ or "").splitlines()
    said = arguments(lines)
    configs = {name: _config(path, name) for name in module.RECIPES}
    texts = {n: explain(n, said, made) for n, made in module.RECIPES.items()}
    first = {}  # Of the recipes with one text, to say how the others differ from it.
    recipes = []
    for name, text in texts.items():
        base = first.setdefault(text, name)
        if name != base:
            found = config.differences(configs[base], configs[name])
            # Another source has other options; nobody chose their defaults.
            changes = [x for x in found if not x.endswith(" before")]
            text = f"{text} ({_some(changes)})"
        recipes.append(_recipe(_spec(path, name), text, configs[name]))
    recipes = tuple(recipes)
    return File(
        path,
        lines[0].rstrip("."),
        recipes,
        paragraph(lines, "Options"),
        tuple(x.strip() for x in block(lines, "One override away")),
        # Patterns stand for whatever there is.
        tuple(n for n in said if n not in module.RECIPES and "*" not in n),
    )


def explain(name, said, function) -> str:
    """Return what a recipe is, from the block of arguments or its function; or ""."""
    if name in said:
        return said[name]
    for pattern, text in said.items():
        if "*" in pattern and fnmatch.fnmatchcase(name, pattern):
            return text
    first = (inspect.getdoc(function) or "").partition("\n")[0]
    if first:
        return first.removeprefix("Return ").rstrip(".")
    mentions = (text for text in said.values() if re.search(rf"\b{name}\b", text))
    return next(mentions, "")


def paragraph(lines, heading) -> str:
    """Return the paragraph that begins with `heading` as one line, or ""."""
    found = []
    for line in lines:
        if found and not line.strip():
            break
        if found or line.startswith(heading):
            found.append(line.strip())
    return " ".join(found)


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
            names = re.split(r",\s*(?![^{]*})", entry[1])
            names = itertools.chain.from_iterable(map(_braces, names))
            current = ["" if n == "(none)" else n for n in names]
            found |= {name: entry[2] or "" for name in current}
        else:
            for name in current:
                found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _braces(name) -> list[str]:
    """Return "a1", "a2" of "a{1,2}"."""
    head, brace, rest = name.strip().partition("{")
    if not brace:
        return [head]
    inside, _, tail = rest.partition("}")
    return [f"{head}{one}{tail}" for one in inside.split(",")]


def _spec(path, name) -> str:
    return f"{path.parent.name}/{path.name}" + (f":{name}" if name else "")


def _config(path, name):
    return experiment.load(f"{path}:{name}" if name else str(path))


def _some(changes, most=4) -> str:
    """Return "key=new, ..." of "key: old -> new" lines."""
    if not changes:
        return "the same"
    words = [c.replace(": ", "=", 1).split("=", 1) for c in changes]
    shown = [f"{key}={value.split(' -> ')[-1]}" for key, value in words[:most]]
    return ", ".join(shown) + (", ..." if len(words) > most else "")


def _recipe(spec, text, c) -> Recipe:
    length = f"{c.steps} steps" if c.steps else f"{c.epochs:g} epochs"
    if "study" in c:
        runs = len(c.study.arms) * len(c.study.seeds)
        length = f"{runs} runs, see `study`"
        c = config.without(c, "study")
    needs = ["data.root"] if _needs_root(c.data) else []
    needs += _needs_weights(c)
    given = f" (give {' and '.join(f'`{n}`' for n in needs)})" if needs else ""
    source = c.data.source + given
    model = c.get("model", {})
    shape = [model.get("name", "vit")]
    for key, unit in (("width", "wide"), ("depth", "deep"), ("patch", "px patches")):
        if key in model:
            shape.append(f"{_plain(model[key])} {unit}")
    return Recipe(spec, text, ", ".join(shape), source, str(c.batch_size), length)


def _plain(value) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _needs_root(data) -> bool:
    return not data.root and not _opens_without_root(data.source)


def _needs_weights(c) -> list[str]:
    """Return the keys that a recipe makes no sense without, and says so."""
    try:
        experiment.read(c)
    except errors.UsageError as e:
        return [key for key in ("init.from", "teacher.from") if key in str(e)]
    return []


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
            cells = (f"`{r.spec}`", *dataclasses.astuple(r)[1:])
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        if file.options:
            lines += ["", file.options]
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
