import logging
import os
import pickle
import unicodedata

import numpy as np
import pytest
from PIL import Image
from sklearn import datasets, neighbors

from vitssl import errors
from vitssl.data import sources
from vitssl.data.sources import folder, layout, mixture, pieces, wrappers


def _flat(source):
    """All images of a source as float [N, H*W*C], and its labels [N]."""
    items = [source[i] for i in range(len(source))]
    pixels = np.stack([x["image"].reshape(-1) for x in items]).astype(np.float32)
    return pixels, np.array([x["label"] for x in items])


def _paint(root, *paths, size=(4, 3)):
    """Write images whose pixels tell them apart."""
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        seed = list(str(path).encode("utf-8", "surrogateescape"))
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(file)


def _names(source):
    """Paths of a folder source, relative to its root."""
    return [os.path.relpath(source.path(i), source.root) for i in range(len(source))]


@pytest.mark.parametrize(
    "base, lacks",
    [
        (layout.Source, "example"),
        (layout.Images, "image"),
        (pieces.Packed, "encoded"),
        (wrappers.Wrapper, "example"),
    ],
)
def test_a_source_that_says_no_examples_is_not_made(base, lacks):
    class Half(base):
        def __init__(self):
            pass

    with pytest.raises(TypeError, match=f"abstract.*{lacks}"):
        Half()
    whole = type("Whole", (Half,), {lacks: lambda self, i: i})
    assert getattr(whole(), lacks)(3) == 3


# --- digits


def test_digits_are_the_scans_of_scikit_learn():
    source = sources.open("digits", "", "all")
    truth = datasets.load_digits()
    pixels, labels = _flat(source)
    np.testing.assert_array_equal(labels, truth.target)
    np.testing.assert_allclose(pixels, truth.data * 255 / 16, atol=0.5)
    assert source[0]["image"].shape == (8, 8, 1)
    assert source[0]["image"].dtype == np.uint8
    assert source.classes == tuple("0123456789")


def test_digits_split_is_stratified_disjoint_and_complete():
    train, test, every = (
        sources.open("digits", "", s) for s in ("train", "test", "all")
    )
    assert (len(train), len(test), len(every)) == (1438, 359, 1797)
    # A fifth of the 174 to 183 scans of each digit.
    assert set(np.bincount(test.labels)) <= {35, 36, 37}
    seen = [x.tobytes() for s in (train, test) for x in s.images]
    assert sorted(seen) == sorted(x.tobytes() for x in every.images)
    val = sources.open("digits", "", "val")
    np.testing.assert_array_equal(val.images, test.images)


def test_digits_are_solved_by_raw_pixels():
    train, test = (_flat(sources.open("digits", "", s)) for s in ("train", "test"))
    score = neighbors.KNeighborsClassifier(5).fit(*train).score(*test)
    assert score > 0.95


def test_digits_of_three_channels_are_gray():
    image = sources.open("digits", "", "test", channels=3)[0]["image"]
    assert image.shape == (8, 8, 3)
    assert (image == image[..., :1]).all()


# --- scenes, fake


def test_scenes_are_a_source():
    source = sources.open("scenes", "", "train", count=30, size=32, channels=3)
    assert (len(source), source.channels, source.split) == (30, 3, "train")
    assert source[0]["image"].shape == (32, 32, 3)
    assert [source[i]["label"] for i in range(30)] == source.labels.tolist()
    assert len(sources.open("scenes", "", "train")) == 6000
    assert len(sources.open("scenes", "", "val")) == 1000
    with pytest.raises(IndexError):
        source[30]


def test_fake_is_noise_of_the_wanted_shape():
    source = sources.open(
        "fake", "", "train", count=6, height=5, width=7, channels=12, classes=3
    )
    assert source[0]["image"].shape == (5, 7, 12)
    assert [source[i]["label"] for i in range(6)] == [0, 1, 2, 0, 1, 2]
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]
    np.testing.assert_array_equal(source[2]["image"], source[2]["image"])
    assert (source[2]["image"] != source[3]["image"]).any()
    other = sources.open("fake", "", "val", count=6, height=5, width=7, channels=12)
    assert (other[2]["image"] != source[2]["image"]).any()


def test_every_built_in_source_travels_by_pickle():
    for kind in ("digits", "scenes", "fake"):
        source = sources.open(kind, "", "train")
        data = pickle.dumps(source)
        assert len(data) < 150_000
        copy = pickle.loads(data)
        assert len(copy) == len(source)
        np.testing.assert_array_equal(copy[7]["image"], source[7]["image"])


# --- opening by name


def test_wrong_names_are_told_with_the_right_ones():
    with pytest.raises(errors.UsageError, match="did you mean 'folder'"):
        sources.open("foldr", "", "train")
    with pytest.raises(
        errors.UsageError, match="options.chanels: digits has: channels"
    ):
        sources.open("digits", "", "train", chanels=3)
    with pytest.raises(errors.DataError, match="no split 'trian'; there is: train"):
        sources.open("digits", "", "trian")
    with pytest.raises(errors.UsageError, match="size=4: 16 or more"):
        sources.open("scenes", "", "train", size=4)
    assert "fragments" in sources.options_of("scenes")


# --- folder


def test_folder_labels_are_the_sorted_class_folders(tmp_path):
    _paint(tmp_path, "train/bee/1.png", "train/ant/deep/er/2.PNG", "train/ant/3.png")
    _paint(tmp_path, "val/bee/4.png")  # No ant here: bee must stay class 1.
    source = sources.open("folder", str(tmp_path), "train")
    assert source.classes == ("ant", "bee")
    names = ["train/ant/3.png", "train/ant/deep/er/2.PNG", "train/bee/1.png"]
    assert _names(source) == names
    assert [source[i]["label"] for i in range(3)] == [0, 0, 1]
    truth = np.asarray(Image.open(tmp_path / names[1]))
    np.testing.assert_array_equal(source[1]["image"], truth)
    val = sources.open("folder", str(tmp_path), "val")
    assert (val.classes, val[0]["label"]) == (("ant", "bee"), 1)
    # There is no test folder: val stands in; "all" is both.
    assert _names(sources.open("folder", str(tmp_path), "test")) == _names(val)
    assert len(sources.open("folder", str(tmp_path), "all")) == 4


def test_folder_without_splits_holds_out_the_same_images_whatever_the_order(tmp_path):
    _paint(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(20)))
    train = sources.open("folder", str(tmp_path), "train", holdout=0.25)
    val = sources.open("folder", str(tmp_path), "val", holdout=0.25)
    assert (len(train), len(val)) == (30, 10)
    assert np.bincount(val.labels).tolist() == [5, 5]
    assert sorted(_names(train) + _names(val)) == sorted(
        f"{c}/{i}.png" for c in "ab" for i in range(20)
    )
    paths = _names(sources.open("folder", str(tmp_path), "all"))
    labels = [p[0] == "b" for p in paths]
    out = folder.held_out(paths, labels, 0.25)
    back = folder.held_out(paths[::-1], labels[::-1], 0.25)
    np.testing.assert_array_equal(out, back[::-1])
    assert sorted(np.array(paths)[out]) == sorted(_names(val))


def test_folder_without_classes_is_unlabelled(tmp_path):
    _paint(tmp_path, *(f"{i}.jpg" for i in range(10)))
    source = sources.open("folder", str(tmp_path), "train", holdout=0.2)
    assert (len(source), source.classes) == (8, ())
    assert set(source.labels) == {-1}
    assert source[0]["label"] == -1


def test_folder_labels_none_takes_every_image(tmp_path, caplog):
    _paint(tmp_path, "loose.png", "a/1.png", "a/2.png", "b/c/3.png")
    source = sources.open("folder", str(tmp_path), "all", labels="none")
    assert len(source) == 4
    assert set(source.labels) == {-1}
    with caplog.at_level(logging.WARNING, "vitssl.data"):
        source = sources.open("folder", str(tmp_path), "all")
    assert len(source) == 3
    assert f"{tmp_path}: left out: 1 image(s) beside the folders" in caplog.text


def test_a_class_may_be_called_train(tmp_path):
    _paint(tmp_path, *(f"{c}/{i}.png" for c in ("bus", "train") for i in range(4)))
    source = sources.open("folder", str(tmp_path), "all")
    assert source.classes == ("bus", "train")
    divided = sources.open("folder", str(tmp_path), "train", divided="yes")
    assert len(divided) == 4


def test_folder_takes_spaces_unicode_links_and_any_bytes(tmp_path):
    real = tmp_path / "real"
    odd = os.fsdecode(b"caf\xe9")
    _paint(real, "ein Käfer/bild 1.png", f"{odd}/x.png", "蝸牛/🐌.webp")
    (tmp_path / "link").symlink_to(real)
    (real / "蝸牛" / "copy.png").symlink_to(real / odd / "x.png")
    (real / "ein Käfer" / "round").symlink_to(real)  # A cycle.
    (real / "ein Käfer" / ".hidden.png").write_bytes(b"")
    (real / "ein Käfer" / "notes.txt").write_text("no image")
    source = sources.open("folder", str(tmp_path / "link"), "all")
    assert [unicodedata.normalize("NFC", c) for c in source.classes] == [
        odd,
        "ein Käfer",
        "蝸牛",
    ]
    names = _names(source)
    assert "ein Käfer/bild 1.png" in names
    assert "蝸牛/copy.png" not in names  # The same file once more.
    assert not any("round" in n or "hidden" in n or "notes" in n for n in names)
    copy = pickle.loads(pickle.dumps(source))
    for i in range(len(source)):
        np.testing.assert_array_equal(copy[i]["image"], source[i]["image"])


def test_folder_of_many_bands(tmp_path):
    (tmp_path / "field").mkdir()
    bands = np.random.default_rng(0).integers(0, 256, (6, 5, 12), np.uint8)
    np.save(tmp_path / "field" / "a.npy", bands)
    source = sources.open("folder", str(tmp_path), "all", channels=12)
    np.testing.assert_array_equal(source[0]["image"], bands)


@pytest.mark.parametrize(
    "case, said",
    [
        ("nowhere", r"data\.root is not a folder[\s\S]*nowhere[\s\S]*no such path"),
        ("empty", r"no image in split 'train'[\s\S]*found: +an empty folder"),
        ("texts", r"no image in split 'train'[\s\S]*found: +readme\.txt"),
        ("split", r"no folder for split 'val'[\s\S]*found: +train/"),
    ],
)
def test_folder_says_what_it_expected_and_what_it_found(tmp_path, case, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "readme.txt").write_text("x")
    _paint(tmp_path / "split", "train/a/1.png")
    wanted = "val" if case == "split" else "train"
    with pytest.raises(errors.DataError, match=said) as error:
        sources.open("folder", str(tmp_path / case), wanted)
    assert "expected: ROOT/{train,val,test}/<class>" in str(error.value)


def test_an_empty_root_is_no_folder():
    with pytest.raises(errors.DataError, match=r"data\.root is empty"):
        sources.open("folder", "", "train")


def test_one_class_is_a_warning(tmp_path, caplog):
    _paint(tmp_path, *(f"only/{i}.png" for i in range(4)))
    with caplog.at_level(logging.WARNING, "vitssl.data"):
        sources.open("folder", str(tmp_path), "train")
    assert "has one class only (only)" in caplog.text


# --- mixtures


def _parts(*counts, classes=10):
    return [
        sources.open("fake", "", "train", count=n, seed=k, classes=classes)
        for k, n in enumerate(counts)
    ]


def test_concat_is_one_after_the_other():
    parts = _parts(3, 5)
    joined = mixture.mix(parts, kind="concat")
    assert len(joined) == 8
    assert [joined.where(i, 0) for i in (0, 2, 3, 7)] == [
        (0, 0),
        (0, 2),
        (1, 0),
        (1, 4),
    ]
    np.testing.assert_array_equal(joined[4]["image"], parts[1][1]["image"])
    with pytest.raises(IndexError):
        joined[8]


def test_balanced_takes_as_many_of_each_as_the_smallest_has():
    mixed = mixture.mix(_parts(4, 9, 30), kind="balanced", seed=1)
    assert len(mixed) == 12
    for epoch in (0, 1):
        drawn = [mixed.where(i, epoch) for i in range(12)]
        assert np.bincount([part for part, _ in drawn]).tolist() == [4, 4, 4]
        assert len(set(drawn)) == 12
    # Over the epochs, all of the largest part comes up.
    seen = {w for e in range(60) for i in range(12) if (w := mixed.where(i, e))[0] == 2}
    assert len(seen) == 30


def test_weighted_draws_follow_the_tempered_weights():
    mixed = mixture.mix(
        _parts(50, 200), kind="weighted", weights=(0.9, 0.1), temperature=2.0, seed=3
    )
    assert len(mixed) == 200
    drawn = np.array([mixed.where(i, e) for e in range(20) for i in range(200)])
    # 0.9^(1/2) : 0.1^(1/2) = 3 : 1.
    assert abs((drawn[:, 0] == 0).mean() - 0.75) < 0.03
    counts = np.bincount(drawn[drawn[:, 0] == 0, 1], minlength=50)
    assert counts.min() > 30  # Uniform: 60 each.
    assert counts.max() < 95
    assert mixed.where(5, 2) == mixed.where(5, 2)
    assert [mixed.where(i, 0) for i in range(9)] != [
        mixed.where(i, 1) for i in range(9)
    ]


def test_mixed_labels_are_shared_only_if_the_classes_are_the_same():
    same = mixture.mix(_parts(4, 4, classes=3), kind="concat")
    assert len(same.classes) == 3
    assert [same[i]["label"] for i in range(8)] == [0, 1, 2, 0] * 2
    digits = sources.open("digits", "", "test")
    fake = sources.open("fake", "", "train", count=4, channels=1, classes=2)
    both = mixture.mix([fake, digits], kind="concat")
    assert len(both.classes) == 12
    assert both.classes[2] == "digits/0"
    assert both[4]["label"] == 2 + digits[0]["label"]


def test_mixtures_open_by_name():
    mixed = sources.open(
        "mixture", "", "train", parts="digits=,scenes=", how="balanced"
    )
    assert len(mixed) == 2 * 1438
    assert mixed.root == "digits:(built in) + scenes:(built in)"
    with pytest.raises(errors.UsageError, match="parts='digits='"):
        sources.open("mixture", "", "train", parts="digits=")


def test_a_part_of_a_mixture_has_its_own_images_in_every_epoch():
    mixed = mixture.mix(_parts(4, 9), kind="concat")
    part = wrappers.Tolerant(wrappers.Subset(mixed, np.array([6, 1])), "skip")
    for epoch in (0, 3):
        for i, whole in enumerate((6, 1)):
            got = part.at(i, epoch)["image"]
            np.testing.assert_array_equal(got, mixed[whole]["image"])


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(how="sum"), "how='sum': want one of weighted, balanced, concat"),
        (dict(how="weighted", weights=(1.0,)), "one per part"),
        (dict(how="weighted", weights=(0.0, 0.0)), "not all 0"),
        (dict(how="weighted", weights=(1.0, -1.0)), "every value 0 or more"),
        (dict(how="weighted", temperature=0.0), "temperature=0.0: above 0"),
    ],
)
def test_impossible_mixtures_are_refused(options, said):
    with pytest.raises(errors.UsageError, match=said):
        sources.open("mixture", "", "train", parts="fake=,fake=", **options)


def test_parts_must_agree_on_channels():
    gray = sources.open("fake", "", "train", channels=1)
    with pytest.raises(errors.DataError, match="fake: 256 x 1, fake: 3 x 3"):
        mixture.mix([gray, *_parts(3)], kind="concat")
