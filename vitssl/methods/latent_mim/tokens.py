"""Tokens of a field: {name: [B, h, w, T, S, D]} as one sequence, and pooled.

A sequence holds the modalities one after the other, in the order of the tuple that
describes the field, each flattened in the order (h, w, T, S).
"""

from typing import NamedTuple

import einops
import jax.numpy as jnp
import numpy as np

from vitssl.data.states import ONLINE
from vitssl.models import patches


class Packed(NamedTuple):
    """Some tokens of a sequence."""

    tokens: jnp.ndarray  # [B, K, D]
    keep: jnp.ndarray | None = None  # [B, K] int32 places in it; None = all, in order.
    count: jnp.ndarray | None = None  # [B] leading entries that are meant; None = all.


def shapes(fields, modalities, patch):
    """Return {name: (h, w, T, S), (T, S) or (S,)} of the tokens of a batch.

    Args:
        patch: side in pixels of the field.

    Raises:
        ValueError: the patch does not divide the field.
    """
    found = {}
    for m in modalities:
        size = fields[m.name].shape
        if not m.space:
            found[m.name] = m.tokens(0, size[1])
            continue
        side = patch * m.factor
        if size[1] % side or size[2] % side:
            raise ValueError(
                f"{m.name}: patch={side} does not divide {size[1]}x{size[2]} pixels"
            )
        found[m.name] = m.tokens(size[1] // side, size[3], size[2] // side)
    return found


def shapes_of(tokens):
    """Return {name: shape} of {name: [B, *shape, D]}."""
    return {name: x.shape[1:-1] for name, x in tokens.items()}


def flatten(tokens, modalities):  # {name: [B or 1, ..., D]} -> [B, N, D]
    """Return the tokens as one sequence."""
    parts = [
        einops.rearrange(tokens[m.name], "b ... d -> b (...) d") for m in modalities
    ]
    batch = max(len(p) for p in parts)
    parts = [jnp.broadcast_to(p, (batch, *p.shape[1:])) for p in parts]
    return jnp.concatenate(parts, axis=1)


def flatten_mask(mask, modalities):  # {name: [B, ...]} -> [B, N]
    """Return the states as one sequence."""
    parts = [einops.rearrange(mask[m.name], "b ... -> b (...)") for m in modalities]
    return jnp.concatenate(parts, axis=1)


def split(x, shapes, modalities):  # [B, N, ...] -> {name: [B, *shape, ...]}
    """Cut a sequence into modalities: `flatten` backwards."""
    found, at = {}, 0
    for m in modalities:
        count = int(np.prod(shapes[m.name]))
        part = x[:, at : at + count]
        found[m.name] = part.reshape(len(x), *shapes[m.name], *x.shape[2:])
        at += count
    return found


def pack(x, member, slots):  # [B, N, D], bool [B, N] -> Packed [B, K, D]
    """Keep the members of a sequence.

    Args:
        slots: static number of places K; 0 = N. A bound on the members: those beyond
            it are lost.
    """
    n = x.shape[1]
    keep, count = patches.pack(member, min(slots, n) or n)
    return Packed(patches.take(x, keep), keep, count)


def unpack(packed, count):  # [B, K, D] -> [B, count, D]
    """Put packed tokens back into a sequence of `count`, zeros elsewhere."""
    x = packed.tokens
    if packed.keep is None:
        return x
    into = jnp.zeros((len(x), count, x.shape[-1]), x.dtype)
    return patches.put(x, packed.keep, packed.count, into)


def mean(packed):  # [B, K, D] -> [B, D]
    """Return the mean of the meant packed tokens, float32; 0 of none."""
    x = packed.tokens.astype(jnp.float32)
    if packed.count is None:
        return x.mean(1)
    member = patches.valid(packed.count, x.shape[1])[..., None]
    total = jnp.where(member, x, 0.0).sum(1)
    return total / jnp.maximum(packed.count, 1)[:, None]


def pool(tokens, mask):  # {name: [B, ..., D]}, {name: [B, ...]} -> [B, D]
    """Return the mean of the ONLINE tokens of all modalities together, float32."""
    x = [einops.rearrange(v, "b ... d -> b (...) d") for v in tokens.values()]
    seen = [einops.rearrange(mask[k], "b ... -> b (...)") for k in tokens]
    x = jnp.concatenate(x, axis=1).astype(jnp.float32)
    seen = (jnp.concatenate(seen, axis=1) == ONLINE)[..., None]
    return jnp.where(seen, x, 0.0).sum(1) / jnp.maximum(seen.sum(1), 1)
