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
def slots(masking, grid, passes) -> Slots:
    """Return the lengths for crops of `grid` = (h, w).

    Args:
        masking: section `masking` of H-JEPA.
        grid: patches of the crop.
        passes: how many of the levels have masks in use, from the finest.
    """
    n = math.prod(grid)
    if not masking.packed:
        return Slots(n, n, 2 * n)
    seen, asked = _counts(masking, grid, passes)
    bound = max(masking.max_targets(k, grid) for k in range(passes))
    if masking.slots >= 1.0:
        asked, most = bound, n
        if masking.context == "block":
            most = max(masking.max_visible(k, grid) for k in range(passes))
        seen, both = min(n, most), n
    else:
        most = math.ceil(np.quantile(seen, masking.slots))
        both = np.minimum(seen, most) + asked
        asked = min(bound, int(asked.max()) + math.ceil(MARGIN * n))
        both = max(math.ceil(np.quantile(both, masking.slots)), asked)
        seen = most
    seen, asked = max(1, seen), max(1, asked)
    if masking.mode == "zero":
        return Slots(n, asked, n + asked)
    return Slots(seen, asked, min(max(both, asked), seen + asked))


def _counts(masking, grid, passes):
    """Return numbers of visible patches and of targets of many draws, [draws K]."""
    rng = np.random.default_rng(0)
    # One call of this sampler gives all crops blocks of the same size.
    calls = DRAWS // 4 if masking.sampler == "ijepa" else 1
    drawn = [
        masks.hierarchical(rng, masking.blocks_only, grid, DRAWS // calls)
        for _ in range(calls)
    ]
    context, targets = map(np.concatenate, zip(*drawn, strict=True))
    targets = targets.any(2)[:, :passes]  # [draws, K, N]
    context = context[:, :passes] if masking.context == "block" else ~targets
    return context.sum(-1).ravel(), targets.sum(-1).ravel()
