"""Batches: where the position is the step.

Batch t of a run is a pure function of (seed, t, global batch size). Epoch e visits
the images in its own random order and drops what does not fill a batch; the random
numbers of a row depend on (seed, its position in the run) only. Threads, worker
processes, hosts and restarts change who computes a row, never what it is. Resuming is
starting at another step, so no state of an iterator is ever stored.
"""

import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from vitssl import errors
from vitssl.data import bijection, decode
from vitssl.data.sources import wrappers

# Positions, epochs and views drawn once draw from different Philox keys.
_ORDER = np.uint64(1 << 63)
_VIEWS = 1 << 62
# grain wants a length; 2^40 batches are for ever.
_FOREVER = 1 << 40
# Up to so many images an epoch's order is an array, 32 MB of it.
LISTED = 1 << 22


class Place(NamedTuple):
    """Where a step is in the data.

    Attributes:
        epoch: passes over the images that ended before it.
        start: images of this epoch that came before it.
        size: images of its batch.
        row: rows of all steps before it.
    """

    epoch: int
    start: int
    size: int
    row: int


def place(n: int, sizes: tuple, t: int) -> Place:
    """Return where step t is, of n images.

    Args:
        sizes: ((first step, batch size from it on), ...), that of step 0 first. Where
            batches grow, an epoch begins.
    """
    epoch = row = 0
    for i, (first, size) in enumerate(sizes):
        per = n // size
        if i + 1 == len(sizes) or t < sizes[i + 1][0]:
            passed, step = divmod(t - first, per)
            return Place(epoch + passed, step * size, size, row + (t - first) * size)
        steps = sizes[i + 1][0] - first
        epoch, row = epoch - (-steps // per), row + steps * size
    raise ValueError("sizes: no batch size")


class Spec(NamedTuple):
    """Shape and dtype of one array of a batch; `jax.eval_shape` takes it as is."""

    shape: tuple[int, ...]
    dtype: np.dtype


def _generator(seed, position):
    """Return the random numbers of one row."""
    key = np.array([seed % (1 << 64), position], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


@functools.lru_cache(maxsize=4)
def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch visits n images: a permutation [n]."""
    return _generator(seed, np.uint64(epoch) | _ORDER).permutation(n)


@functools.lru_cache(maxsize=64)
def shuffled(n: int, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
    """Return the images at positions [start, stop) of an epoch of n: int64.

    Above `LISTED` images nothing of length n is made, see `bijection`.
    """
    if n <= LISTED:
        return order(n, seed, epoch)[start:stop]
    rng = _generator(seed, np.uint64(epoch) | _ORDER)
    return bijection.shuffled(np.arange(start, stop), n, rng)


def order_of(n: int, sampling: str) -> str:
    """Return the name of the order in which n images are visited.

    A run that goes on in another order would see some images twice.
    """
    listed = n <= LISTED or sampling != "shuffle"
    return "listed" if listed else "bijection"


def class_weight(labels):  # [N] -> [N]
    """Return 1 / (images of its class) of every image."""
    _, group, count = np.unique(labels, return_inverse=True, return_counts=True)
    return 1.0 / count[group]


@functools.lru_cache(maxsize=4)
def balanced(labels: bytes, seed: int, epoch: int) -> np.ndarray:
    """Draw as many images as there are, each class equally often on average.

    Args:
        labels: int32 [N] as bytes, so that it can be hashed; unlabelled (-1) images
            count as a class of their own.

    Returns:
        int64 [N], with replacement: image i with weight 1 / (images of its class).
    """
    labels = np.frombuffer(labels, np.int32)
    weight = class_weight(labels)
    rng = _generator(seed, np.uint64(epoch) | _ORDER)
    return rng.choice(len(labels), len(labels), p=weight / weight.sum())


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
        rng = _generator(self.seed, _VIEWS | view << 40 | i)
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
        return place(len(self.source), ((0, self.batch_size), *self.grown), t)

    def size(self, t):
        """Return the images of step t."""
        return self.place(t).size

    def _image(self, at, r):
        """Return the image that row r of a step at a place shows."""
        n = len(self.source)
        if self.labels is None:
            start = at.start
            return int(shuffled(n, self.seed, at.epoch, start, start + at.size)[r])
        return int(balanced(self.labels, self.seed, at.epoch)[at.start + r])

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
        return self._view(example, _generator(self.seed, at.row + r))


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
        row = self._view(example, _generator(self.seed, position))
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


def _own(array):
    """Return an array in this process's own memory.

    Worker processes hand arrays over in shared memory, of which containers often have
    64 MiB only, and which outlives a process that still holds some of it.
    """
    return array if type(array) is np.ndarray else np.array(array)


def cores() -> int:
    """Return the number of CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resources(threads: int, workers: int, prefetch: int) -> tuple[int, int, int]:
    """Replace each -1 by what suits this machine.

    OpenCV and the decoders release Python's lock, so threads are enough for about
    eight cores; worker processes (1.3 s of start each) take over beyond 16. What is
    being made is held in memory: one batch per thread.

    Args:
        threads: per process; 0 = load in the caller.
        workers: processes; 0 = none.
        prefetch: batches ready or in the making; 0 = none ahead.
    """
    n = cores()
    if workers < 0:
        workers = n // 8 if n >= 16 else 0
    if threads < 0:
        threads = min(8, max(2, n // max(1, workers)))
    if prefetch < 0:
        prefetch = threads + 1
    # Fewer batches than threads would leave threads idle.
    return threads, workers, max(threads, prefetch) if threads else 0


def _start_worker(index, count):
    """Run in each worker process before anything else."""
    del index, count
    cv2.setNumThreads(0)
    # The parent answers an interrupt by saving, and needs batches until it has.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def leave_with_parent():
        # A parent that was killed cannot say so, and we would wait for ever.
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


class Loader:
    """Iterator of batches: dicts of numpy arrays, the rows of this process.

    Attributes:
        waited: seconds the caller has spent in `next`, i.e. waiting for data.
        step: index of the batch that `next` returns next.
    """

    def __init__(self, batches, start=0, *, threads=-1, workers=0, prefetch=-1):
        """Load from batch `start` on; see `resources` for the rest."""
        self._batches = batches
        self._options = resources(threads, workers, prefetch)
        self._iterator = None
        self.step = start
        self.waited = 0.0

    def __iter__(self):
        return self

    def __next__(self):
        start = time.perf_counter()
        if self._iterator is None:
            self._iterator = self._begin()
        batch = {key: _own(value) for key, value in next(self._iterator).items()}
        self.waited += time.perf_counter() - start
        self.step += 1
        return batch

    def _begin(self):
        import grain

        threads, workers, prefetch = self._options
        # Threads of ours times threads of OpenCV's would be too many.
        cv2.setNumThreads(0)
        batches = grain.MapDataset.source(self._batches)[self.step :]
        batches = batches.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        )
        if workers:
            from absl import flags

            # grain asks absl's flags; a notebook or a test never parsed them.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers),
                worker_init_fn=_start_worker,
            )
        return iter(batches)

    def spec(self, step: int) -> dict[str, Spec]:
        """Return what the GLOBAL batch of a step is, by loading one row of it."""
        row = self._batches.row(step, 0)
        size = self._batches.size(step)
        arrays = {key: np.asarray(value) for key, value in row.items()}
        return {k: Spec((size, *v.shape), v.dtype) for k, v in arrays.items()}

    def remembers(self, step: int) -> np.ndarray:
        """Return view * N + image, int64 [B], of a step's remembered views."""
        return self._batches.remembers(step)

    def load(self, step: int) -> dict:
        """Return the batch of a step, made here and now: no threads, no grain."""
        return self._batches[step]

    def close(self):
        """Stop threads and workers. May be called twice."""
        iterator, self._iterator = self._iterator, iter(())
        if hasattr(iterator, "close"):
            iterator.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


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
) -> Loader:
    """Return the endless training batches [B/n, ...] from `start_step` on.

    Args:
        source: see `layout.Source`.
        transform: (example, rng) -> dict of arrays. The example has image, label,
            index, epoch and step; all randomness must come from rng.
        batch_size: B, of the global batch.
        seed: of order and augmentation.
        process: (index, n).
        on_bad_image, bad_share: see `wrappers.Tolerant`.
        sampling: "shuffle", or "balanced" (see `balanced`).
        remembered: see `Remembered`; None draws every view anew.
        grown: ((first step, larger batch size), ...), see `place`.
        loading: threads, workers, prefetch: see `resources`.

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
    return Loader(batches, start_step, **loading)


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
) -> Loader:
    """Return remembered views by their places, in batches of one size.

    Other arguments are those of `train`. The last batch is filled up with its last.
    """
    source = _tolerant(source, transform, on_bad_image, bad_share)
    whole = (0, 1)
    batches = _Filling(source, transform, seed, batch_size, whole, tuple(places))
    return Loader(batches, **loading)


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
) -> Loader:
    """Return every image once, in order, in batches of one size.

    The last batch is filled up with rows whose "valid" (bool [B/n]) is False, label
    and index -1; so are rows whose image is broken. Arguments are those of `train`.
    """
    source = _tolerant(source, transform, on_bad_image, bad_share)
    batches = _Evaluation(source, transform, seed, batch_size, process)
    return Loader(batches, **loading)
