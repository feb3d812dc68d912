"""Parameter trees by name: flatten, split into trained and frozen, match rules, EMA.

A leaf's name is its path joined by slashes, "encoder/block_0/attn/qkv/kernel".
"""

import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import traverse_util

from vitssl import errors


def flat(tree) -> dict:
    """Return {name: leaf} of nested dicts; `nest` is the inverse."""
    return traverse_util.flatten_dict(tree, sep="/")


def natural(name: str) -> list:
    """Return a key that sorts names by their numbers: block_2 before block_10."""
    parts = re.split(r"(\d+)", name)
    return [int(x) if i % 2 else x for i, x in enumerate(parts)]


def nest(leaves: Mapping) -> dict:
    """Return nested dicts of {name: leaf}."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def split(tree, names: Iterable[str]) -> tuple[dict, dict]:
    """Split a tree into ({name: leaf} not in `names`, {name: leaf} in `names`)."""
    leaves, names = flat(tree), set(names)
    return (
        {k: v for k, v in leaves.items() if k not in names},
        {k: v for k, v in leaves.items() if k in names},
    )


def merge(*parts: Mapping) -> dict:
    """Return the nested tree of several {name: leaf}; the inverse of `split`."""
    leaves = {}
    for part in parts:
        leaves.update(part)
    return nest(leaves)


_NOTHING = object()


def match(names: Iterable[str], rules, *, what: str, default=_NOTHING) -> dict:
    """Give every name the value of the first rule whose pattern matches it whole.

    Args:
        names: leaf names.
        rules: ((pattern, value), ...), regular expressions of whole names.
        what: config key of the rules, for the message.
        default: value of the names that no rule covers; an error if not given.

    Returns:
        {name: value}.

    Raises:
        UsageError: a name no rule covers, a rule that never wins, a broken pattern.
    """
    compiled = []
    for pattern, value in rules:
        try:
            compiled.append((re.compile(pattern), value))
        except re.error as e:
            message = f"{what}: {pattern!r} is not a regular expression: {e}"
            raise errors.UsageError(message) from e
    found, wins, bare = {}, set(), []
    for name in names:
        for i, (pattern, value) in enumerate(compiled):
            if pattern.fullmatch(name):
                found[name] = value
                wins.add(i)
                break
        else:
            found[name] = default
            bare.append(name)
    if default is not _NOTHING:
        bare = []
    idle = [rules[i][0] for i in range(len(rules)) if i not in wins]
    if bare or idle:
        lines = [f"{what} does not fit the parameters."]
        if bare:
            lines.append(f"  no rule matches: {_some(bare)}")
        if idle:
            lines.append(f"  rules that never win: {idle}")
        lines.append(f"  parameters are named like {_some(sorted(found, key=natural))}")
        raise errors.UsageError("\n".join(lines))
    return found


def _some(names, most=6):
    """Return at most `most` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def ema(target, new, momentum):
    """Return momentum * target + (1 - momentum) * new, leaf by leaf, in float32.

    Source: He et al. 2020, arXiv:1911.05722, Eq. 2.
    """

    def one(t, n):
        mixed = momentum * t.astype(jnp.float32) + (1 - momentum) * n
        return mixed.astype(t.dtype)

    return jax.tree.map(one, target, new)


def copy(tree):
    """Return a tree with buffers of its own (an EMA target must not alias)."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def size(tree) -> int:
    """Return the number of scalars in a tree of arrays or shapes."""
    return sum(x.size for x in jax.tree.leaves(tree))


def count_bytes(tree) -> int:
    """Return the bytes of a tree of arrays or shapes."""
    leaves = jax.tree.leaves(tree)
    return sum(x.size * x.dtype.itemsize for x in leaves if hasattr(x, "dtype"))
