"""`vitssl recipes`: every recipe of every config by purpose, read from the configs.

A config's docstring says what its arguments are, in a block that begins with a line
"Arguments ...:": a line of four spaces holds one name or several, and what they are;
deeper lines go on with it. `freeze_*` and `vitb_{1,4}gpu` stand for several names. What
the block leaves out is taken from the docstring of the recipe's function. A paragraph
"Options ...", and a block "One override away:", are shown as they are. Recipes of equal
values are one, with several names.
"""

import dataclasses
import fnmatch
import functools
import inspect
import itertools
import json
import pathlib
import re
import textwrap

import jax

from vitssl import config, errors
from vitssl.run import experiment, memory

BEGIN = (
    "<!-- Made by `vitssl recipes --write`; a test compares it with the configs. -->"
)


# What a recipe is for: a word to look for, and a heading.
PURPOSES = {
    "folder": "Your own images: --config.data.root=DIR; `vitssl train DIR` picks one",
    "laptop": "A laptop: nothing to download",
    "gpu": "One GPU: published data, at most 256 images a step",
    "papers": "As in the papers: published data, larger steps",
}
OWN = ("folder", "geotiff", "tar", "parquet")  # Sources of anybody's images.
_TIME = re.compile(r"\b(seconds|minutes|an hour)\b")
MEASURED = "memory.json"  # Beside the configs: what `measure` found.


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One recipe of a config: the columns of its table.

    Attributes:
        spec: what --config gets, "configs/hjepa.py:smoke".
        text: what it is.
        length: of the run, in steps or epochs.
        purpose: a key of `PURPOSES`.
        memory: of a step, "1.20 GiB / 64 images", see `measure`; "-" if unknown.
        time: of the run on two cores, as its config says; "-" if it does not.
        also: other names for the same.
    """

    spec: str
    text: str
    model: str
    data: str
    batch: str
    length: str
    purpose: str
    memory: str
    time: str
    also: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The shortest that --config takes for a published config, "hjepa:smoke"."""
        path, _, argument = self.spec.partition(":")
        stem = pathlib.PurePath(path).stem
        return f"{stem}:{argument}" if argument else stem

    @property
    def what(self) -> str:
        """What it is, and its other names."""
        return self.text + (f"; also {', '.join(self.also)}" if self.also else "")


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
    recipes, same = [], _same(configs)
    for name, text in texts.items():
        if name not in same:
            continue
        base = first.setdefault(text, name)
        if name != base:
            found = config.differences(configs[base], configs[name])
            # Another source has other options; nobody chose their defaults.
            changes = [x for x in found if not x.endswith(" before")]
            text = f"{text} ({_some(changes)})"
        made = _recipe(_spec(path, name), text, configs[name])
        recipes.append(dataclasses.replace(made, also=same[name]))
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


def _same(configs) -> dict[str, tuple[str, ...]]:
    """Return {recipe: the names of later ones that have its values}."""
    found = {}
    for name, c in configs.items():
        known = (other for other in found if configs[other] == c)
        found.setdefault(next(known, name), []).append(name)
    return {name: tuple(names[1:]) for name, names in found.items()}


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


def chosen(files, words) -> list[File]:
    """Return the files with the recipes that have all words: of anything said of them.

    Raises:
        UsageError: there is none.
    """

    def fits(r):
        said = " ".join((r.purpose, PURPOSES[r.purpose], r.name, *map(str, r.also)))
        said = f"{said} {r.text} {r.model} {r.data} {r.length}".lower()
        return all(word.lower() in said for word in words)

    found = []
    for file in files:
        if kept := tuple(filter(fits, file.recipes)):
            found.append(dataclasses.replace(file, recipes=kept))
    if not found:
        stems = ", ".join(file.path.stem for file in files)
        raise errors.UsageError(
            f"vitssl recipes {' '.join(words)}: none has all of it; there is: "
            f"{', '.join(PURPOSES)}; {stems}"
        )
    return found


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
    time = _TIME.search(text)
    made = Recipe(
        spec,
        text,
        ", ".join(shape),
        source,
        str(c.batch_size),
        length,
        _purpose(c, needs),
        "-",
        time[1].replace("an hour", "1 hour") if time else "-",
    )
    return dataclasses.replace(made, memory=memory_of(made.name))


def _purpose(c, needs) -> str:
    if c.data.source in OWN:
        return "folder"
    if "data.root" not in needs:
        return "laptop"
    return "gpu" if c.batch_size <= 256 else "papers"


def memory_of(name) -> str:
    """Return the memory of a step, "1.20 GiB / 64 images", or "-"."""
    found = _measured().get(name)
    if not found:
        return "-"
    on = "" if found["on"] == "cpu" else f", {found['on']}"
    return f"{memory.size(found['bytes'])} / {found['images']} images{on}"


@functools.cache
def _measured() -> dict:
    try:
        return json.loads((config.home() / MEASURED).read_text())
    except (OSError, ValueError):
        return {}


def measure(recipes, show=print) -> dict:
    """Compile the steps of recipes here, and keep XLA's count of their memory.

    Returns:
        all that is known: {"hjepa:smoke": {"bytes", "images" at a time, "on"}}.
    """
    from vitssl.run import build, devices

    devices.start()
    found = dict(_measured())
    for recipe in recipes:
        c = _config(*_parts(recipe.spec))
        parts, _ = build.anyhow(experiment.read(_given(c)))
        e = memory.estimate(parts)
        on = jax.default_backend()
        found[recipe.name] = dict(bytes=e.total, images=e.images, on=on)
        show(f"{recipe.name}: {memory.size(e.total)}, {e.images} images at a time")
        place = config.home() / MEASURED  # After each: some take minutes.
        place.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    return found


def _given(c):
    """Return a config with a word for what the user has to give."""
    c = config.without(c, "study") if "study" in c else c
    for key in _needs_weights(c):
        section, _, leaf = key.partition(".")
        c[section][leaf] = "untrained" if section == "teacher" else "anywhere"
    return c


def _parts(spec):
    path, _, name = spec.partition(":")
    return config.find(path), name


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
        "",
        "`vitssl recipes` lists them by purpose, `vitssl recipes WORD ...` those that",
        "have all words; `vitssl recipes --explain=KEY` says what a key means. Memory",
        "is XLA's count of a step, for the images that a device takes at a time; on a",
        "CPU if nothing else is said.",
    ]
    for file in files:
        lines += ["", f"## `{file.path.name}`: {file.title}", ""]
        lines += ["| `--config=` | what | model | data | batch | length | memory |"]
        lines += ["| --- " * 7 + "|"]
        for r in file.recipes:
            cells = [
                f"`{r.spec}`",
                r.what,
                r.model,
                r.data,
                r.batch,
                r.length,
                r.memory,
            ]
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


def text(files, width=100) -> str:
    """Return the recipes for the terminal, by purpose."""
    every = [r for file in files for r in file.recipes]
    name = max(len(r.name) for r in every)
    rows = [(r.name, r.memory, r.time, r) for r in every]
    memory, time = (max([6, *(len(row[i]) for row in rows)]) for i in (1, 2))
    indent = 2 + name + 2
    lines = []
    for purpose, heading in PURPOSES.items():
        own = [row for row in rows if row[3].purpose == purpose]
        if own:
            lines += ["", heading]
            lines += [
                f"  {'recipe':<{name}}  {'memory':<{memory}}  {'time':<{time}}  what"
            ]
        for shown, needs, takes, r in own:
            head = f"  {shown:<{name}}  {needs:<{memory}}  {takes:<{time}}  "
            rest = dict(subsequent_indent=" " * indent)
            lines += textwrap.wrap(r.what, width, initial_indent=head, **rest)
            about = f"{r.model}; {r.data}; batch {r.batch}; {r.length}"
            lines += textwrap.wrap(about, width, initial_indent=" " * indent, **rest)
    return "\n".join(lines[1:])
