"""Which patches LocalMIM hides, drawn on the device, and how much of each target."""

import dataclasses
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
    """

    ratio: Ratio = 0.75
    schedule: tuple[tuple[float, Ratio], ...] = ()
    distance: ranges.Probability = 0.0

    def visible(self, patches: int, epoch: float) -> int:
        """Return K = int(N (1 - ratio)), truncated as the original does."""
        ratio = self.ratio
        for start, value in self.schedule:
            if epoch >= start:
                ratio = value
        return int(patches * (1 - ratio))

    def draw(self, rng, count: int, grid: tuple[int, int], visible: int) -> Masks:
        """Return the masks of `count` images of h x w patches, K of them visible."""
        n = grid[0] * grid[1]
        noise_key, centre_key = jax.random.split(rng)
        noise = jax.random.uniform(noise_key, (count, n))
        if self.distance:
            cells = jnp.stack(jnp.divmod(jnp.arange(n), grid[1]), axis=-1)
            centre = jax.random.randint(centre_key, (count, 1), 0, n)
            apart = (cells[None] - cells[centre]).astype(jnp.float32)
            away = jnp.linalg.norm(apart, axis=-1)  # [B, N]
            away = away / away.max(-1, keepdims=True)
            noise = (1 - self.distance) * noise + self.distance * away
        return masks(noise, visible)


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
