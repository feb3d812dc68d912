"""Drawn farmland as a data set: see `worlds.fields`."""

import dataclasses
from typing import ClassVar

import numpy as np

from vitssl import errors
from vitssl.data.sources import drawn
from vitssl.data.worlds import fields as world

COUNTS = {"train": 2000, "test": 400}


@dataclasses.dataclass(frozen=True, eq=False)
class Fields(drawn.Drawn):
    """The first `count` scenes of a world.

    Examples are those of `data.samples`, with "cover" uint8 [S, S]; the label is the
    landscape. They must not be changed in place: `held` of them are kept in memory.
    """

    names: tuple[str, ...]
    channels: int = 1
    classes: tuple[str, ...] = world.LANDSCAPES
    name: ClassVar[str] = "fields"
    held: int = 0
    _kept: dict = dataclasses.field(default_factory=dict, repr=False)

    @property
    def labels(self) -> np.ndarray:
        """[N] int32."""
        n = range(self.count)
        return np.array([self.world.landscape(i) for i in n], np.int32)

    def example(self, i: int) -> dict:
        """Return example i, which exists."""
        if i in self._kept:
            return dict(self._kept[i])
        sample = self.world.sample(i, self.names)
        if len(self._kept) < self.held:
            self._kept[i] = dict(sample)
        return sample

    def __getstate__(self):
        return self.__dict__ | {"_kept": {}}


def open(
    root,
    split,
    *,
    modalities=(*world.SENSORS, *world.MAPS),
    count=0,
    size=48,
    seed=0,
    clouds=0.35,
    gaps=0.15,
    noise=0.12,
    held=0,
    channels=1,
):
    """Farmland seen by several sensors through a year, with its land cover.

    Args:
        root: not used; the scenes are drawn.
        split: "train" or "test" ("val" is the same).
        modalities: names, of `worlds.fields.SENSORS` and `MAPS`.
        count: number of scenes; 0 = 2000 to train, 400 to test.
        size, seed, clouds, gaps, noise: see `worlds.fields.World`.
        held: scenes that stay in memory once they are drawn, 0.2 to 1.5 MB each.
        channels: not used: each modality has its own.
    """
    split = drawn.opened("fields", split, count)
    names = tuple(modalities)
    for name in names:
        if name not in (*world.SENSORS, *world.MAPS):
            known = ", ".join((*world.SENSORS, *world.MAPS))
            raise errors.UsageError(f"fields: modality {name!r}: one of {known}")
    made = world.World(split, size, seed, clouds, gaps, noise)
    return Fields(made, count or COUNTS[split], names, channels, held=held)
