"""What data sets share whose images are drawn, not read: see `data.worlds`."""

import abc
import dataclasses
from typing import Any, ClassVar

import numpy as np

from vitssl import errors
from vitssl.data.sources import layout

SPLITS = {"train": "train", "test": "test", "val": "test"}


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn(abc.ABC):
    """The first `count` images of a world, as a source.

    Attributes:
        world: with `split`, and `label(i)` of image i.
        count: N.
    """

    world: Any
    count: int
    name: ClassVar[str] = ""
    root: ClassVar[str] = "(built in)"

    @property
    def split(self) -> str:
        """Which stream of random numbers it is made of."""
        return self.world.split

    @property
    def labels(self) -> np.ndarray:
        """[N] int32."""
        return np.array([self.world.label(i) for i in range(self.count)], np.int32)

    def __len__(self):
        """Return N."""
        return self.count

    def __getitem__(self, i):
        """Return example i.

        Raises:
            IndexError: not in 0 .. N - 1.
        """
        if not 0 <= i < self.count:
            raise IndexError(i)
        return self.example(i)

    @abc.abstractmethod
    def example(self, i: int) -> dict:
        """Return example i, which exists."""


def opened(name: str, split: str, count: int) -> str:
    """Return the split's stream, "train" or "test".

    Raises:
        UsageError: an unknown split, or a negative count.
    """
    if count < 0:
        raise errors.UsageError(f"{name}: count={count}: 0 (default size) or more")
    return layout.split_of(name, split, SPLITS)
