"""Soft maps of parts, and the masks of foreground made from them.

Axes: B images, (h, w) patch grid, K parts, D width. Maps have K + 1 channels on the
last axis; the last channel is the background. All arithmetic is float32.

Sources: Aniraj et al. 2025, arXiv:2506.08915, section 3 (two stages, masks); Aniraj et
al. 2024, arXiv:2407.04538, section 3 (maps); code ananthu-aniraj/ifam@bc8eeae.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Removal = Literal["zero", "keep", "keep_all"]


class Draws(NamedTuple):
    """The random numbers of one pass; None = none: no noise, nothing dropped."""

    maps: jax.Array | None = None  # [B, h, w, K+1] Gumbel(0, 1) added to the logits.
    mask: jax.Array | None = None  # The same, independent, for the mask.
    keep_mask: jax.Array | None = None  # bool [B, K] that may be foreground.
    keep_features: jax.Array | None = None  # bool [B, K] the first classifier sees.


QUIET = Draws()


def similarities(z, prototypes):  # [B, h, w, D], [K+1, D] -> 2 x [B, h, w, K+1]
    """Return (dot products z w_k, minus squared distances -|z - w_k|^2)."""
    z, w = z.astype(jnp.float32), prototypes.astype(jnp.float32)
    dot = jnp.einsum("bhwd,kd->bhwk", z, w, preferred_element_type=jnp.float32)
    z2 = jnp.square(z).sum(-1, keepdims=True)
    return dot, 2.0 * dot - z2 - jnp.square(w).sum(-1)


def threshold(dot, logits, least, *, on_distance=False):  # -> [B, h, w, K+1]
    """Return the logits with -inf where a part is not confident (never the background).

    Args:
        dot, logits: of `similarities`.
        least: [K], the smallest dot product at which a part may claim a patch.
        on_distance: False: every logit becomes the raw dot product, as the original
            does, which may move even confident patches from part to part; True: the
            logits that stay are left alone.
    """
    kept = logits if on_distance else dot
    least = jnp.append(jnp.asarray(least, jnp.float32), -jnp.inf)
    return jnp.where(dot >= least, kept, -jnp.inf)


def assign(logits, noise=None, temperature=1.0):  # [B, h, w, K+1] -> the same
    """Return the soft maps softmax((logits + noise) / temperature)."""
    logits = logits.astype(jnp.float32)
    logits = logits if noise is None else logits + noise
    return jax.nn.softmax(logits / temperature, axis=-1)


def masks(maps, keep=None):  # [B, h, w, K+1], bool [B, K] -> 2 x [B, h, w, 2]
    """Return (hard, soft) masks, each of (foreground, background).

    A patch is foreground if its strongest kept part is at least as strong as the
    background. Dropped parts count 0, the others are not scaled up. The gradient of
    hard, in both channels, is that of the summed foreground (straight through).
    """
    parts, background = maps[..., :-1], maps[..., -1]
    if keep is not None:
        parts = parts * keep[:, None, None].astype(maps.dtype)
    # By index, not by `max`, whose gradient is 0 / 0 where XLA rounds twice.
    owner = jax.lax.stop_gradient(parts).argmax(-1, keepdims=True)
    strongest = jnp.take_along_axis(parts, owner, axis=-1)[..., 0]
    soft = jnp.stack([strongest, background], axis=-1)
    front = soft[..., 0] >= soft[..., 1]
    hard = jnp.stack([front, ~front], axis=-1).astype(maps.dtype)
    through = parts.sum(-1, keepdims=True)
    return hard + (through - jax.lax.stop_gradient(through)), soft


def without_parts(maps, removed, removal: Removal = "zero"):  # -> 2 x [B, h, w]
    """Return the (hard, soft) foreground when some parts are taken away.

    Hard: patches whose strongest channel is neither the background nor a removed part.

    Args:
        maps: [B, h, w, K+1].
        removed: ids of the parts, static.
        removal: of the soft mask at patches of a removed part. "zero": 0, as in the
            hard mask; "keep": the strongest part that stays, as in the original's timm
            model; "keep_all": the strongest of all, as in its Hugging Face model.
    """
    k = maps.shape[-1] - 1
    gone = jnp.isin(jnp.arange(k), jnp.asarray(removed, jnp.int32))  # [K]
    parts, background = maps[..., :-1], maps[..., -1]
    left = jnp.where(gone, 0.0, parts)
    top = parts.max(-1)
    owner_gone = jnp.take(gone, parts.argmax(-1))
    hard = ((top >= background) & ~owner_gone).astype(maps.dtype)
    if removal == "keep_all":
        return hard, top
    soft = left.max(-1)
    if removal == "zero":
        soft = jnp.where(owner_gone, 0.0, soft)
    return hard, soft


def pool(maps, z):  # [B, h, w, K+1], [B, h, w, D] -> float32 [B, K+1, D]
    """Sum the tokens of every part over the grid, divided by its size h w.

    Not by the mass of the map: a small part has a short vector.
    """
    total = jnp.einsum("bhwk,bhwd->bkd", maps, z, preferred_element_type=jnp.float32)
    return total / (maps.shape[1] * maps.shape[2])


def centroids(maps, eps=0.0):
    """Return the centre of mass of every map, in patches: (rows, columns) [B, K+1].

    The mass, to which eps is added, has no gradient, as in the original.
    """
    mass = jax.lax.stop_gradient(maps.sum((1, 2))) + eps
    rows = jnp.arange(maps.shape[1], dtype=maps.dtype)[:, None, None]
    columns = jnp.arange(maps.shape[2], dtype=maps.dtype)[:, None]
    return (maps * rows).sum((1, 2)) / mass, (maps * columns).sum((1, 2)) / mass
