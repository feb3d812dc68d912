"""Random pixels of any size and number of channels, for smoke runs and tests."""

import dataclasses

import numpy as np

from vitssl import errors
from vitssl.data.sources import layout

SPLITS = {"train": 0, "val": 1, "test": 2}


@dataclasses.dataclass(frozen=True, eq=False)
class Fake:
    """Uniform uint8 noise; image i is a pure function of (seed, split, i)."""

    count: int
    size: tuple[int, int]
    channels: int
    classes: tuple[str, ...]
    seed: int
    split: str
    root: str = "(generated)"
    name: str = "fake"

    @property
    def labels(self) -> np.ndarray:
        """[N] int32, the classes in turn."""
        return np.arange(self.count, dtype=np.int32) % len(self.classes)

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if not 0 <= i < self.count:
            raise IndexError(i)
        rng = np.random.default_rng((self.seed, SPLITS[self.split], i))
        image = rng.integers(0, 256, (*self.size, self.channels), np.uint8)
        return {"image": image, "label": int(i % len(self.classes))}


def open(
    root, split, *, count=256, height=32, width=32, channels=3, classes=10, seed=0
):
    """`count` images [height, width, channels] of noise, labels 0..classes-1 in turn.

    Args:
        root: not used.
        split: "train", "val" or "test"; each has its own noise.
    """
    layout.split_of("fake", split, SPLITS)
    numbers = dict(count=count, height=height, width=width, channels=channels)
    for key, value in {**numbers, "classes": classes}.items():
        if value < 1:
            raise errors.UsageError(f"fake: {key}={value}: must be at least 1")
    names = tuple(f"noise {c}" for c in range(classes))
    return Fake(count, (height, width), channels, names, seed, split)
