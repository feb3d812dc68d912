"""What a folder of images is found to be, and what is said of one that is none."""

import cv2
import numpy as np
import pytest

from tests.layouts import pictures, trees
from vitssl import errors
from vitssl.data import decode, survey


def _write(folder, count=30, depth=8, name="{i}.png", size=(40, 56), top=255):
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / name.format(i=i, k=i % 2)
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = np.uint8 if depth == 8 else np.uint16
        image = rng.integers(0, top + 1, size, dtype=np.int64).astype(kind)
        cv2.imwrite(str(path), image)
    return folder


def test_class_folders_are_counted_and_colours_have_imagenets_mean(tmp_path):
    trees.classes(tmp_path, ("ant", "bee"), 20, "{i}.jpg")
    found = survey.look(tmp_path)
    assert found.classes == {"ant": 20, "bee": 20} and found.labels == "folder"
    assert (found.train, found.test, found.divided) == (36, 4, False)
    assert found.channels == 3 and (found.mean, found.std) == survey.IMAGENET
    assert found.sides == (40, 40, 40) and not found.measured
    assert "ant 20, bee 20" in str(found) and "a tenth is held out" in str(found)


def test_splits_and_images_beside_classes_are_found(tmp_path):
    trees.folder(tmp_path)
    found = survey.look(tmp_path)
    assert found.divided and (found.train, found.test) == (24, 12)
    pictures.save(tmp_path / "train" / "more.jpg", pictures.thing(0, 0).image)
    found = survey.look(tmp_path)
    assert found.labels == "any" and found.bare == 1 and found.train == 25
    alone = survey.look(tmp_path / "train")
    assert alone.classes == {"ant": 8, "bee": 8, "cow": 8}
    (tmp_path / "val").rename(tmp_path.parent / "elsewhere")
    assert survey.look(tmp_path).root.endswith("/train")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("{i}.png", "no sub-folders"),
        ("all/{i}.png", "one folder only, all"),
        ("{i}/x.png", "30 folders of 1.0 images"),
    ],
)
def test_folders_that_are_no_classes_are_not_taken_for_some(tmp_path, name, why):
    found = survey.look(_write(tmp_path, name=name))
    assert (found.labels, found.why_none, found.classes) == ("none", why, {})
    asked = survey.look(_write(tmp_path, name="{k}/{i}.png"), labels="none")
    assert asked.labels == "none" and asked.why_none in ("as asked", why)


@pytest.mark.parametrize(
    ("top", "bounds", "scale"),
    [(4095, (0.0, 4095), 4095), (900, (0.0, 1023), 1023), (65535, (), 65535)],
)
def test_deep_grey_images_have_the_range_and_moments_of_their_own(
    tmp_path, top, bounds, scale
):
    folder = _write(tmp_path, depth=16, top=top)
    found = survey.look(folder)
    assert (found.channels, found.range, found.measured) == (1, bounds, True)
    every = np.stack([cv2.imread(str(p), -1) for p in sorted(folder.iterdir())])
    every = every / scale
    assert found.mean == pytest.approx((every.mean(),), abs=0.003)
    assert found.std == pytest.approx((every.std(),), abs=0.003)
    assert survey.look(folder) == found


def test_grey_stored_as_colour_is_grey_and_arrays_have_their_channels(tmp_path):
    folder = _write(tmp_path / "grey", name="{i}.jpg")
    assert survey.look(folder).channels == 1
    bands = tmp_path / "bands"
    bands.mkdir()
    for i in range(20):
        image = np.full((8, 8, 5), np.arange(5) * 50, np.uint8)
        np.save(bands / f"{i}.npy", image)
    found = survey.look(bands)
    assert (found.channels, found.range) == (5, ())
    assert found.mean == pytest.approx(np.arange(5) * 50 / 255, abs=1e-4)
    assert found.std == (1.0,) * 5  # Nothing varies: nothing is scaled.
    for i in range(20):
        np.save(
            bands / f"{i}.npy", np.linspace(-2, 6, 64, dtype=np.float32).reshape(8, 8)
        )
    found = survey.look(bands)
    assert (found.channels, found.range) == (1, (-2.0, 6.0))


def test_what_cannot_be_read_is_told_and_too_much_of_it_refused(tmp_path):
    folder = _write(tmp_path, count=40)
    (folder / "7.png").write_bytes(b"no image")
    found = survey.look(folder)
    assert len(found.broken) == 1 and "7.png: cannot be decoded" in str(found)
    for i in range(30):
        (folder / f"{i}.png").write_bytes(b"")
    with pytest.raises(errors.DataError, match="30 of 40 images cannot be read; the"):
        survey.look(folder)


def test_no_folder_no_image_and_too_few_are_one_line(tmp_path):
    for make, text in (
        (lambda: tmp_path / "gone", "gone: no such folder"),
        (lambda: tmp_path, "no image in it, at any depth"),
        (lambda: _write(tmp_path / "few", count=9), "8 images to train on and 1 to"),
        (
            lambda: _write(tmp_path / "t", name="test/{i}.png").parent / "t/test/0.png",
            "a file",
        ),
    ):
        with pytest.raises(errors.DataError) as caught:
            survey.look(make())
        assert text in str(caught.value) and "\n" not in str(caught.value)
    assert decode.stored(tmp_path / "t/test/0.png") is None
    both = tmp_path / "both"
    _write(both, name="test/{i}.png"), _write(both, name="val/{i}.png")
    with pytest.raises(errors.DataError, match="val, test, but no train folder"):
        survey.look(both)


def test_a_table_in_the_folder_gives_the_labels_where_folders_give_none(tmp_path):
    _write(tmp_path / "in")
    rows = [f"{i}.png,{'ab'[i % 2]},{'test' if i < 6 else 'train'}" for i in range(30)]
    table = tmp_path / "in" / "labels.csv"
    table.write_text("\n".join(["file,label,split", *rows]))
    (tmp_path / "in" / "notes.csv").write_text("when,what\n1,2\n")
    found = survey.look(tmp_path / "in")
    assert found.labels == found.table == str(table) and not found.several
    assert (found.classes, found.train, found.test) == ({"a": 15, "b": 15}, 24, 6)
    assert found.parted and not found.divided and found.bare == 0
    assert "as the table says" in str(found) and f"; by {table}" in str(found)
    assert survey.look(tmp_path / "in", labels="none").labels == "none"
    table.rename(tmp_path / "elsewhere.csv")
    assert survey.look(tmp_path / "in").labels == "none"
    asked = survey.look(tmp_path / "in", labels=str(tmp_path / "elsewhere.csv"))
    assert asked.table.endswith("elsewhere.csv") and asked.train == 24
    for name in ("a.csv", "b.csv"):
        (tmp_path / "in" / name).write_text("file,label\n1,x\n")
    with pytest.raises(
        errors.DataError, match="in: a.csv, b.csv: which has the labels"
    ):
        survey.look(tmp_path / "in")


def test_folders_of_classes_come_before_a_table(tmp_path):
    trees.classes(tmp_path, ("ant", "bee"), 20, "{i}.jpg")
    (tmp_path / "labels.csv").write_text("file,label\nant/1,x\n")
    assert survey.look(tmp_path).labels == "folder"
