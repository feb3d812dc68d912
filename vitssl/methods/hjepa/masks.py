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
from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np

from vitssl import ranges

STRATEGIES = ("global_only", "global_with_local_context", "cross_crop_prediction")
SAMPLERS = ("original", "multiblock", "ijepa")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking:
    """The section `masking` of a config: how masks are drawn, and how a step uses them.

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
        levels: per_level: every level has its own context and targets. finest: those
            of level 0 serve all levels (the original's trainer).
        together: all target blocks of a crop are predicted at once, what they share a
            single time. False: each block by itself (I-JEPA; one level, global_only).
        mode: drop: hidden patches do not exist for the encoder. zero: their tokens are
            set to 0 and stay, also as context of the predictor (the original).
        context: block: a context block minus the targets. complement: all that is no
            target (the original's trainer).
        packed: compute visible tokens only. False: all slots of the grid, hidden ones
            masked as attention keys (same loss; to measure what packing saves).
        slots: quantile of the numbers of visible patches that gets room; 1.0 = room
            for all. See `methods.hjepa.slots`.
        accumulate_crops: predict crop by crop, recomputing activations in the backward
            pass: memory of one crop's predictor.
    """

    strategy: Literal[STRATEGIES] = "global_only"
    sampler: Literal[SAMPLERS] = "original"
    num_hierarchies: Annotated[int, ranges.Range(1, 4)] = 3
    num_target_masks: ranges.Count = 4
    scale_progression: Literal["geometric", "linear"] = "geometric"
    base_scale: tuple[ranges.Share, ranges.Share] = (0.05, 0.15)
    aspect_ratio_range: tuple[ranges.Positive, ranges.Positive] = (0.75, 1.5)
    max_attempts: ranges.Count = 10
    min_keep: ranges.OrNone = 4
    targets_per_level: Literal["constant", "shrink"] = "constant"
    context_scale: tuple[ranges.Probability, ranges.Probability] = (0.0, 0.0)
    levels: Literal["per_level", "finest"] = "per_level"
    together: bool = True
    mode: Literal["drop", "zero"] = "drop"
    context: Literal["block", "complement"] = "block"
    packed: bool = True
    slots: ranges.Share = 0.7
    accumulate_crops: bool = False

    def check(self) -> Iterator[str]:
        """Yield one line per pair that is no range."""
        yield from ranges.in_order(self, "base_scale", "aspect_ratio_range")
        low, high = self.context_scale
        if high and not 0 < low <= high:
            yield (
                f"context_scale={self.context_scale}: 0 < smallest <= largest <= 1, "
                "or (0.0, 0.0) for the sampler's own"
            )
        if not self.together:
            for key, want in (("num_hierarchies", 1), ("strategy", "global_only")):
                if (value := getattr(self, key)) != want:
                    yield f"{key}={value}: together=False needs {key}={want}"

    @property
    def passes(self) -> int:
        """Encoder passes per crop: levels that have masks of their own."""
        return self.num_hierarchies if self.levels == "per_level" else 1

    @property
    def asks(self) -> int:
        """Sets of targets per crop that are predicted one by one."""
        return self.passes if self.together else self.num_target_masks

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


def block_size(scale, aspect, grid):
    """Return int (height, width), in patches, of a block of this area and shape.

    Half a patch is rounded to even, and a block is never larger than the grid nor
    smaller than one patch.

    Args:
        scale: share of the grid's N patches, any shape.
        aspect: width / height, same shape.
        grid: (h, w).
    """
    height = np.rint(np.sqrt(scale * (grid[0] * grid[1]) / aspect))
    width = np.rint(height * aspect)
    height = height.clip(1, grid[0]).astype(np.int64)
    return height, width.clip(1, grid[1]).astype(np.int64)


def hierarchical(rng, masking: Masking, grid, crops: int = 1, *, size_rng=None):
    """Draw context and target blocks of every level for several crops.

    Args:
        rng: numpy Generator. The first crops do not depend on how many follow.
        masking: how to draw.
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
    shape = (crops, masking.num_hierarchies, masking.num_target_masks)
    context, targets = [], []
    for visible, blocks in _draw(rng, masking, grid, crops, size_rng):
        context.append(visible)
        targets += blocks + [0] * (masking.num_target_masks - len(blocks))
    return _unpack(context, shape[:2], grid), _unpack(targets, shape, grid)


def multicrop(rng, masking: Masking, global_grid, local_grid, crops, *, size_rng=None):
    """Draw the masks of all crops of one image.

    Args:
        rng: numpy Generator. The global masks do not depend on the local crops.
        masking: how to draw, and the strategy.
        global_grid, local_grid: (h, w) of the two kinds of crop, in patches.
        crops: (G, L) numbers of global and local crops.
        size_rng: see `hierarchical`.

    Returns:
        dict of bool arrays: global_context, global_targets [G, H, N] and, when there
        are local crops that the strategy uses, local_context, local_targets
        [L, H, n]. Targets are the union of the blocks, but with together=False each
        block of the one level, [G, T, N]. The first L // 2 local crops
        have targets in `cross_crop_prediction`, none in `global_with_local_context`.
    """
    out = {}
    if crops[0]:
        context, targets = _pair(rng, masking, global_grid, crops[0], size_rng)
        out |= dict(global_context=context, global_targets=targets)
    if not crops[1] or masking.strategy == "global_only":
        return out
    shape = (crops[1], masking.num_hierarchies, local_grid[0] * local_grid[1])
    context, targets = np.ones(shape, bool), np.zeros(shape, bool)
    hidden = crops[1] // 2 if masking.strategy == "cross_crop_prediction" else 0
    if hidden:
        context[:hidden], targets[:hidden] = _pair(
            rng, masking, local_grid, hidden, size_rng
        )
    return out | dict(local_context=context, local_targets=targets)


def _pair(rng, masking, grid, crops, size_rng):
    """Return context [crops, H, N] and union of targets, or each block; two bools."""
    if not masking.together:
        context, targets = hierarchical(rng, masking, grid, crops, size_rng=size_rng)
        return context, targets[:, 0]
    context, targets = [], []
    for visible, blocks in _draw(rng, masking, grid, crops, size_rng):
        context.append(visible)
        targets.append(_union(blocks))
    shape = (crops, masking.num_hierarchies)
    return _unpack(context, shape, grid), _unpack(targets, shape, grid)


def _draw(rng, masking, grid, crops, size_rng):
    """Yield (context, list of target blocks) as bit sets, crop by crop, by level."""
    attempts = 1 if masking.sampler == "ijepa" else masking.max_attempts
    tall, wide, shift = _candidates(rng, masking, grid, crops, attempts, size_rng)
    table = _table(grid)
    everything = (1 << grid[0] * grid[1]) - 1
    keep = masking.keep(grid)
    for c in range(crops):
        for k in range(masking.num_hierarchies):
            h, w, s = tall[c][k], wide[c][k], shift[c][k]
            blocks, taken = [], 0
            for t in range(masking.blocks(k)):
                for a in range(attempts):
                    block = table[h[t][a]][w[t][a]] << s[t][a]
                    if not block & taken or masking.sampler == "ijepa":
                        break
                else:  # The last candidate is the fallback.
                    block = table[h[t][-1]][w[t][-1]] << s[t][-1]
                blocks.append(block)
                taken |= block
            context = table[h[-1][0]][w[-1][0]] << s[-1][0]
            yield _visible(context, blocks, everything, keep)


def _candidates(rng, masking, grid, crops, attempts, size_rng):
    """Draw every block that may be needed, as nested lists.

    Returns:
        (height, width, shift), each [crops, H, T + 1, attempts + 1]: row T holds the
        context block, column `attempts` the fallback; `shift` is the raster index of
        the top left patch.
    """
    levels = range(masking.num_hierarchies)
    rows = masking.num_target_masks + 1
    # Drawn crop by crop, so that the first crops do not depend on the rest.
    u = rng.random((crops, 4, len(levels), rows, attempts + 1)).swapaxes(0, 1)
    scale, aspect = _ranges(masking, rows)
    if masking.sampler == "ijepa":
        one = u[0][..., [0, -1], :1]  # Target and context: [crops, H, 2, 1].
        if size_rng is not None:
            one = size_rng.random(one.shape[1:])
        u[0] = one.repeat([rows - 1, 1], axis=-2)
        height, width = _ijepa_sizes(u[0], scale, aspect, grid)
    else:
        area, shape = scale[0] + u[0] * scale[1], aspect[0] + u[1] * aspect[1]
        height, width = block_size(area, shape, grid)
        for k in levels:
            height[:, k, :, -1], width[:, k, :, -1] = masking.fallback(k, grid)
    top = (u[2] * (grid[0] + 1 - height)).astype(np.int64)
    left = (u[3] * (grid[1] + 1 - width)).astype(np.int64)
    return height.tolist(), width.tolist(), (top * grid[1] + left).tolist()


@functools.lru_cache
def _ranges(masking, rows):
    """Return (low, span) of the area [H, rows, 1] and of the aspect [H, 1, 1]."""
    levels = range(masking.num_hierarchies)
    scale = np.array([[masking.target_scale(k)] * rows for k in levels])
    scale[:, -1] = [masking.context_range(k) for k in levels]
    aspect = np.array([masking.aspect(k) for k in levels])[:, None]
    pairs = [(x[..., :1], x[..., 1:] - x[..., :1]) for x in (scale, aspect)]
    return pairs[0], pairs[1]


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
