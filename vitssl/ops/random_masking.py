"""Which patches are hidden at random, drawn on the device: MAE, LocalMIM, SimMIM."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import einops
import jax
import jax.numpy as jnp

from vitssl import ranges

Ratio = Annotated[float, ranges.Range(0, 1, open_low=True, open_high=True)]


class Masks(NamedTuple):
    """Which patches are seen.

    Attributes:
        order: [B, N] patches, the visible ones first.
        restore: [B, N] its inverse.
        visible: K.
    """

    order: jax.Array
    restore: jax.Array
    visible: int

    @property
    def keep(self):  # [B, K]
        """Return the visible patches."""
        return self.order[:, : self.visible]

    @property
    def hidden(self):  # [B, N - K]
        """Return the hidden patches."""
        return self.order[:, self.visible :]

    @property
    def mask(self):  # [B, N]
        """Return 1.0 where a patch is hidden."""
        return (self.restore >= self.visible).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Masking:
    """Config section `masking`.

    Attributes:
        ratio: share of the patches that is hidden.
        schedule: ((epoch, ratio), ...): from that epoch on this share; each one is
            compiled once.
        distance: 0: hidden patches are drawn at random. Towards 1 the visible ones
            gather around a random centre, so that what is hidden lies far from them.
        block: squares of so many patches a side are hidden or visible as a whole.
    """

    ratio: Ratio = 0.75
    schedule: tuple[tuple[float, Ratio], ...] = ()
    distance: ranges.Probability = 0.0
    block: ranges.Count = 1

    def visible(self, patches: int, epoch: float) -> int:
        """Return K = int(N (1 - ratio)), truncated as LocalMIM does; whole squares."""
        ratio = self.ratio
        for start, value in self.schedule:
            if epoch >= start:
                ratio = value
        square = self.block**2
        return int(patches // square * (1 - ratio)) * square

    def faults(self, grid: tuple[int, int]) -> Iterator[str]:
        """Yield why these masks do not fit a grid of patches, if they do not."""
        n = grid[0] * grid[1]
        if any(side % self.block for side in grid):
            yield (
                f"masking.block={self.block}: must divide the grid of {grid[0]} x "
                f"{grid[1]} patches"
            )
            return
        epochs = (0.0, *(start for start, _ in self.schedule))
        if any(not 0 < self.visible(n, e) < n for e in epochs):
            yield f"masking.ratio: leaves none or all of the {n} patches visible"

    def draw(self, rng, count: int, grid: tuple[int, int], visible: int) -> Masks:
        """Return the masks of `count` images of h x w patches, K of them visible."""
        return masks(self._noise(rng, count, grid), visible)

    def draw_each(self, keys, grid: tuple[int, int], visible: int) -> Masks:
        """Return the masks of images that each have a key of their own, uint32 [B, 2].

        That of a row does not depend on the others.
        """
        noise = jax.vmap(lambda key: self._noise(key, 1, grid)[0])(keys)
        return masks(noise, visible)

    def _noise(self, rng, count, grid):  # -> [B, N]
        n = grid[0] * grid[1]
        noise_key, centre_key = jax.random.split(rng)
        h, w = (side // self.block for side in grid)
        noise = jax.random.uniform(noise_key, (count, h * w))
        if self.block > 1:  # Equal in a square: a stable sort keeps it together.
            noise = cell_weights(noise, (h, w), self.block)
        if self.distance:
            cells = jnp.stack(jnp.divmod(jnp.arange(n), grid[1]), axis=-1)
            centre = jax.random.randint(centre_key, (count, 1), 0, n)
            apart = (cells[None] - cells[centre]).astype(jnp.float32)
            away = jnp.linalg.norm(apart, axis=-1)  # [B, N]
            away = away / away.max(-1, keepdims=True)
            noise = (1 - self.distance) * noise + self.distance * away
        return noise


def masks(noise, visible: int) -> Masks:
    """Return the masks that noise [B, N] draws: the smallest K are visible."""
    order = jnp.argsort(noise, axis=1, stable=True)
    return Masks(order, jnp.argsort(order, axis=1, stable=True), visible)


def cell_weights(mask, grid, scale):  # [B, N] -> [B, (h s) (w s)]
    """Return how much of every target cell is hidden: 1, or below scale 1 a mean."""
    h, w = grid
    if scale < 1:
        k = round(1 / scale)
        return einops.reduce(
            mask, "b (h p w q) -> b (h w)", "mean", h=h // k, p=k, w=w // k
        )
    s = round(scale)
    return einops.repeat(mask, "b (h w) -> b (h p w q)", h=h, p=s, q=s)
