"""Real handwritten digits, scanned to 8x8 pixels, that come with scikit-learn.

Source: Alpaydin & Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI;
the 1797 images of its test part.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import pathlib
from typing import ClassVar, Literal

import numpy as np

from vitssl import errors
from vitssl.data.sources import drawn, layout

TEST_SHARE = 0.2
CLASSES = tuple("0123456789")
SPLITS = drawn.SPLITS | {"all": "all"}


@functools.cache
def pixels() -> tuple[np.ndarray, np.ndarray]:
    """Return every digit: images [1797, 8, 8] uint8 and labels [1797] int32.

    Raises:
        DataError: scikit-learn, which carries the images, is not installed.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None:
        raise errors.DataError("digits: they come with scikit-learn; install it")
    # Reading the table directly takes 20 ms; importing scikit-learn takes 1.6 s, and
    # every worker process would pay it again.
    table = pathlib.Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if table.exists():
        rows = np.loadtxt(table, delimiter=",", dtype=np.float32)
        flat, labels = rows[:, :64], rows[:, 64]
    else:
        from sklearn import datasets

        flat, labels = datasets.load_digits(return_X_y=True)
    images = np.rint(np.reshape(flat, (-1, 8, 8)) * (255 / 16)).astype(np.uint8)
    return images, labels.astype(np.int32)


@functools.cache
def members(split: str) -> np.ndarray:
    """Return the sorted indices into `pixels()` of a split, the same on every machine.

    In each class the fifth of the images with the smallest hash of their pixels is
    the test split, so it depends neither on the order nor on a random generator.
    """
    images, labels = pixels()
    if split == "all":
        return np.arange(len(images))
    rank = np.array([hashlib.blake2b(x.tobytes()).digest()[:8] for x in images])
    test = []
    for label in range(10):
        own = np.flatnonzero(labels == label)
        own = own[np.argsort(rank[own], kind="stable")]
        test.extend(own[: round(TEST_SHARE * len(own))])
    if split == "test":
        return np.sort(test)
    return np.setdiff1d(np.arange(len(images)), test)


@dataclasses.dataclass(frozen=True, eq=False)
class Digits(layout.Images):
    """Scans in memory: images [N, 8, 8, C] and labels [N]."""

    images: np.ndarray
    labels: np.ndarray
    split: str
    channels: int
    name: ClassVar[str] = "digits"
    root: ClassVar[str] = drawn.BUILT_IN
    classes: ClassVar[tuple[str, ...]] = CLASSES

    def image(self, i: int) -> np.ndarray:
        """Return image i."""
        return self.images[i]


def open(root, split, *, channels: Literal[1, 3] = 1):
    """The digits: 1438 to train, 359 to test, 8x8 pixels, ten classes.

    Args:
        root: not used.
        split: "train", "test" ("val" is the same) or "all".
        channels: 1, or 3 equal ones.
    """
    del root
    split = layout.split_of("digits", split, SPLITS)
    images, labels = pixels()
    at = members(split)
    images = np.repeat(images[at, :, :, None], channels, axis=-1)
    return Digits(images, labels[at], split, channels)
