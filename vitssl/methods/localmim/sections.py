"""Config sections of LocalMIM: `decoder`, `stages`, `masking`, `target`, `augment`."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax.numpy as jnp
import numpy as np

Weighting = Literal["uniform", "n_minus_k", "one_over_k", "one_over_n_minus_k"]
Target = Literal["hog", "pixel", "feature", "prefix"]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Config section `decoder`; see `methods.localmim.decoder.StageDecoder`.

    Attributes:
        width, depth, heads, mlp_ratio: of every stage's decoder.
    """

    width: int = 256
    depth: int = 1
    heads: int = 8
    mlp_ratio: float = 4.0

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        for key in ("width", "depth", "heads"):
            if getattr(self, key) < 1:
                yield f"{key}={getattr(self, key)}: must be at least 1"
        if self.heads >= 1 and self.width % self.heads:
            yield f"heads={self.heads}: must divide width={self.width}"
        if self.width % 4:
            yield f"width={self.width}: its position table needs a multiple of 4"


@dataclasses.dataclass(frozen=True)
class Stages:
    """Config section `stages`: which blocks are decoded, at which scale, into what.

    Attributes:
        blocks: 0-based, rising, the last one the encoder's last; () takes
            (1, 3, depth - 3, depth - 1).
        scales: target cells per patch side of each stage.
        targets: of each stage, or one for all. feature: the last block's tokens of the
            whole image; prefix: the tokens at `prefix.boundary`.
        weighting: weights of the n stages' losses, stage k = 0 the earliest: n_minus_k
            is 4 3 2 1, one_over_k is 1 1/2 1/3 1/4, one_over_n_minus_k is 1/4 1/3 1/2
            1.
        weights: explicit weights in place of `weighting`.
        curriculum: ((epoch, w_0, ..., w_n-1), ...): weights that change, linear between
            these epochs; in place of both.
        by_remaining: count k over the stages that have not frozen yet, as the original
            does; its weights then shift whenever a stage is dropped.
        moves: ((epoch, block_0, ..., block_n-1), ...): from that epoch on the decoders
            read these blocks.
    """

    blocks: tuple[int, ...] = ()
    scales: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5)
    targets: tuple[Target, ...] = ("hog",)
    weighting: Weighting = "uniform"
    weights: tuple[float, ...] = ()
    curriculum: tuple[tuple[float, ...], ...] = ()
    by_remaining: bool = False
    moves: tuple[tuple[float, ...], ...] = ()

    @property
    def count(self) -> int:
        """Number of stages."""
        return len(self.scales)

    def target(self, k: int) -> Target:
        """Return the target of stage k."""
        return self.targets[k] if len(self.targets) > 1 else self.targets[0]

    def blocks_at(self, epoch: float, depth: int) -> tuple[int, ...]:
        """Return the block of every stage at an epoch."""
        blocks = self.blocks or (1, 3, depth - 3, depth - 1)
        for start, *moved in self.moves:
            if epoch >= start:
                blocks = tuple(int(b) for b in moved)
        return blocks

    def loss_weights(self, active: tuple[int, ...], epoch=None):
        """Return the weights of the active stages, [len(active)] float32.

        Args:
            active: indices of the stages that still have a loss, rising.
            epoch: traced; used by a curriculum only.
        """
        if self.curriculum:
            table = np.asarray(self.curriculum, np.float32)
            rows = [jnp.interp(epoch, table[:, 0], table[:, 1 + k]) for k in active]
            return jnp.stack(rows)
        if self.weights:
            return np.asarray([self.weights[k] for k in active], np.float32)
        n = len(active) if self.by_remaining else self.count
        places = range(n) if self.by_remaining else active
        return np.asarray([weight(self.weighting, k, n) for k in places], np.float32)

    def check(self) -> Iterator[str]:
        """Yield what does not fit together."""
        n = self.count
        if not n:
            yield "scales=(): at least one stage"
        if self.blocks and len(self.blocks) != n:
            yield f"blocks has {len(self.blocks)} entries for {n} scales"
        if not self.blocks and n != 4:
            yield f"blocks=(): the default is 4 stages, scales has {n}; name them"
        if self.weights and len(self.weights) != n:
            yield f"weights has {len(self.weights)} entries for {n} scales"
        if len(self.targets) not in (1, n):
            yield f"targets has {len(self.targets)} entries; give 1 or {n}"
        for name in ("curriculum", "moves"):
            rows = getattr(self, name)
            if any(len(row) != n + 1 for row in rows):
                yield f"{name}: every row is (epoch, {n} values, one per stage)"
            starts = [row[0] for row in rows]
            if starts != sorted(starts):
                yield f"{name}: the epochs {starts} must rise"
        for s in self.scales:
            if s not in (0.25, 0.5, 1, 2, 4, 8, 16):
                yield f"scales: {s}: one of 0.25, 0.5, 1, 2, 4, 8, 16"
        for k, s in enumerate(self.scales):
            if self.targets and len(self.targets) in (1, n):
                if self.target(k) in ("feature", "prefix") and s != 1:
                    yield f"targets: {self.target(k)} needs scale 1, stage {k} has {s}"


def weight(weighting: Weighting, k: int, n: int) -> float:
    """Return the weight of stage k of n."""
    return {
        "uniform": 1.0,
        "n_minus_k": float(n - k),
        "one_over_k": 1.0 / (k + 1),
        "one_over_n_minus_k": 1.0 / (n - k),
    }[weighting]


@dataclasses.dataclass(frozen=True)
class Masking:
    """Config section `masking`.

    Attributes:
        ratio: share of the patches that is hidden.
        schedule: ((epoch, ratio), ...): from that epoch on this share; each one is
            compiled once.
        distance: 0: hidden patches are drawn at random. Towards 1 the visible ones
            gather around a random centre, so that what is hidden lies far from them.
    """

    ratio: float = 0.75
    schedule: tuple[tuple[float, float], ...] = ()
    distance: float = 0.0

    def ratio_at(self, epoch: float) -> float:
        """Return the ratio of an epoch."""
        ratio = self.ratio
        for start, value in self.schedule:
            if epoch >= start:
                ratio = value
        return ratio

    def visible(self, patches: int, epoch: float) -> int:
        """Return K = int(N (1 - ratio)), truncated as the original does."""
        return int(patches * (1 - self.ratio_at(epoch)))

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        for ratio in (self.ratio, *(r for _, r in self.schedule)):
            if not 0 < ratio < 1:
                yield f"ratio={ratio}: above 0 and below 1"
        if not 0 <= self.distance <= 1:
            yield f"distance={self.distance}: in [0, 1]"


@dataclasses.dataclass(frozen=True)
class Targets:
    """Config section `target`: what the stages predict.

    Attributes:
        nbins: orientations of HOG over 180 degrees (9, or 18 for LocalMIM's ViT-L).
        hog_bias: add a fixed random offset to the derivatives, its own for each stage,
            drawn from the run's seed (LocalMIM's ViT-L recipe, see the README of its
            authors); kept in the checkpoint.
        normalise_pixels: pixel targets of a cell have mean 0 and variance 1.
    """

    nbins: int = 9
    hog_bias: bool = False
    normalise_pixels: bool = True

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        if self.nbins < 2:
            yield f"nbins={self.nbins}: 2 or more"


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Config section `prefix`: mask features instead of patches.

    The first blocks, once frozen, see the whole image, without gradient, and what they
    give is masked. That costs more than the masked prefix, unless it is read from a
    store (`vitssl store`). Visible tokens have then seen the hidden
    ones: another task, not the same one made cheaper.

    Attributes:
        boundary: number of blocks before the mask; 0 is off.
        store: directory of stored tokens, or "" to compute them in every step.
    """

    boundary: int = 0
    store: str = ""

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        if self.boundary < 0:
            yield f"boundary={self.boundary}: 0 (off) or a number of blocks"
        if self.store and not self.boundary:
            yield "store: needs boundary, the number of blocks it holds the output of"


@dataclasses.dataclass(frozen=True)
class Augment:
    """Config section `augment`: one random crop.

    Attributes:
        size: side of the crop, in pixels.
        scale: smallest and largest share of the area.
        flip: probability that it is mirrored.
        interpolation: see `data.resample`.
    """

    size: int
    scale: tuple[float, float] = (0.2, 1.0)
    flip: float = 0.5
    interpolation: str = "bicubic"

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        if self.size < 1:
            yield f"size={self.size}: 1 or more pixels"
        low, high = self.scale
        if not 0 < low <= high <= 1:
            yield f"scale={self.scale}: 0 < smallest <= largest <= 1"
        if not 0 <= self.flip <= 1:
            yield f"flip={self.flip}: a probability"
