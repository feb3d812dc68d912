"""The side of training images, step by step: fixed, growing, or drawn anew.

A side is a static shape: the step is compiled once for each, ahead of need, and every
side is a multiple of what the model divides an image by.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from vitssl import ranges
from vitssl.sizes import Size


@dataclasses.dataclass(frozen=True)
class Resolution:
    """Config section `resolution`.

    Attributes:
        start: side at the start, in pixels, which grows linearly, epoch by epoch, to
            augment.size; 0: that from the start.
        epochs: in which it grows; 0 is all of the run.
        sizes: least and largest side that a batch may be drawn at; () is neither.
        prob: probability that a batch is drawn so. Which step has which side does not
            depend on the seed of the run.

    Source: w2sg-arnav/HierarchialViT, an early trainer (progressive) and the guide
    (multi-scale, which resizes a finished batch; here the crop itself has the side).
    """

    start: ranges.OrNone = 0
    epochs: ranges.NotNegative = 0.0
    sizes: tuple[ranges.Count, ...] = ()
    prob: ranges.Probability = 0.3

    @property
    def fixed(self) -> bool:
        """Whether every step has the same side."""
        return not self.start and not (self.sizes and self.prob)

    def check(self) -> Iterator[str]:
        """Yield what is wrong with the range of sides."""
        if self.sizes and (len(self.sizes) != 2 or self.sizes[0] > self.sizes[1]):
            yield f"sizes={self.sizes}: (least, largest) in pixels, or ()"

    def faults(self, size: Size, multiple: int) -> Iterator[str]:
        """Yield what does not fit augment.size and the model, with whole keys."""
        if self.fixed:
            return
        if not isinstance(size, int):
            yield f"augment.size={size}: resolution needs a square; give one number"
            return
        if self.start > size:
            yield f"resolution.start={self.start}: at most augment.size={size}"
        if size % multiple:
            below = size // multiple * multiple
            yield (
                f"augment.size={size}: resolution needs a multiple of {multiple}; "
                f"nearest are {below} and {below + multiple}"
            )
        if self.sizes and not _multiples(self.sizes, multiple):
            yield (
                f"resolution.sizes={self.sizes}: no multiple of {multiple} lies between"
            )

    def sides(self, size: Size, multiple: int, run) -> "Sides":
        """Return the side of every step of a run; see `Sides`."""
        return Sides(self, size, multiple, run.steps_per_epoch, max(1, run.total_steps))


@dataclasses.dataclass(frozen=True)
class Sides:
    """`sides(step)` is the side, in pixels, of the batch of a step.

    Attributes:
        spec: the section.
        size: augment.size.
        multiple: what a side is rounded to, the nearest multiple.
        steps_per_epoch, total_steps: of the run.
    """

    spec: Resolution
    size: Size
    multiple: int
    steps_per_epoch: int
    total_steps: int

    def __call__(self, step: int) -> Size:
        """Return the size of step `step` (0-based): a side, unless it is fixed."""
        spec = self.spec
        if spec.fixed:
            return self.size
        if spec.sizes:
            rng = np.random.Generator(np.random.Philox(key=step))
            if rng.random() < spec.prob:
                return int(rng.choice(_multiples(spec.sizes, self.multiple)))
        if not spec.start:
            return self.size
        per_epoch = max(1, self.steps_per_epoch)
        epochs = spec.epochs or self.total_steps / per_epoch
        grown = spec.start + (self.size - spec.start) * (step // per_epoch) / epochs
        side = round(int(grown) / self.multiple) * self.multiple
        return min(max(side, self.multiple), self.size)


def _multiples(sizes, multiple: int) -> list[int]:
    """Return the multiples from sizes[0] to sizes[1], both included."""
    least = -(-sizes[0] // multiple)
    return [k * multiple for k in range(least, sizes[1] // multiple + 1)]


@dataclasses.dataclass(frozen=True)
class Sized:
    """A training transform whose result has the side of its step.

    Attributes:
        transform: a dataclass with a field `size`.
        sides: the side of every step.
    """

    transform: Any
    sides: Sides

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """Return what the transform makes of an example with a "step"."""
        side = self.sides(example["step"])
        return dataclasses.replace(self.transform, size=side)(example, rng)


def sized(transform, sides: Sides):
    """Return a transform with the side of every step; itself if that never changes."""
    return transform if sides.spec.fixed else Sized(transform, sides)
