"""Block masks over the patch grid: what the encoder sees, what is to be predicted.

A mask is a bool array over the N = h * w patches of a grid in raster order. For each
crop and level there is a pair: `context` (True = the encoder sees the patch) and
`targets` (True = the patch is to be predicted), and the two never overlap. Everything
here is a pure function of a numpy Generator.

Inside, a set of patches is one Python integer with N bits: testing two blocks for
overlap is one `&`, which makes the search for disjoint blocks cheap.

Sources: H-JEPA (jonwiggins/H-JEPA src/masks), I-JEPA (arXiv:2301.08243, appendix A).
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np

STRATEGIES = ("global_only", "global_with_local_context", "cross_crop_prediction")


@dataclasses.dataclass(frozen=True)
class Masks:
    """The section `masking` of a config: how blocks are drawn, and for which crops.

    Attributes:
        strategy: which crops get targets. `global_only`: the global crops, local ones
            have no masks. `global_with_local_context`: the same, and local crops are
            wholly visible. `cross_crop_prediction`: also the first half of the local
            crops; the other half is wholly visible.
        sampler: `original`: H-JEPA's hierarchical blocks. `multiblock`: its
            single-level generator, every level alike. `ijepa`: I-JEPA's blocks of one
            size that may overlap each other.
        num_hierarchies: number of levels H; level 0 is the finest.
        num_target_masks: target blocks per crop and level, T.
        scale_progression: block area of level k is base_scale times 2^k (geometric) or
            1 + k (linear). Only `original` lets blocks grow with the level.
        base_scale: smallest and largest area of a target block at level 0, as a share
            of the grid.
        aspect_ratio_range: width / height of a block; `original` narrows it to
            [0.85, 1.15] at level 0.
        max_attempts: draws of a block that must not touch the earlier ones, before a
            small fallback block is put anywhere.
        min_keep: fewest visible patches (but at most a quarter of the grid). With
            fewer, everything that is no target becomes visible, and target blocks are
            dropped from the last while that is not enough. 0 switches the rule off.
        targets_per_level: `constant`: T blocks at every level. `shrink`:
            max(1, T // 2^k), so that coarse blocks fit beside each other.
        context_scale: area of the context block, as a share of the grid, the same at
            every level. (0.0, 0.0): the sampler's own, growing with the level
            (`original`) or (0.85, 1.0).
    """

    strategy: Literal[
        "global_only", "global_with_local_context", "cross_crop_prediction"
    ]
    sampler: Literal["original", "multiblock", "ijepa"]
    num_hierarchies: int
    num_target_masks: int
    scale_progression: Literal["geometric", "linear"]
    base_scale: tuple[float, float]
    aspect_ratio_range: tuple[float, float]
    max_attempts: int
    min_keep: int
    targets_per_level: Literal["constant", "shrink"]
    context_scale: tuple[float, float] = (0.0, 0.0)

    def check(self) -> Iterator[str]:
        """Yield one line per value that is out of range."""
        if not 1 <= self.num_hierarchies <= 4:
            yield f"num_hierarchies={self.num_hierarchies}: 1 to 4 levels"
        for key in ("num_target_masks", "max_attempts"):
            if getattr(self, key) < 1:
                yield f"{key}={getattr(self, key)}: at least 1"
        if self.min_keep < 0:
            yield f"min_keep={self.min_keep}: 0 (off) or more patches"
        low, high = self.base_scale
        if not 0 < low <= high <= 1:
            yield f"base_scale={self.base_scale}: 0 < smallest <= largest <= 1"
        low, high = self.aspect_ratio_range
        if not 0 < low <= high:
            yield f"aspect_ratio_range={self.aspect_ratio_range}: 0 < low <= high"
        low, high = self.context_scale
        if high != 0 and not 0 < low <= high <= 1:
            yield (
                f"context_scale={self.context_scale}: 0 < smallest <= largest <= 1, "
                "or (0.0, 0.0) for the sampler's own"
            )

    def blocks(self, level: int) -> int:
        """Return the number of target blocks of a level."""
        if self.targets_per_level == "shrink":
            return max(1, self.num_target_masks // 2**level)
        return self.num_target_masks

    def target_scale(self, level: int) -> tuple[float, float]:
        """Return the smallest and largest area of a target block of a level."""
        low, high = self.base_scale
        if self.sampler != "original":
            return low, high
        grow = 2**level if self.scale_progression == "geometric" else 1 + level
        return min(0.95, grow * low), min(0.95, grow * high)

    def context_range(self, level: int) -> tuple[float, float]:
        """Return the smallest and largest area of the context block of a level."""
        if self.context_scale[1]:
            return self.context_scale
        if self.sampler != "original":
            return 0.85, 1.0
        low = 0.6 + 0.3 * level / max(1, self.num_hierarchies - 1)
        return min(0.95, low), min(1.0, low + 0.15)

    def aspect(self, level: int) -> tuple[float, float]:
        """Return the range of width / height of the blocks of a level."""
        low, high = self.aspect_ratio_range
        if self.sampler == "original" and level == 0:
            low, high = (min(max(x, 0.85), 1.15) for x in (low, high))
        return low, high

    def fallback(self, level: int, grid: tuple[int, int]) -> tuple[int, int]:
        """Return (height, width) of the block placed when no attempt fitted."""
        parts = level + 2 if self.sampler == "original" else 4
        return max(1, grid[0] // parts), max(1, grid[1] // parts)

    def keep(self, grid: tuple[int, int]) -> int:
        """Return the fewest visible patches on this grid."""
        return min(self.min_keep, grid[0] * grid[1] // 4)

    def max_visible(self, level: int, grid: tuple[int, int]) -> int:
        """Return a number of visible patches that no draw on this grid exceeds."""
        return _bounds(self, level, grid)[0]

    def max_targets(self, level: int, grid: tuple[int, int]) -> int:
        """Return a number of target patches that no draw on this grid exceeds."""
        return _bounds(self, level, grid)[1]

    def mean_visible(self, level, grid, *, samples: int = 2000) -> float:
        """Return the mean number of visible patches over `samples` draws (seed 0)."""
        return float(_counts(self, grid, samples)[0][:, level].mean())

    def mean_targets(self, level, grid, *, samples: int = 2000) -> float:
        """Return the mean number of target patches over `samples` draws (seed 0)."""
        return float(_counts(self, grid, samples)[1][:, level].mean())


def block_size(scale, aspect, grid):
    """Return height and width, in patches, of a block of this area and shape.

    Args:
        scale: share of the grid's N patches, any shape.
        aspect: width / height, same shape.
        grid: (h, w).

    Returns:
        (height, width): int arrays; half a patch is rounded to even, and a block is
        never larger than the grid nor smaller than one patch.
    """
    height = np.rint(np.sqrt(scale * (grid[0] * grid[1]) / aspect))
    width = np.rint(height * aspect)
    height = height.clip(1, grid[0]).astype(np.int64)
    return height, width.clip(1, grid[1]).astype(np.int64)


def rasterise(blocks, grid):
    """Return bool masks [..., N] of blocks [..., 4] = (top, left, height, width)."""
    top, left, height, width = np.moveaxis(np.asarray(blocks), -1, 0)[..., None]
    y, x = np.arange(grid[0]), np.arange(grid[1])
    rows = (y >= top) & (y < top + height)  # [..., h]
    columns = (x >= left) & (x < left + width)  # [..., w]
    mask = rows[..., :, None] & columns[..., None, :]  # [..., h, w]
    return mask.reshape(*mask.shape[:-2], -1)


def hierarchical(rng, masks: Masks, grid, crops: int = 1, *, size_rng=None):
    """Draw context and target blocks of every level for several crops.

    Args:
        rng: numpy Generator. The first crops do not depend on how many follow.
        masks: how to draw.
        grid: (h, w) of the crops, in patches.
        crops: how many.
        size_rng: where `ijepa` takes its block sizes from. I-JEPA draws one size per
            batch: pass a Generator seeded by the number of the batch to every example
            of it. None: every crop has a size of its own.

    Returns:
        context: bool [crops, H, N], True = visible.
        targets: bool [crops, H, T, N], True = to predict; blocks a level does not
            have, or that were dropped, are all False.
    """
    shape = (crops, masks.num_hierarchies, masks.num_target_masks)
    context, targets = [], []
    for visible, blocks in _draw(rng, masks, grid, crops, size_rng):
        context.append(visible)
        targets += blocks + [0] * (masks.num_target_masks - len(blocks))
    return _unpack(context, shape[:2], grid), _unpack(targets, shape, grid)


def multicrop(rng, masks: Masks, global_grid, local_grid, crops, *, size_rng=None):
    """Draw the masks of all crops of one image.

    Args:
        rng: numpy Generator. The global masks do not depend on the local crops.
        masks: how to draw, and the strategy.
        global_grid, local_grid: (h, w) of the two kinds of crop, in patches.
        crops: (G, L) numbers of global and local crops.
        size_rng: see `hierarchical`.

    Returns:
        dict of bool arrays: global_context, global_targets [G, H, N] and, when there
        are local crops that the strategy uses, local_context, local_targets
        [L, H, n]. Targets are the union of the blocks. The first L // 2 local crops
        have targets in `cross_crop_prediction`, none in `global_with_local_context`.

    Raises:
        ValueError: the strategy is unknown.
    """
    if masks.strategy not in STRATEGIES:
        raise ValueError(f"strategy={masks.strategy!r}: one of {STRATEGIES}")
    out = {}
    if crops[0]:
        context, targets = _pair(rng, masks, global_grid, crops[0], size_rng)
        out |= dict(global_context=context, global_targets=targets)
    if not crops[1] or masks.strategy == "global_only":
        return out
    shape = (crops[1], masks.num_hierarchies, local_grid[0] * local_grid[1])
    context, targets = np.ones(shape, bool), np.zeros(shape, bool)
    hidden = crops[1] // 2 if masks.strategy == "cross_crop_prediction" else 0
    if hidden:
        context[:hidden], targets[:hidden] = _pair(
            rng, masks, local_grid, hidden, size_rng
        )
    return out | dict(local_context=context, local_targets=targets)


def cut_to_minimum(mask):
    """Keep in every row only as many members as the poorest row has.

    I-JEPA makes the masks of a batch equally long this way; the first ones in raster
    order stay.

    Args:
        mask: bool [..., N].

    Returns:
        bool [..., N], the same number of members in every row.
    """
    fewest = mask.sum(-1).min()
    return mask & (np.cumsum(mask, -1) <= fewest)


def _pair(rng, masks, grid, crops, size_rng):
    """Return context and union of targets, two bool arrays [crops, H, N]."""
    context, targets = [], []
    for visible, blocks in _draw(rng, masks, grid, crops, size_rng):
        context.append(visible)
        targets.append(_union(blocks))
    shape = (crops, masks.num_hierarchies)
    return _unpack(context, shape, grid), _unpack(targets, shape, grid)


def _draw(rng, masks, grid, crops, size_rng):
    """Yield (context, list of target blocks) as bit sets, crop by crop, by level."""
    attempts = 1 if masks.sampler == "ijepa" else masks.max_attempts
    tall, wide, shift = _candidates(rng, masks, grid, crops, attempts, size_rng)
    table = _table(grid)
    everything = (1 << grid[0] * grid[1]) - 1
    keep = masks.keep(grid)
    for c in range(crops):
        for k in range(masks.num_hierarchies):
            h, w, s = tall[c][k], wide[c][k], shift[c][k]
            blocks, taken = [], 0
            for t in range(masks.blocks(k)):
                for a in range(attempts):
                    block = table[h[t][a]][w[t][a]] << s[t][a]
                    if not block & taken or masks.sampler == "ijepa":
                        break
                else:  # The last candidate is the fallback.
                    block = table[h[t][-1]][w[t][-1]] << s[t][-1]
                blocks.append(block)
                taken |= block
            context = table[h[-1][0]][w[-1][0]] << s[-1][0]
            yield _visible(context, blocks, everything, keep)


def _candidates(rng, masks, grid, crops, attempts, size_rng):
    """Draw every block that may be needed, as nested lists.

    Returns:
        (height, width, shift), each [crops, H, T + 1, attempts + 1]: row T holds the
        context block, column `attempts` the fallback; `shift` is the raster index of
        the top left patch.
    """
    levels = range(masks.num_hierarchies)
    rows = masks.num_target_masks + 1
    # Drawn crop by crop, so that the first crops do not depend on the rest.
    u = rng.random((crops, 4, len(levels), rows, attempts + 1)).swapaxes(0, 1)
    if masks.sampler == "ijepa":
        one = u[0][..., [0, -1], :1]  # Target and context: [crops, H, 2, 1].
        if size_rng is not None:
            one = size_rng.random(one.shape[1:])
        u[0] = one.repeat([rows - 1, 1], axis=-2)
        height, width = _ijepa_sizes(u[0], *_ranges(masks, rows), grid)
    else:
        height, width = _sizes(u[0], u[1], *_ranges(masks, rows), grid)
        for k in levels:
            height[:, k, :, -1], width[:, k, :, -1] = masks.fallback(k, grid)
    top = (u[2] * (grid[0] + 1 - height)).astype(np.int64)
    left = (u[3] * (grid[1] + 1 - width)).astype(np.int64)
    return height.tolist(), width.tolist(), (top * grid[1] + left).tolist()


@functools.lru_cache
def _ranges(masks, rows):
    """Return (low, span) of the area [H, rows, 1] and of the aspect [H, 1, 1]."""
    levels = range(masks.num_hierarchies)
    scale = np.array([[masks.target_scale(k)] * rows for k in levels])
    scale[:, -1] = [masks.context_range(k) for k in levels]
    aspect = np.array([masks.aspect(k) for k in levels])[:, None]
    pairs = [(x[..., :1], x[..., 1:] - x[..., :1]) for x in (scale, aspect)]
    return pairs[0], pairs[1]


def _sizes(u, v, scale, aspect, grid):
    """Return block heights and widths of uniform draws `u` (area) and `v` (shape)."""
    return block_size(scale[0] + u * scale[1], aspect[0] + v * aspect[1], grid)


def _ijepa_sizes(u, scale, aspect, grid):
    """Return block heights and widths of uniform draws `u` as I-JEPA computes them.

    One number drives both area and aspect, a block stays smaller than the grid, and
    the context block (the last row) has aspect 1.
    """
    area = np.floor((scale[0] + u * scale[1]) * (grid[0] * grid[1]))
    ratio = aspect[0] + u * aspect[1]
    ratio[:, :, -1] = 1.0
    sides = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    most = [max(1, n - 1) for n in grid]
    return [x.clip(1, m).astype(np.int64) for x, m in zip(sides, most, strict=True)]


def _visible(context, blocks, everything, keep):
    """Take the targets out of the context block and apply the `min_keep` rule."""
    taken = _union(blocks)
    visible = context & ~taken
    if visible.bit_count() >= keep:
        return visible, blocks
    while len(blocks) > 1 and (everything & ~taken).bit_count() < keep:
        blocks = blocks[:-1]
        taken = _union(blocks)
    visible = everything & ~taken
    while visible.bit_count() < keep:  # One block covers the grid: take from it.
        first = taken & -taken
        visible, taken = visible | first, taken ^ first
        blocks = [taken]
    return visible, blocks


def _union(blocks):
    return functools.reduce(int.__or__, blocks, 0)


@functools.lru_cache
def _table(grid):
    """Return table[height][width]: the bit set of that block at the top left."""
    column = [sum(1 << i * grid[1] for i in range(h)) for h in range(grid[0] + 1)]
    return [[c * ((1 << w) - 1) for w in range(grid[1] + 1)] for c in column]


def _unpack(sets, shape, grid):
    """Turn bit sets into bool [*shape, N]."""
    n = grid[0] * grid[1]
    size = -(-n // 8)
    data = b"".join(s.to_bytes(size, "little") for s in sets)
    bits = np.frombuffer(data, np.uint8).reshape(*shape, size)
    return np.unpackbits(bits, axis=-1, count=n, bitorder="little").view(bool)


@functools.lru_cache
def _counts(masks, grid, samples):
    """Return numbers of visible and of target patches, two int [samples, H]."""
    context, targets = _pair(np.random.default_rng(0), masks, grid, samples, None)
    return context.sum(-1), targets.sum(-1)


@functools.lru_cache
def _bounds(masks, level, grid):
    """Return upper bounds of the numbers of visible and of target patches.

    Visible: no more than the context block holds, and the first target block (which
    is never a fallback) is never visible. When `min_keep` replaces the context by
    all that is no target, fewer than `keep` patches of the context block were
    visible, so the rest lies outside of it.
    """
    n, keep = grid[0] * grid[1], masks.keep(grid)
    least, most = _areas(masks, masks.target_scale(level), masks.aspect(level), grid)
    shape = (1.0, 1.0) if masks.sampler == "ijepa" else masks.aspect(level)
    small, large = _areas(masks, masks.context_range(level), shape, grid)
    visible = min(n - least, large)
    if keep:
        visible = max(keep, min(n - least, max(large, n - small + keep)))
    others = most
    if masks.sampler != "ijepa":
        others = max(most, math.prod(masks.fallback(level, grid)))
    targets = most + (masks.blocks(level) - 1) * others
    return visible, min(n - keep, targets)


def _areas(masks, scale, aspect, grid):
    """Return a lower and an upper bound of the area of a block, in patches.

    Both sides grow with the area that is asked for, so the ends of `scale` suffice.
    """
    n = grid[0] * grid[1]
    if masks.sampler == "ijepa":
        # height = rint(sqrt(a r)), width = rint(sqrt(a / r)): at most half a patch more
        # or less than a real number, and at least one patch smaller than the grid.
        low, high = (int(n * x) for x in scale)
        sides = max(math.sqrt(high * r) + math.sqrt(high / r) for r in aspect)
        most = int(high + sides / 2 + 0.25)
        h = min(grid[0] - 1, math.ceil(math.sqrt(low * aspect[0]) - 0.5))
        w = min(grid[1] - 1, math.ceil(math.sqrt(low / aspect[1]) - 0.5))
        fits = max(1, grid[0] - 1) * max(1, grid[1] - 1)
        return max(1, h) * max(1, w), max(1, min(most, fits))
    return (
        min(_heights(scale[0] * n, aspect, grid, lambda h, r: math.ceil(h * r - 0.5))),
        max(_heights(scale[1] * n, aspect, grid, lambda h, r: int(h * r + 0.5), -1)),
    )


def _heights(area, aspect, grid, width, end=0):
    """Yield the area of a block of `area` patches for every height it can have.

    A height h = rint(sqrt(area / r)) leaves an interval of aspects r; `end` is the end
    of it that is looked at, `width` the most extreme width there.
    """
    for h in range(math.ceil(math.sqrt(area / aspect[0])) + 1):
        low = max(aspect[0], area / (h + 0.5) ** 2)
        high = min(aspect[1], area / (h - 0.5) ** 2 if h else math.inf)
        if low <= high:
            w = width(h, (low, high)[end])
            yield min(max(h, 1), grid[0]) * min(max(w, 1), grid[1])
