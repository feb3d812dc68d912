"""CIFAR-10 and CIFAR-100 as their author distributes them: pickles of Python 2.

A pickle is a program. These are read by an unpickler that knows the few names
which rebuild a numpy array and refuses every other one without looking it up.

Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
"""

import codecs
import io
import pathlib
import pickle

import numpy as np

from vitssl import errors
from vitssl.data.sources import blocks, layout

SPLITS = {"train": "train", "test": "test", "val": "test"}
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
FILES = {
    ("cifar10", "train"): tuple(f"data_batch_{i}" for i in range(1, 6)),
    ("cifar10", "test"): ("test_batch",),
    ("cifar100", "train"): ("train",),
    ("cifar100", "test"): ("test",),
}
LABELS = {"cifar10": b"labels", "cifar100": b"fine_labels"}
META = {
    "cifar10": ("batches.meta", b"label_names", 10),
    "cifar100": ("meta", b"fine_label_names", 100),
}
SHAPE = (3, 32, 32)


def _latin1(text, encoding="latin1"):
    """Return bytes that Python 3 wrote as text, so that Python 2 could read them."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not expected")
    return codecs.encode(text, "latin1")


def _array(subtype, shape, typecode):
    """Return an empty array, to be filled by `__setstate__`; never one of objects."""
    del subtype, shape, typecode
    return np.ndarray.__new__(np.ndarray, (0,), np.uint8)


def _frombuffer(buffer, dtype, shape, order):
    """Return an array whose bytes are in the pickle (protocol 5)."""
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


class _Unpickler(pickle.Unpickler):
    """Allows dicts, lists, strings, numbers and numpy arrays, and nothing to call."""

    allowed = {
        ("numpy.core.multiarray", "_reconstruct"): _array,
        ("numpy._core.multiarray", "_reconstruct"): _array,
        ("numpy.core.numeric", "_frombuffer"): _frombuffer,
        ("numpy._core.numeric", "_frombuffer"): _frombuffer,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.allowed[module, name]


def unpickle(path):
    """Return (the dict in one of CIFAR's files, keys as bytes; the file's bytes).

    Raises:
        DataError: the file is missing, damaged, or holds anything else.
    """
    try:
        data = pathlib.Path(path).read_bytes()
        made = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as e:  # noqa: BLE001 - a damaged pickle raises anything.
        raise errors.DataError(f"{path}: not a CIFAR file: {e}") from e
    if not isinstance(made, dict):
        raise errors.DataError(f"{path}: not a CIFAR file: no dict in it")
    made = {k.encode() if isinstance(k, str) else k: v for k, v in made.items()}
    return made, data


def _batch(name, path):
    """Return the images of one file as a `Block`, and its labels."""
    made, raw = unpickle(path)
    data, labels = made.get(b"data"), made.get(LABELS[name])
    if not isinstance(data, np.ndarray) or not isinstance(labels, list):
        raise errors.DataError(
            f"{path}: want {LABELS[name]!r} and b'data', found {sorted(made)}"
        )
    if data.dtype != np.uint8 or data.shape != (len(labels), np.prod(SHAPE)):
        raise errors.DataError(
            f"{path}: want uint8 [{len(labels)}, 3072], found {data.dtype} "
            f"{list(data.shape)}"
        )
    classes = META[name][2]
    labels = np.array(labels, np.int32)
    if labels.size and not (0 <= labels.min() and labels.max() < classes):
        raise errors.DataError(f"{path}: labels outside 0..{classes - 1}")
    # Python 2 wrote the pixels as one piece: then the file itself can be mapped.
    offset = raw.find(data.tobytes())
    held = np.empty(0, np.uint8) if offset >= 0 else data.reshape(-1, *SHAPE)
    return blocks.Block(str(path), offset, len(labels), held), labels


def _open(name, root, split):
    split = layout.split_of(name, split, SPLITS)
    files = FILES[name, split]
    meta, key, count = META[name]
    expected = f"ROOT/{FOLDERS[name]}/{{{','.join((*files, meta))}}} (python version)"
    base = layout.root_of(name, root, expected, FOLDERS[name])
    layout.need(name, base, files, expected)
    parts = [_batch(name, base / f) for f in files]
    classes = tuple(str(c) for c in range(count))
    if (base / meta).is_file():
        names = unpickle(base / meta)[0].get(key, ())
        classes = tuple(c.decode() if isinstance(c, bytes) else c for c in names)
        if len(classes) != count:
            raise errors.DataError(f"{base / meta}: want {count} names in {key!r}")
    return blocks.Blocks(
        blocks=tuple(block for block, _ in parts),
        shape=SHAPE,
        transposed=False,
        labels=np.concatenate([labels for _, labels in parts]),
        classes=classes,
        root=str(base),
        name=name,
        split=split,
    )


def open10(root, split):
    """CIFAR-10: 50 000 images to train, 10 000 to test ("val" is the same), 32x32.

    Args:
        root: folder with `cifar-10-batches-py`, or that folder itself.

    Raises:
        DataError: files are missing or are not what they should be.
    """
    return _open("cifar10", root, split)


def open100(root, split):
    """CIFAR-100 with its 100 fine labels; otherwise as `open10`."""
    return _open("cifar100", root, split)
