"""Several data sets as one: weighted, balanced or joined end to end.

Source: jonwiggins/H-JEPA, src/data/multi_dataset.py; here every choice is a pure
function of (seed, epoch, index).
"""

import bisect
import dataclasses
import functools
import itertools
from typing import ClassVar

import numpy as np

from vitssl import errors
from vitssl.data.sources import layout


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture(layout.Source):
    """Images of several sources; labels are not known before they are read.

    `[i]` is the image of epoch 0; `at(i, epoch)` that of any epoch, so that over the
    epochs every image of every source can come up.

    Attributes:
        parts: the sources, all with the same channels.
        kind: "weighted" (each item: a source by weight^(1/temperature), then a
            uniform image of it; as long as the largest), "balanced" (as many of each
            as the smallest has, drawn anew each epoch), "concat" (all, once).
        weights: of the parts, for "weighted".
        temperature: above 1 evens the weights out.
        seed: of the draws.
    """

    parts: tuple[layout.Source, ...]
    kind: str
    weights: tuple[float, ...]
    temperature: float
    seed: int
    split: str
    name: ClassVar[str] = "mixture"

    @property
    def root(self) -> str:
        """Of all parts."""
        return " + ".join(f"{p.name}:{p.root}" for p in self.parts)

    @property
    def channels(self) -> int:
        """Of every part."""
        return self.parts[0].channels

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """Those of the parts: once if they are the same, else one after the other."""
        if self._shared:
            return self.parts[0].classes
        return tuple(f"{p.name}/{c}" for p in self.parts for c in p.classes)

    @functools.cached_property
    def _shared(self):
        return len({p.classes for p in self.parts}) == 1

    @functools.cached_property
    def _first_class(self):
        sizes = [0 if self._shared else len(p.classes) for p in self.parts]
        return list(itertools.accumulate(sizes, initial=0))

    @functools.cached_property
    def _share(self):
        share = np.array(self.weights, np.float64) ** (1 / self.temperature)
        return np.cumsum(share / share.sum())

    @functools.cached_property
    def _sizes(self):
        return [len(p) for p in self.parts]

    def __len__(self):
        sizes = self._sizes
        if self.kind == "weighted":
            return max(sizes)
        return min(sizes) * len(sizes) if self.kind == "balanced" else sum(sizes)

    def where(self, i: int, epoch: int) -> tuple[int, int]:
        """Return (part, index in it) of item i."""
        sizes = self._sizes
        if self.kind == "concat":
            first = list(itertools.accumulate(sizes, initial=0))
            part = bisect.bisect_right(first, i) - 1
            return part, i - first[part]
        if self.kind == "balanced":
            part, j = i % len(sizes), i // len(sizes)
            return part, int(_draw(sizes[part], self.seed, part, epoch)[j])
        u, v = np.random.default_rng((self.seed, epoch, i, 7)).random(2)
        part = min(int(np.searchsorted(self._share, u, "right")), len(sizes) - 1)
        return part, int(v * sizes[part])

    def at(self, i: int, epoch: int) -> dict:
        """Return item i of an epoch."""
        part, j = self.where(i, epoch)
        item = dict(self.parts[part][j])
        if item["label"] >= 0:
            item["label"] += self._first_class[part]
        return item

    def example(self, i: int) -> dict:
        """Return item i of epoch 0."""
        return self.at(i, 0)


@functools.lru_cache(maxsize=16)
def _draw(n, seed, part, epoch):
    """Return an order of n images of one part for one epoch."""
    return np.random.default_rng((seed, epoch, part, 8)).permutation(n)


def mix(parts, *, kind, weights=(), temperature=1.0, seed=0, split="") -> Mixture:
    """Mix two or more sources: see `Mixture`; weights () = equal ones.

    Raises:
        UsageError: weights that do not suit the parts.
        DataError: parts of different channels, or an empty one.
    """
    parts = tuple(parts)
    weights = tuple(weights) or (1.0,) * len(parts)
    if len(weights) != len(parts) or not sum(weights):
        raise errors.UsageError(
            f"mixture: weights={weights}: one per part ({len(parts)}), not all 0"
        )
    if len({p.channels for p in parts}) > 1 or not all(len(p) for p in parts):
        found = ", ".join(f"{p.name}: {len(p)} x {p.channels}" for p in parts)
        raise errors.DataError(
            f"mixture: parts must not be empty and share the number of channels; "
            f"found (images x channels) {found}"
        )
    return Mixture(parts, kind, weights, temperature, seed, split or parts[0].split)


def parse(parts: str) -> tuple[tuple[str, str], ...]:
    """Return ((kind, root), ...) of "kind=root,kind=root".

    Raises:
        UsageError: not of that form.
    """
    pairs = tuple(p.strip().partition("=")[::2] for p in parts.split(",") if p.strip())
    if len(pairs) < 2:
        raise errors.UsageError(
            f"mixture: parts={parts!r}: want two or more of kind=root, separated by "
            "commas, such as 'cifar10=/data/cifar,stl10=/data/stl'"
        )
    return pairs
