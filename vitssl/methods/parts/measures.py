"""What a batch of part maps says about the truth, reduced on the device.

Everything here returns a few numbers per image, so that a whole test split fits on the
host. Maps are [B, h, w, K+1] with the background last; images have S x S pixels.
"""

import jax
import jax.numpy as jnp

from vitssl.methods.parts import maps as partmaps

LABELS = 33  # Of a map of true parts: the background and up to 32 parts.


def nearest(mask, grid):
    """Sample a mask [B, H, W] on a grid: cell i reads pixel floor((i + 1/2) H / h).

    Returns:
        [B, h, w] float32.
    """
    rows, columns = (
        jnp.floor((jnp.arange(n) + 0.5) * old / n).astype(jnp.int32)
        for n, old in zip(grid, mask.shape[1:], strict=True)
    )
    return mask[:, rows[:, None], columns].astype(jnp.float32)


def _axis(n, old, corners):
    """Return (lower index, upper index, weight of the upper) of n samples of old."""
    if corners:
        at = jnp.arange(n) * ((old - 1) / max(1, n - 1))
    else:
        at = jnp.maximum((jnp.arange(n) + 0.5) * (old / n) - 0.5, 0.0)
    low = jnp.minimum(jnp.floor(at).astype(jnp.int32), old - 1)
    return low, jnp.minimum(low + 1, old - 1), at - low


def owner(maps, size, *, corners=False):
    """Return which channel is largest at every pixel of [size, size]: [B, S, S].

    Args:
        maps: [B, h, w, K+1].
        size: S.
        corners: corners of image and grid coincide (align_corners), else pixel areas.
    """
    axes = [_axis(size, n, corners) for n in maps.shape[1:3]]
    (top, down, dy), (left, right, dx) = axes
    dy, dx = dy[None, :, None, None], dx[None, None, :, None]
    rows = maps[:, top] * (1 - dy) + maps[:, down] * dy  # [B, S, w, K+1]
    full = rows[:, :, left] * (1 - dx) + rows[:, :, right] * dx
    return full.argmax(-1).astype(jnp.int32)


def at_points(maps, xy, size):
    """Return which channel is largest at points: [B, P] int32.

    Args:
        maps: [B, h, w, K+1].
        xy: [B, P, 2] in pixels of an S x S image; the pixel nearest to (x, y) - 1/2 is
            read, of the maps enlarged bilinearly.
        size: S.
    """
    pixel = jnp.clip(jnp.round(xy - 0.5), 0, size - 1).astype(jnp.int32)
    value, rows = 0.0, jnp.arange(len(maps))[:, None]  # [B, 1]
    (top, down, dy), (left, right, dx) = (
        _axis(size, n, False) for n in maps.shape[1:3]
    )
    y, x = pixel[..., 1], pixel[..., 0]  # [B, P]
    for row, wy in ((top, 1 - dy), (down, dy)):
        for column, wx in ((left, 1 - dx), (right, dx)):
            weight = (wy[y] * wx[x])[..., None]
            value = value + weight * maps[rows, row[y], column[x]]  # [B, P, K+1]
    return value.argmax(-1).astype(jnp.int32)


def centres(maps, size):
    """Return (centres of mass (x, y) in pixels [B, K, 2], which parts are there).

    A part is there, [B, K] bool, if its map exceeds 1/2 somewhere; the centre of one
    whose map is all 0 is the corner.
    """
    parts = maps[..., :-1]
    rows, columns = partmaps.centroids(parts)
    scale = size / maps.shape[1], size / maps.shape[2]
    xy = jnp.stack([columns * scale[1], rows * scale[0]], axis=-1)
    xy = jnp.where(parts.sum((1, 2))[..., None] > 0, xy, 0.0)
    return xy, parts.max((1, 2)) > 0.5


def overlap(maps, mask):
    """Count pixels for the IoU of foreground and background.

    Args:
        maps: [B, h, w, K+1].
        mask: [B, S, S], above 0 where the foreground is.

    Returns:
        [B, 2, 2] int32: (foreground, background) x (intersection, union).
    """
    background = owner(maps, mask.shape[1], corners=True) == maps.shape[-1] - 1
    truth = mask > 0
    counts = []
    for ours, theirs in ((~background, truth), (background, ~truth)):
        pair = (ours & theirs).sum((1, 2)), (ours | theirs).sum((1, 2))
        counts.append(jnp.stack(pair, axis=-1))
    return jnp.stack(counts, axis=1).astype(jnp.int32)


def contingency(maps, labels):
    """Count pixels by the part we find and the true part.

    Args:
        maps: [B, h, w, K+1].
        labels: [B, S, S] ints below `LABELS`.

    Returns:
        [B, K+1, LABELS] int32.
    """
    ours = owner(maps, labels.shape[1])
    pair = ours * LABELS + labels.astype(jnp.int32)
    count = lambda p: jnp.bincount(p.ravel(), length=maps.shape[-1] * LABELS)  # noqa: E731
    return jax.vmap(count)(pair).reshape(len(maps), -1, LABELS).astype(jnp.int32)


def of_maps(maps, batch) -> dict:
    """Return the rows of part maps for what a test batch knows of the truth.

    Args:
        maps: [B, h, w, K+1].
        batch: image, and any of keypoints [B, P, 3], box [B, 4], mask, parts.
    """
    size, rows = batch["image"].shape[1], {}
    if "keypoints" in batch:
        points = batch["keypoints"]
        rows["keypoint_part"] = at_points(maps, points[..., :2], size)
        rows["keypoint_seen"] = points[..., 2] > 0
        corner, sides = jnp.zeros((1, 2)), jnp.full((1, 2), size)
        if "box" in batch:
            corner, sides = batch["box"][:, :2], batch["box"][:, 2:]
        xy, there = centres(maps, size)
        rows["centres"] = (xy - corner[:, None]) / sides[:, None]
        rows["keypoints"] = (points[..., :2] - corner[:, None]) / sides[:, None]
        rows["part_there"] = there
    if "mask" in batch:
        rows["overlap"] = overlap(maps, batch["mask"])
    if "parts" in batch:
        rows["contingency"] = contingency(maps, batch["parts"])
    return rows


def swaps(classify, batch, rows=None) -> dict:
    """Return the logits of the images, and of those before other backgrounds.

    Args:
        classify: images [B, S, S, C] -> logits.
        batch: image, and perhaps swap_same, swap_random.
        rows: what is known already; "logits" is then not computed again.
    """
    names = {"image": "logits"} if rows is None else {}
    names |= {k: f"logits_{k}" for k in ("swap_same", "swap_random")}
    return {row: classify(batch[key]) for key, row in names.items() if key in batch}


def passed(batch) -> dict:
    """Return the columns that the scores need as they are."""
    return {key: batch[key] for key in ("group",) if key in batch}
