"""Weights from PyTorch to Flax and back, by one table for both directions.

A table is a list of rules `Rule(torch name, flax name, rearrangement)`. Names are
templates: `{i}` stands for the same integer on both sides. A rearrangement is an
einops pattern from the PyTorch layout to ours, so its inverse is the pattern read
backwards. Every key of the state dict and every leaf of the model is used exactly
once, or named in the error.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import einops
import numpy as np

from vitssl import errors, tree

Tree = Any  # Nested dicts of arrays.

LINEAR = "o i -> i o"  # nn.Linear, and the packed in_proj of MultiheadAttention.
CONV = "o i h w -> h w i o"  # nn.Conv2d.


@dataclasses.dataclass(frozen=True)
class Rule:
    """One family of tensors: its two names, and how its layout changes.

    Attributes:
        torch: template of the key, "blocks.{i}.norm1.weight".
        flax: template of the leaf, "block_{i}/norm1/scale", with the same fields.
        pattern: einops pattern PyTorch -> Flax; "" = unchanged. Sizes that a
            pattern needs in order to split an axis stand in `sizes`.
        sizes: ((axis, size), ...).
    """

    torch: str
    flax: str
    pattern: str = ""
    sizes: tuple[tuple[str, int], ...] = ()

    def to_flax(self, x: np.ndarray) -> np.ndarray:
        """Return a tensor of the state dict in our layout."""
        if not self.pattern:
            return x
        return einops.rearrange(x, self.pattern, **dict(self.sizes))

    def to_torch(self, x: np.ndarray) -> np.ndarray:
        """Return a leaf of ours in the layout of the state dict."""
        if not self.pattern:
            return x
        ours, theirs = reversed(self.pattern.split("->"))
        return einops.rearrange(x, f"{ours} -> {theirs}", **dict(self.sizes))


@dataclasses.dataclass(frozen=True)
class Table:
    """Rules, and the keys of a state dict that are left aside on purpose.

    The first rule that fits a name wins; rules for parts a model lacks do no harm.

    Attributes:
        ignore: templates of keys to skip; `{*}` stands for any text.
    """

    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()

    def __add__(self, other: "Table") -> "Table":
        """Return the table of both: one model made of two parts."""
        return Table(self.rules + other.rules, self.ignore + other.ignore)

    def under(self, torch: str = "", flax: str = "") -> "Table":
        """Return the table with prefixes before every name of either side.

        A prefix may hold fields of its own, "levels.{k}.".
        """
        rules = tuple(
            dataclasses.replace(r, torch=torch + r.torch, flax=flax + r.flax)
            for r in self.rules
        )
        return Table(rules, tuple(torch + name for name in self.ignore))

    def forward(self, key: str) -> tuple[Rule | None, str | None]:
        """Return (rule, leaf) of a key of a state dict."""
        for rule in self.rules:
            if match := _compile(rule.torch).fullmatch(key):
                return rule, rule.flax.format_map(match.groupdict())
        return None, None

    def backward(self, leaf: str) -> tuple[Rule | None, str | None]:
        """Return (rule, key) of a leaf."""
        for rule in self.rules:
            if match := _compile(rule.flax).fullmatch(leaf):
                return rule, rule.torch.format_map(match.groupdict())
        return None, None

    def ignores(self, key: str) -> bool:
        """Return whether a key is skipped."""
        return any(_compile(name).fullmatch(key) for name in self.ignore)


def convert(state: Mapping[str, np.ndarray], like: Tree, table: Table) -> Tree:
    """Fill a tree like `like`, of arrays or shapes, with the tensors of a state dict.

    Raises:
        CheckpointError: naming every key no rule knows, every leaf left unfilled or
            filled twice, and every pair of shapes that differ.
    """
    found, want = views(state, like, table), tree.flat(like)
    return tree.nest(
        {name: np.array(x, want[name].dtype, order="C") for name, x in found.items()}
    )


def views(state: Mapping[str, np.ndarray], like: Tree, table: Table) -> dict:
    """Return {name: array} of `convert` before anything is copied.

    The arrays are views of the state's, rearranged where the layout asks for it, in
    their own dtype: what is made of them can be made one by one.

    Raises:
        CheckpointError: as `convert`.
    """
    want, filled, faults = tree.flat(like), {}, _Faults()
    origin: dict[str, str] = {}
    for key in state:
        rule, name = table.forward(key)
        if name is None or name not in want:  # Known to the table is not enough.
            if not table.ignores(key):
                faults.surplus.append(key if name is None else f"{key} (-> {name})")
        elif name in filled:
            faults.twice.append(f"{name}: {origin[name]} and {key}")
        else:
            filled[name] = _fit(key, state[key], rule, name, want[name], faults)
            origin[name] = key
    for name in [name for name in want if name not in filled]:
        _, known = table.backward(name)
        faults.missing.append(
            f"{name} (no rule)" if known is None else f"{name} (<- {known})"
        )
    faults.raise_if_any()
    return {name: filled[name] for name in want}


def by_name(state: Mapping[str, np.ndarray], table: Table) -> dict:
    """Return {name: view} of a state dict without a model to compare it with.

    Raises:
        CheckpointError: naming every key no rule knows, and leaves filled twice.
    """
    made, faults = {}, _Faults()
    origin: dict[str, str] = {}
    for key, value in state.items():
        rule, name = table.forward(key)
        if rule is None or name is None:
            if not table.ignores(key):
                faults.surplus.append(key)
            continue
        if name in made:
            faults.twice.append(f"{name}: {origin[name]} and {key}")
        made[name], origin[name] = rule.to_flax(value), key
    faults.raise_if_any()
    return made


def left_aside(state: Mapping, table: Table) -> list[str]:
    """Return the keys of a state dict that a table knows and leaves aside."""
    return [k for k in state if table.forward(k)[0] is None and table.ignores(k)]


def export(params: Tree, table: Table) -> dict[str, np.ndarray]:
    """Return the PyTorch state dict of a tree: `convert` backwards.

    Where several rules lead to one leaf, the first names the key.

    Raises:
        CheckpointError: naming every leaf no rule knows.
    """
    state, faults = {}, _Faults()
    for name, leaf in tree.flat(params).items():
        rule, key = table.backward(name)
        if rule is None or key is None:
            faults.nameless.append(name)
        else:
            state[key] = np.ascontiguousarray(rule.to_torch(np.asarray(leaf)))
    faults.raise_if_any()
    return state


class Misfit(errors.CheckpointError):
    """Weights that do not fit a table or a model.

    Attributes:
        surplus: keys that have no place.
    """

    def __init__(self, message: str, surplus: Iterable[str] = ()):
        super().__init__(message)
        self.surplus = tuple(surplus)


@functools.cache
def _compile(template):
    """Return the pattern of a template: {i} an integer, {*} anything."""
    parts, seen = [], set()
    for text, field in re.findall(r"([^{]+)|\{([^}]*)\}", template):
        if text:
            parts.append(re.escape(text))
        elif field == "*":
            parts.append(".*")
        elif field in seen:
            parts.append(f"(?P={field})")
        else:
            seen.add(field)
            parts.append(rf"(?P<{field}>\d+)")
    return re.compile("".join(parts))


def _fit(key, value, rule, name, leaf, faults):
    """Return the tensor in our layout, or note that its shape is wrong."""
    value = np.asarray(value)
    try:
        ours = rule.to_flax(value)
    except einops.EinopsError:
        ours = None
    if ours is None or ours.shape != tuple(leaf.shape):
        got = f"{key} {value.shape}"
        if ours is not None and ours.shape != value.shape:
            got += f", here {ours.shape}"
        faults.misshapen.append(f"{name} {tuple(leaf.shape)}: {got}")
        return None
    return ours


@dataclasses.dataclass
class _Faults:
    """Everything that does not fit, told at once."""

    surplus: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    twice: list[str] = dataclasses.field(default_factory=list)
    misshapen: list[str] = dataclasses.field(default_factory=list)
    nameless: list[str] = dataclasses.field(default_factory=list)

    def raise_if_any(self):
        """Raise CheckpointError with all faults, one per line."""
        told = {
            "keys of the checkpoint that the model has no place for": self.surplus,
            "parameters of the model that the checkpoint lacks": self.missing,
            "parameters with more than one key": self.twice,
            "shapes that differ (model: checkpoint)": self.misshapen,
            "parameters without a PyTorch name": self.nameless,
        }
        lines = [
            "\n  ".join([f"{what}:", *names]) for what, names in told.items() if names
        ]
        if lines:
            message = "the weights do not fit.\n" + "\n".join(lines)
            raise Misfit(message, [key.split(" (->")[0] for key in self.surplus])
