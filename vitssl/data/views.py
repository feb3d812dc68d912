"""Transforms that make one view of an image: evaluation, and single-crop training.

Every one is a frozen dataclass of numbers, called with an example (a dict with `image`
uint8 [H, W, C], `label`, `index`) and a numpy Generator, and returns uint8 pixels;
normalisation happens on the device.
"""

import dataclasses
import math

import numpy as np

from vitssl import sizes
from vitssl.data import crops, resample
from vitssl.data.randaugment import RandAugment
from vitssl.methods.hjepa.masks import Masks


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Resize until the size is covered, cut out the centre. Nothing is random.

    Attributes:
        size: side of the result, or (height, width), in pixels.
        ratio: int(ratio * size) is covered, by the short side if that is a square: 1.14
            in H-JEPA and I-JEPA (224 -> 255), 1.0 for the largest central cut.
        interpolation: see `crops.MultiCrop`.
    """

    size: sizes.Size
    ratio: float = 1.14
    interpolation: str = "bicubic"

    def __call__(self, example: dict, rng: np.random.Generator | None = None) -> dict:
        """Return {image uint8 [h, w, C], label, index int32 []}."""
        # The quotient of two integers must not lose a pixel to rounding.
        least = [max(n, int(self.ratio * n + 1e-6)) for n in sizes.pair(self.size)]
        image = resize_over(example["image"], least, self.interpolation)
        return _labels(example) | dict(image=centre_crop(image, self.size))


@dataclasses.dataclass(frozen=True)
class Warp:
    """Resize the whole image to one size, whatever its shape. Nothing is random.

    Attributes:
        size: side of the result, or (height, width), in pixels.
        interpolation: see `crops.MultiCrop`.
    """

    size: sizes.Size
    interpolation: str = "bicubic"

    def __call__(self, example: dict, rng: np.random.Generator | None = None) -> dict:
        """Return {image uint8 [h, w, C], label, index int32 []}."""
        size = sizes.pair(self.size)
        image = resample.resize(example["image"], size, None, self.interpolation)
        return _labels(example) | dict(image=np.ascontiguousarray(image))


@dataclasses.dataclass(frozen=True)
class SingleCrop:
    """One random crop, as the single-crop systems train: the baselines of multi-crop.

    Attributes:
        size: side of the crop, in pixels.
        scale: smallest and largest share of the area.
        flip: probability that it is mirrored.
        color_jitter: strength, see `crops.MultiCrop`; 0 is off.
        resize_to: the short side is first resized to this many pixels; 0 is off.
        interpolation: see `crops.MultiCrop`.
        masks: the section `masking`, or None.
        patch: side of a patch, in pixels; used with masks only.
    """

    size: int
    scale: tuple[float, float]
    flip: float = 0.0
    color_jitter: float = 0.0
    resize_to: int = 0
    interpolation: str = "bicubic"
    masks: Masks | None = None
    patch: int = 1

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """Return the layout of `crops.MultiCropTransform` with one global crop.

        The boxes are shares of the image as it was given.
        """
        image = example["image"]
        if self.resize_to:
            image = resize_short(image, self.resize_to, self.interpolation)
        one = crops.MultiCrop(
            num_global_crops=1,
            num_local_crops=0,
            global_crop_size=self.size,
            local_crop_size=self.size,
            global_crop_scale=self.scale,
            local_crop_scale=self.scale,
            global_color_jitter=self.color_jitter,
            local_color_jitter=0.0,
            color_jitter_prob=1.0,
            horizontal_flip_prob=self.flip,
            interpolation=self.interpolation,
            colour="host",
        )
        transform = crops.MultiCropTransform(one, self.masks, self.patch)
        return transform(dict(example, image=image), rng)


def hjepa_single(size: int, color_jitter: float = 0.4, **masks_and_patch) -> SingleCrop:
    """Return H-JEPA's single-crop transform: mild crop, flip, jitter."""
    return SingleCrop(
        size, (0.8, 1.0), 0.5, color_jitter, resize_to=size + 32, **masks_and_patch
    )


def ijepa_single(size: int, **masks_and_patch) -> SingleCrop:
    """Return I-JEPA's transform: a random crop and nothing else."""
    return SingleCrop(size, (0.3, 1.0), **masks_and_patch)


def resize_short(image, side, interpolation="bicubic"):
    """Resize [H, W, C] so that the shorter side has `side` pixels.

    The longer side is cut to a whole number of pixels, as torchvision does.
    """
    return resize_over(image, (side, side), interpolation)


def resize_over(image, least, interpolation="bicubic"):
    """Resize [H, W, C], with its shape kept, to just cover least = (height, width)."""
    rows, columns = image.shape[:2]
    height, width = least
    if height * columns >= width * rows:
        size = height, max(width, height * columns // rows)
    else:
        size = max(height, width * rows // columns), width
    return resample.resize(image, size, None, interpolation)


def centre_crop(image, size):
    """Return the central [h, w, C] of a size; half a pixel is rounded to even."""
    height, width = sizes.pair(size)
    top, left = (
        round((n - side) / 2)
        for n, side in zip(image.shape[:2], (height, width), strict=True)
    )
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def _labels(example):
    return {key: np.int32(example.get(key, -1)) for key in ("label", "index")}


@dataclasses.dataclass(frozen=True)
class Supervised:
    """One random crop, mirrored, augmented: what a classifier trains on.

    Attributes:
        size: side of the result, or (height, width), in pixels; the crop has its shape,
            up to 4 / 3.
        scale: smallest and largest share of the area.
        flip: probability that it is mirrored.
        randaugment: None, or what is applied last.
        crop: "sampled": boxes that do not fit are drawn again, up to ten times.
            "clipped": one draw, cut to the image (MAE's linear probe).
        interpolation: see `crops.MultiCrop`.
        fill: colour of what geometric operations bring in, in [0, 255].
    """

    size: sizes.Size
    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    randaugment: RandAugment | None = None
    crop: str = "sampled"
    interpolation: str = "bicubic"
    fill: tuple[int, ...] = (124, 116, 104)

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """Return {image uint8 [h, w, C], label, index int32 []}."""
        image = example["image"]
        draw = clipped_box if self.crop == "clipped" else crops.draw_box
        ratio = crops.shaped(self.size)
        box = draw(rng, image.shape[:2], self.scale, ratio)
        size = sizes.pair(self.size)
        image = resample.resize(image, size, box, self.interpolation)
        if rng.random() < self.flip:
            image = image[:, ::-1]
        if self.randaugment is not None:
            image = self.randaugment(np.ascontiguousarray(image), rng, self.fill)
        return _labels(example) | dict(image=np.ascontiguousarray(image))


def clipped_size(size, share, log_ratio):
    """Return (height, width) of MAE's crop: one draw, cut to the image.

    Args:
        size: (H, W) of the image.
        share: of the area.
        log_ratio: natural logarithm of width / height.

    Source: facebookresearch/mae util/crop.py (after BYOL).
    """
    area, ratio = size[0] * size[1] * share, math.exp(log_ratio)
    width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return min(height, size[0]), min(width, size[1])


def clipped_box(rng, size, scale, ratio=crops.RATIO):
    """Return a random (top, left, height, width) of `clipped_size`."""
    share = rng.uniform(*scale)
    log_ratio = rng.uniform(*np.log(ratio))
    height, width = clipped_size(size, share, log_ratio)
    top = int(rng.integers(0, size[0] - height + 1))
    left = int(rng.integers(0, size[1] - width + 1))
    return top, left, height, width


def classifier_evaluation(size: sizes.Size, interpolation="bicubic") -> Evaluate:
    """Return the evaluation view of classifiers: 224 of 256, and all above 224 px.

    Source: facebookresearch/mae util/datasets.py.
    """
    short = min(sizes.pair(size))
    side = int(short / 0.875) if short <= 224 else short
    return Evaluate(size, side / short, interpolation)
