"""Birds: drawn animals of four true parts before backgrounds that give them away.

The class shows in the wing's pattern and the head's crest alone. Every class lives
before a background of its own, in training almost always, in a balanced test never
more often than before another: whoever learns the background fails there. Everything
is known: parts, mask, keypoints, box, and the same bird before other backgrounds.
"""

import dataclasses
from typing import Annotated, ClassVar, Literal, NamedTuple

import cv2
import numpy as np

from vitssl import ranges
from vitssl.data.sources import drawn

PARTS = ("body", "head", "wing", "tail")
CLASSES = ("plain", "striped", "spotted", "crested")
PLACES = ("sand", "water", "forest", "stone")
COLOURS = {  # Of the parts, before jitter; red, green, blue.
    "body": (150, 110, 80),
    "head": (190, 70, 60),
    "wing": (90, 90, 160),
    "tail": (200, 170, 70),
}
_PLACES = ((205, 180, 130), (70, 130, 190), (50, 110, 55), (130, 130, 135))


class Bird(NamedTuple):
    """A picture and what is in it.

    Attributes:
        image: uint8 [S, S, 3].
        label: class, an index of `CLASSES`.
        place: background, an index of `PLACES`.
        parts: uint8 [S, S]: 0 background, k + 1 = part k of `PARTS`.
        keypoints: float32 [4, 3] (x, y, visible), the middle of every part.
        box: float32 [4] (x, y, width, height) of the bird.
    """

    image: np.ndarray
    label: int
    place: int
    parts: np.ndarray
    keypoints: np.ndarray
    box: np.ndarray

    @property
    def mask(self):
        """uint8 [S, S], 1 on the bird."""
        return (self.parts > 0).astype(np.uint8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Birds(drawn.Drawn):
    """Birds whose background gives them away in training, and does not in the test.

    Examples have "group", "parts", "mask", "keypoints" and "box", and in the test
    "swap_same" and "swap_random": the bird before a new background of its home's kind,
    and of another kind.

    Attributes:
        purity: probability that a training bird is at home before its background; the
            others are before any other one. The test's is always 1/4: no correlation.
        noise: amplitude of the uniform pixel noise, of 255.
        masks: whose "mask" an example has: its own bird's, or that of another bird of
            the split, a placebo of the same sizes and shapes.
    """

    size: Annotated[int, ranges.Range(24)] = 48
    purity: ranges.Probability = 0.95
    noise: Annotated[int, ranges.Range(0, 127)] = 12
    masks: Literal["own", "other"] = "own"
    name: ClassVar[str] = "birds"
    classes: ClassVar[tuple[str, ...]] = CLASSES
    COUNTS: ClassVar[dict[str, int]] = {"train": 4000, "test": 800}

    def label(self, i: int) -> int:
        """Return the class of bird i; every class equally often."""
        return i % len(CLASSES)

    def place(self, i: int) -> int:
        """Return the background of bird i, an index of `PLACES`."""
        u, v = self.rng(i, 1).random(2).tolist()
        home, count = self.label(i), len(PLACES)
        if u < (self.purity if self.split == "train" else 1 / count):
            return home
        return (home + 1 + int(v * (count - 1))) % count

    def example(self, i: int) -> dict:
        """Return bird i; its group is 2 label + 1 at home, 2 label elsewhere."""
        bird = self.bird(i)
        masked = bird if self.masks == "own" else self.bird((i + 1) % len(self))
        example = bird._asdict() | {"mask": masked.mask}
        home = example.pop("place") == bird.label
        example["group"] = np.int32(2 * bird.label + home)
        if self.split == "test":
            other = (bird.label + 1 + i // 4 % 3) % len(PLACES)
            example["swap_same"] = self.bird(i, place=bird.label, take=1).image
            example["swap_random"] = self.bird(i, place=other, take=2).image
        return example

    def bird(self, i, *, place=None, take=0):
        """Draw bird i.

        Args:
            i: which.
            place: another background than its own.
            take: number of the drawing of the background; the bird stays the same.
        """
        place = self.place(i) if place is None else place
        canvas = _background(self.rng(i, 10 + take), place, self.size)
        rng = self.rng(i, 2)
        parts, box, points = _draw(canvas, rng, self.label(i), self.size)
        shape = (self.size, self.size, 1)
        grain = self.rng(i, 3).integers(-self.noise, self.noise + 1, shape)
        image = (canvas.astype(np.int32) + grain).clip(0, 255).astype(np.uint8)
        return Bird(image, self.label(i), place, parts, points, box)


def _background(rng, place, size):
    """Return uint8 [S, S, 3]: a colour of its own, and a texture of its own."""
    base = np.array(_PLACES[place]) + rng.uniform(-15, 15, 3)
    canvas = np.tile(base.clip(0, 255).astype(np.uint8), (size, size, 1))
    for _ in range(14):
        shade = (base * rng.uniform(0.75, 1.2)).clip(0, 255).tolist()
        x, y, r = (int(v) for v in rng.uniform(0, size, 3) * (1, 1, 0.12))
        if place == 0:  # Dots.
            cv2.circle(canvas, (x, y), max(1, r // 3), shade, -1, cv2.LINE_AA)
        elif place == 1:  # Waves.
            cv2.line(canvas, (x - size // 4, y), (x + size // 4, y), shade, 1)
        elif place == 2:  # Trunks.
            cv2.line(canvas, (x, 0), (x, size), shade, max(1, r // 2))
        else:  # Blocks.
            cv2.rectangle(canvas, (x, y), (x + r, y + r), shade, -1)
    return canvas


def _draw(canvas, rng, label, size):
    """Draw a bird; return its parts [S, S], box [4] and keypoints [4, 3]."""
    scale = rng.uniform(0.75, 1.05) * size
    angle = rng.uniform(-25, 25)
    side = rng.choice((-1, 1))
    centre = np.array((size / 2, size / 2)) + rng.uniform(-0.1, 0.1, 2) * size
    tint = rng.uniform(-18, 18, 3)
    turn = np.deg2rad(angle)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) * (
        side,
        1.0,
    )

    def at(x, y):  # From the bird's own frame, in shares of its size, to pixels.
        return matrix @ (np.array((x, y)) * scale) + centre

    def ellipse(on, x, y, a, b, tilt, colour):
        axis = matrix @ np.array((np.cos(tilt), np.sin(tilt)))
        degrees = float(np.rad2deg(np.arctan2(axis[1], axis[0])))
        box = (at(x, y).tolist(), (2 * a * scale, 2 * b * scale), degrees)
        cv2.ellipse(on, box, colour, -1)

    def polygon(on, corners, colour):
        points = np.rint([at(*c) for c in corners]).astype(np.int32)
        cv2.fillPoly(on, [points], colour)

    shapes = {
        "tail": lambda on, c: polygon(
            on, [(-0.18, -0.03), (-0.42, -0.14), (-0.42, 0.08)], c
        ),
        "body": lambda on, c: ellipse(on, 0, 0, 0.25, 0.16, 0.0, c),
        "head": lambda on, c: (
            ellipse(on, 0.26, -0.17, 0.11, 0.11, 0.0, c),
            polygon(on, [(0.34, -0.20), (0.45, -0.15), (0.34, -0.11)], c),
        ),
        "wing": lambda on, c: ellipse(on, -0.04, -0.01, 0.15, 0.09, 0.3, c),
    }
    parts = np.zeros((size, size), np.uint8)
    for name in ("tail", "body", "head", "wing"):  # From back to front.
        colour = (np.array(COLOURS[name]) + tint).clip(0, 255).tolist()
        shapes[name](canvas, colour)
        shapes[name](parts, PARTS.index(name) + 1)
    _mark(canvas, parts, label, at, scale)
    ys, xs = np.nonzero(parts)
    box = np.array((xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1), np.float32)
    return parts, box, _middles(parts)


def _mark(canvas, parts, label, at, scale):
    """Draw what tells the classes apart: on the wing, or a crest on the head."""
    ink, wide = (235, 235, 235), max(1, round(0.035 * scale))
    point = lambda x, y: tuple(np.rint(at(x, y)).astype(int).tolist())  # noqa: E731
    if label == 1:
        for x in (-0.12, -0.04, 0.04):
            cv2.line(canvas, point(x, -0.06), point(x, 0.05), ink, wide)
    elif label == 2:
        for x, y in ((-0.12, -0.03), (-0.02, 0.02), (0.04, -0.05)):
            cv2.circle(canvas, point(x, y), wide, ink, -1)
    elif label == 3:
        colour, name = (240, 220, 90), PARTS.index("head") + 1
        for x in (0.19, 0.25, 0.31):
            for on, ink in ((canvas, colour), (parts, name)):
                cv2.line(on, point(x, -0.24), point(x - 0.03, -0.36), ink, wide)


def _middles(parts):
    """Return the middle of every part that shows: [4, 3] (x, y, visible)."""
    points = np.zeros((len(PARTS), 3), np.float32)
    for k in range(len(PARTS)):
        ys, xs = np.nonzero(parts == k + 1)
        if len(xs):
            points[k] = xs.mean() + 0.5, ys.mean() + 0.5, 1.0
    return points
