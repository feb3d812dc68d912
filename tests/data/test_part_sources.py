"""Birds, CUB, Waterbirds, SIIM-ACR, MetaShift: layouts, groups, and what is refused."""

import pathlib
import pickle
import re

import numpy as np
import pytest

from tests import layouts
from tests.layouts import pictures
from vitssl import errors
from vitssl.data import decode, sources
from vitssl.data.sources import birds


def test_a_bird_is_a_pure_function_of_seed_and_index():
    world = birds.Birds(size=32)
    one, other = world.bird(5), world.bird(6)
    again = pickle.loads(pickle.dumps(world)).bird(5)
    for a, b in zip(one, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.image != other.image).any()
    assert (birds.Birds(size=32, split="test").bird(5).image != one.image).any()


def test_the_background_follows_the_class_in_training_only():
    train, test = (
        sources.open("birds", "", s, count=400, purity=0.9) for s in ("train", "test")
    )
    home = [
        np.mean([s.place(i) == s.label(i) for i in range(400)]) for s in (train, test)
    ]
    assert 0.86 < home[0] < 0.94 and 0.2 < home[1] < 0.3
    labels = np.bincount(train.labels)
    assert (labels == 100).all()


def test_a_swapped_background_leaves_every_pixel_of_the_bird():
    source = sources.open("birds", "", "test", count=8)
    for i in range(8):
        example = source[i]
        seen = example["mask"] > 0
        for key in ("swap_same", "swap_random"):
            # The outline is drawn without blending, so the bird is the same.
            np.testing.assert_array_equal(example[key][seen], example["image"][seen])
            assert (example[key][~seen] != example["image"][~seen]).mean() > 0.5
        assert example["group"] // 2 == example["label"]


def test_truth_of_a_bird_agrees_with_itself():
    for i in range(12):
        bird = birds.Birds(size=48).bird(i)
        assert set(np.unique(bird.parts)) <= set(range(5))
        x, y, w, h = bird.box
        ys, xs = np.nonzero(bird.parts)
        assert (xs.min(), ys.min()) == (x, y)
        assert (xs.max() + 1, ys.max() + 1) == (x + w, y + h)
        for k, (px, py, seen) in enumerate(bird.keypoints):
            assert seen == (bird.parts == k + 1).any()
            if seen:
                assert x <= px <= x + w and y <= py <= y + h


@pytest.mark.parametrize(
    "fields", [dict(size=8), dict(purity=1.5), dict(noise=200), dict(count=-1)]
)
def test_birds_that_cannot_be_drawn(fields):
    key = next(iter(fields))
    with pytest.raises(errors.UsageError, match=f"data.options.{key}="):
        sources.open("birds", "", "train", **fields)


# A class that only the training set has, and one that only the test set has.
FOUR = [(1, 0), (2, 1), (2, 8), (4, 9)]


def test_cub_numbers_classes_over_all_images(tmp_path):
    root = layouts.birds.cub(tmp_path, FOUR)
    test = sources.open("cub", str(root), "test")
    assert test.labels.tolist() == [1, 2]  # Class 1 is in the training set alone.
    assert test.classes == (
        "001.Black_footed_Albatross",
        "002.Laysan_Albatross",
        "004.Groove_billed_Ani",
    )
    own = sources.open("cub", str(root), "test", labels="split")
    assert own.labels.tolist() == [0, 1]
    want = np.array([[41.6, 26.7, 1], [0, 0, 0]], np.float32)
    np.testing.assert_array_equal(test[0]["keypoints"][[0, 3]], want)
    # Read twice: nothing is scaled in place.
    np.testing.assert_array_equal(test[0]["keypoints"], test[0]["keypoints"])
    np.testing.assert_array_equal(test[0]["box"], [40, 24, 16, 16])
    assert pickle.loads(pickle.dumps(test))[1]["label"] == 2


def test_cub_faults_name_the_file(tmp_path):
    root = layouts.birds.cub(tmp_path / "three", FOUR, masks=3)
    with pytest.raises(errors.DataError, match="1 of 2 images have no mask.*Ani_0010"):
        sources.open("cub", str(root), "test", masks=True)
    root = layouts.birds.cub(tmp_path / "two", FOUR, masks=2)
    train = sources.open("cub", str(root), "train", masks=True)
    assert train[0]["mask"].max() == 1 and train[0]["mask"].shape == (40, 56)
    (root / "classes.txt").unlink()
    with pytest.raises(errors.DataError, match="no file classes.txt"):
        sources.open("cub", str(root), "train")
    pictures.text(root / "image_class_labels.txt", ["1"])
    with pytest.raises(errors.DataError, match="2 columns are needed"):
        sources.open("cub", str(root), "train")


def test_waterbirds_without_its_columns_says_which(tmp_path):
    rows = ["img_id,img_filename,y,split", "1,a.jpg,0,0"]
    pictures.text(tmp_path / "metadata.csv", rows)
    with pytest.raises(errors.DataError, match="no column place; there is: img_id"):
        sources.open("waterbirds", str(tmp_path), "train")
    with pytest.raises(errors.DataError, match="no metadata.csv"):
        (tmp_path / "metadata.csv").unlink()
        sources.open("waterbirds", str(tmp_path), "train")


def test_waterbirds_groups(tmp_path):
    root = layouts.make("waterbirds", tmp_path)
    source = sources.open("waterbirds", str(root), "test")
    # Of three birds of a class the first is at home.
    groups = [int(source[i]["group"]) for i in range(12)]
    assert groups == [3, 2, 2, 3, 2, 2, 0, 1, 1, 0, 1, 1]
    worst = sources.open("waterbirds", str(root), "worst_case")
    assert worst.labels.tolist() == [1] * 4 + [0] * 4


def test_metashift_contexts_are_groups(tmp_path):
    root = layouts.trees.metashift(tmp_path, count=1)
    train, test = (sources.open("metashift", str(root), s) for s in ("train", "test"))
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 1, 1] and test.labels.tolist() == [0, 1]
    groups = [[int(e["group"]) for e in s] for s in (train, test)]
    # Of both splits: cat(bed, shelf, sofa), dog(bench, bike, shelf).
    assert groups == [[0, 2, 3, 4], [1, 5]]
    with pytest.raises(errors.DataError, match="no folder val"):
        sources.open("metashift", str(root), "val")


def test_siim_acr_masks_and_images_must_match(tmp_path):
    layouts.radiographs.siim_acr(tmp_path, train=1, test=0)
    pixels, mask = layouts.radiographs.radiograph(2000)
    source = sources.open("siim_acr", str(tmp_path), "train")
    np.testing.assert_array_equal(source[1]["image"], np.stack([pixels] * 3, -1))
    (own,) = (tmp_path / "all_masks").iterdir()
    own.rename(tmp_path / "kept.png")
    name = re.escape(own.stem)
    with pytest.raises(errors.DataError, match=f"1/{name}.dcm has no mask"):
        sources.open("siim_acr", str(tmp_path), "train", masks=True)
    (tmp_path / "kept.png").rename(own)
    pictures.save(tmp_path / "all_masks" / "stranger.png", mask)
    with pytest.raises(errors.DataError, match="without an image.*stranger.png"):
        sources.open("siim_acr", str(tmp_path), "train", masks=True)
    (tmp_path / "all_masks" / "stranger.png").unlink()
    source = sources.open("siim_acr", str(tmp_path), "train", masks=True)
    assert source[0]["mask"].sum() == 0 and source[1]["mask"].sum() == 256
    with pytest.raises(errors.DataError, match="no folder full_test_set/0"):
        sources.open("siim_acr", str(tmp_path), "test")


def test_dicom_with_a_jpeg_inside_and_other_syntaxes():
    pixels = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (16, 1))
    plain = layouts.radiographs.dicom(pixels)

    def read(data, channels=1):
        return decode.decode(data, channels=channels, name="x.dcm")

    np.testing.assert_array_equal(read(plain)[..., 0], pixels)
    np.testing.assert_array_equal(read(plain, 3), np.stack([pixels] * 3, -1))
    got = read(layouts.radiographs.dicom(pixels, "jpeg"))[..., 0]
    assert np.abs(got.astype(int) - pixels).max() <= 2
    light = plain.replace(b"MONOCHROME2 ", b"MONOCHROME1 ")
    np.testing.assert_array_equal(read(light)[..., 0], 255 - pixels)
    with pytest.raises(errors.DataError, match="x.dcm: cannot be decoded: "):
        read(plain[:200])
    with pytest.raises(errors.DataError, match="transfer syntax .* not supported"):
        read(plain.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"))


def _moved(root, **names):
    """Return a tree with some folders renamed."""
    for old, new in names.items():
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)
    return str(root)


@pytest.mark.parametrize(
    "kind, names, options",
    [
        (
            "siim_acr",
            dict(train_set="a", full_test_set="b/c", all_masks="m"),
            dict(mask_sub_path="m", masks=True),
        ),
        ("metashift", dict(train="a", test="b/c"), {}),
        (
            "waterbirds",
            {"waterbird_complete95_forest2water2": "a"},
            dict(image_sub_path_test="a", mask_sub_path="segmentations"),
        ),
        (
            "cub",
            dict(images="a", segmentations="m"),
            dict(image_sub_path_test="a", mask_sub_path="m", masks=True),
        ),
    ],
)
def test_folders_may_have_other_names(kind, names, options, tmp_path):
    own = pathlib.Path(layouts.make(kind, tmp_path / "own"))
    given = dict(image_sub_path_train="a", image_sub_path_test="b/c") | options
    root = pathlib.Path(layouts.make(kind, tmp_path / "moved"))
    if kind == "waterbirds":  # Masks are those of CUB, beside it.
        own, root = own.parent, root.parent
        for tree in (own, root):
            layouts.make("cub", tree / "birds")
            (cub,) = tree.rglob("segmentations")
            cub.rename(tree / "segmentations")
    _moved(root, **names)
    there = {k: options[k] for k in ("masks",) if k in options}
    there |= {"mask_sub_path": "segmentations"} if kind == "waterbirds" else {}
    for split in ("train", "test"):
        want = sources.open(kind, str(own), split, **there)
        got = sources.open(kind, str(root), split, **given)
        assert len(got) == len(want) and got.classes == want.classes
        for i in (0, len(want) - 1):
            a, b = got[i], want[i]
            assert sorted(a) == sorted(b)
            for key in a:
                np.testing.assert_array_equal(a[key], b[key], err_msg=key)
            if there:
                assert "mask" in a
    with pytest.raises(errors.DataError):
        sources.open(kind, str(root), "train", **given | {"image_sub_path_train": "x"})
