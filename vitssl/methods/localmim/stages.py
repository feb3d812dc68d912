"""The stages of LocalMIM: which blocks are decoded, into what, and what they count."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax.numpy as jnp
import numpy as np

Target = Literal["hog", "pixel", "feature", "prefix"]
SCALES = (0.25, 0.5, 1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Stages:
    """Config section `stages`.

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
    weighting: Literal["uniform", "n_minus_k", "one_over_k", "one_over_n_minus_k"] = (
        "uniform"
    )
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

    def up_to(self, depth: int, whole: int) -> "Stages":
        """Return the stages of the first blocks of `whole`: later ones read the last.

        The result is not checked: several may read one block.
        """

        def found(blocks):
            return tuple(min(int(b), depth - 1) for b in blocks)

        moves = tuple((start, *found(moved)) for start, *moved in self.moves)
        blocks = found(self.blocks or (1, 3, whole - 3, whole - 1))
        return dataclasses.replace(self, blocks=blocks, moves=moves)

    def layers(self, depth: int) -> tuple:
        """Return ((pattern, layer), ...): norm and decoder go with a stage's block."""
        *early, last = self.blocks_at(0.0, depth)
        own = [(rf"(norm|decoder)_{k}/.*", b + 1) for k, b in enumerate(early)]
        return (*own, (rf"(encoder/norm|decoder_{len(early)})/.*", last + 1))

    def loss_weights(self, active: tuple[int, ...], epoch=None):  # [len(active)]
        """Return the weights of the stages that still have a loss, given rising.

        `epoch` may be traced; only a curriculum looks at it.
        """
        if self.curriculum:
            table = np.asarray(self.curriculum, np.float32)
            rows = [jnp.interp(epoch, table[:, 0], table[:, 1 + k]) for k in active]
            return jnp.stack(rows)
        if self.weights:
            return np.asarray([self.weights[k] for k in active], np.float32)
        n = len(active) if self.by_remaining else self.count
        places = range(n) if self.by_remaining else active
        return np.asarray([self._weight(k, n) for k in places], np.float32)

    def _weight(self, k, n):
        if self.weighting == "n_minus_k":
            return float(n - k)
        if self.weighting == "one_over_k":
            return 1.0 / (k + 1)
        if self.weighting == "one_over_n_minus_k":
            return 1.0 / (n - k)
        return 1.0

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
        for name in ("curriculum", "moves"):
            rows = getattr(self, name)
            if any(len(row) != n + 1 for row in rows):
                yield f"{name}: every row is (epoch, {n} values, one per stage)"
            starts = [row[0] for row in rows]
            if starts != sorted(starts):
                yield f"{name}: the epochs {starts} must rise"
        for s in self.scales:
            if s not in SCALES:
                yield f"scales: {s}: one of {', '.join(map(str, SCALES))}"
        if len(self.targets) not in (1, n):
            yield f"targets has {len(self.targets)} entries; give 1 or {n}"
            return
        for k, s in enumerate(self.scales):
            if self.target(k) in ("feature", "prefix") and s != 1:
                yield f"targets: {self.target(k)} needs scale 1, stage {k} has {s}"

    def faults(self, depth: int, patch: int, grid: int) -> Iterator[str]:
        """Yield, with whole keys, what does not fit an encoder and its training crop.

        Args:
            grid: patches along a side.
        """
        starts = [0.0, *(row[0] for row in self.moves)]
        for blocks in {self.blocks_at(e, depth) for e in starts}:
            yield from self._block_faults(blocks, depth)
        for s in self.scales:
            cell = patch / s
            if cell != int(cell) or cell < 1:
                yield (
                    f"stages.scales: {s} makes cells of {cell:g} pixels at model.patch="
                    f"{patch}; a whole number is needed"
                )
            if s < 1 and grid % round(1 / s):
                yield f"stages.scales: {s} does not divide the grid of {grid} patches"

    def _block_faults(self, blocks, depth):
        rising = all(a < b for a, b in zip(blocks, blocks[1:], strict=False))
        if not rising or min(blocks) < 0 or max(blocks) >= depth:
            given = "stages.blocks" if self.blocks else "the default stages"
            yield (
                f"model.depth={depth}: {given} {blocks} must be rising numbers below "
                "it; give stages.blocks (the default needs depth 7 or more)"
            )
        elif blocks[-1] != depth - 1:
            yield (
                f"stages.blocks={blocks}: the last must be {depth - 1}, or the blocks "
                "after it would not train"
            )
