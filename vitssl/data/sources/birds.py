"""Drawn birds as a data set: see `worlds.birds`."""

import dataclasses
from typing import ClassVar

import numpy as np

from vitssl.data.sources import drawn
from vitssl.data.worlds import birds as world

COUNTS = {"train": 4000, "test": 800}


@dataclasses.dataclass(frozen=True, eq=False)
class Birds(drawn.Drawn):
    """The first `count` birds of a world.

    Examples have "group", "parts", "mask", "keypoints" and "box", and in the test
    "swap_same" and "swap_random": the bird before a new background of its home's kind,
    and of another kind.
    """

    classes: tuple[str, ...] = world.CLASSES
    name: ClassVar[str] = "birds"
    channels: int = 3

    def example(self, i: int) -> dict:
        """Return example i, which exists."""
        w = self.world
        bird = w.bird(i)
        example = dict(
            image=bird.image,
            label=bird.label,
            group=np.int32(w.group(i)),
            parts=bird.parts,
            mask=bird.mask,
            keypoints=bird.keypoints,
            box=bird.box,
        )
        if w.split == "test":
            other = (bird.label + 1 + i // 4 % 3) % len(world.PLACES)
            example["swap_same"] = w.bird(i, place=bird.label, take=1).image
            example["swap_random"] = w.bird(i, place=other, take=2).image
        return example


def open(root, split, *, count=0, size=48, seed=0, purity=0.95, noise=12):
    """Birds whose background gives them away in training, and does not in the test.

    Args:
        root: not used; the birds are drawn.
        split: "train" or "test" ("val" is the same); the test's purity is always 1/4.
        count: number of images; 0 = 4000 to train, 800 to test.
        size, seed, noise: see `worlds.birds.World`.
        purity: of the training set.
    """
    split = drawn.opened("birds", split, count)
    if split == "test":
        purity = 1 / len(world.PLACES)
    made = world.World(split, size, seed, purity, noise)
    return Birds(made, count or COUNTS[split])
