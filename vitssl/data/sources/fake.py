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
    multilabel: bool = False
    root: ClassVar[str] = "(generated)"
    name: ClassVar[str] = "fake"

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """[N] int32, the classes in turn."""
        if self.multilabel:
            return np.full(self.count, -1, np.int32)
        return np.arange(self.count, dtype=np.int32) % len(self.classes)

    @functools.cached_property
    def several(self) -> np.ndarray | None:
        """[N, K] uint8: the binary digits of the image's number, else None."""
        if not self.multilabel:
            return None
        digit = np.arange(self.count)[:, None] >> np.arange(len(self.classes))
        return (digit & 1).astype(np.uint8)

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
    multilabel: bool = False,
):
    """`count` images [height, width, channels] of noise, labels 0..classes-1 in turn.

    Args:
        root: not used.
        split: "train", "val" or "test"; each has its own noise.
        count: images of a split.
        height, width: of every image, in pixels.
        classes: labels, which nothing in the images tells.
        seed: of the noise.
        multilabel: label image i by the binary digits of i instead.
    """
    del root
    layout.split_of("fake", split, SPLITS)
    names = tuple(f"noise {c}" for c in range(classes))
    about = (channels, names, seed, split, multilabel)
    return Fake(count, (height, width), *about)
