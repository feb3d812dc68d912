"""Augmentations of part discovery: the recipes of iFAM, each a transform of one image.

Source: ananthu-aniraj/ifam utils/data_utils/transform_utils.py.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np

from vitssl.data import colour, geometry
from vitssl.data.randaugment import RandAugment
from vitssl.methods.parts import frames, planckian

Name = Literal["cub_original", "siim_acr", "timm", "given_mask", "none"]
# What an evaluation hands on, where the data set has it.
COLUMNS = ("group", "mask", "parts", "keypoints", "box", "swap_same", "swap_random")


@dataclasses.dataclass(frozen=True)
class Augment:
    """Config section `augment`.

    Attributes:
        recipe: "cub_original": short side to `size`, flips, Planckian jitter, affine,
            random square; "timm": random resized crop, flip and, where no mask comes
            along, RandAugment of magnitude 6; "siim_acr": warp to a square, flip;
            "given_mask": random square that holds a pixel of the mask, flip, colour
            and Planckian jitter; "none": as in evaluation.
        size: side of the result in pixels.
        flip, flip_vertical: probabilities.
        planckian: probability of another illuminant.
        degrees, translate, scale: of the affine: +-degrees, +-shares of the sides,
            (least, most).
        crop_scale: of "timm": least and largest share of the area.
        evaluation: "crop": short side to size, centre square; "warp": to a square;
            "timm": what timm does for ImageNet (warp from 384 px on, otherwise
            size / 0.875 bicubic and centre square).
    """

    size: int
    recipe: Name = "cub_original"
    flip: float = 0.5
    flip_vertical: float = 0.0
    planckian: float = 0.8
    degrees: float = 90.0
    translate: tuple[float, float] = (0.2, 0.2)
    scale: tuple[float, float] = (0.8, 1.2)
    crop_scale: tuple[float, float] = (0.08, 1.0)
    evaluation: Literal["crop", "warp", "timm"] = "crop"

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        if self.size < 1:
            yield f"size={self.size}: at least 1 pixel"
        for key in ("flip", "flip_vertical", "planckian"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                yield f"{key}={getattr(self, key)}: a probability, 0 to 1"
        for key in ("scale", "crop_scale"):
            low, high = getattr(self, key)
            if not 0.0 < low <= high:
                yield f"{key}={(low, high)}: 0 < smallest <= largest"


@dataclasses.dataclass(frozen=True)
class Training:
    """The training transform of a recipe.

    Attributes:
        spec: the section `augment`.
        masked: hand on the data set's mask.
    """

    spec: Augment
    masked: bool = False

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """Return {image uint8 [s, s, C], label, index, and mask uint8 [s, s]}."""
        frame = {k: example[k] for k in ("image", "mask") if k in example}
        if not self.masked:
            frame.pop("mask", None)
        frame = getattr(self, f"_{self.spec.recipe}")(frame, rng)
        return frame | _numbers(example)

    def _none(self, frame, rng):
        del rng
        return evaluate(frame, self.spec, self.spec.size)

    def _cub_original(self, frame, rng):
        s = self.spec
        frame = frames.resize_short(frame, s.size)
        frame = self._flips(frame, rng)
        frame["image"] = planckian.jitter(frame["image"], rng, s.planckian)
        height, width = frame["image"].shape[:2]
        angle, x, y, zoom = rng.uniform(-1.0, 1.0, 4).tolist()
        shift = round(x * s.translate[0] * width), round(y * s.translate[1] * height)
        low, high = s.scale
        scale = low + (zoom + 1) / 2 * (high - low)
        frame = frames.affine(frame, angle * s.degrees, shift, scale)
        top, left = (
            int(u * (n - s.size + 1))
            for u, n in zip(rng.random(2), (height, width), strict=True)
        )
        return frames.crop(frame, top, left, s.size)

    def _timm(self, frame, rng):
        s, image = self.spec, frame["image"]
        top, left, h, w = geometry.draw_box(rng, image.shape[:2], s.crop_scale)
        cut = {k: v[top : top + h, left : left + w] for k, v in frame.items()}
        frame = frames.resize(cut, (s.size, s.size), "bicubic")
        frame = self._flips(frame, rng)
        if not self.masked and frame["image"].shape[-1] in (1, 3):
            frame["image"] = RandAugment(6.0)(frame["image"], rng)
        return frame

    def _siim_acr(self, frame, rng):
        side = (self.spec.size,) * 2
        return self._flips(frames.resize(frame, side, "plain"), rng)

    def _given_mask(self, frame, rng):
        s = self.spec
        frame = frames.resize_short(frame, s.size)
        limits = [n - s.size for n in frame["image"].shape[:2]]
        inside = np.argwhere(frame["mask"] > 0) if "mask" in frame else []
        u, v, pick, tint = rng.random(4).tolist()
        at = [int(u * (limits[0] + 1)), int(v * (limits[1] + 1))]
        if len(inside):  # Some pixel of the mask, somewhere in the square.
            point = inside[int(pick * len(inside))]
            for axis, share in ((0, u), (1, v)):
                low = max(0, point[axis] - s.size + 1)
                high = min(limits[axis], point[axis])
                at[axis] = int(low + share * (high - low + 1))
        frame = self._flips(frames.crop(frame, *at, s.size), rng)
        factors, order = _tint(rng)
        if tint < 0.5:
            frame["image"] = colour.jitter(frame["image"], factors, order)
        frame["image"] = planckian.jitter(frame["image"], rng, s.planckian)
        return frame

    def _flips(self, frame, rng):
        across, over = rng.random(2).tolist()
        frame = frames.mirror(frame) if across < self.spec.flip else frame
        return frames.upend(frame) if over < self.spec.flip_vertical else frame


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluation transform: nothing is random.

    Attributes:
        spec: the section `augment`.
        size: side of the result.
    """

    spec: Augment
    size: int

    def __call__(self, example: dict, rng=None) -> dict:
        """Return {image, label, index} and what `COLUMNS` the example has."""
        frame = {k: example[k] for k in ("image", *COLUMNS) if k in example}
        frame = evaluate(frame, self.spec, self.size)
        if "group" in frame:
            frame["group"] = np.int32(frame["group"])
        return frame | _numbers(example)


def evaluate(frame, spec: Augment, size: int):
    """Return a frame as it is evaluated: [size, size] pixels."""
    if spec.recipe == "siim_acr":
        return frames.resize(frame, (size, size), "plain")
    if spec.evaluation == "crop":
        return frames.centre_crop(frames.resize_short(frame, size), size)
    if spec.evaluation == "warp" or size >= 384:
        return frames.resize(frame, (size, size), "bicubic")
    frame = frames.resize_short(frame, int(size / 0.875), "bicubic")
    return frames.centre_crop(frame, size)


def _numbers(example):
    return {key: np.int32(example.get(key, -1)) for key in ("label", "index")}


def _tint(rng):
    """Return factors and order of a jitter by +-0.2 in all four operations."""
    *u, pick = rng.random(5).tolist()
    factors = [0.8 + 0.4 * x for x in u[:3]] + [0.4 * u[3] - 0.2]
    return factors, colour.ORDERS[int(pick * len(colour.ORDERS))]
