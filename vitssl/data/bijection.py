"""A random order of any number of things, of which any part is made by itself.

A permutation of a billion images is 8 GB in every worker process. This one is a
function instead: position -> image, one to one, and nothing of it is stored.
"""

import math

import numpy as np

ROUNDS = 8


def shuffled(position, n: int, rng) -> np.ndarray:
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
