"""Resizing of images: PIL's antialiased bicubic, and a fast stand-in for it.

`bicubic` is PIL's, bit for bit. `fast` is OpenCV's cubic interpolation behind a short
symmetric filter, chosen for each scale so that both together come as near as possible
to PIL's operator on images with natural spectra. On photographs it differs by 0.5 grey
levels in the mean (OpenCV's area interpolation by 1 to 1.6) at a quarter of the cost.
"""

import functools
import math

import cv2
import numpy as np
from PIL import Image

from vitssl.data import reduced

TAPS = (5, 7)  # Of the filter, below and from a reduction by LONG.
LONG = 2.0
OCTAVE = 16  # Scales are rounded to this many steps per doubling.
MOST = 3.0  # Above this reduction the filter would be too short.
_CORRELATION = 0.98  # Of neighbouring pixels of a photograph.


def resize(image, size, box=None, interpolation="bicubic"):
    """Cut out a box and resize it.

    Args:
        image: uint8 or uint16 [H, W, C], any C; or float32, by "bicubic" or
            "bilinear"; or a `Reduced`, which has PIL's bicubic for "fast", too.
        size: (height, width) of the result.
        box: (top, left, height, width), or None for the whole image. No pixel outside
            of it is used.
        interpolation: "bicubic", "bilinear" or "fast".

    Returns:
        [height, width, C] of the same dtype; a view if there is nothing to resize.
    """
    if isinstance(image, reduced.Reduced):
        return _reduced(image, size, box or (0, 0, *image.shape[:2]), interpolation)
    if box is not None:
        top, left, height, width = box
        image = image[top : top + height, left : left + width]
    if image.shape[:2] == tuple(size):
        return image
    one = _fast
    if interpolation != "fast":
        one = functools.partial(_pil, how=interpolation)
    depth = image.shape[-1]
    if depth == 1 or (depth == 3 and image.dtype == np.uint8):
        return one(image, size).reshape(*size, depth)
    # PIL would take the fourth channel for opacity; OpenCV resizes at most four.
    return np.stack([one(image[..., i : i + 1], size) for i in range(depth)], -1)


def _reduced(image, size, box, how):
    """Return the resize of a box of a `Reduced`: of pixels, and parts of some."""
    pixels, box = image.cut(box)
    depth = pixels.shape[-1]
    pixels = np.ascontiguousarray(pixels[..., 0] if depth == 1 else pixels)
    top, left, height, width = box
    how = Image.Resampling["BICUBIC" if how == "fast" else how.upper()]
    inside = left, top, left + width, top + height
    found = Image.fromarray(pixels).resize(size[::-1], how, box=inside)
    return np.asarray(found).reshape(*size, depth)


def _pil(image, size, how):
    """Return PIL's antialiased resize of [H, W, 1 or 3]."""
    if image.dtype == np.uint16:  # PIL has 16 bits for integers, but not its filters.
        found = _pil(image.astype(np.float32), size, how)
        return np.rint(found.clip(0, 65535)).astype(np.uint16)
    image = np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture = Image.fromarray(image).resize(size[::-1], Image.Resampling[how.upper()])
    return np.asarray(picture)


def _fast(image, size):
    """Return the filtered cubic resize of [H, W, 1 or 3]."""
    if max(_scales(image, size)) > MOST:
        # The mean of the covered pixels, down to twice the size that is wanted.
        least = [min(n, 2 * m) for n, m in zip(image.shape, size, strict=False)]
        image = cv2.resize(image, least[::-1], interpolation=cv2.INTER_AREA)
    column, row = (
        kernel(round(OCTAVE * math.log2(s)), TAPS[s >= LONG])
        for s in _scales(image, size)
    )
    image = cv2.sepFilter2D(image, -1, row, column, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_CUBIC)


def _scales(image, size):
    return image.shape[0] / size[0], image.shape[1] / size[1]


@functools.lru_cache
def kernel(step, taps):  # -> float64 [taps]
    """Return the filter that turns OpenCV's cubic into PIL's, along one axis.

    Both are linear, so they are read off as matrices C and P. The filter F, symmetric
    and of sum 1, minimises the expected ||(C F - P) x||^2 over signals x whose samples
    are correlated like the pixels of a photograph.

    Args:
        step: log2 of the scale (source / result) in sixteenths.
        taps: odd length.
    """
    scale = 2 ** (step / OCTAVE)
    m = max(32, math.ceil(32 / scale))
    n, half = round(m * scale), taps // 2
    eye = np.eye(n, dtype=np.float32)
    want = Image.fromarray(eye).resize((n, m), Image.Resampling.BICUBIC)  # P: [m, n]
    have = cv2.resize(eye, (n, m), interpolation=cv2.INTER_CUBIC)  # C: [m, n]
    pad = np.pad(eye, ((half, half), (0, 0)), mode="edge")
    shifts = [pad[i : i + n] for i in range(taps)]
    pairs = [shifts[half]]
    pairs += [shifts[half - j] + shifts[half + j] for j in range(1, half + 1)]
    distance = np.abs(np.arange(n)[:, None] - np.arange(n))
    root = np.linalg.cholesky(_CORRELATION**distance)  # [n, n]
    inside = slice(m // 6, -(m // 6))  # The two treat the borders differently.
    terms = np.stack([(have @ p @ root)[inside].ravel() for p in pairs], -1)
    half_kernel = np.linalg.lstsq(terms, (want @ root)[inside].ravel())[0]
    both = np.concatenate([half_kernel[:0:-1], half_kernel])
    # Rounded, so that no difference between processors reaches the pixels.
    return (both / both.sum()).round(4)
