"""Pixels to patches and back, and moving tokens in and out of a sequence.

Patches are in raster (row-major) order everywhere: patch i of an h x w grid lies
at row i // w and column i % w.
"""

import einops
import jax.numpy as jnp


def normalise(image, mean, std):
    """Turn the pixels [..., C] a loader ships into what a model takes, float32.

    Integers are taken as pixels of 8 bits, uint16 of 16, and standardised on the
    device, where that is free; mean and std are of pixels in [0, 1]. Floats are taken
    as standardised already.

    Raises:
        ValueError: mean or std has not one entry per channel.
    """
    channels = image.shape[-1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"normalise: mean has {len(mean)} and std {len(std)} entries, "
            f"the image {channels} channels"
        )
    if jnp.issubdtype(image.dtype, jnp.floating):
        return image.astype(jnp.float32)
    # One multiplication and one addition per pixel: (x / 255 - mean) / std.
    scale = 1.0 / (most(image.dtype) * jnp.asarray(std, jnp.float32))
    shift = -jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
    return image.astype(jnp.float32) * scale + shift


def most(dtype) -> float:
    """Return the value of the brightest pixel: 65535 of uint16, else 255."""
    return 65535.0 if dtype == jnp.uint16 else 255.0


def grid(image, patch):
    """Return the patch grid (h, w) of an image [..., H, W, C].

    Raises:
        ValueError: the patch size does not divide both sides.
    """
    height, width = image.shape[-3:-1]
    if height % patch or width % patch:
        raise ValueError(
            f"patch={patch} does not divide an image of {height}x{width} pixels"
        )
    return height // patch, width // patch


def patchify(image, patch):
    """Cut [..., H, W, C] into [..., h w, patch patch C] flattened patches.

    Raises:
        ValueError: the patch size does not divide both sides.
    """
    h, w = grid(image, patch)
    return einops.rearrange(
        image, "... (h p) (w q) c -> ... (h w) (p q c)", h=h, w=w, p=patch, q=patch
    )


def cells(image, cell, normalise):  # [B, H, W, C] -> [B, h, w, cell cell C]
    """Return the pixels of every cell, as they are or with mean 0 and variance 1.

    Source: He et al. 2021, arXiv:2111.06377, section 4.1 (norm_pix_loss).
    """
    x = einops.rearrange(image, "b (h p) (w q) c -> b h w (p q c)", p=cell, q=cell)
    if not normalise:
        return x
    mean, var = x.mean(-1, keepdims=True), x.var(-1, ddof=1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-6)


def paint(x, image, cell, normalised):  # [B, h, w, cell cell C] -> [B, H, W, C]
    """Put cells together; normalised ones get brightness and contrast of the image's.

    Args:
        image: [B, H, W, C] they are of, or stand for.
    """
    if normalised:
        own = cells(image, cell, normalise=False)
        x = x * own.std(-1, ddof=1, keepdims=True) + own.mean(-1, keepdims=True)
    return einops.rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=cell, q=cell)


def pack(mask, slots):
    """List the members of sets [..., N] bool in a fixed number of slots, at most N.

    Returns:
        keep: [..., slots] int32, the members in ascending order, then (padding) the
            first non-members, so every entry is a valid index and none repeats.
        count: [...] int32, how many leading entries are members. Members beyond
            `slots` are dropped: bound the set to avoid it.

    Raises:
        ValueError: slots is not in 1..N.
    """
    n = mask.shape[-1]
    if not 1 <= slots <= n:
        raise ValueError(f"pack: slots={slots} must be in 1..{n}")
    # A stable sort of False < True on the complement keeps the raster order.
    keep = jnp.argsort(jnp.logical_not(mask), axis=-1, stable=True)[..., :slots]
    count = jnp.minimum(mask.sum(-1), slots)
    return keep.astype(jnp.int32), count.astype(jnp.int32)


def valid(count, slots):
    """Mark the filled slots: [...] counts -> [..., slots] bool."""
    return jnp.arange(slots) < count[..., None]


def take(tokens, keep):
    """Gather tokens [..., N, D] at indices [..., K] -> [..., K, D].

    Leading axes broadcast, so one table [1, N, D] serves a batch of index lists.
    """
    return jnp.take_along_axis(tokens, keep[..., None], axis=-2)


def put(tokens, keep, count, into):
    """Scatter packed tokens into a full grid: the inverse of `take` after `pack`.

    Args:
        tokens: [B, K, D].
        keep: [B, K] int32 indices into N.
        count: [B] int32 filled slots, or None for all K.
        into: [B, N, D] what stays where nothing is put; its dtype is the result's.
    """
    slots, n = keep.shape[-1], into.shape[-2]
    if count is not None:
        keep = jnp.where(valid(count, slots), keep, n)  # Out of range: dropped.
    rows = jnp.arange(len(into))[:, None]  # [B, 1]
    into = jnp.asarray(into)
    return into.at[rows, keep].set(tokens.astype(into.dtype), mode="drop")
