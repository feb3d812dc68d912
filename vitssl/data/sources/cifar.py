"""CIFAR-10 and CIFAR-100 as their author distributes them: pickles of Python 2.

A pickle is a program. These are read by a machine that knows only data, see `pickles`.

Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
"""

import numpy as np

from vitssl import errors
from vitssl.data import decode, pickles
from vitssl.data.sources import blocks, layout

SPLITS = {"train": "train", "test": "test", "val": "test"}
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
FILES = {
    ("cifar10", "train"): tuple(f"data_batch_{i}" for i in range(1, 6)),
    ("cifar10", "test"): ("test_batch",),
    ("cifar100", "train"): ("train",),
    ("cifar100", "test"): ("test",),
}
LABELS = {"cifar10": "labels", "cifar100": "fine_labels"}
META = {
    "cifar10": ("batches.meta", "label_names", 10),
    "cifar100": ("meta", "fine_label_names", 100),
}
SHAPE = (3, 32, 32)


def unpickle(path):
    """Return (the dict in one of CIFAR's files, texts as str; the file's bytes).

    Raises:
        DataError: the file is missing, damaged, or holds anything else.
    """
    data, where = decode.contents(path), decode.printable(path)
    try:
        made = pickles.read(data, f"{where}: not a CIFAR file")
    except errors.CheckpointError as e:
        raise errors.DataError(str(e)) from e
    if not isinstance(made, dict):
        raise errors.DataError(f"{where}: not a CIFAR file: no dict in it")
    # Python 2 wrote texts, which Python 3 calls bytes.
    return {_text(key): value for key, value in made.items()}, data


def _text(value):
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _batch(name, path):
    """Return the images of one file as a `Block`, and its labels."""
    made, raw = unpickle(path)
    data, labels = made.get("data"), made.get(LABELS[name])
    if not isinstance(data, np.ndarray) or not isinstance(labels, list):
        raise errors.DataError(
            f"{path}: want {LABELS[name]!r} and 'data', found "
            + errors.told(sorted(made))
        )
    if data.dtype != np.uint8 or data.shape != (len(labels), np.prod(SHAPE)):
        raise errors.DataError(
            f"{path}: want uint8 [{len(labels)}, 3072], found {data.dtype} "
            f"{list(data.shape)}"
        )
    classes = META[name][2]
    if not all(isinstance(y, int) and 0 <= y < classes for y in labels):
        raise errors.DataError(f"{path}: labels outside 0..{classes - 1}")
    labels = np.array(labels, np.int32)
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
        classes = tuple(map(_text, names if isinstance(names, list) else ()))
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
