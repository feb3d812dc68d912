"""How large a batch's samples are: patches a side, time steps, patch sizes.

All of it is a pure function of (seed, step), the same on every process; each distinct
shape is one compiled step.

Source: allenai/olmoearth_pretrain@5411573 olmoearth_pretrain/data/dataset.py
(OlmoEarthSample.subset) and data/dataloader.py.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple

import numpy as np

from vitssl import errors, ranges
from vitssl.data import modalities


class Shape(NamedTuple):
    """The static part of a batch."""

    p: int  # Patch that is processed, in 10 m pixels.
    q: int  # Patch of the output; divides p.
    side: int  # Patches of size p along a side of the crop.
    times: int  # Time steps.


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Config section `sampling`.

    Attributes:
        token_budget: most tokens of a sample at patch p; gives the time steps.
        min_side, max_side: patches along a side of the crop.
        min_patch, max_patch: patch sizes drawn where none is fixed.
        tile: side of the samples on disk, in 10 m pixels.
        times: most time steps.
        hold: optimizer steps that keep a shape; each change may be a compilation.
        cutmix: choose rows and columns of patches anywhere in the tile instead of
            one square.
        seed: of the shapes.
    """

    token_budget: ranges.Count = 2250
    min_side: ranges.Count = 1
    max_side: ranges.Count = 12
    min_patch: ranges.Count = 1
    max_patch: ranges.Count = 8
    tile: ranges.Count = 128
    times: Annotated[int, ranges.Range(1, modalities.TIMES)] = modalities.TIMES
    hold: ranges.Count = 1
    cutmix: bool = False
    seed: int = 3622

    def check(self) -> Iterator[str]:
        """Yield ranges that are upside down."""
        for low, high in (("min_side", "max_side"), ("min_patch", "max_patch")):
            a, b = getattr(self, low), getattr(self, high)
            if a > b:
                yield f"{low}={a}, {high}={b}: {low} <= {high}"


def max_times(
    kinds: Sequence[modalities.Modality],
    token_budget: int,
    side: int,
    most: int = modalities.TIMES,
) -> int:
    """Return the time steps, at most `most`, that a budget of tokens leaves.

    Raises:
        UsageError: not even one fits.
    """
    fixed = sum(int(np.prod(k.tokens(side, 1))) for k in kinds if not k.time)
    each = sum(int(np.prod(k.tokens(side, 1))) for k in kinds if k.time)
    if not each:
        times = 1 if fixed <= token_budget else 0
    else:
        times = (token_budget - fixed) // each
    if times < 1:
        raise errors.UsageError(
            f"sampling.token_budget={token_budget}: one time step of {side} x {side} "
            f"patches takes {fixed + each} tokens; raise it or lower sampling.max_side"
        )
    return min(most, times)


def draw(
    sampling: Sampling,
    kinds: Sequence[modalities.Modality],
    step: int,
    patches: tuple[int, ...] = (),
    output: int = 0,
) -> Shape:
    """Return the shape of the batch of a step.

    Args:
        step: 0-based.
        patches: sizes to choose from; () is min_patch..max_patch.
        output: patch of the output, 0 = the one that is processed.

    Raises:
        UsageError: the budget fits no time step, or the tile no crop.
    """
    rng = np.random.default_rng((sampling.seed, step // sampling.hold))
    choices = patches or tuple(range(sampling.min_patch, sampling.max_patch + 1))
    p = choices[int(rng.integers(len(choices)))]
    most = min(sampling.max_side, sampling.tile // p)
    if most < sampling.min_side:
        raise errors.UsageError(
            f"sampling.min_side={sampling.min_side}: patches of {p} px do not fit into "
            f"sampling.tile={sampling.tile}"
        )
    side = int(rng.integers(sampling.min_side, most + 1))
    times = max_times(kinds, sampling.token_budget, side, sampling.times)
    return Shape(p, output or p, side, times)
