"""Views of images to classify; of leaves in severities, with symptoms and sunlight.

The leaves' images are float32 [H, W, 3] in [0, 1], so that a chain of operations rounds
once, at its end. Further channels (spectral planes) move with the image, and keep their
values.

Sources: w2sg-arnav/HierarchialViT hvit/data/augmentations.py and docs/training.md. The
kernel of the blur is 3 to 9 pixels here, as documented, not 3 by 9; a crop's share of
the area is cut at 1.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import cv2
import numpy as np

from vitssl import errors, ranges, sizes
from vitssl.data import geometry, resample, views
from vitssl.data.randaugment import RandAugment

LUMA = np.array((0.2989, 0.587, 0.114), np.float32)
JITTER = (0.3, 0.3, 0.25, 0.15)  # Brightness, contrast, saturation, hue.
NOISE = 0.02  # Standard deviation of the noise.


@dataclasses.dataclass(frozen=True)
class Severity:
    """How hard a severity is.

    Attributes:
        scale: least and largest share of the area of a crop.
        rotation: largest angle, in degrees; beyond the border it is black.
        blur, erase, light: probabilities; see `lighting` and `erase`.
        colours: jitter, symptoms, light, blur, noise and erasing at all.
        flip_vertical: probability.
        extra: RandAugment, cutout and grid distortion on top.
    """

    scale: tuple[float, float]
    rotation: float
    blur: float
    erase: float
    light: float
    colours: bool = True
    flip_vertical: float = 0.5
    extra: bool = False


_MILD = Severity((0.8, 1.0), 15.0, 0.2, 0.1, 0.4)
_STRONG = Severity((0.6, 1.0), 35.0, 0.3, 0.2, 0.6)
SEVERITIES = {
    "light": dataclasses.replace(_MILD, rotation=0.0, colours=False, flip_vertical=0.0),
    "moderate": Severity((0.7, 1.0), 25.0, 0.25, 0.15, 0.5),
    "aggressive": dataclasses.replace(_STRONG, extra=True),
    "mild": _MILD,
    "strong": _STRONG,
}


def gray(image):
    """Return the luma [H, W, 1]."""
    return (image @ LUMA)[..., None]


def blend(image, other, factor):
    """Return factor * image + (1 - factor) * other, cut to [0, 1]."""
    return np.clip(factor * image + (1 - factor) * other, 0.0, 1.0).astype(np.float32)


def brightness(image, factor):
    """Multiply."""
    return blend(image, 0.0, factor)


def contrast(image, factor):
    """Move every value away from (or to) the mean grey of the image."""
    return blend(image, gray(image).mean(), factor)


def saturation(image, factor):
    """Move every pixel away from (or to) its own grey."""
    return blend(image, gray(image), factor)


def hue(image, turn):
    """Turn the hue by a share of the circle, in [-0.5, 0.5]."""
    hsv = cv2.cvtColor(np.ascontiguousarray(image, np.float32), cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + 360.0 * turn) % 360.0
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


OPERATIONS = (brightness, contrast, saturation, hue)


def blur(image, kernel, sigma):
    """Blur by a Gaussian of kernel = (width, height), odd, reflecting at the edge."""
    border = cv2.BORDER_REFLECT_101
    if min(image.shape[:2]) <= max(kernel) // 2:
        border = cv2.BORDER_REPLICATE
    x, y = (cv2.getGaussianKernel(k, sigma) for k in kernel)
    return cv2.sepFilter2D(image, -1, x, y, borderType=border).reshape(image.shape)


def chlorosis(image, green, red, blue):
    """Turn leaves yellow: less green, some of what it lost into red, less blue."""
    r, g, b = np.moveaxis(image, -1, 0)
    less = green * g
    r = np.clip(red * r + 0.5 * (g - less), 0.0, 1.0)
    return np.stack([r, less, blue * b], -1)


def necrosis(image, brown, colour):
    """Turn leaves brown, and pale: `colour` of it stays, the rest is grey."""
    r, g, b = np.moveaxis(image, -1, 0)
    tinted = np.stack(
        [
            np.clip(r * (1 + 0.5 * brown) + 0.2 * brown * g, 0.0, 1.0),
            np.clip(g * (1 - 0.3 * brown), 0.0, 1.0),
            np.clip(b * (1 - 0.6 * brown), 0.0, 1.0),
        ],
        -1,
    )
    return blend(tinted, gray(image), colour)


def lighting(image, kind, values):
    """Change the light: "over" and "under" by values = (factor,), or unevenly.

    "across" columns and "down" rows the factor goes linearly: values = (first, last).
    """
    if kind in ("over", "under"):
        return np.clip(image * np.float32(values[0]), 0.0, 1.0)
    axis = {"down": 0, "across": 1}[kind]
    ramp = np.linspace(*values, image.shape[axis], dtype=np.float32)
    shape = [1, 1, 1]
    shape[axis] = -1
    return np.clip(image * ramp.reshape(shape), 0.0, 1.0)


def draw_lighting(rng):
    """Return (kind, values) of `lighting`; every kind equally often."""
    kind = ("over", "under", "across", "down")[int(rng.integers(4))]
    u, v = rng.random(2).tolist()
    if kind == "over":
        return kind, (1.1 + 0.3 * u,)
    if kind == "under":
        return kind, (0.6 + 0.3 * u,)
    return kind, (0.7 + 0.2 * u, 1.1 + 0.2 * v)


def erase(image, rng, area=(0.02, 0.12), ratio=(0.3, 3.0)):
    """Fill a random box with black; if ten draws do not fit, none."""
    rows, columns = image.shape[:2]
    for _ in range(geometry.ATTEMPTS):
        size = rows * columns * rng.uniform(*area)
        aspect = math.exp(rng.uniform(*np.log(ratio)))
        h, w = round(math.sqrt(size * aspect)), round(math.sqrt(size / aspect))
        if 0 < h < rows and 0 < w < columns:
            top, left = rng.integers(rows - h + 1), rng.integers(columns - w + 1)
            image = image.copy()
            image[top : top + h, left : left + w] = 0.0
            return image
    return image


def rotate(image, degrees):
    """Turn counter-clockwise about the centre; nearest pixel, black outside."""
    rows, columns = image.shape[:2]
    centre = ((columns - 1) / 2, (rows - 1) / 2)
    matrix = cv2.getRotationMatrix2D(centre, degrees, 1.0)
    turned = cv2.warpAffine(image, matrix, (columns, rows), flags=cv2.INTER_NEAREST)
    return turned.reshape(image.shape)


def grid_steps(rng, cells=5, limit=0.3):
    """Return the distorted lines of a grid along one axis, [cells + 1] from 0 to 1."""
    steps = 1 + rng.uniform(-limit, limit, cells)
    return np.concatenate([[0.0], np.cumsum(steps) / steps.sum()])


def distort(image, lines):
    """Read an image through a grid whose lines (of rows, of columns) have moved."""
    at = []
    for n, line in zip(image.shape[:2], lines, strict=True):
        even = np.linspace(0.0, 1.0, len(line))
        where = np.interp((np.arange(n) + 0.5) / n, even, line) * n - 0.5
        at.append(where.astype(np.float32))
    y, x = np.meshgrid(*at, indexing="ij")
    how = dict(interpolation=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return cv2.remap(image, x, y, **how).reshape(image.shape)


@dataclasses.dataclass(frozen=True)
class Leaves:
    """The training transform of a severity; of "minimal", as in evaluation."""

    size: sizes.Size
    severity: str = "moderate"

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """Return {image [h, w, C] in its dtype, label, index int32 []}."""
        image, size = example["image"], sizes.pair(self.size)
        spec, ratio = SEVERITIES.get(self.severity), geometry.shaped(self.size)
        box = spec and geometry.draw_box(rng, image.shape[:2], spec.scale, ratio)
        image = resample.resize(image, size, box, "bicubic")
        if spec:
            kind = image.dtype
            image = image.astype(np.float32) / np.iinfo(kind).max
            image = _whole(_random(image, spec, rng), kind)
        numbers = {k: np.int32(example.get(k, -1)) for k in ("label", "index")}
        return numbers | dict(image=np.ascontiguousarray(image))


def _whole(image, kind=np.uint8):
    return np.rint(np.clip(image, 0.0, 1.0) * np.iinfo(kind).max).astype(kind)


def _random(image, spec, rng):
    """Return a float image of a severity: moved, coloured, and what comes on top."""
    across, over = rng.random(2).tolist()
    if across < 0.5:
        image = image[:, ::-1]
    if over < spec.flip_vertical:
        image = image[::-1]
    image = np.ascontiguousarray(image)
    if spec.rotation:
        image = rotate(image, rng.uniform(-spec.rotation, spec.rotation))
    image, planes = image[..., :3], image[..., 3:]
    if spec.colours and image.shape[-1] == 3:
        image = _colours(np.ascontiguousarray(image), spec, rng)
    if not spec.extra:
        return np.concatenate([image, planes], -1)
    if image.shape[-1] == 3:
        policy = RandAugment(9.0, 0.5, 2, 1.0, still=planes.shape[-1] > 0)
        image = policy(_whole(image), rng, (0, 0, 0)).astype(np.float32) / 255
    cut, warp = rng.random(2).tolist()
    if cut < 0.5:
        image = erase(image, rng, ratio=(1.0, 1.0))
    image = np.concatenate([image, planes], -1)
    if warp < 0.5:
        image = distort(image, (grid_steps(rng), grid_steps(rng)))
    return image


def _colours(image, spec, rng):
    """Jitter, symptoms, light, blur, noise and a black box, each by its chance."""
    for i in rng.permutation(4):
        low = 1.0 - JITTER[i] if i < 3 else -JITTER[3]
        high = 1.0 + JITTER[i] if i < 3 else JITTER[3]
        image = OPERATIONS[i](image, rng.uniform(low, high))
    chances = rng.random(6)
    happens = chances < (0.2, 0.15, spec.light, spec.blur, 0.3, spec.erase)
    if happens[0]:
        green, red, blue = rng.uniform((0.7, 1.0, 0.8), (0.9, 1.1, 1.0)).tolist()
        image = chlorosis(image, green, red, blue)
    if happens[1]:
        image = necrosis(image, *rng.uniform((0.1, 0.6), (0.3, 0.9)).tolist())
    if happens[2]:
        image = lighting(image, *draw_lighting(rng))
    if happens[3]:
        side = 3 + 2 * int(rng.integers(4))
        image = blur(image, (side, side), rng.uniform(0.1, 1.5))
    if happens[4]:
        noise = rng.normal(0.0, NOISE, image.shape).astype(np.float32)
        image = np.clip(image + noise, 0.0, 1.0)
    return erase(image, rng) if happens[5] else image


@dataclasses.dataclass(frozen=True)
class Augment:
    """Config section `augment`: one crop on the host, erasing on the device.

    Attributes:
        size: side of the crop, or (height, width), in pixels.
        severity: "" is what follows here. Otherwise a recipe for photographs of leaves,
            whose numbers take the place of scale, flip and randaugment (see `Leaves`);
            the evaluation then warps the whole image to `size`.
        scale, flip, crop, interpolation: see `data.views.Supervised`.
        randaugment: such as "rand-m9-mstd0.5-inc1"; "" is none.
        erase: probability of random erasing.
    """

    size: ranges.Count | tuple[ranges.Count, ranges.Count]
    severity: Literal["", *SEVERITIES, "minimal"] = ""
    scale: tuple[ranges.Share, ranges.Share] = (0.08, 1.0)
    flip: ranges.Probability = 0.5
    randaugment: str = ""
    erase: ranges.Probability = 0.0
    crop: Literal["sampled", "clipped"] = "sampled"
    interpolation: Literal["bicubic", "bilinear", "fast"] = "bicubic"

    def training(self, mean):
        """Return the training transform; corners of a turned image have `mean`."""
        if self.severity:
            return Leaves(self.size, self.severity)
        return views.Supervised(
            size=self.size,
            scale=self.scale,
            flip=self.flip,
            randaugment=RandAugment.parse(self.randaugment),
            crop=self.crop,
            interpolation=self.interpolation,
            fill=tuple(min(255, round(255 * m)) for m in mean),
        )

    def evaluation(self, size: sizes.Size):
        """Return the transform of evaluation images of a size."""
        if self.severity:
            return views.Warp(size)
        return views.classifier_evaluation(size, self.interpolation)

    def check(self) -> Iterator[str]:
        """Yield what does not fit together, and a `randaugment` that is none."""
        yield from ranges.in_order(self, "scale")
        try:
            RandAugment.parse(self.randaugment)
        except errors.UsageError as e:
            yield str(e).removeprefix("augment.")
