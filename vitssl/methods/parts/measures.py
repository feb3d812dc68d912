"""What is measured: a few numbers per test image, and studies at the end of a run.

The device reduces a batch of part maps to rows, so that a whole test split fits on the
host, where `scores` has the formulas. Maps are [B, h, w, K+1] with the background last;
images have S x S pixels.

Sources: ananthu-aniraj/ifam calculate_part_logit_thresholds.py (removal of patches of
low confidence); Xiao et al. 2020, arXiv:2006.09994 (ImageNet-9, the challenge).
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import errors, ranges
from vitssl.data import decode
from vitssl.data.sources import in9
from vitssl.methods.parts import maps as partmaps
from vitssl.methods.parts import scores

LABELS = 33  # Of a map of true parts: the background and up to 32 parts.
Inside = Annotated[float, ranges.Range(0, 1, open_low=True, open_high=True)]


@dataclasses.dataclass(frozen=True)
class Measures:
    """Config section `measures`.

    Attributes:
        leave_one_out: also classify without each single part in turn (K times the
            second stage), beside those of `parts.removed`.
        thresholds: shares of each part's least confident patches, as (0.01, 0.05): the
            final evaluation finds them in the bank split (`evals.final_samples_train`
            of it) and scores the test split with such patches taken away.
        backgrounds: folder of ImageNet-9, whose variants the final evaluation scores;
            "" = off. See `data.sources.in9`.
        mapping: JSON file {class of the model: class of ImageNet-9, or -1}; "" = they
            are the same.
        challenge: backgrounds to put behind each foreground of ImageNet-9; 0 = off.
        maps: probability with which a batch of the test split is drawn with its parts,
            in WORKDIR/pictures/maps; 0.0 = off.
        maps_every_epochs: when: at evaluations in epoch 1, in each so-manieth, and at
            the end.
    """

    leave_one_out: bool = False
    thresholds: tuple[Inside, ...] = ()
    backgrounds: str = ""
    mapping: str = ""
    challenge: ranges.OrNone = 0
    maps: ranges.Probability = 0.0
    maps_every_epochs: ranges.Count = 16

    def check(self) -> Iterator[str]:
        """Yield what cannot be combined or is not there."""
        if self.challenge and not self.backgrounds:
            yield f"challenge={self.challenge}: needs measures.backgrounds, a folder"
        for key, there in (("backgrounds", os.path.isdir), ("mapping", os.path.isfile)):
            path = getattr(self, key)
            if path and not there(os.path.expanduser(path)):
                yield f"{key}={path!r}: there is no such path"


def nearest(mask, grid):  # [B, H, W] -> float32 [B, h, w]
    """Sample a mask on a grid (h, w): cell i reads pixel floor((i + 1/2) H / h)."""
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


def owner(maps, size, *, corners=False):  # -> int32 [B, S, S]
    """Return which channel is largest at every pixel.

    Args:
        corners: corners of image and grid coincide (align_corners), else pixel areas.
    """
    axes = [_axis(size, n, corners) for n in maps.shape[1:3]]
    (top, down, dy), (left, right, dx) = axes
    dy, dx = dy[None, :, None, None], dx[None, None, :, None]
    rows = maps[:, top] * (1 - dy) + maps[:, down] * dy  # [B, S, w, K+1]
    full = rows[:, :, left] * (1 - dx) + rows[:, :, right] * dx
    return full.argmax(-1).astype(jnp.int32)


def at_points(maps, xy, size):  # -> int32 [B, P]
    """Return which channel is largest at points xy [B, P, 2], in pixels.

    The pixel nearest to (x, y) - 1/2 is read, of the maps enlarged bilinearly.
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


def overlap(maps, mask):  # [B, h, w, K+1], [B, S, S] -> int32 [B, 2, 2]
    """Count pixels: (foreground, background) x (intersection, union).

    The mask is above 0 where the foreground is.
    """
    background = owner(maps, mask.shape[1], corners=True) == maps.shape[-1] - 1
    truth = mask > 0
    counts = []
    for ours, theirs in ((~background, truth), (background, ~truth)):
        pair = (ours & theirs).sum((1, 2)), (ours | theirs).sum((1, 2))
        counts.append(jnp.stack(pair, axis=-1))
    return jnp.stack(counts, axis=1).astype(jnp.int32)


def contingency(maps, labels):  # -> int32 [B, K+1, LABELS]
    """Count pixels by the part we find and the true part [B, S, S], below `LABELS`."""
    pair = owner(maps, labels.shape[1]) * LABELS + labels.astype(jnp.int32)

    def count(p):
        return jnp.bincount(p.ravel(), length=maps.shape[-1] * LABELS)

    return jax.vmap(count)(pair).reshape(len(maps), -1, LABELS).astype(jnp.int32)


def of_maps(maps, batch) -> dict:
    """Return the rows of part maps for what a test batch knows of the truth.

    That is any of keypoints [B, P, 3], box [B, 4], mask, parts.
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


def final(method, rows) -> dict:
    """Return what is measured once: {name: float, or array for WORKDIR/scores.npz}.

    Args:
        method: PartDiscovery.
        rows: see `base.Method.final_scores`.
    """
    found = {}
    if method.measures.thresholds:
        found |= _confident(method, rows)
    if method.measures.backgrounds:
        found |= _backgrounds(method, rows)
    return found


def _confident(method, rows) -> dict:
    """Return scores without each part's least confident patches, "<name>_least_<q>"."""
    shares = method.measures.thresholds
    seen = rows(method.confidence, split="bank")
    limits = scores.thresholds(seen["owner"], seen["value"], method.parts.count, shares)
    found = {"thresholds": np.stack([limits[q] for q in shares])}
    for q in shares:
        values = rows(method.thresholded, limits[q].astype(np.float32))
        for name, value in scores.scores(values).items():
            if not np.ndim(value):
                found[f"{name}_least_{q:g}"] = value
    return found


def _backgrounds(method, rows) -> dict:
    """Return the accuracy on every variant of ImageNet-9, the gap and the challenge."""
    m, channels, found = method.measures, method.run.channels, {}
    mapping = mapped(m.mapping, method.run.classes)

    def right(source):
        values = rows(method.guesses, source=source)
        return scores.coarse(values["guess"], mapping) == values["label"]

    root = os.path.expanduser(m.backgrounds)
    for name in in9.variants(root):
        if name != in9.BACKGROUNDS:  # No object in them.
            source = in9.open(root, name, channels=channels)
            found[f"in9_{name}"] = float(right(source).mean())
    same, random = (found.get(f"in9_mixed_{kind}") for kind in ("same", "rand"))
    if None not in (same, random):
        found["in9_bg_gap"] = same - random
    if m.challenge:
        source = in9.challenge(root, m.challenge, channels=channels)
        wrong = ~right(source).reshape(-1, len(source.chosen))
        # The share of foregrounds no background makes the model err on.
        found["in9_challenge"] = float(1.0 - wrong.any(1).mean())
    return found


def mapped(path, classes) -> dict:
    """Return {class of the model: class of ImageNet-9} of a file; "" = the same.

    Raises:
        DataError: it cannot be read, or is no such table.
    """
    if not path:
        return {c: c for c in range(classes)}
    try:
        found = json.loads(decode.contents(os.path.expanduser(path)))
        return {int(fine): int(group) for fine, group in found.items()}
    except errors.DataError:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise errors.DataError(
            f'{path}: want JSON of classes, {{"0": 3, ...}} ({errors.told(e)})'
        ) from e
