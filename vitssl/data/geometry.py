"""Boxes of crops, and cuts of images; boxes follow torchvision's RandomResizedCrop.

A box is (top, left, height, width) in pixels, a size (height, width).
"""

import math

import numpy as np

from vitssl import sizes
from vitssl.data import resample

RATIO = (3 / 4, 4 / 3)  # Width / height of a crop box.
ATTEMPTS = 10
LONGEST = 8  # Times as long as wanted is an image at most when it is resized.


def draw_box(rng, size, scale, ratio=RATIO, attempts=ATTEMPTS):
    """Draw a box: area uniform in `scale`, width / height log-uniform in `ratio`.

    Args:
        rng: numpy Generator.
        size: of the image.
        scale: smallest and largest share of its area.
        ratio: smallest and largest width / height.
        attempts: draws before the largest central box of an allowed shape is taken.
    """
    rows, columns = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(attempts):
        u, v, y, x = rng.random(4).tolist()
        area = rows * columns * (scale[0] + u * (scale[1] - scale[0]))
        aspect = math.exp(low + v * (high - low))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= columns and 0 < height <= rows:
            top, left = int(y * (rows - height + 1)), int(x * (columns - width + 1))
            return top, left, height, width
    height, width = rows, columns
    if columns / rows < ratio[0]:
        height = max(1, round(columns / ratio[0]))
    elif columns / rows > ratio[1]:
        width = max(1, round(rows * ratio[1]))
    return (rows - height) // 2, (columns - width) // 2, height, width


def clipped_box(rng, size, scale, ratio=RATIO):
    """Draw a box of `clipped_size`, placed uniformly."""
    height, width = clipped_size(size, rng.uniform(*scale), rng.uniform(*np.log(ratio)))
    top = int(rng.integers(0, size[0] - height + 1))
    left = int(rng.integers(0, size[1] - width + 1))
    return top, left, height, width


def clipped_size(size, share, log_ratio):
    """Return (height, width) of MAE's crop: one draw, cut to the image.

    Args:
        size: of the image.
        share: of its area.
        log_ratio: natural logarithm of width / height.

    Source: facebookresearch/mae util/crop.py (after BYOL).
    """
    area, ratio = size[0] * size[1] * share, math.exp(log_ratio)
    width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return min(height, size[0]), min(width, size[1])


def shaped(size, ratio=RATIO):
    """Return the least and largest width / height of boxes that become this size."""
    return tuple(r * sizes.aspect(size) for r in ratio)


def reduction(size, scale, shape) -> float:
    """Return how many pixels become one of a random crop at least, along an axis.

    Args:
        size: of the image.
        scale: smallest and largest share of its area that a box has.
        shape: of the crop, whose boxes are `shaped` so.
    """
    (rows, columns), (low, high) = size, shaped(shape)
    area = rows * columns * scale[0]
    # A box that does not fit is the largest central one that has an allowed shape.
    height = min(math.sqrt(area / high), rows, columns / low)
    width = min(math.sqrt(area * low), columns, rows * high)
    return min(a / b for a, b in zip((height, width), sizes.pair(shape), strict=True))


def relative(box, size, flip):
    """Return (top, left, height, width, flipped), lengths as shares of the image."""
    (top, left, height, width), (rows, columns) = box, size
    return top / rows, left / columns, height / rows, width / columns, float(flip)


def middle(size, shape):
    """Return the box of an image without its ends, where it is far longer than a shape.

    Of what is cut out at the centre nothing changes, and a line of pixels is not
    resized to gigabytes. The ends are of equal length.

    Args:
        size: of the image.
        shape: that is wanted.
    """
    rows, columns = size
    height, width = sizes.pair(shape)
    across = max(0, columns - math.ceil(LONGEST * rows * width / height))
    down = max(0, rows - math.ceil(LONGEST * columns * height / width))
    top, left = down // 2, across // 2
    return top, left, rows - 2 * top, columns - 2 * left


def resize_over(image, least, interpolation="bicubic", box=None):
    """Resize [H, W, C], with its shape kept, to just cover least = (height, width).

    The longer side is cut to a whole number of pixels, as torchvision does.

    Args:
        box: part of the image to resize; None is all of it.
    """
    rows, columns = box[2:] if box else image.shape[:2]
    height, width = least
    if height * columns >= width * rows:
        size = height, max(width, height * columns // rows)
    else:
        size = max(height, width * rows // columns), width
    return resample.resize(image, size, box, interpolation)


def centre_crop(image, size):
    """Return the central [h, w, C] of a size; half a pixel is rounded to even."""
    height, width = sizes.pair(size)
    top, left = (
        round((n - side) / 2)
        for n, side in zip(image.shape[:2], (height, width), strict=True)
    )
    return np.ascontiguousarray(image[top : top + height, left : left + width])
