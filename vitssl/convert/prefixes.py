"""What wrappers put before the names of a network: "module.", "model.backbone."."""

import collections
import fnmatch
from collections.abc import Mapping, Sequence

import numpy as np

from vitssl import errors, tree

# Of modules that only hold another one, anywhere in a name: torch.compile, FSDP,
# activation checkpointing.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Of two networks in one file the one that its authors evaluate, and the other.
_PAIRS = (
    ("teacher", "student"),
    ("target_encoder", "encoder"),
    ("target_encoder", "context_encoder"),
    ("base_encoder", "momentum_encoder"),
    ("encoder_q", "encoder_k"),
)


def unwrapped(state: Mapping) -> dict:
    """Return a state without the names of wrappers, if no two keys become one."""
    found = {}
    for key, value in state.items():
        for wrapper in _WRAPPERS:
            key = key.replace(wrapper, "")
        found[key] = value
    return found if len(found) == len(state) else dict(state)


def written(prefix: str) -> str:
    """Return a prefix with its dot, whether or not the user wrote it."""
    return f"{prefix}." if prefix and prefix[-1] not in "./" else prefix


def under(state: Mapping, prefix: str) -> dict:
    """Return what is under a prefix, without it."""
    return {k[len(prefix) :]: x for k, x in state.items() if k.startswith(prefix)}


def candidates(state: Mapping) -> list[str]:
    """Return the prefixes under which a network may be, the shortest first.

    Every network that reads images has a kernel of four axes somewhere.
    """
    found = set()
    for key, value in state.items():
        if np.ndim(value) == 4:
            ends = [i + 1 for i, c in enumerate(key) if c in "./"]
            found |= {key[:end] for end in ends}
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def chosen(state: Mapping, found: Mapping) -> str:
    """Return the prefix to take of {prefix: family} that fit.

    Raises:
        CheckpointError: two networks, and neither is known to be the one to take.
    """
    heads = list(found)
    for better, other in _PAIRS:
        if len(heads) == 2:
            first = [h for h in heads if better in h.split(".")]
            second = [h for h in heads if other in h.split(".")]
            if len(first) == len(second) == 1 and first != second:
                return first[0]
    if len(heads) == 1:
        return heads[0]
    keys = [next(k for k in state if k.startswith(head)) for head in heads[:2]]
    kinds = ", ".join(f"{head} {found[head].name}" for head in heads[:6])
    raise errors.CheckpointError(
        f"several networks in the file ({kinds}), with keys such as {keys[0]} and "
        f"{keys[1]}; say which: --prefix={heads[0]} or --prefix={heads[1]}"
    )


def told(raw: Mapping, plain: Mapping, prefix: str, strip: Sequence[str]) -> list[str]:
    """Return the lines that say what was taken off, and what lies outside.

    Args:
        raw: the state of the file.
        plain: the same, unwrapped.
        prefix: that fitted.
        strip: of the family.
    """
    found = [w for w in _WRAPPERS if any(w in key for key in set(raw) - set(plain))]
    lines = [f"taken off every name: {w} (of a wrapper)" for w in found]
    here = under(plain, prefix)
    off, left = prefix, list(here)
    for head in strip:
        if left and all(key.startswith(head) for key in left):
            off, left = off + head, [key[len(head) :] for key in left]
    if off:
        lines.append(f"read below the prefix {off!r}")
    outside = collections.Counter(
        key.split(".")[0] for key in plain if not key.startswith(prefix)
    )
    for name, count in sorted(outside.items(), key=lambda x: tree.natural(x[0])):
        lines.append(f"outside of the prefix, left aside: {name} ({count} keys)")
    return lines


def names(pattern: str, key: str) -> bool:
    """Return whether a name or glob of the user means a key, or one above it."""
    ends = [i for i, c in enumerate(key) if c in "./"] + [len(key)]
    return any(fnmatch.fnmatchcase(key[:end], pattern) for end in ends)
