"""The four states of a token, and which tokens there is nothing of.

A mask is int8 [h, w, T, S] on the grid of patches ([T, S] and [S] without space), one
state for each token.

Source: allenai/olmoearth_pretrain@5411573 olmoearth_pretrain/train/masking.py.
"""

from collections.abc import Sequence

import numpy as np

from vitssl.data import modalities
from vitssl.data.modalities import Modality

ONLINE = 0  # The encoder reads it.
TARGET_ONLY = 1  # Only the target encoder reads it.
DECODER = 2  # The decoder predicts it.
MISSING = 3  # There is nothing.

Masks = dict[str, np.ndarray]


def missing(kind: Modality, x: np.ndarray) -> np.ndarray:
    """Return where any band of a bandset is missing: bool [..., S] of x [..., C]."""
    gone = x == modalities.MISSING
    return np.stack([gone[..., list(c)].any(-1) for c in kind.channels], axis=-1)


def per_patch(kind: Modality, gone: np.ndarray, patch: int, whole: bool = True):
    """Return which tokens are missing: bool [h, w, T, S] of pixels [H, W, T, S].

    Args:
        patch: side in 10 m pixels.
        whole: any missing pixel counts; False: the top left one alone.
    """
    if not kind.space:
        return gone
    n = patch * kind.factor
    if not whole:
        return gone[::n, ::n]
    h, w = (side // n for side in gone.shape[:2])
    cells = gone[: h * n, : w * n].reshape(h, n, w, n, *gone.shape[2:])
    return cells.any((1, 3))


def present_times(kinds: Sequence[Modality], gone: Masks) -> np.ndarray:
    """Return the steps at which some modality lacks nothing: int [t].

    `gone` is {modality: bool [..., T, S]}; of a batch, it must be whole in all.
    """
    whole = [
        ~gone[k.name].any(axis=(*range(gone[k.name].ndim - 2), -1))
        for k in kinds
        if k.time and k.name in gone
    ]
    return np.flatnonzero(np.any(whole, axis=0)) if whole else np.zeros(0, int)


def scatter(rng, count: int, ratios, least: int = 0) -> np.ndarray:
    """Return `count` states in random order, int(count ratio) of the first two."""
    encode, decode = (max(least, int(count * r)) for r in ratios)
    states = np.full(count, TARGET_ONLY)
    states[:encode] = ONLINE
    states[encode : encode + decode] = DECODER
    return rng.permutation(states)
