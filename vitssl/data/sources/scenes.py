"""Composed scenes of scanned digits as a data set: see `worlds.scenes`."""

import dataclasses
from typing import ClassVar

from vitssl.data.sources import drawn
from vitssl.data.worlds import scenes as world

COUNTS = {"train": 6000, "test": 1000}


@dataclasses.dataclass(frozen=True, eq=False)
class Scenes(drawn.Drawn):
    """The first `count` scenes of a world; the label is the one whole digit."""

    classes: tuple[str, ...] = tuple(str(d) for d in range(10))
    name: ClassVar[str] = "scenes"

    @property
    def channels(self) -> int:
        """1 or 3."""
        return self.world.channels

    def example(self, i: int) -> dict:
        """Return example i, which exists."""
        scene = self.world.scene(i)
        return {"image": scene.image, "label": scene.label}


def difficulty():
    """Dict from each further option of `open`, a field of the world, to its default."""
    own = ("split", "size", "channels", "seed")
    fields = dataclasses.fields(world.World)
    return {f.name: f.default for f in fields if f.name not in own}


def open(root, split, *, count=0, size=48, channels=1, seed=0, **difficulty):
    """Scenes with one whole scanned digit each among clutter.

    Args:
        root: not used; the digits come with a Python package.
        split: "train" or "test" ("val" is the same): their digits are disjoint.
        count: number of images; 0 = 6000 to train, 1000 to test.
        size: side of the square canvas in pixels.
        channels: 1 (gray) or 3 (every object its own colour).
        seed: of the composition.
        difficulty: further fields of `worlds.scenes.World` (scale_min, fragments ...).
    """
    split = drawn.opened("scenes", split, count)
    made = world.World(
        split=split, size=size, channels=channels, seed=seed, **difficulty
    )
    return Scenes(made, count or COUNTS[split])
