"""Real handwritten digits, scanned to 8x8 pixels, that come with scikit-learn.

Source: Alpaydin & Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI;
the 1797 images of its test part.
"""

import functools
import hashlib
import importlib.util
import pathlib

import numpy as np

from vitssl import errors

TEST_SHARE = 0.2


@functools.cache
def pixels():
    """Every digit: images [1797, 8, 8] uint8 in 0..255 and labels [1797] int32.

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
def members(split):
    """Indices into `pixels()` of one split, sorted; the same on every machine.

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
