"""Batches ahead of the training: threads, worker processes, one iterator."""

import multiprocessing
import os
import signal
import threading
import time
from typing import NamedTuple

import cv2
import numpy as np


class Spec(NamedTuple):
    """Shape and dtype of one array of a batch; `jax.eval_shape` takes it as is."""

    shape: tuple[int, ...]
    dtype: np.dtype


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
