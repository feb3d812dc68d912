"""Leaves: the drawn world, SAR-CLD-2024 and its split, spectral planes, severities."""

import os

import numpy as np
import pytest

from tests import layouts
from tests.layouts import pictures
from vitssl import errors
from vitssl.data import dataset, sources
from vitssl.data.sources import sarcld, spectral
from vitssl.methods.classify import views

DATA = dict(
    source="leaves",
    root="",
    split="train",
    bank_split="train",
    test_split="test",
    channels=3,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
)


def _write(path, number):
    pictures.save(path, pictures.thing(0, number).image)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The layout of the archives: six photographs and two copies per class."""
    base = tmp_path_factory.mktemp("sarcld")
    layouts.trees.sarcld_photographs(base, count=6, copied=(0, 5))
    (base / sarcld.ORIGINAL / sarcld.CLASSES[0] / "notes.txt").write_text("no image")
    return base


def _paths(source):
    return [os.path.relpath(source.path(i), source.root) for i in range(len(source))]


def test_the_clean_split_is_stratified_and_leaves_no_image_out(root):
    found = {
        s: sources.open("sarcld", str(root), s, val=0.2, test=0.2)
        for s in ("train", "val", "test", "all")
    }
    parts = [set(_paths(found[s])) for s in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(found["all"]) == 42
    for split, count in (("train", 4), ("val", 1), ("test", 1)):
        assert np.bincount(found[split].labels).tolist() == [count] * 7
    assert found["train"].classes == sarcld.CLASSES
    assert not any(sarcld.AUGMENTED in p for part in parts for p in part)
    again = sources.open("sarcld", str(root), "test", val=0.2, test=0.2)
    assert _paths(again) == _paths(found["test"])
    other = sources.open("sarcld", str(root), "test", val=0.2, test=0.2, seed=1)
    assert _paths(other) != _paths(found["test"])


def test_copies_train_only_beside_their_photograph(root):
    args = dict(val=0.2, test=0.2, augmented=True)
    train = _paths(sources.open("sarcld", str(root), "train", **args))
    stems = {os.path.basename(p)[:5] for p in train if sarcld.ORIGINAL in p}
    copies = [p for p in train if sarcld.AUGMENTED in p]
    assert copies and all(os.path.basename(p)[4:9] in stems for p in copies)
    every = {f"X{c}00{i}" for c in range(7) for i in (0, 5)}
    assert len(copies) == len(every & stems)
    test = _paths(sources.open("sarcld", str(root), "test", **args))
    assert not any(sarcld.AUGMENTED in p for p in test)


def test_the_legacy_split_is_the_published_one(root):
    train = sources.open("sarcld", str(root), "train", rule="legacy")
    val, test = (
        sources.open("sarcld", str(root), s, rule="legacy") for s in ("val", "test")
    )
    assert len(train) == int(56 * 0.8) and len(val) == 56 - len(train)
    assert _paths(val) == _paths(test)
    order = np.arange(56)
    np.random.default_rng(42).shuffle(order)
    everything = _paths(sources.open("sarcld", str(root), "all", rule="legacy"))
    assert _paths(train) == [everything[i] for i in order[: len(train)]]


def test_files_of_one_content_stay_on_one_side(tmp_path):
    for c in range(2):
        for i in range(10):
            _write(tmp_path / f"kind {c}" / f"{i}.png", 10 * c + i // 2)
    # Photographs 2 k and 2 k + 1 are the same file.
    for split in ("train", "val", "test"):
        source = sources.open("sarcld", str(tmp_path), split, val=0.2, test=0.2)
        assert source.classes == ("kind 0", "kind 1")
        names = [os.path.splitext(p)[0] for p in _paths(source)]
        numbers = {(n[:-1], int(n[-1])) for n in names}
        assert numbers == {(c, i ^ 1) for c, i in numbers}, split
        assert len(numbers) == {"train": 12}.get(split, 4)


def test_what_cannot_be_split_or_read_is_an_error(root, tmp_path, monkeypatch):
    _write(tmp_path / "many" / "0.png", 0)
    _write(tmp_path / "many" / "1.png", 1)
    _write(tmp_path / "lonely" / "0.png", 2)
    with pytest.raises(errors.DataError, match="lonely: one image; a class needs two"):
        sources.open("sarcld", str(tmp_path), "train")
    with pytest.raises(errors.DataError, match="data.root is not a folder"):
        sources.open("sarcld", str(tmp_path / "nowhere"), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.DataError, match="no image"):
        sources.open("sarcld", str(tmp_path / "empty"), "train")

    real = os.listdir

    def closed(path):
        if str(path).endswith("Leaf Redding"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "listdir", closed)
    with pytest.raises(errors.DataError, match="Leaf Redding cannot be read: Permiss"):
        sources.open("sarcld", str(root), "train")


def test_plantvillage_has_its_own_split_folders(tmp_path):
    plants = ("Apple___scab", "Corn___healthy")
    layouts.trees.plantvillage(tmp_path, names=plants, train=1, val=1)
    train, val = (sources.open("plantvillage", str(tmp_path), s) for s in SPLITS)
    assert len(train) == len(val) == 2 and train.classes == val.classes
    assert _paths(train)[0] == "train/Apple___scab/00000000___FREC_Leaf 0.JPG"


SPLITS = ("train", "val")


def test_planes_are_channels(root, tmp_path):
    layouts.trees.sarcld_planes(tmp_path, count=6)
    options = dict(planes="npy", planes_root=str(tmp_path), planes_range=(-1.0, 1.0))
    source = sources.open("sarcld", str(root), "all", channels=5, **options)
    image = source[7]["image"]  # Class 1, photograph 1.
    assert source.channels == 5 and image.shape == (40, 56, 5)
    assert image.dtype == np.uint16 and (image[..., 4] == 0).all()
    assert (image[..., 3] == round((0.1 + 1) / 2 * 65535)).all()
    colours = sources.open("sarcld", str(root), "all")[7]["image"]
    np.testing.assert_array_equal(image[..., :3], colours.astype(np.uint16) * 257)
    assert source[7]["label"] == 1 and source.classes == sarcld.CLASSES
    os.remove(tmp_path / sarcld.ORIGINAL / sarcld.CLASSES[3] / "X3002.npy")
    with pytest.raises(errors.DataError, match="1 of 42 images.*X3002"):
        sources.open("sarcld", str(root), "all", channels=5, **options)
    with pytest.raises(errors.UsageError, match="which is 4"):
        sources.open("sarcld", str(root), "all", channels=5, planes="ndvi")
    made = sources.open("sarcld", str(root), "all", channels=4, planes="ndvi")
    image = made[0]["image"].astype(np.float32)
    index = spectral.ndvi(image[..., :3] / 65535)
    np.testing.assert_allclose(image[..., 3:], (index + 1) / 2 * 65535, atol=0.6)


def test_planes_of_a_wrong_shape_name_their_file(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((5, 4, 7)))
    with pytest.raises(errors.DataError, match=r"x.npy: planes of shape \(5, 4, 7\)"):
        spectral.read(str(tmp_path / "x.npy"), (5, 4), 2)
    np.save(tmp_path / "y.npy", np.arange(20.0).reshape(5, 4))
    got = spectral.read(str(tmp_path / "y.npy"), (5, 4), 1)
    np.testing.assert_allclose(got[..., 0], np.arange(20.0).reshape(5, 4), rtol=1e-6)


def test_drawn_leaves_are_imbalanced_to_train_and_even_to_test():
    train, test = (sources.open("leaves", "", s) for s in ("train", "test"))
    counts = np.bincount(train.labels).tolist()
    assert counts == [250, 431, 257, 280, 225, 578, 116] and len(train) == 2137
    assert np.bincount(test.labels).tolist() == [60] * 7
    # The two sizes are set apart.
    few = dict(count=14, test_count=700)
    more = sources.open("leaves", "", "test", **few)
    assert np.bincount(more.labels).tolist() == [100] * 7
    assert (more.example(7)["image"] == test.example(7)["image"]).all()
    assert len(sources.open("leaves", "", "train", **few)) == 14
    # Any part of the set has about the same shares.
    part = np.bincount(train.labels[:300], minlength=7) / 300
    assert np.abs(part - np.array(counts) / 2137).max() < 0.02


def test_a_leaf_is_a_function_of_its_number_and_its_lesions_are_known():
    source = sources.open("leaves", "", "train", channels=4)
    for label, name in enumerate(source.classes):
        i = int(np.flatnonzero(source.labels == label)[0])
        one, two = source[i], source[i]
        assert np.array_equal(one["image"], two["image"]) and one["label"] == label
        mask, infrared = one["mask"], one["image"][..., 3].astype(float)
        assert 0.2 < (mask > 0).mean() < 0.7, name
        sick = (mask == 2).any()
        assert sick == (name not in ("Healthy Leaf", "Curl Virus")), name
        if sick:
            gap = infrared[mask == 1].mean() - infrared[mask == 2].mean()
            assert gap > 60, name
    assert not np.array_equal(source[0]["image"], source[1]["image"])
    test = sources.open("leaves", "", "test", channels=4)
    assert not np.array_equal(source[0]["image"], test[0]["image"])
    with pytest.raises(errors.UsageError, match=r"cast=1.5: in \[0, 1\)"):
        sources.open("leaves", "", "train", cast=1.5)


def test_few_labels_are_a_part_of_more():
    five, twenty = (dataset.Data(**DATA, per_class=n).open("train") for n in (5, 20))
    assert np.bincount(five.labels).tolist() == [5] * 7
    assert set(five.indices) < set(twenty.indices)
    again, other = (dataset.Data(**DATA, per_class=5).open("train", s) for s in (0, 1))
    np.testing.assert_array_equal(again.indices, five.indices)
    assert set(other.indices) != set(five.indices)  # The run's seed chooses.
    whole = dataset.Data(**DATA, per_class=5).open("test")
    assert len(whole) == 420  # Only what trains is cut.
    with pytest.raises(errors.DataError, match="has 116 images of class 'Leaf Varieg"):
        dataset.Data(**DATA, per_class=117).open("train")


@pytest.mark.parametrize("severity", [*views.SEVERITIES, "minimal"])
@pytest.mark.parametrize("channels", [3, 4])
def test_every_severity_keeps_the_kind_of_the_image(severity, channels):
    image = np.random.default_rng(0).integers(0, 256, (40, 52, channels), np.uint8)
    run = views.Leaves(24, severity)
    example = dict(image=image, label=np.int32(4), index=np.int32(9))
    rng = np.random.default_rng(1)
    got = [run(example, rng) for _ in range(12)]
    assert all(g["image"].shape == (24, 24, channels) for g in got)
    assert all(g["image"].dtype == np.uint8 and g["label"] == 4 for g in got)
    same = all(np.array_equal(got[0]["image"], g["image"]) for g in got)
    assert same == (severity == "minimal")
    again = run(example, np.random.default_rng(1))["image"]
    assert np.array_equal(again, got[0]["image"])
    if channels == 4:  # A plane is moved, which may leave black corners, no more.
        image[..., 3] = 200
        planes = np.stack([run(example, rng)["image"][..., 3] for _ in range(12)])
        assert np.median(planes) == 200 and planes.max() == 200


def test_severities_grow_and_light_changes_no_colour():
    flat = np.full((32, 32, 3), (60, 120, 40), np.uint8)
    spread = {}
    for severity in ("light", "mild", "strong"):
        run, rng = views.Leaves(32, severity), np.random.default_rng(0)
        out = [run(dict(image=flat), rng)["image"] for _ in range(60)]
        spread[severity] = np.std([x.mean((0, 1)) for x in out])
    base = np.std((60, 120, 40))
    assert spread["light"] == pytest.approx(base)
    assert spread["light"] < spread["mild"] < spread["strong"]


def test_geometry_of_rotation_distortion_and_erasing():
    image = np.zeros((21, 21, 1), np.float32)
    image[10, 18] = 1.0
    turned = views.rotate(image, 90.0)
    assert np.argwhere(turned[..., 0])[0].tolist() == [2, 10]  # Counter-clockwise.
    even = np.linspace(0, 1, 6)
    ramp = np.tile(np.arange(30, dtype=np.float32)[:, None, None], (1, 30, 1))
    np.testing.assert_allclose(views.distort(ramp, (even, even)), ramp, atol=1e-4)
    lines = views.grid_steps(np.random.default_rng(0))
    moved = views.distort(ramp, (lines, even))[:, 0, 0]
    assert (np.diff(moved[1:-1]) > 0).all() and np.abs(moved - ramp[:, 0, 0]).max() > 1
    black = views.erase(np.ones((40, 40, 3), np.float32), np.random.default_rng(0))
    gone = (black == 0).all(-1)
    assert 0.015 < gone.mean() < 0.13
    rows, columns = gone.any(1), gone.any(0)
    assert (gone == rows[:, None] & columns).all()
