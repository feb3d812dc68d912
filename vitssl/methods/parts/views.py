"""Augmentations of part discovery: the recipes of iFAM, each a transform of one image.

They move a frame: an image with what is known of it, resized, cropped, mirrored and
warped together. A frame is a dict of "image" uint8 [H, W, C] and any of: "mask" uint8
[H, W]; "parts" uint8 [H, W], a part number per pixel, 0 the background; "keypoints"
float32 [P, 3] as (x, y, visible) in pixels; "box" float32 [4] as (x, y, width, height);
"swap_same" and "swap_random", the image before other backgrounds. Nothing is changed
in place.

Source: ananthu-aniraj/ifam utils/data_utils/transform_utils.py.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import cv2
import numpy as np

from vitssl import ranges
from vitssl.data import colour, geometry, resample
from vitssl.data.randaugment import RandAugment

Recipe = Literal["cub_original", "siim_acr", "timm", "given_mask", "none"]
IMAGES = ("image", "swap_same", "swap_random")
LABELS = ("mask", "parts")
# What an evaluation hands on, where the data set has it.
COLUMNS = (*IMAGES, *LABELS, "group", "keypoints", "box")

# Red, green, blue of black bodies from 3000 K to 15000 K in steps of 500 K: the table
# of Planckian jitter, Zini et al. 2023, arXiv:2202.07993.
ILLUMINANTS = np.array(
    [
        (0.6743, 0.4029, 0.0013),
        (0.6281, 0.4241, 0.1665),
        (0.5919, 0.4372, 0.2513),
        (0.5623, 0.4457, 0.3154),
        (0.5376, 0.4515, 0.3672),
        (0.5163, 0.4555, 0.4103),
        (0.4979, 0.4584, 0.4468),
        (0.4816, 0.4604, 0.4782),
        (0.4672, 0.4619, 0.5053),
        (0.4542, 0.4630, 0.5289),
        (0.4426, 0.4638, 0.5497),
        (0.4320, 0.4644, 0.5681),
        (0.4223, 0.4648, 0.5844),
        (0.4135, 0.4651, 0.5990),
        (0.4054, 0.4653, 0.6121),
        (0.3980, 0.4654, 0.6239),
        (0.3911, 0.4655, 0.6346),
        (0.3847, 0.4656, 0.6444),
        (0.3787, 0.4656, 0.6532),
        (0.3732, 0.4656, 0.6613),
        (0.3680, 0.4655, 0.6688),
        (0.3632, 0.4655, 0.6756),
        (0.3586, 0.4655, 0.6820),
        (0.3544, 0.4654, 0.6878),
        (0.3503, 0.4653, 0.6933),
    ]
)


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

    size: ranges.Count
    recipe: Recipe = "cub_original"
    flip: ranges.Probability = 0.5
    flip_vertical: ranges.Probability = 0.0
    planckian: ranges.Probability = 0.8
    degrees: float = 90.0
    translate: tuple[float, float] = (0.2, 0.2)
    scale: tuple[ranges.Positive, ranges.Positive] = (0.8, 1.2)
    crop_scale: tuple[ranges.Positive, ranges.Positive] = (0.08, 1.0)
    evaluation: Literal["crop", "warp", "timm"] = "crop"

    def check(self) -> Iterator[str]:
        """Yield what is in the wrong order."""
        yield from ranges.in_order(self, "scale", "crop_scale")


@dataclasses.dataclass(frozen=True)
class Training:
    """The training transform of a recipe."""

    spec: Augment
    masked: bool = False  # Hand on the data set's mask.

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """Return {image uint8 [s, s, C], label, index, and mask uint8 [s, s]}."""
        keys = ("image", "mask") if self.masked else ("image",)
        frame = {k: example[k] for k in keys if k in example}
        frame = getattr(self, f"_{self.spec.recipe}")(frame, rng)
        return frame | _numbers(example)

    def _none(self, frame, rng):
        del rng
        return evaluate(frame, self.spec, self.spec.size)

    def _cub_original(self, frame, rng):
        s = self.spec
        frame = self._flips(resize_short(frame, s.size), rng)
        frame["image"] = planckian(frame["image"], rng, s.planckian)
        height, width = frame["image"].shape[:2]
        angle, x, y, zoom = rng.uniform(-1.0, 1.0, 4).tolist()
        shift = round(x * s.translate[0] * width), round(y * s.translate[1] * height)
        low, high = s.scale
        scale = low + (zoom + 1) / 2 * (high - low)
        frame = affine(frame, angle * s.degrees, shift, scale)
        top, left = (
            int(u * (n - s.size + 1))
            for u, n in zip(rng.random(2), (height, width), strict=True)
        )
        return crop(frame, top, left, s.size)

    def _timm(self, frame, rng):
        s, image = self.spec, frame["image"]
        top, left, h, w = geometry.draw_box(rng, image.shape[:2], s.crop_scale)
        cut = {k: v[top : top + h, left : left + w] for k, v in frame.items()}
        frame = self._flips(resize(cut, (s.size, s.size), "bicubic"), rng)
        if not self.masked and frame["image"].shape[-1] in (1, 3):
            frame["image"] = RandAugment(6.0)(frame["image"], rng)
        return frame

    def _siim_acr(self, frame, rng):
        return self._flips(evaluate(frame, self.spec, self.spec.size), rng)

    def _given_mask(self, frame, rng):
        s = self.spec
        frame = resize_short(frame, s.size)
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
        frame = self._flips(crop(frame, *at, s.size), rng)
        factors, order = _tint(rng)
        if tint < 0.5:
            frame["image"] = colour.jitter(frame["image"], factors, order)
        frame["image"] = planckian(frame["image"], rng, s.planckian)
        return frame

    def _flips(self, frame, rng):
        across, over = rng.random(2).tolist()
        frame = mirror(frame) if across < self.spec.flip else frame
        return upend(frame) if over < self.spec.flip_vertical else frame


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluation transform: nothing is random."""

    spec: Augment
    size: int

    def __call__(self, example: dict, rng=None) -> dict:
        """Return {image, label, index} and what `COLUMNS` the example has."""
        frame = {k: example[k] for k in COLUMNS if k in example}
        frame = evaluate(frame, self.spec, self.size)
        if "group" in frame:
            frame["group"] = np.int32(frame["group"])
        return frame | _numbers(example)


def evaluate(frame, spec: Augment, size: int):
    """Return a frame as it is evaluated: [size, size] pixels."""
    if spec.recipe == "siim_acr":
        return resize(frame, (size, size), "plain")
    if spec.evaluation == "crop":
        return centre_crop(resize_short(frame, size), size)
    if spec.evaluation == "warp" or size >= 384:
        return resize(frame, (size, size), "bicubic")
    frame = resize_short(frame, int(size / 0.875), "bicubic")
    return centre_crop(frame, size)


def _numbers(example):
    return {key: np.int32(example.get(key, -1)) for key in ("label", "index")}


def resize(frame, size, interpolation="bilinear", scale=None):
    """Resize to size = (height, width); label maps take the nearest pixel.

    Args:
        interpolation: "bilinear", "bicubic" (PIL's) or "plain" (OpenCV's bilinear,
            without antialiasing).
        scale: of the coordinates, (y, x); None = new size over old.
    """
    old = frame["image"].shape[:2]
    if tuple(old) == tuple(size):
        return dict(frame)

    def picture(image):
        if interpolation == "plain":
            resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
            return resized.reshape(*size, image.shape[-1])
        return resample.resize(image, size, None, interpolation)

    at = 0.0 if interpolation == "plain" else 0.5  # OpenCV reads at the corner.
    out = _each(frame, picture, lambda m: _nearest(m, size, at))
    sy, sx = scale or (size[0] / old[0], size[1] / old[1])
    return _points(out, lambda xy: xy * (sx, sy), lambda b: b * (sx, sy, sx, sy))


def resize_short(frame, side, interpolation="bilinear"):
    """Resize so that the shorter side is `side`; the longer one is cut to an integer.

    Coordinates are scaled alike in both directions, by side / shorter side.
    """
    rows, columns = frame["image"].shape[:2]
    short = min(rows, columns)
    size = max(side, side * rows // short), max(side, side * columns // short)
    return resize(frame, size, interpolation, (side / short,) * 2)


def crop(frame, top, left, side):
    """Cut out [side, side] pixels.

    Keypoints that leave it become invisible and are moved to its border; invisible
    ones are left alone. A box is shifted and its corner kept inside, its size stays.
    """
    rows, columns = slice(top, top + side), slice(left, left + side)
    out = _each(frame, lambda x: np.ascontiguousarray(x[rows, columns]))
    if "keypoints" in frame:
        points = frame["keypoints"].astype(np.float32)
        moved = points[:, :2] - (left, top)
        kept = np.clip(moved, 0, side)
        visible = points[:, 2] > 0
        inside = visible & (moved == kept).all(-1)
        xy = np.where(visible[:, None], kept, points[:, :2])
        flag = np.where(visible, inside, points[:, 2])
        out["keypoints"] = np.column_stack([xy, flag]).astype(np.float32)
    if "box" in frame:
        corner = np.clip(frame["box"][:2] - (left, top), 0, side)
        out["box"] = np.append(corner, frame["box"][2:]).astype(np.float32)
    return out


def centre_crop(frame, side):
    """Cut out the central [side, side]; half a pixel is rounded to even."""
    top, left = (round((n - side) / 2) for n in frame["image"].shape[:2])
    return crop(frame, top, left, side)


def mirror(frame):
    """Flip left and right."""
    width = frame["image"].shape[1]
    return _points(
        _each(frame, lambda x: np.ascontiguousarray(x[:, ::-1])),
        lambda xy: np.column_stack([width - xy[:, 0], xy[:, 1]]),
        lambda b: np.array([width - b[0] - b[2], *b[1:]]),
    )


def upend(frame):
    """Flip top and bottom."""
    height = frame["image"].shape[0]
    return _points(
        _each(frame, lambda x: np.ascontiguousarray(x[::-1])),
        lambda xy: np.column_stack([xy[:, 0], height - xy[:, 1]]),
        lambda b: np.array([b[0], height - b[1] - b[3], *b[2:]]),
    )


def affine(frame, angle, translate, scale):
    """Turn by degrees, shift by whole pixels (x, y) and scale, about the centre.

    Nearest sampling, 0 outside. Boxes and keypoints are dropped: nothing trains on
    them.

    Source: torchvision.transforms.RandomAffine on PIL images.
    """
    height, width = frame["image"].shape[:2]
    cy, cx = (height - 1) / 2, (width - 1) / 2
    a = np.deg2rad(angle)
    c, s = np.cos(a) / scale, np.sin(a) / scale
    tx, ty = cx + translate[0], cy + translate[1]
    # From output (x, y, 1) to input pixels.
    matrix = np.array([[c, s, cx - c * tx - s * ty], [-s, c, cy + s * tx - c * ty]])
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP

    def warp(x):
        y = cv2.warpAffine(x, matrix, (width, height), flags=flags)
        return y.reshape(x.shape)

    out = _each(frame, warp)
    return {k: v for k, v in out.items() if k not in ("keypoints", "box")}


def _each(frame, images, labels=None):
    """Return the frame with functions applied to its images and its label maps."""
    out = dict(frame)
    for keys, function in ((IMAGES, images), (LABELS, labels or images)):
        out |= {key: function(frame[key]) for key in keys if key in frame}
    return out


def _points(frame, move, move_box):
    """Return the frame with its coordinates moved."""
    if "keypoints" in frame:
        points = frame["keypoints"]
        xy = move(points[:, :2])
        frame["keypoints"] = np.column_stack([xy, points[:, 2]]).astype(np.float32)
    if "box" in frame:
        frame["box"] = np.asarray(move_box(frame["box"]), np.float32)
    return frame


def _nearest(labels, size, at):
    """Resize a label map: pixel i reads floor((i + at) old / new)."""
    rows, columns = (
        ((np.arange(n) + at) * old / n).astype(int)
        for n, old in zip(size, labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]


def _tint(rng):
    """Return factors and order of a jitter by +-0.2 in all four operations."""
    *u, pick = rng.random(5).tolist()
    factors = [0.8 + 0.4 * x for x in u[:3]] + [0.4 * u[3] - 0.2]
    return factors, colour.ORDERS[int(pick * len(colour.ORDERS))]


def relight(image, index):
    """Return uint8 [H, W, 3] under illuminant `index`: red and blue against green.

    Other numbers of channels come back unchanged.
    """
    if image.shape[-1] != 3:
        return image
    red, green, blue = ILLUMINANTS[index]
    levels = np.arange(256)[:, None] * (red / green, 1.0, blue / green)
    table = np.minimum(levels, 255.0).astype(np.uint8)  # Fractions are cut off.
    return np.stack([table[image[..., c], c] for c in range(3)], axis=-1)


def planckian(image, rng, probability):
    """Return an image under a random illuminant, with a probability."""
    chance, which = rng.random(2).tolist()
    if chance >= probability:
        return image
    return relight(image, int(which * len(ILLUMINANTS)))
