"""`vitssl recipes --explain=KEY`: what a config key means, from the code that reads it.

A key is a field of a section's class; what it means stands in the block "Attributes:"
of its docstring. One name may be several keys, as `model.depths` of an HViT and of a
ResNet.
"""

import dataclasses
import functools
import inspect
import re
import textwrap
import typing

from vitssl import config, errors, ranges
from vitssl.data import sources
from vitssl.methods import table
from vitssl.models import MODELS
from vitssl.run import experiment


@dataclasses.dataclass(frozen=True)
class Key:
    """One key: whose it is, what it means, accepts, and is if nobody says.

    Attributes:
        of: what has this key: "every run", "method=hjepa", "model.name=vit".
        cls: the class of its section, or a source's module.
        default: `dataclasses.MISSING` if a config has to state it.
    """

    of: str
    cls: object
    annotation: object
    default: object
    meaning: str

    def lines(self) -> list[str]:
        """Return it as text."""
        default = (
            "none; a recipe has to state it"
            if self.default is dataclasses.MISSING
            else repr(self.default)
        )
        wants = "" if self.annotation is None else ranges.describe(self.annotation)
        rows = [("type", wants), ("default", default)]
        said = textwrap.wrap(self.meaning, 84) or ["(its docstring does not say)"]
        return [f"  {line}" for line in said] + [
            f"    {name:<8} {value}" for name, value in rows if value
        ]


def explain(key: str, folder) -> str:
    """Return all that there is to say about a key, and which recipes set it.

    Raises:
        UsageError: no such key; the message names the nearest.
    """
    key = key.removeprefix("--").removeprefix("config.")
    tree = _tree()
    if key in tree:
        return "\n".join([key, *_section(key, tree)])
    section, _, leaf = key.rpartition(".")
    found = tree.get(section, {}).get(leaf)
    if not found:
        known = [f"{s}.{k}".lstrip(".") for s, keys in tree.items() for k in keys]
        raise errors.UsageError(f"{key}: {config.unknown(key, [*tree, *known])}")
    lines = [key]
    for meaning, same in _alike(found):
        lines += ["", f"  {', '.join(k.of for k in same)}:"] if len(found) > 1 else []
        lines += meaning
    return "\n".join([*lines, *_settings(key, folder)])


def _alike(found):
    """Yield (text, keys) of keys that say the same."""
    groups = {}
    for one in found:
        groups.setdefault(tuple(one.lines()), []).append(one)
    for text, keys in groups.items():
        yield list(text), keys


def _section(name, tree):
    """Yield a line per key of a section."""
    for leaf, found in tree[name].items():
        first = found[0].meaning.partition(". ")[0]
        first = textwrap.shorten(first, 90, placeholder=" ...")
        yield f"  {leaf:<22} {first}".rstrip()


@functools.cache
def _tree() -> dict[str, dict[str, list[Key]]]:
    """Return {section: {key: [Key]}} of everything that a config may hold."""
    tree = {}
    _add(tree, "", experiment.Settings, "every run")
    for name, cls in table.METHODS.items():
        for section, (annotation, _) in config.schema(cls).items():
            kinds = typing.get_args(annotation) or (annotation,)
            for kind in kinds if section != "run" else ():
                models = [m for m, known in MODELS.items() if known is kind]
                of = f"model.name={models[0]}" if models else f"method={name}"
                if dataclasses.is_dataclass(kind):
                    _add(tree, section, kind, of)
    for name in sources.SOURCES:
        for leaf, default in sources.options_of(name).items():
            if leaf == "channels":
                continue  # It is data.channels.
            meaning = _meaning(sources.SOURCES[name], leaf)
            one = Key(f"data.source={name}", name, None, default, meaning)
            tree.setdefault(config.OPEN, {}).setdefault(leaf, []).append(one)
    return tree


def _add(tree, section, cls, of):
    """Put the keys of a class at a section, and those of the sections in it."""
    for leaf, (annotation, default) in config.schema(cls).items():
        where = f"{section}.{leaf}".lstrip(".")
        if dataclasses.is_dataclass(annotation):
            _add(tree, where, annotation, of)
        elif where != config.OPEN:
            known = tree.setdefault(section, {}).setdefault(leaf, [])
            if all(one.of != of for one in known):
                known.append(Key(of, cls, annotation, default, _meaning(cls, leaf)))


def _meaning(cls, leaf) -> str:
    """Return what a docstring says of a key: of a class or of one it is made from."""
    for one in inspect.getmro(cls) if inspect.isclass(cls) else (cls,):
        found = attributes(inspect.getdoc(one) or "")
        if leaf in found:
            return found[leaf]
        # What goes with another key is told there.
        for name, text in found.items():
            if re.search(rf"\b{leaf}\b", text):
                return f"see {name}: {text}"
    return ""


def attributes(doc: str) -> dict[str, str]:
    """Return {name: what it is} of the blocks "Attributes:" and "Args:" of a docstring.

    `a, b: text` is of both; deeper lines go on with it.
    """
    found, current, inside = {}, [], False
    for line in doc.splitlines():
        if re.fullmatch(r"\s*(Attributes|Args):", line):
            inside = True
        elif inside and line.strip() and not line.startswith(" "):
            inside = False
        entry = re.fullmatch(r" {4}([a-z_]\w*(?:, [a-z_]\w*)*): (.*)", line)
        if inside and entry:
            current = [name.removesuffix("_") for name in entry[1].split(", ")]
            found |= {name: entry[2] for name in current}
        elif inside and current and line.startswith(" " * 8):
            found |= {name: f"{found[name]} {line.strip()}" for name in current}
        elif not line.strip():
            current = []
    return found


def _settings(key, folder):
    """Yield which recipes state a key, by value."""
    values = {}
    for path in config.files(folder):
        for name in config.module(str(path)).RECIPES:
            spec = f"{path.stem}:{name}" if name else path.stem
            c = config.recipe(f"{path}:{name}" if name else str(path))
            for part in key.split("."):
                c = c.get(part) if hasattr(c, "get") else None
            if c is not None:
                values.setdefault(repr(c), []).append(spec)
    if values:
        yield "    set by"
    for value, specs in sorted(values.items(), key=lambda pair: -len(pair[1])):
        some = ", ".join(specs[:4]) + f" and {len(specs) - 4} more" * (len(specs) > 4)
        yield f"      {value}: {some}"
