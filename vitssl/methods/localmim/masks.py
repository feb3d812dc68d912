"""Which patches LocalMIM hides, and the weight of every target cell."""

from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp


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
    def keep(self):
        """Return the visible patches [B, K]."""
        return self.order[:, : self.visible]

    @property
    def hidden(self):
        """Return the hidden patches [B, N - K]."""
        return self.order[:, self.visible :]

    @property
    def mask(self):
        """Return 1 where a patch is hidden: [B, N] float32."""
        return (self.restore >= self.visible).astype(jnp.float32)


def random_masks(noise, visible) -> Masks:
    """Return the masks that noise [B, N] draws: the smallest K are visible."""
    order = jnp.argsort(noise, axis=1, stable=True)
    return Masks(order, jnp.argsort(order, axis=1, stable=True), visible)


def cell_weights(mask, grid, scale):
    """Return the weight of every target cell, from a patch mask.

    Args:
        mask: [B, N], 1 = hidden.
        grid: (h, w).
        scale: cells per patch side; below 1 the masks of a cell are averaged.

    Returns:
        [B, (h s) (w s)].
    """
    h, w = grid
    if scale < 1:
        k = round(1 / scale)
        return einops.reduce(
            mask, "b (h p w q) -> b (h w)", "mean", h=h // k, p=k, w=w // k
        )
    s = round(scale)
    return einops.repeat(mask, "b (h w) -> b (h p w q)", h=h, p=s, q=s)


def draw(rng, count, grid, visible, distance=0.0) -> Masks:
    """Return random masks.

    Args:
        rng: key.
        count: B.
        grid: (h, w).
        visible: K.
        distance: 0 draws uniformly; towards 1 the visible patches gather around a
            random centre.
    """
    n = grid[0] * grid[1]
    noise_key, centre_key = jax.random.split(rng)
    noise = jax.random.uniform(noise_key, (count, n))
    if distance:
        cells = jnp.stack(jnp.divmod(jnp.arange(n), grid[1]), axis=-1)
        centre = jax.random.randint(centre_key, (count, 1), 0, n)
        apart = (cells[None] - cells[centre]).astype(jnp.float32)
        away = jnp.linalg.norm(apart, axis=-1)  # [B, N]
        away = away / away.max(-1, keepdims=True)
        noise = (1 - distance) * noise + distance * away
    return random_masks(noise, visible)
