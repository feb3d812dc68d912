"""Data sets with a layout of their own: CIFAR, STL-10, ImageNet, tfds."""

import os
import pathlib
import pickle
import shutil
import sys

import numpy as np
import pytest

from tests import layouts
from tests.layouts import binaries, pictures, trees
from vitssl import errors
from vitssl.data import sources
from vitssl.data.sources import imagenet

# --- CIFAR


def _python3_batch(protocol):
    def write(data, labels, key):
        return pickle.dumps({b"data": data, key: labels}, protocol)

    return write


WRITERS = {"python2": binaries.python2} | {
    f"python3 protocol {p}": _python3_batch(p) for p in range(2, 6)
}


@pytest.mark.parametrize("writer", WRITERS)
def test_cifar10_planes_are_red_green_blue(tmp_path, writer):
    binaries.cifar10(tmp_path, write=WRITERS[writer], test=4)
    train = sources.open("cifar10", str(tmp_path), "train")
    test = sources.open("cifar10", str(tmp_path / "cifar-10-batches-py"), "val")
    assert (len(train), len(test), train.channels) == (30, 4, 3)
    assert train.classes[3] == "cat"
    got = [train[i] for i in range(30)] + [test[i] for i in range(4)]
    for i, item in enumerate(got):
        stored = pictures.thing((i // 6 + i % 6) % 10, i, size=(32, 32)).image
        np.testing.assert_array_equal(item["image"], stored)
    truth = [(k + i) % 10 for k in range(5) for i in range(6)]
    assert [item["label"] for item in got[:30]] == truth
    assert train.labels.tolist() == truth
    assert [item["label"] for item in got[30:]] == [5, 6, 7, 8]


def test_cifar_as_distributed_is_mapped_not_copied(tmp_path):
    binaries.cifar10(tmp_path, each=60)
    source = sources.open("cifar10", str(tmp_path), "train")
    image = source[65]["image"]
    data = pickle.dumps(source)
    assert len(data) < 10_000  # The pixels alone are 920 kB.
    np.testing.assert_array_equal(pickle.loads(data)[65]["image"], image)


def test_cifar100_has_fine_labels(tmp_path):
    binaries.cifar100(tmp_path, train=(99, 0, 42), test=(1,))
    source = sources.open("cifar100", str(tmp_path), "train")
    assert [source[i]["label"] for i in range(3)] == [99, 0, 42]
    assert len(source.classes) == 100 and source.classes[42] == "fine 42"
    (tmp_path / "cifar-100-python" / "meta").unlink()
    bare = sources.open("cifar100", str(tmp_path), "train")
    assert len(bare.classes) == 100 and bare.classes[42] == "42"


class _Touch:
    """Pickles to a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


class _Open(_Touch):
    def __reduce__(self):
        return (open, (self.path, "w"))


class _Path(_Touch):
    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path(self.path),))


@pytest.mark.parametrize("kind", [_Touch, _Open, _Path])
def test_a_malicious_cifar_file_runs_nothing(tmp_path, kind):
    binaries.cifar10(tmp_path)
    trace = tmp_path / "trace"
    evil = {b"data": kind(str(trace)), b"labels": [0]}
    data = pickle.dumps(evil)
    pickle.loads(data)  # It would work.
    assert trace.exists()
    trace.unlink()
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(data)
    with pytest.raises(
        errors.DataError, match="data_batch_3: not a CIFAR file: refused, it wants"
    ):
        sources.open("cifar10", str(tmp_path), "train")
    assert not trace.exists()


def test_an_array_of_objects_is_not_pixels(tmp_path):
    binaries.cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    data = np.array([[None] * 3072], object)
    path.write_bytes(pickle.dumps({b"data": data, b"labels": [0]}))
    with pytest.raises(
        errors.DataError, match="test_batch: not a CIFAR file: damaged .*dtype 'O8'"
    ):
        sources.open("cifar10", str(tmp_path), "test")


@pytest.mark.parametrize("kept", [0, 1, 100, -1, -2000])
def test_a_truncated_cifar_file_is_named(tmp_path, kept):
    binaries.cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(errors.DataError, match="data_batch_2: not a CIFAR file"):
        sources.open("cifar10", str(tmp_path), "train")


@pytest.mark.parametrize(
    "program",
    [
        b")q\0" + b"".join(b"h%c2\x86q%c0" % (i, i + 1) for i in range(60)) + b"}h<Ns.",
        b"Nr\xff\xff\xff\xff.",  # Python's own would reserve 32 GB for its memo.
        b"cnumpy\nndarray\n(J\xff\xff\xff\x7fJ\xff\xff\0\0\x86tR.",
        b"}(U\4dataNU\6labels](K\1K\2eu.",
        b"}(I1\nNNNu.",
    ],
)
def test_a_cifar_file_neither_hangs_nor_fills_the_memory(tmp_path, program):
    binaries.cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(b"\x80\2" + program)
    with pytest.raises(
        errors.DataError, match=r"test_batch: (not a CIFAR|want)"
    ) as told:
        sources.open("cifar10", str(tmp_path), "test")
    assert "\n" not in str(told.value)


def test_missing_cifar_files_are_listed(tmp_path):
    with pytest.raises(errors.DataError, match="no file data_batch_1, data_batch_2"):
        sources.open("cifar10", str(tmp_path), "train")


# --- STL-10


@pytest.fixture
def stl10(tmp_path):
    """A small tree in the real layout, and its images [H, W, C] of each file."""
    labels = {"train": [1, 10, 3, 1, 2], "test": [4, 5, 6]}
    folds = ["0 4", "1 2 3"] + ["0"] * 8
    binaries.stl10(tmp_path, **labels, unlabelled=4, folds=folds)
    images, number = {}, 0
    for part, own in (*labels.items(), ("unlabeled", [1] * 4)):
        things = [
            pictures.thing(y - 1, number + i, size=(96, 96)) for i, y in enumerate(own)
        ]
        images[part], number = [t.image for t in things], number + len(own)
    return tmp_path, images


def test_stl10_planes_are_turned_and_labels_begin_at_zero(stl10):
    root, images = stl10
    train = sources.open("stl10", str(root), "train")
    for i in range(5):
        np.testing.assert_array_equal(train[i]["image"], images["train"][i])
    assert [train[i]["label"] for i in range(5)] == [0, 9, 2, 0, 1]
    assert train.classes[9] == "truck"
    val = sources.open("stl10", str(root), "val")
    np.testing.assert_array_equal(val[2]["image"], images["test"][2])
    assert val.labels.tolist() == [3, 4, 5]


def test_stl10_with_unlabelled_images_is_longer(stl10):
    """Defect 27 of the original: asking for them changed nothing."""
    root, images = stl10
    both = sources.open("stl10", str(root), "train+unlabeled")
    assert len(both) == 9
    assert both.labels.tolist() == [0, 9, 2, 0, 1, -1, -1, -1, -1]
    np.testing.assert_array_equal(both[4]["image"], images["train"][4])
    np.testing.assert_array_equal(both[5]["image"], images["unlabeled"][0])
    np.testing.assert_array_equal(both[8]["image"], images["unlabeled"][3])
    assert both[8]["label"] == -1
    alone = sources.open("stl10", str(root), "unlabeled")
    np.testing.assert_array_equal(alone[0]["image"], images["unlabeled"][0])
    assert len(pickle.dumps(both)) < 5000


def test_stl10_folds_are_those_of_the_file(stl10):
    root, images = stl10
    fold = sources.open("stl10", str(root), "train", fold=1)
    assert fold.labels.tolist() == [9, 2, 0]
    np.testing.assert_array_equal(fold[2]["image"], images["train"][3])
    assert pickle.loads(pickle.dumps(fold))[0]["label"] == 9
    with pytest.raises(errors.UsageError, match="fold=1 split='test'"):
        sources.open("stl10", str(root), "test", fold=1)


def test_stl10_of_a_wrong_size_is_refused(stl10):
    root, _ = stl10
    with open(root / "stl10_binary" / "test_X.bin", "ab") as f:
        f.write(b"\x00" * 100)
    with pytest.raises(errors.DataError, match="test_X.bin: 83044 bytes are not"):
        sources.open("stl10", str(root), "test")
    (root / "stl10_binary" / "train_y.bin").write_bytes(b"\x01\x02")
    with pytest.raises(errors.DataError, match="want 5 labels 1..10"):
        sources.open("stl10", str(root), "train")
    (root / "stl10_binary" / "unlabeled_X.bin").unlink()
    with pytest.raises(errors.DataError, match="no file unlabeled_X.bin"):
        sources.open("stl10", str(root), "unlabeled")


# --- ImageNet


@pytest.fixture
def tree(tmp_path):
    """Five class folders, two of them of the 100: colours tell their images apart."""
    wnids = ["n01440764", "n01498041", "n01443537", "n02018207", "n01537544"]
    return trees.imagenet(tmp_path, wnids=wnids, train=2, val=2)


def test_imagenet_labels_are_the_order_of_the_folders(tree):
    source = sources.open("imagenet", str(tree), "train")
    assert source.classes == tuple(sorted(p.name for p in (tree / "train").iterdir()))
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert pictures.label_of(source[4]["image"]) == 1  # Written second: n01498041.
    assert len(sources.open("imagenet", str(tree), "val")) == 10


def test_imagenet100_keeps_its_classes_only_and_counts_them_from_zero(tree):
    """Defect 26 of the original: any 1000 classes came through, as labels 0..999."""
    source = sources.open("imagenet100", str(tree), "train")
    assert len(source) == 4
    assert len(source.classes) == 100
    names = {os.path.basename(os.path.dirname(source.path(i))) for i in range(4)}
    assert names == {"n01498041", "n01537544"}
    # Labels are places in the list, whichever folders are there.
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert [source[i]["label"] for i in range(4)] == [0, 0, 1, 1]
    (tree / "few.txt").write_text("# mine\nn02018207\n\nn01440764  # tench\n")
    few = sources.open(
        "imagenet100", str(tree), "val", classes_file=str(tree / "few.txt")
    )
    assert few.classes == ("n02018207", "n01440764")
    assert few.labels.tolist() == [0, 0, 1, 1]
    assert "n02018207" in few.path(0)


def test_the_list_of_100_is_sorted_and_whole():
    names = imagenet.read_list(imagenet.LIST_100)
    assert len(names) == 100
    assert list(names) == sorted(set(names))
    assert all(len(n) == 9 and n[0] == "n" and n[1:].isdigit() for n in names)


def test_imagenet_that_is_not_there(tree, tmp_path):
    (tmp_path / "none.txt").write_text("n99999999\n")
    with pytest.raises(errors.DataError, match="no image of the 1 classes"):
        sources.open(
            "imagenet", str(tree), "train", classes_file=str(tmp_path / "none.txt")
        )
    with pytest.raises(errors.DataError, match="no such list of classes"):
        sources.open("imagenet", str(tree), "train", classes_file="nowhere.txt")
    with pytest.raises(errors.DataError, match="no folder 'val'"):
        sources.open("imagenet", str(tree / "train"), "val")


# --- tensorflow-datasets


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set of 12 small PNGs, written as array_record without tensorflow."""
    root = tmp_path_factory.mktemp("tfds")
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 6, 3), np.uint8)
    return layouts.prepared.blots(root, {"train": images}), images


def test_tfds_array_records_without_tensorflow(prepared):
    root, images = prepared
    source = sources.open("tfds", str(root), "train")
    assert (len(source), source.channels) == (12, 3)
    assert source.classes == ("dull", "bright")
    # tfds shuffles what it writes; the pixels say which is which.
    order = [images.tolist().index(source[i]["image"].tolist()) for i in range(12)]
    assert sorted(order) == list(range(12))
    assert [source[i]["label"] for i in range(12)] == [k % 2 for k in order]
    assert source.labels.tolist() == [k % 2 for k in order]
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[3]["image"], source[3]["image"])
    half = sources.open("tfds", str(root), "train[:50%]", label="")
    assert len(half) == 6
    assert half[0]["label"] == -1
    assert "tensorflow" not in sys.modules


def test_tfds_finds_the_newest_version_below_its_data_dir(prepared, tmp_path):
    root, _ = prepared
    base = tmp_path / "tiny_blots"
    for version in ("1.0.0", "2.0.0", "10.0.0"):
        shutil.copytree(root, base / version)
        info = base / version / "dataset_info.json"
        info.write_text(info.read_text().replace("1.0.0", version))

    def found(dataset):
        source = sources.open("tfds", str(tmp_path), "train", dataset=dataset)
        return source._records.dataset_info.version

    assert str(found("tiny_blots")) == "10.0.0"
    assert str(found("tiny_blots:2.0.0")) == "2.0.0"
    with pytest.raises(errors.DataError, match="no data set 'tiny_blots:3.0.0'"):
        found("tiny_blots:3.0.0")
    with pytest.raises(errors.DataError, match="no data set 'nothing_like_it'"):
        found("nothing_like_it")
    (base / "big").mkdir()
    shutil.copytree(root, base / "big" / "1.0.0")
    with pytest.raises(errors.DataError, match="tiny_blots/big/1.0.0; name one"):
        found("tiny_blots")
    assert str(found("tiny_blots/big")) == "1.0.0"


def test_tfds_says_what_is_missing(prepared, monkeypatch):
    root, _ = prepared
    with pytest.raises(errors.DataError, match="no feature picture; it has: id, image"):
        sources.open("tfds", str(root), "train", image="picture")
    with pytest.raises(errors.DataError, match="split 'val'[\\s\\S]*splits train"):
        sources.open("tfds", str(root), "val")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(errors.DataError, match=r"vitssl\[tfds\]"):
        sources.open("tfds", str(root), "train")
