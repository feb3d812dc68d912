"""Affine warps of images on the device, and their approximate inverse on maps.

A warp is given as torchvision gives it: an angle in degrees, a translation in pixels
(x, y) and a scale, about the image's centre; outside the image there is 0.

Source: ananthu-aniraj/ifam utils/data_utils/reversible_affine_transform.py;
torchvision.transforms.functional.affine.
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from vitssl import ranges


class Warp(NamedTuple):
    """One affine warp; every field [] or float."""

    angle: jax.Array | float  # Degrees.
    x: jax.Array | float  # Pixels to the right.
    y: jax.Array | float  # Pixels down.
    scale: jax.Array | float  # Above 0.


@dataclasses.dataclass(frozen=True)
class Affine:
    """Config section `affine`: what warps are drawn from, uniformly.

    Attributes:
        degrees: -degrees to degrees.
        translate: (x, y) largest shift as a fraction of the side.
        scale: (least, most).
    """

    degrees: Annotated[float, ranges.Range(0, 180)] = 90.0
    translate: tuple[ranges.BelowOne, ranges.BelowOne] = (0.11, 0.11)
    scale: tuple[ranges.Positive, ranges.Positive] = (0.8, 1.4)

    def draw(self, rng, size: int) -> Warp:
        """Return one warp for square images of `size` pixels; whole-pixel shifts."""
        keys = jax.random.split(rng, 4)
        x, y = (
            jnp.round(jax.random.uniform(k, (), minval=-t * size, maxval=t * size))
            for k, t in zip(keys[1:3], self.translate, strict=True)
        )
        return Warp(
            jax.random.uniform(keys[0], (), minval=-self.degrees, maxval=self.degrees),
            x,
            y,
            jax.random.uniform(keys[3], (), minval=self.scale[0], maxval=self.scale[1]),
        )

    def check(self) -> Iterator[str]:
        """Yield what is in the wrong order."""
        if self.scale[0] > self.scale[1]:
            yield f"scale={self.scale}: ascending, the least first"


def _sources(shape, warp):
    """Return where each output pixel reads: (rows, columns) [H, W], in pixels."""
    height, width = shape
    centre = (height - 1) / 2, (width - 1) / 2
    y = jnp.arange(height, dtype=jnp.float32)[:, None] - centre[0]
    x = jnp.arange(width, dtype=jnp.float32)[None] - centre[1]
    angle = jnp.deg2rad(jnp.float32(warp.angle))
    c, s = jnp.cos(angle) / warp.scale, jnp.sin(angle) / warp.scale
    x, y = x - warp.x, y - warp.y  # [1, W], [H, 1]
    return c * y - s * x + centre[0], c * x + s * y + centre[1]


def _read(image, rows, columns):
    """Return image [B, H, W, C] at integer positions [h, w]; 0 outside."""
    height, width = image.shape[1:3]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    rows, columns = jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)
    return jnp.where(inside[None, :, :, None], image[:, rows, columns], 0.0)


def bilinear(image, warp: Warp):
    """Warp images [B, H, W, C] float, all alike, with bilinear sampling."""
    rows, columns = _sources(image.shape[1:3], warp)
    top, left = jnp.floor(rows), jnp.floor(columns)
    down, right = rows - top, columns - left
    top, left = top.astype(jnp.int32), left.astype(jnp.int32)
    total = 0.0
    for i, wy in ((0, 1.0 - down), (1, down)):
        for j, wx in ((0, 1.0 - right), (1, right)):
            weight = (wy * wx)[None, :, :, None]
            total = total + weight * _read(image, top + i, left + j)
    return total


def nearest(image, warp: Warp):
    """Warp images or maps [B, H, W, C], all alike, with nearest sampling.

    Halves round to even, as torch rounds them.
    """
    rows, columns = (jnp.round(x) for x in _sources(image.shape[1:3], warp))
    return _read(image, rows.astype(jnp.int32), columns.astype(jnp.int32))


def undo(maps, warp: Warp, size: int):  # [B, h, w, K] -> [B, h, w, K]
    """Bring maps of warped images of `size` pixels back to the unwarped frame.

    First the shift, in units of the maps, then rotation and scale, each with nearest
    sampling: the original's two steps, whose rounding is not that of one.
    """
    ratio = maps.shape[1] / size
    shift = Warp(0.0, -warp.x * ratio, -warp.y * ratio, 1.0)
    back = Warp(-warp.angle, 0.0, 0.0, 1.0 / warp.scale)
    return nearest(nearest(maps, shift), back)
