"""How large a batch's samples are: patches a side, time steps, patch sizes.

All of it is a pure function of (seed, step), the same on every process; each distinct
shape is one compiled step.

Source: allenai/olmoearth_pretrain@5411573 olmoearth_pretrain/data/dataset.py
(OlmoEarthSample.subset) and data/dataloader.py.
"""

import dataclasses
import typing
from collections.abc import Iterator, Sequence

import numpy as np

from vitssl import errors
from vitssl.data import modalities


class Shape(typing.NamedTuple):
    """The static part of a batch.

    Attributes:
        p: patch that is processed, in 10 m pixels.
        q: patch of the output; divides p.
        side: patches of size p along a side of the crop.
        times: time steps.
    """

    p: int
    q: int
    side: int
    times: int


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

    token_budget: int = 2250
    min_side: int = 1
    max_side: int = 12
    min_patch: int = 1
    max_patch: int = 8
    tile: int = 128
    times: int = modalities.TIMES
    hold: int = 1
    cutmix: bool = False
    seed: int = 3622

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        if self.token_budget < 1:
            yield f"token_budget={self.token_budget}: 1 or more"
        for low, high in (("min_side", "max_side"), ("min_patch", "max_patch")):
            a, b = getattr(self, low), getattr(self, high)
            if not 1 <= a <= b:
                yield f"{low}={a}, {high}={b}: 1 <= {low} <= {high}"
        for key in ("tile", "hold", "times"):
            if getattr(self, key) < 1:
                yield f"{key}={getattr(self, key)}: 1 or more"
        if self.times > modalities.TIMES:
            yield f"times={self.times}: at most {modalities.TIMES}"


def max_times(
    kinds: Sequence[modalities.Modality],
    token_budget: int,
    side: int,
    most: int = modalities.TIMES,
) -> int:
    """Return the time steps that a budget of tokens leaves.

    Args:
        kinds: of a sample.
        token_budget: most tokens.
        side: patches a side.
        most: time steps.

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
        sampling: the config section.
        kinds: modalities of a sample.
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


def spatial(rng, shape: Shape, tile: int, cutmix: bool) -> tuple[np.ndarray, ...]:
    """Return (rows, columns): the 10 m pixels [side p] that a crop keeps.

    Args:
        rng: numpy Generator.
        shape: of the batch.
        tile: side of the sample.
        cutmix: see `Sampling`.

    Raises:
        DataError: the sample is smaller than the crop.
    """
    size = shape.side * shape.p
    if size > tile:
        raise errors.DataError(
            f"a sample of {tile} x {tile} pixels holds no crop of {size}; set "
            f"sampling.tile={tile}"
        )
    if not cutmix:
        at = rng.integers(0, tile - size + 1, 2)
        return tuple(int(a) + np.arange(size) for a in at)
    count = tile // shape.p
    chosen = [np.sort(rng.permutation(count)[: shape.side]) for _ in range(2)]
    return tuple((c[:, None] * shape.p + np.arange(shape.p)).ravel() for c in chosen)


TURNS = (  # The eight ways to lay a square on itself: (quarter turns, then a flip).
    ("no_transform", 0, ""),
    ("rotate_90", 1, ""),
    ("rotate_180", 2, ""),
    ("rotate_270", 3, ""),
    ("hflip", 0, "h"),
    ("vflip", 0, "v"),
    ("hflip_rotate_90", 1, "h"),
    ("vflip_rotate_90", 1, "v"),
)


def turn(x: np.ndarray, which: int) -> np.ndarray:
    """Return an array [H, W, ...] turned or mirrored, by number of `TURNS`.

    Quarter turns are counter-clockwise, with row 0 on top.
    """
    _, quarters, flip = TURNS[which]
    x = np.rot90(x, quarters, axes=(0, 1))
    return {"": x, "h": x[:, ::-1], "v": x[::-1]}[flip]


def microbatches(batch: int, most: int) -> int:
    """Return into how many equal parts of at most `most` samples a batch splits.

    The original lets the last part be short and weighs it like the others.
    """
    count = -(-batch // most)
    while batch % count:
        count += 1
    return count
