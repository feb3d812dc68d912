"""The trees of `tests.layouts` hold what they say, for every recipe and option."""

import functools
import json
import pathlib

import numpy as np
import pytest

from tests import layouts, runs
from tests.layouts import birds, earth, pictures, radiographs, trees
from vitssl import config, errors
from vitssl.data import dataset, modalities, sources
from vitssl.data.sources import in9, sarcld
from vitssl.methods.parts import measures
from vitssl.run import experiment

# Where the colour of a thing is not the label of its image: colours by label.
COLOURS = {
    "imagenet100": range(1, 100),
    "cub": (1, 2, 4, 9),
    "waterbirds": ((4, 9), (1, 2)),
    "siim_acr": (6, 6),
}
SIZES = {"cifar10": (32, 32), "cifar100": (32, 32), "stl10": (96, 96)}


@pytest.fixture(scope="module")
def root_of(tmp_path_factory):
    """From a source to the root of its tree, written once; for reading only."""
    base = tmp_path_factory.mktemp("layouts")
    return functools.cache(lambda source: layouts.make(source, base / source))


@pytest.fixture
def opened(root_of):
    return lambda kind, split, **keys: sources.open(
        kind, str(root_of(kind)), split, **keys
    )


@functools.cache
def _sections():
    """Return the distinct sections `data` of all recipes that read files, as JSON."""
    found = set()
    for path in config.files(runs.ROOT / "configs"):
        for name in config.module(str(path)).RECIPES:
            section = experiment.load(f"{path}:{name}" if name else str(path)).data
            if section.source in layouts.MAKERS:
                found.add(json.dumps(section.to_dict(), sort_keys=True))
    return sorted(found)


def _files(root):
    return {str(p.relative_to(root)): p for p in root.rglob("*") if p.is_file()}


def test_there_is_a_tree_for_every_source_that_needs_a_root():
    needy = set()
    for kind in sources.SOURCES:
        try:
            sources.open(kind, "", "train")
        except errors.DataError:
            needy.add(kind)
        except errors.UsageError:
            assert kind == "mixture"  # Its parts name their roots.
    assert needy == set(layouts.MAKERS)


def test_every_split_of_every_recipe_opens_and_every_image_has_its_label(root_of):
    seen = set()
    for section in _sections():
        given = config.from_json(section).to_dict()
        data = dataset.Data(**given | {"root": str(root_of(given["source"]))})
        seen.add(data.source)
        for split in {data.split, data.bank_split, data.test_split}:
            source = data.open(split)
            assert len(source) >= (24 if split == "train" else 12), data.source
            if source.classes:
                _agree(data.source, source)
    assert seen == {
        *("cifar10", "imagenet", "cub", "waterbirds", "siim_acr", "metashift"),
        *("olmoearth", "sarcld", "plantvillage", "folder"),
        *("eurosat", "pastis", "mados", "geotiff"),
    }


@pytest.mark.parametrize("kind", ["cifar100", "stl10", "imagenet100", "in9", "tfds"])
def test_sources_that_no_recipe_names_open_too(opened, kind):
    for split in ("train", "test"):
        source = opened(kind, split)
        assert len(source) >= (24 if split == "train" and kind != "in9" else 12)
        _agree(kind, source)


def _agree(kind, source):
    """Every image is in the colour of its label, and of the size it should be."""
    colours = COLOURS.get(kind, range(100))
    for i in range(len(source)):
        example = source[i]
        assert example["label"] == source.labels[i]
        if "image" not in example:  # Of other sensors than a camera.
            continue
        assert example["image"].shape == (*SIZES.get(kind, (40, 56)), 3)
        want = np.atleast_1d(colours[example["label"]]) % 10
        assert pictures.label_of(example["image"]) in want, (kind, i)
    assert len(np.unique(source.labels)) >= 2


@pytest.mark.parametrize("kind", layouts.MAKERS)
def test_the_same_tree_is_written_again(root_of, tmp_path, kind):
    root_of(kind)
    again = layouts.make(kind, tmp_path)
    first, second = _files(root_of(kind)), _files(again)
    assert set(first) == set(second)
    for name, path in first.items():
        assert path.read_bytes() == second[name].read_bytes(), name


# --- One data set after the other


def test_folder_options(opened):
    assert opened("folder", "val").classes == ("ant", "bee", "cow")
    assert set(opened("folder", "all", labels="none").labels) == {-1}
    undivided = opened("folder", "all", divided="no")
    assert undivided.classes == ("train", "val") and len(undivided) == 36
    held = opened("folder", "val", divided="no", holdout=0.25)
    assert np.bincount(held.labels).tolist() == [6, 3]


def test_names_and_numbers_of_classes_come_from_the_files(opened):
    assert opened("cifar10", "train").classes[:2] == ("airplane", "automobile")
    stored = pictures.thing(2, 7, size=(32, 32)).image  # The second of batch 2.
    np.testing.assert_array_equal(opened("cifar10", "train")[7]["image"], stored)
    assert opened("cifar100", "test").classes[99] == "fine 99"
    assert opened("cifar100", "test").labels.tolist() == [*range(0, 96, 8)]
    assert opened("stl10", "test").classes[7] == "monkey"
    assert opened("plantvillage", "train").classes == trees.PLANTS
    assert len(opened("plantvillage", "all")) == 36


def test_stl10_folds_and_images_without_label(opened):
    fold = opened("stl10", "train", fold=4)
    assert fold.indices.tolist() == [*range(1, 30, 3)]
    every = opened("stl10", "train+unlabeled")
    assert every.labels[30:].tolist() == [-1] * 6
    # After 30 and 20 others; stored column by column.
    stored = pictures.thing(0, 53, size=(96, 96)).image
    np.testing.assert_array_equal(every[33]["image"], stored)
    assert len(opened("stl10", "unlabeled")) == 6


def test_imagenet_by_a_list_of_classes(opened, tmp_path):
    pictures.text(tmp_path / "few.txt", [trees.IN_LIST[2], trees.OTHERS[0]])
    few = opened("imagenet", "val", classes_file=str(tmp_path / "few.txt"))
    assert few.labels.tolist() == [0] * 3 + [1] * 3
    assert [pictures.label_of(e["image"]) for e in few] == [3] * 3 + [0] * 3
    assert pathlib.Path(few.path(0)).name == "ILSVRC2012_val_00000010.JPEG"
    assert opened("imagenet100", "train").labels.tolist() == [
        y for y in range(4) for _ in range(6)
    ]


def test_every_foreground_of_in9_can_be_cut_out(root_of, opened, tmp_path):
    root = root_of("in9")
    evaluated = ("mixed_next", "mixed_rand", "mixed_same", "no_fg", "only_fg")
    assert set(in9.variants(root)) == {*evaluated, "original", "only_bg_t"}
    for variant in evaluated:
        assert len(opened("in9", variant)) == 18
    source = in9.challenge(root, 5)
    assert len(source) == 18 * 5
    mask = pictures.thing(8, 1).mask > 0
    got = source[17 * 5 + 3]["image"]  # The last foreground, a fish.
    assert pictures.label_of(got) == 8 and np.median(got[mask], 0).min() < 60
    behind = in9.open(root, "only_bg_t")[int(source.chosen[3])]["image"]
    np.testing.assert_array_equal(got[~mask], behind[~mask])
    path = layouts.in9.mapping(tmp_path / "in_to_in9.json", 200)
    table = measures.mapped(str(path), 200)
    assert (table[0], table[10], table[199]) == (0, 1, -1)


def test_tfds_by_name_and_without_labels(root_of):
    above = str(root_of("tfds").parents[1])
    source = sources.open("tfds", above, "test", dataset="tiny_blots")
    assert source.classes == ("dull", "bright")
    half = sources.open("tfds", above, "test[:50%]", dataset="tiny_blots", label="")
    assert half.labels.tolist() == [-1] * 6


def test_cub_masks_boxes_and_keypoints_are_where_the_bird_is(opened):
    source = opened("cub", "test", masks=True)
    shown = [(c, i) for c in birds.CLASSES for i in range(8, 12)]
    for example, (c, i) in zip(source, shown, strict=True):
        picture = pictures.thing(c, i)
        np.testing.assert_array_equal(example["mask"], picture.mask > 0)
        np.testing.assert_array_equal(example["box"], picture.box)
        x, y, seen = example["keypoints"].T
        inside = example["mask"][y.astype(int), x.astype(int)]
        assert (inside[seen > 0] == 1).all() and not x[seen == 0].any()
    # Bird 9 of class 1: the thing is at x = 4, y = 2, and its beak, the second part,
    # in the second of five columns, first of three rows.
    np.testing.assert_allclose(source[1]["keypoints"][1], [8.8, 4.7, 1], rtol=1e-6)
    np.testing.assert_array_equal(source[1]["keypoints"][2], [0, 0, 0])
    np.testing.assert_array_equal(source[1]["box"], [4, 2, 16, 16])
    assert source[1]["mask"].sum() == 256


def test_cub_splits_labels_and_other_backgrounds(root_of, opened):
    train = opened("cub", "train", train_share=0.75, keypoints=False)
    val = opened("cub", "val", train_share=0.75)
    assert np.bincount(train.labels).tolist() == [8, 8, 8]
    assert val.labels.tolist() == [3] * 8 and "keypoints" not in train[0]
    own = opened("cub", "val", train_share=0.75, labels="split")
    assert own.classes == ("009.Brewer_Blackbird",) and own.labels.tolist() == [0] * 8
    # The birds of the test split before the backgrounds of Waterbirds.
    moved = opened("cub", "test", images=str(root_of("waterbirds")), masks=True)
    behind = [e["image"][e["mask"] == 0].mean(0)[1:] for e in moved]
    water = [b > g for g, b in behind]
    # Of the birds 8 to 11 of a class two are at home; two classes live on water.
    assert water == [True, True, False, False] * 2 + [False, False, True, True] * 2


def test_waterbirds_has_every_group_in_every_split(opened):
    counts = {"train": [8, 4, 4, 8], "val": [4, 2, 2, 4], "test": [2, 4, 4, 2]}
    for split, want in counts.items():
        source = opened("waterbirds", split)
        assert np.bincount(source.columns["group"]).tolist() == want
        for example in source:
            _, green, blue = example["image"].min((0, 1)).astype(int)
            assert (blue > green) == example["group"] % 2  # The place.
    worst, best = (opened("waterbirds", f"{s}_case") for s in ("worst", "best"))
    assert worst.columns["group"].tolist() == [2] * 4 + [1] * 4
    assert best.columns["group"].tolist() == [3] * 2 + [0] * 2


@pytest.mark.parametrize("kind", radiographs.KINDS)
def test_radiographs_of_either_kind_have_their_masks(tmp_path, kind):
    root = str(radiographs.siim_acr(tmp_path, kind))
    source = sources.open("siim_acr", root, "train", masks=True)
    for i, number in enumerate([*range(1000, 1012), *range(2000, 2012)]):
        pixels, mask = radiographs.radiograph(number)
        example = source[i]
        off = np.abs(example["image"].astype(int) - pixels[..., None]).max()
        assert off == 0 if kind == "raw" else off < 30
        want = mask > 0 if number >= 2000 else 0 * mask
        np.testing.assert_array_equal(example["mask"], want)
    jpegs = [b"\xff\xd8\xff" in p.read_bytes() for p in tmp_path.rglob("*.dcm")]
    assert set(jpegs) == {kind == "jpeg"}
    test, *halves = (
        sources.open("siim_acr", root, s) for s in ("test", "robust", "non_robust")
    )
    assert [len(s) for s in (test, *halves)] == [12, 6, 6]
    assert all(s.labels.sum() * 2 == len(s) for s in (test, *halves))


def test_metashift_contexts_change_in_the_test(opened):
    train, test = (opened("metashift", s).columns["group"] for s in ("train", "test"))
    assert np.bincount(train).tolist() == [6, 0, 6, 6, 6]
    assert np.bincount(test).tolist() == [0, 6, 0, 0, 0, 6]


def test_sarcld_splits_copies_and_planes(root_of, opened):
    for split, each in (("train", 11), ("val", 2), ("test", 2), ("all", 15)):
        source = opened("sarcld", split)
        assert np.bincount(source.labels).tolist() == [each] * 7
        assert source.classes == sarcld.CLASSES
    plain, more = (opened("sarcld", "train", augmented=a) for a in (False, True))
    assert 77 == len(plain) < len(more) <= 77 + 14
    legacy = [opened("sarcld", s, rule="legacy") for s in ("train", "val", "test")]
    assert [len(s) for s in legacy] == [95, 24, 24]
    few = [opened("sarcld", s, val=0.2, test=0.4) for s in ("train", "val", "test")]
    assert [len(s) for s in few] == [42, 21, 42]
    keys = dict(channels=5, planes="npy")
    for root in ("", str(root_of("sarcld"))):
        image = opened("sarcld", "all", planes_root=root, **keys)[3]["image"]
        assert (image[..., 3] == round((0.3 + 1) / 2 * 65535)).all()
        assert (image[..., 4] == 0).all()
    image = opened("sarcld", "all", planes_range=(-1.0, 0.3), **keys)[3]["image"]
    assert (image[..., 3] == 65535).all()
    image = opened("sarcld", "all", channels=4, planes="ndvi")[0]["image"]
    assert image[..., 3].max() > image[..., 3].min()


def test_earth_has_absent_sensors_and_gaps(opened, tmp_path):
    wanted = config.module(str(runs.ROOT / "configs" / "latent_mim.py")).ALL
    source = opened("olmoearth", "train", modalities=wanted)
    assert source.indices.tolist() == [*range(24)]  # The last one has maps only.
    for i, gone in ((0, 0), (1, 1), (2, 2), (3, 2), (7, 1)):
        example = source[i]
        absent = [n for n in wanted if (example[n] == modalities.MISSING).all()]
        assert set(absent) == set(earth.absent(i)) and len(absent) == gone
        assert example["sentinel2_l2a"].shape == (64, 64, 12, 12)
    assert source[0]["openstreetmap_raster"].shape == (64, 64, 1, 30)
    assert source[0]["present"]["sentinel2_l2a"].all()
    # From step 1 on, Sentinel-1's first: Sentinel-2 at 2, 3, 7 comes after it.
    there = source[1]["present"]["sentinel2_l2a"]
    assert np.flatnonzero(there).tolist() == [1, 2, 6] and source[1]["length"] == 10
    names = [n for n in wanted if n not in earth.absent(1)]
    raw = earth.sample(1, earth.GAPS, names=names, side=64)["sentinel2_l2a"]
    got = source[1]["sentinel2_l2a"][:, :, [1, 2, 6]]
    np.testing.assert_array_equal(got, raw)
    np.save(tmp_path / "keep.npy", [4, 9, 24])
    kept = opened("olmoearth", "train", filter_file=str(tmp_path / "keep.npy"))
    assert kept.indices.tolist() == [4, 9]
    test = opened("olmoearth", "test", holdout=5)
    assert test.indices.tolist() == [*range(19, 24)]
    assert len(opened("olmoearth", "train", share=0.25)) == 6
    assert len(opened("olmoearth", "train", max_samples=7)) == 7


def test_a_mixture_of_trees(tmp_path):
    source = sources.open("mixture", "", "train", parts=layouts.mixture(tmp_path))
    assert source.classes == (
        *("folder/ant", "folder/bee", "folder/cow"),
        *("metashift/cat", "metashift/dog"),
    )
    assert np.bincount([e["label"] for e in source]).tolist() == [8, 8, 8, 12, 12]
