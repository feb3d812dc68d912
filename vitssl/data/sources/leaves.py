"""Leaves: drawn cotton leaves in seven conditions, with every lesion known.

Names and frequencies are those of SAR-CLD-2024. Sunlight and white balance differ from
leaf to leaf, so that the mean colour says little; what tells the conditions apart is
where a colour lies: round spots, a pale margin, flat patches, stripes between veins,
a wavy or a narrow shape.
"""

import dataclasses
import functools
from typing import Annotated, ClassVar, Literal, NamedTuple

import cv2
import numpy as np

from vitssl import ranges
from vitssl.data.sources import drawn

CLASSES = (
    "Bacterial Blight",
    "Curl Virus",
    "Healthy Leaf",
    "Herbicide Growth Damage",
    "Leaf Hopper Jassids",
    "Leaf Redding",
    "Leaf Variegation",
)
# Photographs per class in SAR-CLD-2024; training sets are as imbalanced.
FREQUENCY = (250, 431, 257, 280, 225, 578, 116)
_GREEN, _SOIL = (88, 140, 62), (150, 125, 95)


class Leaf(NamedTuple):
    """A picture and what is in it.

    Attributes:
        image: uint8 [S, S, 3].
        label: condition, an index of `CLASSES`.
        mask: uint8 [S, S]: 0 background, 1 sound leaf, 2 lesion.
        infrared: uint8 [S, S]: bright where the leaf is sound.
    """

    image: np.ndarray
    label: int
    mask: np.ndarray
    infrared: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaves(drawn.Drawn):
    """Leaves in seven conditions: imbalanced to train, equally many to test.

    Examples have "mask" too, see `Leaf`.

    Attributes:
        channels: 3, or 4: near infrared, bright on sound leaf, as a spectral plane.
        cast: strength of the colour cast: channels are multiplied by 1 +- cast.
        noise: amplitude of the uniform pixel noise, of 255.
    """

    channels: Literal[3, 4] = 3
    size: Annotated[int, ranges.Range(24)] = 48
    cast: ranges.BelowOne = 0.25
    noise: Annotated[int, ranges.Range(0, 127)] = 12
    name: ClassVar[str] = "leaves"
    classes: ClassVar[tuple[str, ...]] = CLASSES
    COUNTS: ClassVar[dict[str, int]] = {"train": sum(FREQUENCY), "test": 420}

    def label(self, i: int) -> int:
        """Return the condition of leaf i: as often as in the field; evenly in the test.

        Every run of 2137 training leaves has exactly the published counts.
        """
        if self.split == "test":
            return i % len(CLASSES)
        total = sum(FREQUENCY)
        # A fixed stride through the ranks spreads each class over the whole run.
        rank = i * 1297 % total
        return int(np.searchsorted(np.cumsum(FREQUENCY), rank, side="right"))

    def example(self, i: int) -> dict:
        """Return leaf i."""
        leaf = _kept(self, i)
        image = leaf.image
        if self.channels == 4:
            image = np.concatenate([image, leaf.infrared[..., None]], -1)
        return {"image": image, "label": leaf.label, "mask": leaf.mask}

    def leaf(self, i):
        """Draw leaf i."""
        rng, label, size = self.rng(i, 0), self.label(i), self.size
        soil = np.array(_SOIL) * rng.uniform(0.6, 1.2) + rng.uniform(-15, 15, 3)
        canvas = np.tile(soil.clip(0, 255).astype(np.uint8), (size, size, 1))
        for _ in range(10):
            shade = (soil * rng.uniform(0.7, 1.25)).clip(0, 255).tolist()
            x, y, r = (int(v) for v in rng.uniform(0, size, 3) * (1, 1, 0.1))
            cv2.circle(canvas, (x, y), max(1, r), shade, -1, cv2.LINE_AA)
        outline, frame = _outline(rng, label, size)
        inside = np.zeros((size, size), np.uint8)
        cv2.fillPoly(inside, [outline], 1)
        green = np.array(_GREEN) * rng.uniform(0.8, 1.2) + rng.uniform(-12, 12, 3)
        painted = np.tile(green.clip(0, 255).astype(np.uint8), (size, size, 1))
        lesions = np.zeros((size, size), np.uint8)
        paint = _Paint(painted, lesions, rng, frame, inside, green)
        _SYMPTOMS[label](paint)
        paint.veins()
        canvas[inside > 0] = painted[inside > 0]
        mask = inside + (inside * (lesions > 0)).astype(np.uint8)
        image = canvas * rng.uniform(1 - self.cast, 1 + self.cast, 3)
        image += rng.integers(-self.noise, self.noise + 1, image.shape)
        glow = np.array((60, 210, 120))[mask] + rng.integers(-20, 21, mask.shape)
        to_bytes = lambda x: x.clip(0, 255).astype(np.uint8)  # noqa: E731
        return Leaf(to_bytes(image), label, mask, to_bytes(glow))


@functools.lru_cache(maxsize=4096)
def _kept(leaves, i):
    """Return leaf i; drawing one takes longer than augmenting it."""
    leaf = leaves.leaf(i)
    for array in (leaf.image, leaf.mask, leaf.infrared):
        array.flags.writeable = False
    return leaf


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Where a leaf lies: from its own frame, in shares of its length, to pixels."""

    centre: np.ndarray
    matrix: np.ndarray
    scale: float
    wide: float

    def at(self, x, y):
        """Return a point in pixels; x runs along the leaf from -1 to 1."""
        point = self.matrix @ (np.array((x, y * self.wide)) * self.scale) + self.centre
        return tuple(np.rint(point).astype(int).tolist())

    def dots(self, rng, count):
        """Return `count` random points well inside the leaf."""
        angle, radius = rng.uniform(0, 2 * np.pi, count), rng.uniform(0, 0.7, count)
        both = zip(angle, np.sqrt(radius) * 0.8, strict=True)
        return [self.at(r * np.cos(a), r * np.sin(a)) for a, r in both]


def _outline(rng, label, size):
    """Return (points int32 [N, 2] of the edge, frame) of a leaf."""
    turn = rng.uniform(0, 2 * np.pi)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    wide = rng.uniform(0.62, 0.85) * (0.6 if label == 3 else 1.0)
    centre = np.full(2, size / 2) + rng.uniform(-0.06, 0.06, 2) * size
    frame = _Frame(centre, matrix, rng.uniform(0.36, 0.46) * size, wide)
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    wave = rng.uniform(0.10, 0.16) if label == 1 else 0.02
    radius = 1 + wave * np.sin(rng.integers(7, 11) * angle + rng.uniform(0, 6))
    x, y = radius * np.cos(angle), radius * np.sin(angle) * (1 - 0.25 * np.cos(angle))
    edge = [frame.at(a, b) for a, b in zip(x, y, strict=True)]
    return np.array(edge, np.int32), frame


class _Paint(NamedTuple):
    """What a leaf is painted with: its surface and lesions [S, S], where it lies."""

    on: np.ndarray
    lesions: np.ndarray
    rng: np.random.Generator
    frame: _Frame
    inside: np.ndarray
    green: np.ndarray

    def blob(self, point, radius, colour):
        """Paint an uneven spot of sick tissue."""
        axes = [max(1, round(radius * f)) for f in self.rng.uniform(0.8, 1.25, 2)]
        angle = float(self.rng.uniform(0, 180))
        for canvas, ink in ((self.on, colour), (self.lesions, 1)):
            cv2.ellipse(canvas, point, axes, angle, 0, 360, ink, -1)

    def blobs(self, count, radius, colour, halo=None):
        """Paint as many spots as drawn from `count`, of a size drawn from `radius`."""
        for point in self.frame.dots(self.rng, int(self.rng.integers(*count))):
            size = self.rng.uniform(*radius) * self.frame.scale
            if halo:
                self.blob(point, 1.6 * size, halo)
            self.blob(point, size, colour)

    def veins(self):
        """Paint a midrib and six veins."""
        pale = (self.green * 1.22).clip(0, 255).tolist()
        at, wide = self.frame.at, max(1, round(0.03 * self.frame.scale))
        cv2.line(self.on, at(-1, 0), at(1, 0), pale, wide, cv2.LINE_AA)
        for x in (-0.55, -0.15, 0.25):
            for side in (-1, 1):
                end = at(x + 0.4, 0.75 * side)
                cv2.line(self.on, at(x, 0), end, pale, 1, cv2.LINE_AA)

    def folds(self):
        """Paint thick dark folds: nothing is sick but the shape, which curls."""
        at, ink = self.frame.at, (self.green * 0.75).tolist()
        for y in self.rng.uniform(-0.6, 0.6, 3):
            cv2.line(self.on, at(-0.6, y), at(0.6, y * 0.6), ink, 1, cv2.LINE_AA)

    def stripes(self):
        """Paint what herbicide does: pale stripes between the veins."""
        pale = (0.5 * self.green + 0.5 * np.array((205, 205, 130))).tolist()
        at, wide = self.frame.at, max(1, round(0.07 * self.frame.scale))
        for x in np.linspace(-0.8, 0.6, 5) + self.rng.uniform(-0.08, 0.08, 5):
            for side in (-1, 1):
                ends = at(x, 0.12 * side), at(x + 0.35, 0.8 * side)
                for canvas, ink in ((self.on, pale), (self.lesions, 1)):
                    cv2.line(canvas, *ends, ink, wide)

    def margin(self):
        """Paint the margin: what lies near the background."""
        depth = cv2.distanceTransform(self.inside, cv2.DIST_L2, 3)
        wide = self.rng.uniform(0.16, 0.28) * self.frame.scale
        rim = (self.inside > 0) & (depth < wide)
        self.on[rim], self.lesions[rim] = (190, 165, 75), 1


_SYMPTOMS = (  # In the order of `CLASSES`.
    lambda p: p.blobs((5, 10), (0.07, 0.13), (85, 55, 35), halo=(170, 160, 70)),
    _Paint.folds,
    lambda p: None,
    _Paint.stripes,
    _Paint.margin,
    lambda p: p.blobs((1, 3), (0.35, 0.55), (160, 60, 55)),
    lambda p: p.blobs((2, 5), (0.2, 0.35), (215, 220, 175)),
)
