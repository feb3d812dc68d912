"""What data sets share whose images are drawn, not read, everything in them known."""

import abc
import dataclasses
import functools
from typing import ClassVar

import numpy as np

from vitssl import ranges
from vitssl.data.sources import layout

BUILT_IN = "(built in)"
SPLITS = {"train": "train", "test": "test", "val": "test"}


@dataclasses.dataclass(frozen=True)
class Drawn(layout.Source):
    """The first `count` images of a world; image i is a function of the fields and i.

    Keyword fields are the options of the source.

    Attributes:
        root: not used.
        split: "train" or "test" ("val" is the same); they share no random number.
        count: number of images; 0 = that of `COUNTS`.
        test_count: of the split "test"; 0 = as `count` says.
        size: S, side of the image in pixels.
        seed: of everything.
    """

    root: str = BUILT_IN
    split: str = "train"
    _: dataclasses.KW_ONLY
    count: ranges.OrNone = 0
    test_count: ranges.OrNone = 0
    size: ranges.Count = 48
    seed: int = 0

    name: ClassVar[str]
    channels: ClassVar[int] = 3
    classes: ClassVar[tuple[str, ...]]
    COUNTS: ClassVar[dict[str, int]]

    def __post_init__(self):
        split = layout.split_of(self.name, self.split, SPLITS)
        own = self.test_count if split == "test" else 0
        count = own or self.count or self.COUNTS[split]
        # The fields are frozen; these three are what was asked for, made precise.
        self.__dict__.update(root=BUILT_IN, split=split, count=count)

    def rng(self, i: int, purpose: int) -> np.random.Generator:
        """Return the random numbers of image i for one purpose."""
        return np.random.default_rng((self.seed, i, self.split == "test", purpose))

    @abc.abstractmethod
    def label(self, i: int) -> int:
        """Return the class of image i, without drawing it."""

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """[N] int32."""
        return np.array([self.label(i) for i in range(self.count)], np.int32)

    def __len__(self):
        return self.count
