"""The scanned digits of `worlds.scans` as a data set."""

import numpy as np

from vitssl import errors
from vitssl.data.sources import arrays, layout
from vitssl.data.worlds import scans

SPLITS = {"train": "train", "test": "test", "val": "test", "all": "all"}


def open(root, split, *, channels=1):
    """The digits: 1438 to train, 359 to test, 8x8 pixels, ten classes.

    Args:
        root: not used; they come with a Python package.
        split: "train", "test" ("val" is the same) or "all".
        channels: 1, or 3 equal ones.
    """
    split = layout.split_of("digits", split, SPLITS)
    if channels not in (1, 3):
        raise errors.UsageError(f"digits: channels={channels}: 1 or 3")
    images, labels = scans.pixels()
    at = scans.members(split)
    images = np.repeat(images[at, :, :, None], channels, axis=-1)  # [N, 8, 8, C]
    names = tuple(str(d) for d in range(10))
    return arrays.Arrays(images, labels[at], names, "(built in)", "digits", split)
