"""Transforms that make one view of an image: evaluation, and single-crop training.

Every one is a frozen dataclass of numbers, called with an example (a dict with `image`
[H, W, C] of uint8 or uint16, `label`, `index`) and a numpy Generator, and returns
pixels with label and index, int32 []; normalisation happens on the device. One that
has a `reduction` may get an image that is `reduced.Reduced`. A size is
the side of the result, or (height, width), in pixels; `interpolation` is explained in
`resample`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np

from vitssl import ranges, sizes
from vitssl.data import geometry, resample
from vitssl.data.randaugment import RandAugment


def labels(example: dict) -> dict:
    """Return label and index of an example; -1 where it has none."""
    return {key: np.int32(example.get(key, -1)) for key in ("label", "index")}


def _one(example, image):
    return labels(example) | dict(image=np.ascontiguousarray(image))


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Resize until the size is covered, cut out the centre. Nothing is random.

    Attributes:
        ratio: int(ratio * size) is covered, by the short side if that is a square: 1.14
            in H-JEPA and I-JEPA (224 -> 255), 1.0 for the largest central cut.
    """

    size: sizes.Size
    ratio: float = 1.14
    interpolation: str = "bicubic"

    def __call__(self, example: dict, rng: np.random.Generator | None = None) -> dict:
        """Return {image [h, w, C], label, index}."""
        image, least = example["image"], self._least
        box = geometry.middle(image.shape[:2], least)
        image = geometry.resize_over(image, least, self.interpolation, box)
        return _one(example, geometry.centre_crop(image, self.size))

    @property
    def _least(self):
        # The quotient of two integers must not lose a pixel to rounding.
        return [max(n, int(self.ratio * n + 1e-6)) for n in sizes.pair(self.size)]

    def reduction(self, size: tuple[int, int]) -> float:
        """Return how many pixels of an image become one; see `reduced`."""
        return min(n / least for n, least in zip(size, self._least, strict=True))


@dataclasses.dataclass(frozen=True)
class Warp:
    """Resize the whole image to one size, whatever its shape. Nothing is random."""

    size: sizes.Size
    interpolation: str = "bicubic"

    def __call__(self, example: dict, rng: np.random.Generator | None = None) -> dict:
        """Return {image [h, w, C], label, index}."""
        size = sizes.pair(self.size)
        image = resample.resize(example["image"], size, None, self.interpolation)
        return _one(example, image)

    def reduction(self, size: tuple[int, int]) -> float:
        """Return how many pixels of an image become one; see `reduced`."""
        return min(n / m for n, m in zip(size, sizes.pair(self.size), strict=True))


@dataclasses.dataclass(frozen=True)
class SingleCrop:
    """Config section `augment`: one random crop, as I-JEPA and MAE train.

    Attributes:
        size: side of the crop, in pixels.
        scale: smallest and largest share of the area.
        flip: probability that it is mirrored.
        interpolation: see `resample.resize`.
    """

    size: ranges.Count
    scale: tuple[ranges.Share, ranges.Share] = (0.2, 1.0)
    flip: ranges.Probability = 0.5
    interpolation: Literal["bicubic", "bilinear", "fast"] = "bicubic"

    def check(self) -> Iterator[str]:
        """Yield a scale that is upside down."""
        yield from ranges.in_order(self, "scale")

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """Return {global [1, s, s, C], global_box float32 [1, 5], label, index}.

        That is H-JEPA's multi-crop with one global crop; a box is `geometry.relative`.
        """
        # Multi-crop draws two seeds first: without them its one crop would be another.
        rng.integers(2**63, size=2)
        image = example["image"]
        box = geometry.draw_box(rng, image.shape[:2], self.scale)
        flip = rng.random() < self.flip
        crop = resample.resize(image, (self.size,) * 2, box, self.interpolation)
        crop = np.ascontiguousarray(crop[:, ::-1] if flip else crop)
        found = geometry.relative(box, image.shape[:2], flip)
        return labels(example) | {
            "global": crop[None],
            "global_box": np.array([found], np.float32),
        }

    def reduction(self, size: tuple[int, int]) -> float:
        """Return how many pixels of an image become one, at least; see `reduced`."""
        return geometry.reduction(size, self.scale, self.size)


@dataclasses.dataclass(frozen=True)
class Supervised:
    """One random crop, mirrored, augmented: what a classifier trains on.

    Attributes:
        size: the crop has its shape, up to 4 / 3.
        scale: smallest and largest share of the area.
        flip: probability that it is mirrored.
        randaugment: None, or what is applied last.
        crop: "sampled": boxes that do not fit are drawn again, up to ten times.
            "clipped": one draw, cut to the image (MAE's linear probe).
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
        """Return {image [h, w, C], label, index}."""
        image = example["image"]
        clips = self.crop == "clipped"
        draw = geometry.clipped_box if clips else geometry.draw_box
        box = draw(rng, image.shape[:2], self.scale, geometry.shaped(self.size))
        image = resample.resize(image, sizes.pair(self.size), box, self.interpolation)
        if rng.random() < self.flip:
            image = image[:, ::-1]
        if self.randaugment is not None:
            image = self.randaugment(np.ascontiguousarray(image), rng, self.fill)
        return _one(example, image)

    def reduction(self, size: tuple[int, int]) -> float:
        """Return how many pixels of an image become one, at least; see `reduced`."""
        return geometry.reduction(size, self.scale, self.size)


def classifier_evaluation(size: sizes.Size, interpolation="bicubic") -> Evaluate:
    """Return the evaluation view of classifiers: 224 of 256, and all above 224 px.

    Source: facebookresearch/mae util/datasets.py.
    """
    short = min(sizes.pair(size))
    side = int(short / 0.875) if short <= 224 else short
    return Evaluate(size, side / short, interpolation)
