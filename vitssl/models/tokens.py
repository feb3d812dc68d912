"""Tokens of a field: {name: [B, h, w, T, S, D]} as one sequence, and pooled.

A sequence holds the modalities one after the other, in the order of the tuple that
describes the field, each flattened in the order (h, w, T, S).

Of a modality (`data.modalities.Modality`) networks ask its `name`, the `channels` of
its bandsets, whether it has `space` and `time`, and how much finer its pixels are
than those of the field (`factor`). Its array is [B, H, W, T, C], with T = 1 without
time; [B, T, C] with time alone; [B, C] with neither.
"""

from typing import NamedTuple

import einops
import jax.numpy as jnp
import numpy as np

from vitssl.data import modalities as sensors
from vitssl.data.states import DECODER, MISSING, ONLINE, TARGET_ONLY
from vitssl.models import patches

__all__ = ["DECODER", "MISSING", "ONLINE", "TARGET_ONLY"]

Modality = sensors.Modality


class Packed(NamedTuple):
    """Some tokens of a sequence.

    Attributes:
        tokens: [B, K, D].
        keep: [B, K] int32 places in the whole sequence; None = all, in order.
        count: [B] int32, how many leading entries are meant; None = all.
    """

    tokens: jnp.ndarray
    keep: jnp.ndarray | None = None
    count: jnp.ndarray | None = None


def shape(m, rows, columns, times):
    """Return the shape of a modality's tokens: (h, w, T, S), (T, S) or (S,)."""
    sets = len(m.channels)
    if not m.space:
        return (times, sets) if m.time else (sets,)
    return rows, columns, times if m.time else 1, sets


def mask_key(m):
    """Return the key of a modality's mask in a batch."""
    return f"{m.name}_mask"


def shapes(fields, modalities, patch):
    """Return {name: (h, w, T, S), (T, S) or (S,)} of the tokens of a batch.

    Args:
        fields: {name: array}, see the module.
        modalities: tuple of `Modality`.
        patch: side in pixels of the field.

    Raises:
        ValueError: the patch does not divide the field.
    """
    found = {}
    for m in modalities:
        size = fields[m.name].shape
        if not m.space:
            found[m.name] = shape(m, 0, 0, size[1])
            continue
        side = patch * m.factor
        if size[1] % side or size[2] % side:
            raise ValueError(
                f"{m.name}: patch={side} does not divide {size[1]}x{size[2]} pixels"
            )
        found[m.name] = shape(m, size[1] // side, size[2] // side, size[3])
    return found


def shapes_of(tokens):
    """Return {name: shape} of {name: [B, *shape, D]}."""
    return {name: x.shape[1:-1] for name, x in tokens.items()}


def flatten(tokens, modalities):
    """Return {name: [B, ..., D]} as one sequence [B, N, D]."""
    parts = [
        einops.rearrange(tokens[m.name], "b ... d -> b (...) d") for m in modalities
    ]
    batch = max(len(p) for p in parts)
    parts = [jnp.broadcast_to(p, (batch, *p.shape[1:])) for p in parts]
    return jnp.concatenate(parts, axis=1)


def flatten_mask(mask, modalities):
    """Return {name: [B, ...]} as one sequence [B, N]."""
    parts = [einops.rearrange(mask[m.name], "b ... -> b (...)") for m in modalities]
    return jnp.concatenate(parts, axis=1)


def split(x, shapes, modalities):
    """Cut a sequence [B, N, ...] into {name: [B, *shape, ...]}: `flatten` backwards."""
    found, at = {}, 0
    for m in modalities:
        count = int(np.prod(shapes[m.name]))
        part = x[:, at : at + count]
        found[m.name] = part.reshape(len(x), *shapes[m.name], *x.shape[2:])
        at += count
    return found


def pack(x, member, slots):
    """Keep the members of a sequence.

    Args:
        x: [B, N, D].
        member: [B, N] bool.
        slots: static number of places K; 0 = N. A bound on the members: those beyond
            it are lost.

    Returns:
        `Packed` of K tokens.
    """
    n = x.shape[1]
    keep, count = patches.pack(member, min(slots, n) or n)
    return Packed(patches.take(x, keep), keep, count)


def unpack(packed, count):
    """Put packed tokens back into a sequence of `count`, zeros elsewhere: [B, N, D]."""
    x = packed.tokens
    if packed.keep is None:
        return x
    into = jnp.zeros((len(x), count, x.shape[-1]), x.dtype)
    return patches.put(x, packed.keep, packed.count, into)


def mean(packed):
    """Return the mean of the meant packed tokens: [B, D] float32; 0 of none."""
    x = packed.tokens.astype(jnp.float32)
    if packed.count is None:
        return x.mean(1)
    member = patches.valid(packed.count, x.shape[1])[..., None]
    total = jnp.where(member, x, 0.0).sum(1)
    return total / jnp.maximum(packed.count, 1)[:, None]


def pool(tokens, mask, how="mean"):
    """Return one vector per field from its ONLINE tokens: [B, D] float32.

    Args:
        tokens: {name: [B, ..., D]}.
        mask: {name: [B, ...]}.
        how: "mean" or "max" over all tokens of all modalities together.
    """
    x = [einops.rearrange(v, "b ... d -> b (...) d") for v in tokens.values()]
    seen = [einops.rearrange(mask[k], "b ... -> b (...)") for k in tokens]
    x = jnp.concatenate(x, axis=1).astype(jnp.float32)
    seen = (jnp.concatenate(seen, axis=1) == ONLINE)[..., None]
    if how == "max":
        return jnp.where(seen, x, -jnp.inf).max(1)
    return jnp.where(seen, x, 0.0).sum(1) / jnp.maximum(seen.sum(1), 1)


def pool_in_place(tokens, mask=None, how="mean"):
    """Return one vector per place from what has places: [B, h, w, D] float32.

    Args:
        tokens: {name: [B, h, w, T, S, D]}; others are left out.
        mask: {name: [B, h, w, T, S]}; a modality is left out unless all its tokens are
            ONLINE, told by a concrete mask (not a traced one). None = all are.
        how: "mean" or "max" over times and bandsets of each modality, then over
            modalities; "concat": [B, h, w, S of all, D], the mean over times alone.
    """
    places = {k: v.astype(jnp.float32) for k, v in tokens.items() if v.ndim == 6}
    if mask is not None:
        places = {
            k: v for k, v in places.items() if (np.asarray(mask[k]) == ONLINE).all()
        }
    if how == "concat":
        return jnp.concatenate([x.mean(3) for x in places.values()], axis=3)
    reduce = {"mean": jnp.mean, "max": jnp.max}[how]
    each = [reduce(x, axis=(3, 4)) for x in places.values()]
    return reduce(jnp.stack(each), axis=0)
