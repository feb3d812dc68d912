"""Large photographs at a part of their size, where crops of them shrink far more.

The decoder of JPEG leaves out high frequencies of each block of 8 x 8 pixels, and makes
4 x 4, 2 x 2 or one of it. That is quick, but no filter to resize by: the crop is still
resized by the filter that it always has, from at least `GAP` times its size, which
leaves little trace of how the pixels came about: less than between PIL's bicubic and
Lanczos filters, and from twice the size on no more than "fast" of `resample` has.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

GAP = 1.7  # Pixels, along an axis, that are left for one of the smallest crop.
FACTORS = (8, 4, 2)  # Of JPEG, without loss of speed.
LARGE = 1 << 20  # Pixels from which on it is worth it.

# (height, width) of an image -> how many of its pixels, along either axis, become one
# of a transform's results, at least.
Reduction = Callable[[tuple[int, int]], float]


@dataclasses.dataclass(frozen=True, eq=False)
class Reduced:
    """An image of which fewer pixels are there than it has.

    Attributes:
        pixels: uint8 [h, w, C].
        shape: (H, W, C) of the image, by which boxes are drawn.
        factor: pixels of the image, along an axis, in one of `pixels`.
        origin: (y, x) of the corner of `pixels` in the image; above 0 nowhere.
    """

    pixels: np.ndarray
    shape: tuple[int, int, int]
    factor: int
    origin: tuple[int, int] = (0, 0)

    @property
    def dtype(self):
        return self.pixels.dtype

    def cut(self, box):
        """Return (pixels that hold a box of the image, the box in them, not whole).

        Args:
            box: (top, left, height, width) in pixels of the image.
        """
        ends = []
        for start, length, corner, most in zip(
            box[:2], box[2:], self.origin, self.pixels.shape, strict=False
        ):
            low, high = ((v - corner) / self.factor for v in (start, start + length))
            first = int(low)
            ends.append((first, min(most, -int(-high // 1)), low - first, high - first))
        (y0, y1, top, bottom), (x0, x1, left, right) = ends
        inside = min(bottom, y1 - y0), min(right, x1 - x0)
        whole = (top, left, inside[0] - top, inside[1] - left)
        return self.pixels[y0:y1, x0:x1], whole


def factor(reduction: Reduction | None, size: tuple[int, int]) -> int:
    """Return the factor at which an image of a size may be decoded; 1 = as it is."""
    if reduction is None or size[0] * size[1] < LARGE:
        return 1
    least = reduction(size)
    return next((f for f in FACTORS if f * GAP <= least), 1)
