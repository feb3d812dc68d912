"""Batches: where the position is the step.

Batch t of a run is a pure function of (seed, t, global batch size). Epoch e visits
the images in its own random order and drops what does not fill a batch; the random
numbers of a row depend on (seed, its position in the run) only. Threads, worker
processes, hosts and restarts change who computes a row, never what it is. Resuming is
starting at another step, so no state of an iterator is ever stored.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vitssl import errors
from vitssl.data import decode, loader, orders
from vitssl.data.sources import wrappers

# Positions and views drawn once draw from different Philox keys, see `orders`.
_VIEWS = 1 << 62
# grain wants a length; 2^40 batches are for ever.
_FOREVER = 1 << 40


def steps_per_epoch(source, batch_size: int) -> int:
    """Return the full batches in one epoch.

    Raises:
        DataError: the set is smaller than one batch.
    """
    if len(source) < batch_size:
        raise errors.DataError(
            f"{source.name}: {decode.printable(source.root)} split {source.split!r} "
            f"holds {len(source)} images, fewer than one batch of {batch_size}; "
            "lower batch_size"
        )
    return len(source) // batch_size


def _stack(rows):
    """Return dicts of one row each as a dict of arrays [B, ...]."""
    batch = {}
    for key in rows[0]:
        try:
            batch[key] = np.stack([row[key] for row in rows])
        except ValueError as e:
            shapes = sorted({np.shape(row[key]) for row in rows})
            raise ValueError(f"rows of {key!r} differ in shape: {shapes}") from e
    return batch


@dataclasses.dataclass(frozen=True)
class _Batches:
    """`[t]` is our rows of batch t: process p of n has rows [p B/n, (p+1) B/n)."""

    source: wrappers.Tolerant
    transform: Callable
    seed: int
    batch_size: int
    process: tuple[int, int]

    def __post_init__(self):
        index, count = self.process
        if self.batch_size % count or not 0 <= index < count:
            raise errors.UsageError(
                f"batch_size={self.batch_size} does not split over {count} processes "
                f"(this is number {index})"
            )

    def size(self, t):
        """Return the rows of the global batch t."""
        del t
        return self.batch_size

    def __getitem__(self, t):
        index, count = self.process
        ours = self.size(t) // count
        return _stack([self.row(t, index * ours + r) for r in range(ours)])

    def _view(self, example, rng):
        """Return what the transform makes of an example, and its several labels."""
        row = self.transform(example, rng)
        return row | {"labels": example["labels"]} if "labels" in example else row

    def _once(self, view, i):
        """Return view `view` of image i: a function of the seed and these two alone.

        "view_seed" uint32 [2] is the key of what the device draws for it.
        """
        example = dict(self.source.at(i, view), epoch=view, step=0)
        example["label"] = np.int32(example["label"])
        example["index"] = np.int32(example["index"])
        rng = orders.generator(self.seed, _VIEWS | view << 40 | i)
        key = rng.integers(2**32, size=2, dtype=np.uint32)
        return {**self._view(example, rng), "view_seed": key}


class Remembered(NamedTuple):
    """Views that are drawn once: epoch e visits view e mod `views` of every image.

    Attributes:
        views: per image.
        end: first step that there is no batch of.
    """

    views: int
    end: int


@dataclasses.dataclass(frozen=True)
class _Training(_Batches):
    """Endless batches; those of `remembered` views end with the run."""

    labels: bytes | None = None  # If classes are drawn equally often.
    remembered: Remembered | None = None
    grown: tuple[tuple[int, int], ...] = ()  # ((first step, larger batch size), ...)

    def __len__(self):
        return self.remembered.end if self.remembered else _FOREVER

    def place(self, t):
        """Return where step t is in the data."""
        return orders.place(len(self.source), ((0, self.batch_size), *self.grown), t)

    def size(self, t):
        """Return the images of step t."""
        return self.place(t).size

    def _image(self, at, r):
        """Return the image that row r of a step at a place shows."""
        n = len(self.source)
        if self.labels is None:
            start = at.start
            return int(
                orders.shuffled(n, self.seed, at.epoch, start, start + at.size)[r]
            )
        return int(orders.balanced(self.labels, self.seed, at.epoch)[at.start + r])

    def remembers(self, t):  # -> int64 [B]
        """Return view * N + image of the rows of step t."""
        at, n = self.place(t), len(self.source)
        first = at.epoch % self.remembered.views * n
        return np.array([first + self._image(at, r) for r in range(at.size)])

    def row(self, t, r):
        """Return row r of the global batch t."""
        at = self.place(t)
        i = self._image(at, r)
        if self.remembered:
            return self._once(at.epoch % self.remembered.views, i)
        example = self.source.at(i, at.epoch)
        example["label"] = np.int32(example["label"])
        example["index"] = np.int32(example["index"])
        example["epoch"] = at.epoch
        example["step"] = t  # What a batch shares may be drawn from it.
        return self._view(example, orders.generator(self.seed, at.row + r))


@dataclasses.dataclass(frozen=True)
class _Evaluation(_Batches):
    """The set once, in its order."""

    def __len__(self):
        return -(-len(self.source) // self.batch_size)

    def row(self, t, r):
        """Return row r of the global batch t; past the end a copy that is not valid."""
        position = t * self.batch_size + r
        i = min(position, len(self.source) - 1)
        example = self.source.at(i, 0)
        # What stands in for a broken image must not be counted twice.
        valid = position == i == example["index"]
        example["label"] = np.int32(example["label"] if valid else -1)
        example["index"] = np.int32(i if valid else -1)
        example["epoch"] = 0
        row = self._view(example, orders.generator(self.seed, position))
        return {**row, "valid": np.bool_(valid)}


@dataclasses.dataclass(frozen=True)
class _Filling(_Batches):
    """Remembered views, by their places view * N + image, in that order."""

    places: tuple[int, ...]

    def __len__(self):
        return -(-len(self.places) // self.batch_size)

    def row(self, t, r):
        """Return row r of batch t; past the end the last view again."""
        at = self.places[min(t * self.batch_size + r, len(self.places) - 1)]
        return self._once(*divmod(at, len(self.source)))


def _tolerant(source, transform, policy, share):
    """Return a source as `wrappers.Tolerant`, which decodes for a transform."""
    reduction = getattr(transform, "reduction", None)
    if reduction is not None and hasattr(source, "reduced"):
        source = source.reduced(reduction)
    return wrappers.Tolerant(source, policy, share)


def train(
    source,
    transform,
    *,
    batch_size,
    seed,
    start_step=0,
    process=(0, 1),
    on_bad_image="skip",
    bad_share=0.01,
    sampling="shuffle",
    remembered=None,
    grown=(),
    **loading,
) -> loader.Loader:
    """Return the endless training batches [B/n, ...] from `start_step` on.

    Args:
        source: see `layout.Source`.
        transform: (example, rng) -> dict of arrays. The example has image, label,
            index, epoch and step; all randomness must come from rng.
        batch_size: B, of the global batch.
        seed: of order and augmentation.
        process: (index, n).
        on_bad_image, bad_share: see `wrappers.Tolerant`.
        sampling: "shuffle", or "balanced" (see `orders.balanced`).
        remembered: see `Remembered`; None draws every view anew.
        grown: ((first step, larger batch size), ...), see `orders.place`.
        loading: threads, workers, prefetch: see `loader.resources`.

    Raises:
        DataError: fewer images than a batch; from `next`, broken images.
        UsageError: the batch does not split over the processes; balanced sampling of
            a source that does not know its labels.
    """
    steps_per_epoch(source, batch_size)
    labels = None
    if sampling == "balanced":
        if getattr(source, "several", None) is not None:
            raise errors.UsageError(
                "data.sampling=balanced: images of several labels are of no one class; "
                "use shuffle"
            )
        if getattr(source, "labels", None) is None:
            raise errors.UsageError(
                f"data.sampling=balanced: {source.name} knows no labels before its "
                "images are read; use shuffle"
            )
        labels = np.asarray(source.labels, np.int32).tobytes()
    source = _tolerant(source, transform, on_bad_image, bad_share)
    own = process, labels, remembered, grown
    batches = _Training(source, transform, seed, batch_size, *own)
    return loader.Loader(batches, start_step, **loading)


def fill(
    source,
    transform,
    places,
    *,
    batch_size,
    seed,
    on_bad_image="skip",
    bad_share=0.01,
    **loading,
) -> loader.Loader:
    """Return remembered views by their places, in batches of one size.

    Other arguments are those of `train`. The last batch is filled up with its last.
    """
    source = _tolerant(source, transform, on_bad_image, bad_share)
    whole = (0, 1)
    batches = _Filling(source, transform, seed, batch_size, whole, tuple(places))
    return loader.Loader(batches, **loading)


def evaluate(
    source,
    transform,
    *,
    batch_size,
    seed=0,
    process=(0, 1),
    on_bad_image="skip",
    bad_share=0.01,
    **loading,
) -> loader.Loader:
    """Return every image once, in order, in batches of one size.

    The last batch is filled up with rows whose "valid" (bool [B/n]) is False, label
    and index -1; so are rows whose image is broken. Arguments are those of `train`.
    """
    source = _tolerant(source, transform, on_bad_image, bad_share)
    batches = _Evaluation(source, transform, seed, batch_size, process)
    return loader.Loader(batches, **loading)
