"""CIFAR and STL-10: many images in one file."""

import pickle

import numpy as np

from tests.layouts import pictures


def python2(data, labels, key):
    """Return what Python 2's cPickle wrote: protocol 2, one piece of pixels.

    Args:
        data: uint8 [N, 3072].
        labels: [N], below 256.
        key: of the labels.
    """

    def text(s):
        return b"U" + bytes([len(s)]) + s

    n = len(data)
    shape = b"M" + n.to_bytes(2, "little") + b"M" + (3072).to_bytes(2, "little")
    dtype = (
        b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR"
        b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t"
        + text(b"b")
        + b"tR(K\x01("
        + shape
        + b"t"
        + dtype
        + b"\x89T"
        + data.nbytes.to_bytes(4, "little")
        + data.tobytes()
        + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([y]) for y in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(key) + numbers + b"u."


def planes(labels, size, *, first=0):
    """Return pictures of these labels as uint8 [N, 3, H, W]."""
    made = [pictures.thing(y, first + i, size=size) for i, y in enumerate(labels)]
    return np.stack([p.image for p in made]).transpose(0, 3, 1, 2)


def cifar10(root, *, write=python2, each=6, test=12):
    """Write cifar-10-batches-py: five batches and the test batch.

    Image i of file k has label (k + i) modulo 10.

    Args:
        write: from (data, labels, key) to the bytes of a batch.
        each: images of a training batch.
        test: images of the test batch.
    """
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        labels = [(k + i) % 10 for i in range(each if k < 5 else test)]
        data = planes(labels, (32, 32), first=each * k).reshape(-1, 3072)
        (base / name).write_bytes(write(data, labels, b"labels"))
    names = b"airplane automobile bird cat deer dog frog horse ship truck".split()
    (base / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, 2))
    return root


def cifar100(root, *, train=tuple(range(0, 96, 4)), test=tuple(range(0, 96, 8))):
    """Write cifar-100-python, with these fine labels."""
    base = root / "cifar-100-python"
    base.mkdir(parents=True)
    for name, labels in (("train", train), ("test", test)):
        first = 0 if name == "train" else len(train)
        made = {
            b"data": planes(labels, (32, 32), first=first).reshape(-1, 3072),
            b"fine_labels": list(labels),
            b"coarse_labels": [y // 5 for y in labels],
        }
        (base / name).write_bytes(pickle.dumps(made, 2))
    names = {
        b"fine_label_names": [f"fine {i}".encode() for i in range(100)],
        b"coarse_label_names": [f"coarse {i}".encode() for i in range(20)],
    }
    (base / "meta").write_bytes(pickle.dumps(names, 2))
    return root


def stl10(root, *, train=None, test=None, unlabelled=6, folds=None):
    """Write stl10_binary.

    Args:
        train, test: labels 1..10; None = 30 and 20 of all classes in turn.
        unlabelled: number of images without label.
        folds: lines of fold_indices.txt; None = every third image from k modulo 3 on.
    """
    base = root / "stl10_binary"
    base.mkdir(parents=True)
    labels = {
        "train": train or [*range(1, 11)] * 3,
        "test": test or [*range(1, 11)] * 2,
    }
    count, first = len(labels["train"]), 0
    for part, own in (*labels.items(), ("unlabeled", [1] * unlabelled)):
        images = planes([y - 1 for y in own], (96, 96), first=first)
        # As distributed: image, channel, column, row.
        images.transpose(0, 1, 3, 2).tofile(base / f"{part}_X.bin")
        if part in labels:
            np.array(own, np.uint8).tofile(base / f"{part}_y.bin")
        first += len(own)
    names = "airplane bird car cat deer dog horse monkey ship truck"
    pictures.text(base / "class_names.txt", names.split())
    folds = folds or [" ".join(map(str, range(k % 3, count, 3))) for k in range(10)]
    pictures.text(base / "fold_indices.txt", [f"{line} " for line in folds])
    return root
