"""Random pixels of any size and number of channels, for smoke runs and tests."""

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from vitssl import ranges
from vitssl.data.sources import layout

SPLITS = {"train": 0, "val": 1, "test": 2}


@dataclasses.dataclass(frozen=True, eq=False)
class Fake(layout.Images):
    """Uniform uint8 noise; image i is a pure function of (seed, split, i)."""

    count: int
    size: tuple[int, int]
    channels: int
    classes: tuple[str, ...]
    seed: int
    split: str
    root: ClassVar[str] = "(generated)"
    name: ClassVar[str] = "fake"

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """[N] int32, the classes in turn."""
        return np.arange(self.count, dtype=np.int32) % len(self.classes)

    def image(self, i: int) -> np.ndarray:
        """Return image i."""
        rng = np.random.default_rng((self.seed, SPLITS[self.split], i))
        return rng.integers(0, 256, (*self.size, self.channels), np.uint8)


def open(
    root,
    split,
    *,
    count: ranges.Count = 256,
    height: ranges.Count = 32,
    width: ranges.Count = 32,
    channels: ranges.Count = 3,
    classes: ranges.Count = 10,
    seed: int = 0,
):
    """`count` images [height, width, channels] of noise, labels 0..classes-1 in turn.

    Args:
        root: not used.
        split: "train", "val" or "test"; each has its own noise.
        count: images of a split.
        height, width: of every image, in pixels.
        classes: labels, which nothing in the images tells.
        seed: of the noise.
    """
    del root
    layout.split_of("fake", split, SPLITS)
    names = tuple(f"noise {c}" for c in range(classes))
    return Fake(count, (height, width), channels, names, seed, split)
