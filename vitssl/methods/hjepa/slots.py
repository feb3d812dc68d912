"""How many tokens of a masked crop the compiled step has room for.

The number of visible patches and of targets differs from crop to crop; the shapes of
a compiled step do not. Room for the largest number costs: on a 14 x 14 grid the
original sampler shows 37 % of the patches on average and 77 % at most. So the step
offers a quantile of the numbers the sampler draws, and a crop with more visible
patches than that is thinned out evenly (`predictor.thin`), as I-JEPA thins all of
them to the batch's minimum. Targets always have room for the largest set seen in
`DRAWS` draws and a margin.

With the default quantile of 0.7 a step costs 4 to 9 % more than one with the mean
number of tokens would (2 global and 6 local crops, ViT-B/16), and of all visible
patches 4 to 6 % do not enter the encoder, 6 to 9 % not the predictor. The metrics
`dropped_context` and `dropped_targets` say what a run loses. With 1.0 it is nothing.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from vitssl.methods.hjepa import masks

DRAWS = 1024
MARGIN = 0.03  # Of the grid, on top of the largest set of targets drawn.


class Slots(NamedTuple):
    """Static lengths for one kind of crop.

    Attributes:
        visible: patches the context encoder sees.
        targets: patches to predict.
        sequence: rows of the predictor for both together; without packing, or where
            hidden tokens stay in the context, their sum.
    """

    visible: int
    targets: int
    sequence: int


@functools.lru_cache
def slots(masking: masks.Masking, grid) -> Slots:
    """Return the lengths for crops of `grid` = (h, w) patches."""
    n, passes = math.prod(grid), masking.passes
    if not masking.packed:
        return Slots(n, n, 2 * n)
    seen, asked = _counts(masking, grid)
    shown, wanted = zip(*(bounds(masking, k, grid) for k in range(passes)), strict=True)
    if masking.slots >= 1.0:
        most = max(shown) if masking.context == "block" else n
        asked, seen, both = max(wanted), min(n, most), n
    else:
        most = math.ceil(np.quantile(seen, masking.slots))
        both = np.minimum(seen, most) + asked
        asked = min(max(wanted), int(asked.max()) + math.ceil(MARGIN * n))
        both = max(math.ceil(np.quantile(both, masking.slots)), asked)
        seen = most
    seen, asked = max(1, seen), max(1, asked)
    if masking.mode == "zero":
        return Slots(n, asked, n + asked)
    return Slots(seen, asked, min(max(both, asked), seen + asked))


def _counts(masking, grid):
    """Return numbers of visible patches and of targets of many draws, [draws K]."""
    rng = np.random.default_rng(0)
    # One call of this sampler gives all crops blocks of the same size.
    calls = DRAWS // 4 if masking.sampler == "ijepa" else 1
    drawn = [
        masks.hierarchical(rng, masking, grid, DRAWS // calls) for _ in range(calls)
    ]
    context, targets = map(np.concatenate, zip(*drawn, strict=True))
    union = targets.any(2)[:, : masking.passes]  # [draws, K, N]
    block = masking.context == "block"
    context = context[:, : masking.passes] if block else ~union
    asked = union if masking.together else targets[:, 0]  # [draws, T, N]
    seen = np.broadcast_to(context.sum(-1), asked.shape[:2])
    return seen.ravel(), asked.sum(-1).ravel()


@functools.lru_cache
def bounds(masking, level, grid):
    """Return numbers (visible, targets) of patches that no draw exceeds.

    Visible: no more than the context block holds, and the first target block (which
    is never a fallback) is never visible. When `min_keep` replaces the context by
    all that is no target, fewer than `keep` patches of the context block were
    visible, so the rest lies outside of it.
    """
    n, keep = grid[0] * grid[1], masking.keep(grid)
    least, most = _areas(
        masking, masking.target_scale(level), masking.aspect(level), grid
    )
    shape = (1.0, 1.0) if masking.sampler == "ijepa" else masking.aspect(level)
    small, large = _areas(masking, masking.context_range(level), shape, grid)
    visible = min(n - least, large)
    if keep:
        visible = max(keep, min(n - least, max(large, n - small + keep)))
    others = most
    if masking.sampler != "ijepa":
        others = max(most, math.prod(masking.fallback(level, grid)))
    targets = most + (masking.blocks(level) - 1) * others
    if not masking.together:
        targets = max(most, others)
    return visible, min(n - keep, targets)


def _areas(masking, scale, aspect, grid):
    """Return a lower and an upper bound of the area of a block, in patches.

    Both sides grow with the area that is asked for, so the ends of `scale` suffice.
    """
    n = grid[0] * grid[1]
    if masking.sampler == "ijepa":
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
