"""In which order images are visited, and where in it a step is.

A permutation of a billion images is 8 GB in every worker process. Of so many the order
is a function instead: position -> image, one to one, and nothing of it is stored.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

# Positions, epochs and views drawn once draw from different Philox keys.
_ORDER = np.uint64(1 << 63)
# Up to so many images an epoch's order is an array, 32 MB of it.
LISTED = 1 << 22
ROUNDS = 8


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


def generator(seed, position):
    """Return the random numbers of one row."""
    key = np.array([seed % (1 << 64), position], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


@functools.lru_cache(maxsize=4)
def listed(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch visits n images: a permutation [n]."""
    return generator(seed, np.uint64(epoch) | _ORDER).permutation(n)


@functools.lru_cache(maxsize=64)
def shuffled(n: int, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
    """Return the images at positions [start, stop) of an epoch of n: int64.

    Above `LISTED` images nothing of length n is made, see `bijection`.
    """
    if n <= LISTED:
        return listed(n, seed, epoch)[start:stop]
    rng = generator(seed, np.uint64(epoch) | _ORDER)
    return bijection(np.arange(start, stop), n, rng)


def name(n: int, sampling: str) -> str:
    """Return the name of the order in which n images are visited.

    A run that goes on in another order would see some images twice.
    """
    return "listed" if n <= LISTED or sampling != "shuffle" else "bijection"


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
    rng = generator(seed, np.uint64(epoch) | _ORDER)
    return rng.choice(len(labels), len(labels), p=weight / weight.sum())


def bijection(position, n: int, rng) -> np.ndarray:
    """Return what lies at some positions of a random order of 0 .. n - 1.

    A Feistel network over the cells of a grid of about sqrt(n) x sqrt(n): in turns a
    row is moved by a hash of the column, and a column by a hash of the row. Each move
    can be undone, so no two cells meet; a cell beyond n goes on until it is below.

    Args:
        position: integers in [0, n), of any shape.
        rng: numpy Generator, drawn from for the keys of the hash.

    Returns:
        int64 of that shape.

    Source: generalised Feistel with cycle-walking, Black and Rogaway 2002,
    doi:10.1007/3-540-45760-7_9.
    """
    rows = np.uint64(max(1, math.isqrt(n)))
    columns = np.uint64(-(-n // int(rows)))
    keys = rng.integers(2**64, size=ROUNDS, dtype=np.uint64)
    flat = np.array(position, np.uint64).ravel()
    beyond = np.arange(flat.size)
    while beyond.size:
        row, column = np.divmod(flat[beyond], columns)
        for even, odd in keys.reshape(-1, 2):
            row = (row + _hash(column + even) % rows) % rows
            column = (column + _hash(row + odd) % columns) % columns
        flat[beyond] = row * columns + column
        beyond = beyond[flat[beyond] >= n]
    return flat.astype(np.int64).reshape(np.shape(position))


def _hash(x):  # uint64 [N] -> uint64 [N]
    """Mix all bits: the finaliser of SplitMix64, doi:10.1145/2660193.2660195."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
