"""Drawn leaves as a data set: see `worlds.leaves`."""

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from vitssl import errors
from vitssl.data.sources import drawn
from vitssl.data.worlds import leaves as world

COUNTS = {"train": 2137, "test": 420}


@functools.lru_cache(maxsize=4096)
def _drawn(world, i):
    """Leaf i; drawing one takes longer than augmenting it."""
    leaf = world.leaf(i)
    for array in (leaf.image, leaf.mask, leaf.infrared):
        array.flags.writeable = False
    return leaf


@dataclasses.dataclass(frozen=True, eq=False)
class Leaves(drawn.Drawn):
    """The first `count` leaves of a world; examples have "mask" too.

    Attributes:
        channels: 3, or 4 with near infrared.
    """

    channels: int = 3
    classes: tuple[str, ...] = world.CLASSES
    name: ClassVar[str] = "leaves"

    def example(self, i: int) -> dict:
        """Return example i, which exists."""
        leaf = _drawn(self.world, i)
        image = leaf.image
        if self.channels == 4:
            image = np.concatenate([image, leaf.infrared[..., None]], -1)
        return {"image": image, "label": leaf.label, "mask": leaf.mask}


def open(root, split, *, channels=3, count=0, size=48, seed=0, cast=0.25, noise=12):
    """Leaves in seven conditions: imbalanced to train, equally many to test.

    Args:
        root: not used; the leaves are drawn.
        split: "train" or "test" ("val" is the same).
        channels: 3, or 4: near infrared, bright on sound leaf, as a spectral plane.
        count: number of images; 0 = 2137 to train, 420 to test.
        size, seed, cast, noise: see `worlds.leaves.World`.
    """
    split = drawn.opened("leaves", split, count)
    if channels not in (3, 4):
        raise errors.UsageError(f"leaves: channels={channels}: 3, or 4 with infrared")
    made = world.World(split, size, seed, cast, noise)
    return Leaves(made, count or COUNTS[split], channels)
