"""Colour augmentation of uint8 images on the host, with OpenCV.

Images are uint8 [H, W, C], channels last, red first. Brightness, contrast, blur and
solarisation work on any number of channels; saturation, hue and grayscale need red,
green and blue and leave other images alone. `vitssl.ops.jitter` is the same on an
accelerator, with the same distributions.

The operations are those of PIL's ImageEnhance and torchvision's ColorJitter, to within
a rounding of two grey levels (hue: four, both sides are quantised).
"""

import itertools
import math

import cv2
import numpy as np

LUMA = (0.299, 0.587, 0.114)
ORDERS = tuple(itertools.permutations(range(4)))  # Of the four operations of `jitter`.
SPREAD = (0.4, 0.4, 0.2, 0.1)  # Brightness, contrast, saturation, hue at strength 1.
BLUR_SIGMA = (0.1, 2.0)  # Of the DINOv2 recipe, in pixels; its kernel is 9 x 9.
BLUR_KERNEL = 9

# PIL cuts fractions off, OpenCV rounds: take off (nearly) a half before.
_CUT = -0.499


def brightness(image, factor):
    """Multiply by `factor`."""
    return _linear(image, factor, _CUT)


def contrast(image, factor):
    """Move every value away from (or to) the mean grey of the image."""
    if image.shape[-1] == 3:
        mean = np.dot(LUMA, cv2.mean(image)[:3])
    else:
        mean = image.mean()
    return _linear(image, factor, math.floor(mean + 0.5) * (1 - factor) + _CUT)


def saturation(image, factor):
    """Move every pixel away from (or to) its own grey."""
    if image.shape[-1] != 3:
        return image
    return cv2.addWeighted(image, factor, grayscale(image), 1 - factor, _CUT)


def hue(image, turn):
    """Turn the hue by a share of the circle, in [-0.5, 0.5].

    As in PIL, hue has whole values of which 255 make a turn, and wraps at 256.
    """
    if image.shape[-1] != 3:
        return image
    hsv = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)  # Hue in degrees.
    steps = cv2.extractChannel(hsv, 0)
    steps = cv2.convertScaleAbs(steps, alpha=255 / 360, beta=_CUT)
    steps += np.uint8(int(turn * 255) % 256)
    cv2.insertChannel(steps * np.float32(360 / 255), hsv, 0)
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def grayscale(image):
    """Replace every channel by the luma (ITU-R 601)."""
    if image.shape[-1] != 3:
        return image
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB)


def blur(image, sigma, size=BLUR_KERNEL):
    """Blur with a Gaussian of `sigma` pixels, reflecting at the edge; `size` is odd."""
    kernel = cv2.getGaussianKernel(size, sigma)
    # A border can be reflected only where the image is wider than half the kernel.
    thin = min(image.shape[:2]) <= size // 2
    border = cv2.BORDER_REPLICATE if thin else cv2.BORDER_REFLECT_101
    out = cv2.sepFilter2D(image, -1, kernel, kernel, borderType=border)
    return out.reshape(image.shape)


def solarize(image):
    """Invert every value from 128 up."""
    # Below 128 a value is smaller than its inverse, from there on larger.
    return cv2.min(image, cv2.bitwise_not(image)).reshape(image.shape)


OPERATIONS = (brightness, contrast, saturation, hue)


def jitter(image, factors, order):
    """Apply `OPERATIONS` with one of `factors` each, in `order`, one of `ORDERS`."""
    for i in order:
        image = OPERATIONS[i](image, factors[i])
    return image


def draw_jitter(rng, strength):
    """Return (factors, order) of one `jitter`; operations come in random order.

    Args:
        strength: 0.4 gives factors within 1 +- 0.16, 1 +- 0.16, 1 +- 0.08 and a hue
            turn within +- 0.04; 1.0 gives the DINOv2 jitter (0.4, 0.4, 0.2, 0.1).
    """
    *u, pick = rng.random(5).tolist()
    factors = []
    for i, (x, spread) in enumerate(zip(u, SPREAD, strict=True)):
        shift = strength * spread
        low = max(0.0, 1 - shift) if i < 3 else -shift
        high = 1 + shift if i < 3 else shift
        factors.append(low + x * (high - low))
    return factors, ORDERS[int(pick * len(ORDERS))]


def only(image, change):
    """Return an image whose colours `change` has changed; other planes keep theirs.

    Args:
        image: uint8 or uint16 [H, W, C]; the first three of more channels are colours.
        change: from uint8 [H, W, 1 or 3] to the same.
    """
    if image.dtype == np.uint8 and image.shape[-1] <= 3:
        return change(image)
    colours = np.ascontiguousarray(image[..., :3])
    if image.dtype == np.uint16:
        colours = ((colours + np.uint32(128)) // 257).astype(np.uint8)
    colours = change(colours)
    if image.dtype == np.uint16:
        colours = colours.astype(np.uint16) * np.uint16(257)
    return np.concatenate([colours, image[..., 3:]], -1)


def augment(image, rng, *, strength, prob, grayscale_prob, blur_prob, solarize_prob):
    """Jitter, then turn grey, blur and solarise, each with its own probability.

    The number of draws from `rng` does not depend on their values.

    Args:
        strength: of the jitter, see `draw_jitter`; 0 switches it off.
        prob: probability of the jitter as a whole.
    """
    chance, gray, soft, sun, where = rng.random(5).tolist()
    factors, order = draw_jitter(rng, strength)
    if strength and chance < prob:
        image = jitter(image, factors, order)
    if gray < grayscale_prob:
        image = grayscale(image)
    if soft < blur_prob:
        low, high = BLUR_SIGMA
        image = blur(image, low + where * (high - low))
    if sun < solarize_prob:
        image = solarize(image)
    return image


def _linear(image, factor, shift):
    """Return factor * image + shift, rounded and clipped to 0..255."""
    flat = image.reshape(len(image), -1)
    return cv2.addWeighted(flat, factor, flat, 0.0, shift).reshape(image.shape)
