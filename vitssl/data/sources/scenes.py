"""Scenes: one whole scanned digit among clutter on a larger canvas, with the truth.

The digit has a random place, size, slant and ink. The clutter is made of pieces of
other scanned digits (same ink statistics, so ink does not give the digit away) and
of drawn lines, rings and frames. Raw pixels therefore say little about the label.
"""

import dataclasses
import functools
from typing import Annotated, ClassVar, Literal, NamedTuple

import cv2
import numpy as np

from vitssl import errors, ranges
from vitssl.data.sources import digits, drawn


class Scene(NamedTuple):
    """A picture and what is in it.

    Attributes:
        image: uint8 [S, S, C].
        label: the digit, 0..9.
        digit: index of the scanned digit in `digits.pixels()`.
        box: float32 [4], (y0, x0, h, w) of the digit in pixels, before its slant.
        mask: float32 [S, S], how much of each pixel is ink of the digit, 0..1.
        clutter: float32 [K, 4], boxes of the pieces of other digits.
    """

    image: np.ndarray
    label: int
    digit: int
    box: np.ndarray
    mask: np.ndarray
    clutter: np.ndarray


@functools.cache
def _order(split, seed):
    """A fixed shuffle of the split's digits; scene i shows the digit i mod N."""
    at = digits.members(split)
    return np.random.default_rng((seed, 11)).permutation(at)


@functools.cache
def _large():
    """Every scan at 32x32, [1797, 32, 32]: smooth enough to be turned linearly."""
    cubic = functools.partial(cv2.resize, interpolation=cv2.INTER_CUBIC)
    return np.stack([cubic(scan, (32, 32)) for scan in digits.pixels()[0]])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenes(drawn.Drawn):
    """Scenes with one whole scanned digit each, the label, among clutter.

    With the defaults raw pixels give 0.3 to 0.5 (k-NN, cosine the better), and a
    supervised convolutional net of 0.4 M weights passes 0.7 in seven epochs of the
    6000. Smaller digits and more pieces are much harder. No scanned digit is in both
    splits.

    Attributes:
        channels: 1 (gray) or 3 (every object and the background have own colours).
        scale_min, scale_max: side of the digit relative to the canvas.
        slant: largest rotation of digit and pieces, degrees.
        fragments: number of pieces of other digits.
        shapes: number of drawn lines, rings and frames.
        contrast: least difference of ink and background, of 1.
        noise: amplitude of the uniform pixel noise, of 255.
    """

    channels: Literal[1, 3] = 1
    size: Annotated[int, ranges.Range(16)] = 48
    scale_min: ranges.Positive = 0.55
    scale_max: ranges.Share = 0.8
    slant: float = 15.0
    fragments: Annotated[int, ranges.Range(0, 32)] = 1
    shapes: Annotated[int, ranges.Range(0, 32)] = 1
    contrast: Annotated[float, ranges.Range(0, 0.5)] = 0.35
    noise: Annotated[int, ranges.Range(0, 127)] = 8
    name: ClassVar[str] = "scenes"
    classes: ClassVar[tuple[str, ...]] = digits.CLASSES
    COUNTS: ClassVar[dict[str, int]] = {"train": 6000, "test": 1000}

    def __post_init__(self):
        super().__post_init__()
        if self.scale_min > self.scale_max:
            raise errors.UsageError(
                f"scenes: scale_min={self.scale_min}: at most scale_max, which is "
                f"{self.scale_max}"
            )

    def label(self, i: int) -> int:
        """Return the digit of scene i, 0..9."""
        order = _order(self.split, self.seed)
        return int(digits.pixels()[1][order[i % len(order)]])

    def example(self, i: int) -> dict:
        """Return scene i."""
        scene = self.scene(i)
        return {"image": scene.image, "label": scene.label}

    def scene(self, i: int) -> Scene:
        """Draw scene i."""
        order = _order(self.split, self.seed)
        digit = int(order[i % len(order)])
        rng = self.rng(i, 5)
        u = iter(rng.random(16 * (2 + self.shapes + self.fragments)).tolist())
        canvas, box, mask, clutter = self._draw(digit, order, u)
        if self.noise:
            shape = (self.size, self.size, 1)
            canvas += rng.integers(-self.noise, self.noise, shape, np.int8, True)
        image = np.rint(canvas.clip(0, 255)).astype(np.uint8)
        return Scene(image, self.label(i), digit, box, mask, clutter)

    def _draw(self, digit, order, u):
        """Background, shapes, pieces and, on top of them, the digit."""
        base = [next(u) for _ in range(self.channels)]
        canvas = self._background(base, u)  # [S, S, C] uint8
        for _ in range(self.shapes):
            self._shape(canvas, self._ink(base, u), u)
        canvas = canvas.astype(np.float32)
        clutter = np.zeros((self.fragments, 4), np.float32)
        for k in range(self.fragments):
            piece = _piece(_large()[order[int(next(u) * len(order))]], u)
            clutter[k], window, alpha = self._place(piece, u, inside=False)
            _blend(canvas[window], alpha, self._ink(base, u))
        box, window, alpha = self._place(_large()[digit], u, inside=True)
        _blend(canvas[window], alpha, self._ink(base, u))
        mask = np.zeros((self.size, self.size), np.float32)
        mask[window] = alpha
        return canvas, box, mask, clutter

    def _background(self, base, u):
        """A plane of intensities around `base`, tilted by up to +-0.12."""
        tilt = (np.arange(self.size, dtype=np.float32) / self.size - 0.5) * 0.24
        y = ((2 * next(u) - 1) * tilt)[:, None, None]
        x = ((2 * next(u) - 1) * tilt)[None, :, None]
        plane = (y + x + np.array(base, np.float32)) * 255  # [S, S, C]
        return plane.clip(0, 255).astype(np.uint8)

    def _ink(self, base, u):
        """A colour [C], 0..255, that differs from `base` by `contrast` or more."""
        ink = []
        for b in base:
            low, high = max(0.0, b - self.contrast), max(0.0, 1 - b - self.contrast)
            v = next(u) * (low + high)
            ink.append(255 * (v if v < low else b + self.contrast + v - low))
        return ink

    def _shape(self, canvas, ink, u):
        """Draw a line, a ring or a frame of one pixel's width onto `canvas`."""
        s = self.size
        kind, y0, x0, y1, x1 = (next(u) for _ in range(5))
        a, b = (int(x0 * s), int(y0 * s)), (int(x1 * s), int(y1 * s))
        if kind < 0.5:
            cv2.line(canvas, a, b, ink, 1, cv2.LINE_AA)
        elif kind < 0.75:
            radii = (2 + int(x1 * s / 4), 2 + int(y1 * s / 4))
            cv2.ellipse(canvas, a, radii, 0, 0, 360, ink, 1, cv2.LINE_AA)
        else:
            cv2.rectangle(canvas, a, b, ink, 1)

    def _place(self, patch, u, *, inside):
        """Put a patch [32, 32] somewhere.

        Returns:
            its box [4]; the window of the canvas (two slices) it may touch; its ink
            there, [h, w] in 0..1.
        """
        s = self.size
        side = (self.scale_min + next(u) * (self.scale_max - self.scale_min)) * s
        angle = (2 * next(u) - 1) * self.slant
        margin = side / 2 if inside else 0.0
        cy, cx = (margin + next(u) * (s - 2 * margin) for _ in range(2))
        half = 0.75 * side + 1  # Half the diagonal and a little, whatever the angle.
        y0, y1 = max(0, int(cy - half)), min(s, int(cy + half) + 1)
        x0, x1 = max(0, int(cx - half)), min(s, int(cx + half) + 1)
        matrix = cv2.getRotationMatrix2D((15.5, 15.5), angle, side / 32)
        matrix[:, 2] += cx - 16 - x0, cy - 16 - y0
        size = (x1 - x0, y1 - y0)
        alpha = cv2.warpAffine(patch, matrix, size, flags=cv2.INTER_LINEAR)
        box = np.array((cy - side / 2, cx - side / 2, side, side), np.float32)
        window = (slice(y0, y1), slice(x0, x1))
        return box, window, alpha.astype(np.float32) / 255


def _piece(scan, u):
    """A copy of a scan [32, 32] of which only half, or a quarter, is left."""
    y, x = int(next(u) * 17), int(next(u) * 17)
    h, w = ((32, 16), (16, 32), (16, 16))[int(next(u) * 3)]
    y, x = (0 if h == 32 else y), (0 if w == 32 else x)
    piece = np.zeros_like(scan)
    piece[y : y + h, x : x + w] = scan[y : y + h, x : x + w]
    return piece


def _blend(canvas, alpha, ink):
    """Lay ink [C] over the canvas [h, w, C] where alpha [h, w] is, in place."""
    canvas += alpha[:, :, None] * (np.array(ink, np.float32) - canvas)
