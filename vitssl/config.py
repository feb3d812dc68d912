"""Configs: load a file, apply overrides, check everything, list all faults at once.

A config file defines `get_config(arg="")` and returns plain data in an
`ml_collections.ConfigDict`. Every section of it is described by a dataclass (or a
linen module): its fields are the keys, their annotations the types. Nothing else in
the package sees a ConfigDict.
"""

import ast
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import json
import keyword
import pathlib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import ml_collections

from vitssl import disk, errors, ranges

# The one section that may be given as a whole, as a dict: its keys are a source's.
OPEN = "data.options"


class Problems(list[str]):
    """Faults found so far; raised together."""

    def stop(self) -> None:
        """Raise UsageError if there is any."""
        if self:
            raise errors.UsageError("config:\n  " + "\n  ".join(self))


def recipe(spec: str) -> ml_collections.ConfigDict:
    """Return the config of `PATH[:ARGUMENT]`, as its file states it.

    Raises:
        UsageError: no such file or argument, or no `get_config` in it.
    """
    path, _, argument = spec.partition(":")
    file = module(path)
    if not hasattr(file, "get_config"):
        raise errors.UsageError(f"--config={path}: defines no get_config()")
    try:
        c = file.get_config(argument) if argument else file.get_config()
        return ml_collections.ConfigDict(c)
    except ValueError as e:
        raise errors.UsageError(f"--config={spec}: {e}") from e


def override(
    c: ml_collections.ConfigDict, overrides: Sequence[str], problems: Problems
) -> None:
    """Apply "key.path=value" texts to a config; what does not fit is reported."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if equals:
            _override(c, key, value, problems)
        else:
            problems.append(f"--config.{text}: write --config.{key}=VALUE")


def name_of(spec: str) -> str:
    """Return the run's name of `configs/hjepa.py:smoke`: "hjepa-smoke"."""
    path, _, argument = spec.partition(":")
    stem = pathlib.Path(path).stem
    return f"{stem}-{argument}" if argument else stem


def module(path: str) -> types.ModuleType:
    """Return a config file as a module.

    Raises:
        UsageError: no such file, or a syntax error in it.
    """
    file = find(path)
    found = importlib.util.spec_from_file_location(file.stem, file)
    if found is None or found.loader is None:
        raise errors.UsageError(f"--config={path}: not a Python file")
    made = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(made)
    except SyntaxError as e:
        raise errors.UsageError(f"--config={path}: line {e.lineno}: {e.msg}") from e
    return made


def home() -> pathlib.Path:
    """Return the folder of the published configs, of a clone or of a wheel."""
    inside = pathlib.Path(__file__).with_name("configs")
    return inside if inside.is_dir() else inside.parents[1] / "configs"


def find(path: str) -> pathlib.Path:
    """Return the file that `path` means, which may be a published config's name.

    "hjepa" and "configs/hjepa.py" are looked up in ./configs and then in `home`.

    Raises:
        UsageError: neither a file nor a name.
    """
    given = pathlib.Path(path)
    name = given.name if given.suffix == ".py" else f"{given.name}.py"
    places = [given]
    if str(given.parent) in (".", "configs"):
        places += [folder / name for folder in (pathlib.Path("configs"), home())]
    for place in places:
        if place.is_file():
            return place
    known = {str(p): str(p) for p in files(given.parent)}
    known |= {p.stem: p.stem for p in files(home())}
    known |= {f"configs/{p.name}": p.stem for p in files(home())}
    guess = difflib.get_close_matches(path, known, 1)
    also = f"did you mean {known[guess[0]]}?" if guess else "there is: "
    if not guess:
        also += ", ".join(dict.fromkeys(known.values()))
    raise errors.UsageError(f"--config={path}: no such file; {also}")


def beside(path: str, name: str) -> types.ModuleType:
    """Return NAME.py of the folder of a config file: how one config uses another."""
    return module(str(pathlib.Path(path).with_name(f"{name}.py")))


def files(folder: disk.AnyPath) -> list[pathlib.Path]:
    """Return the config files of a folder, by name, without what only helps them."""
    found = sorted(pathlib.Path(folder).glob("*.py"))
    return [p for p in found if _defines_config(p)]


def _defines_config(path) -> bool:
    text = path.read_text("utf-8", errors="replace")
    return bool(re.search(r"^(def )?get_config\b", text, re.M))


def _override(c, key: str, text: str, problems: Problems):
    """Set `key` of `c` to the value written as `text`, or report why not."""
    found = _find(c, key, problems)
    if found is None:
        return
    parent, leaf = found
    old, value = parent[leaf], text
    if not isinstance(old, str):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            # A bare word may be the one entry of a tuple: evals.final=knn.
            if not (isinstance(old, tuple) and text.isidentifier()):
                problems.append(f"{key}={_short(text)}: want {_like(old)}")
                return
    if fault := ranges.beyond(value):
        problems.append(f"{key}={_short(text)}: {fault}")
        return
    _replace(parent, leaf, key, value, problems)


def _short(text: str) -> str:
    return text if len(text) < 100 else f"{text[:90]}..."


def _find(c, key, problems):
    """Return (section, key in it) of a dotted key, or report why there is none."""
    node, seen, parent = c, [], None
    for part in key.split("."):
        if not isinstance(node, ml_collections.ConfigDict):
            problems.append(f"{key}: {'.'.join(seen)} is a value, not a section")
            return None
        if part not in node:
            problems.append(f"{'.'.join([*seen, part])}: {unknown(part, list(node))}")
            return None
        seen.append(part)
        parent, node = node, node[part]
    if isinstance(node, ml_collections.ConfigDict):
        if key != OPEN:
            problems.append(f"{key}: a section; set one of its keys: {sorted(node)}")
            return None
    return parent, seen[-1]


def _replace(parent, leaf, key, value, problems):
    old = parent[leaf]
    if key == OPEN and type(value) is dict:
        value = ml_collections.ConfigDict(value)
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    # One value and several stand for each other where the annotation says so.
    if type(old) is not type(value) and tuple not in (type(old), type(value)):
        problems.append(f"{key}={value}: want {_like(old)}")
        return
    with parent.unlocked(), parent.ignore_type():
        parent[leaf] = value


def without(c: ml_collections.ConfigDict, *keys: str) -> ml_collections.ConfigDict:
    """Return a deep copy of a config without some of its keys."""
    copy = ml_collections.ConfigDict(c.to_dict())
    for key in keys:
        del copy[key]
    return copy


def _like(value) -> str:
    return f"{type(value).__name__}, like {value!r}"


def unknown(key: str, known: Sequence[str]) -> str:
    """Return "no such key", with the nearest right name or all of them."""
    guess = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    if guess:
        return f"no such key; did you mean {guess[0]!r}?"
    return f"no such key; there is: {', '.join(sorted(known))}"


def section(
    cls: type,
    values: Mapping | ml_collections.ConfigDict,
    path: str,
    problems: Problems,
    **given: Any,
) -> Any:
    """Build the dataclass or linen module `cls` from a config section.

    Args:
        cls: class whose annotated fields are the keys.
        values: the section (a ConfigDict or dict).
        path: dotted path of the section, for messages.
        problems: receives unknown and missing keys, wrong types, failed checks.
        given: fields that do not come from the section.

    Returns:
        The object, or None if it could not be built.
    """
    if not isinstance(values, ml_collections.ConfigDict | dict):
        problems.append(f"{path}={values!r}: must be a section (a dict)")
        return None
    before = len(problems)
    fields = schema(cls)
    for key in values:
        if key not in fields or key in given:
            problems.append(f"{_join(path, key)}: {unknown(key, list(fields))}")
    kwargs = dict(given)
    for key, (annotation, default) in fields.items():
        if key in given:
            continue
        if key in values:
            where = _join(path, key)
            kwargs[key] = typed(annotation, values[key], where, problems)
        elif default is dataclasses.MISSING:
            where = _join(path, key)
            problems.append(f"{where}: missing; want {ranges.describe(annotation)}")
    if len(problems) > before:
        return None
    built = cls(**{_field(key): value for key, value in kwargs.items()})
    if hasattr(built, "check"):
        problems.extend(_join(path, line) for line in built.check() or ())
    return built


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _field(key: str) -> str:
    """Return the field of a key: "from" is a Python keyword, its field is `from_`."""
    return f"{key}_" if keyword.iskeyword(key) else key


def schema(cls: type) -> dict[str, tuple[Any, Any]]:
    """Return {key: (annotation, default)} of a dataclass or linen module.

    The default of a key that a config must have is `dataclasses.MISSING`.
    """
    hints, own = _hints(cls), {}
    for f in dataclasses.fields(cls):
        if issubclass(cls, nn.Module) and f.name in ("parent", "name"):
            continue
        default = f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        own[f.name.removesuffix("_")] = (hints[f.name], default)
    return own


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Return the types of a class's fields; evaluating them takes most of a listing."""
    return typing.get_type_hints(cls, include_extras=True)


def fill(c: ml_collections.ConfigDict, cls: type) -> None:
    """Add to a section the keys of `cls` that have a default and are not there.

    What is there gets the type that is wanted: 9 becomes 9.0, one value a tuple of it.
    """
    for key, (annotation, default) in schema(cls).items():
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            if key not in c and default is not dataclasses.MISSING:
                c[key] = ml_collections.ConfigDict()
            if isinstance(c.get(key), ml_collections.ConfigDict):
                fill(c[key], annotation)
        elif key not in c and default is not dataclasses.MISSING:
            c[key] = default
        elif key in c and not ranges.fault(annotation, c[key]):
            found = ranges.convert(annotation, c[key])
            if repr(found) != repr(c[key]):
                with c.ignore_type():  # Slow: it walks the section, by letters.
                    c[key] = found


def typed(annotation: Any, value: Any, path: str, problems: Problems) -> Any:
    """Return `value` as `annotation` wants it, or report it at `path`."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return section(annotation, value, path, problems)
    if fault := ranges.fault(annotation, value):
        problems.append(f"{path}={value!r}: {fault}")
        return value
    return ranges.convert(annotation, value)


def choose(table: Mapping[str, Any], name: Any, path: str, problems: Problems) -> Any:
    """Return table[name], or report the names there are."""
    if isinstance(name, str) and name in table:
        return table[name]
    guess = difflib.get_close_matches(str(name), list(table), 1, cutoff=0.5)
    hint = f"; did you mean {guess[0]!r}?" if guess else ""
    problems.append(f"{path}={name!r}: one of {', '.join(sorted(table))}{hint}")
    return None


def to_json(c: Mapping | ml_collections.ConfigDict) -> str:
    """Return the resolved config as JSON text; the only form that is ever read back."""
    return json.dumps(_plain(c), indent=2, sort_keys=False) + "\n"


def _plain(value):
    if isinstance(value, ml_collections.ConfigDict | dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def from_json(text: str | bytes) -> ml_collections.ConfigDict:
    """Return the config of `to_json` text; lists become tuples.

    Raises:
        Damaged: it is no such text.
    """

    def tuples(value):
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        if isinstance(value, list):
            return tuple(map(tuples, value))
        return value

    return ml_collections.ConfigDict(tuples(disk.parse(text)))


def differences(
    a: ml_collections.ConfigDict, b: ml_collections.ConfigDict, path: str = ""
) -> Iterator[str]:
    """Yield "key: old -> new" for every value in which two configs differ."""
    for key in sorted(set(a) | set(b)):
        where = f"{path}{key}"
        if key not in a or key not in b:
            yield f"{where}: {'absent' if key not in a else 'present'} before"
        elif isinstance(a[key], ml_collections.ConfigDict | dict):
            yield from differences(a[key], b[key], f"{where}.")
        elif _plain(a[key]) != _plain(b[key]):
            yield f"{where}: {a[key]!r} -> {b[key]!r}"


def folder_fault(name: str) -> str:
    """Return why a name cannot be that of a folder of ours, or ""."""
    if not re.fullmatch(r"\w[\w =.+-]*", name):
        return "want a letter or digit, then letters, digits and any of =.+-_"
    return "" if len(name.encode()) <= 200 else "want at most 200 bytes"


def describes(cls: type) -> str:
    """Return the first line of a section's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]
