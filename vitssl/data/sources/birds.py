"""Drawn birds as a data set: see `worlds.birds`."""

import dataclasses

import numpy as np

from vitssl import errors
from vitssl.data.sources import layout
from vitssl.data.worlds import birds as world

SPLITS = {"train": "train", "test": "test", "val": "test"}
COUNTS = {"train": 4000, "test": 800}


@dataclasses.dataclass(frozen=True, eq=False)
class Birds:
    """The first `count` birds of a world.

    Examples have "group", "parts", "mask", "keypoints" and "box", and in the test
    "swap_same" and "swap_random": the bird before a new background of its home's kind,
    and of another kind.
    """

    world: world.World
    count: int
    classes: tuple[str, ...] = world.CLASSES
    root: str = "(built in)"
    name: str = "birds"
    channels: int = 3

    @property
    def split(self) -> str:
        """Which stream of random numbers it is made of."""
        return self.world.split

    @property
    def labels(self) -> np.ndarray:
        """[N] int32."""
        return np.array([self.world.label(i) for i in range(self.count)], np.int32)

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if not 0 <= i < self.count:
            raise IndexError(i)
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
    split = layout.split_of("birds", split, SPLITS)
    if count < 0:
        raise errors.UsageError(f"birds: count={count}: 0 (default size) or more")
    if split == "test":
        purity = 1 / len(world.PLACES)
    made = world.World(split, size, seed, purity, noise)
    return Birds(made, count or COUNTS[split])
