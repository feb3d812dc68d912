"""Tables of labels and lists of files beside a folder; deep and many-banded files."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.layouts import radiographs
from vitssl import errors
from vitssl.data import pipeline, sources, views
from vitssl.data.sources import layout, wrappers


def _paint(root, *paths):
    for n, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 3, 3), n, np.uint8)).save(file)


def _open(root, split="all", **options):
    return sources.open("folder", str(root), split, **options)


def _labels(root, text, split="all", ending=".csv", **options):
    path = root.parent / f"labels{ending}"
    path.write_text(text)
    source = _open(root, split, labels=str(path), **options)
    names = [source.relative(i) for i in range(len(source))]
    return dict(zip(names, source.labels.tolist(), strict=True)), source.classes


@pytest.fixture
def images(tmp_path):
    _paint(tmp_path / "in", "x/1.png", "x/2.png", "y/3.png", "4.png")
    return tmp_path / "in"


@pytest.mark.parametrize(
    "text, ending",
    [
        ("file,label\nx/1.png,cat\nx/2.png,ant\n4.png,cat\n", ".csv"),
        ("\ufeffImage;Class\n1;cat\n2;ant\n4;cat\n", ".csv"),
        ("note\tfilename\tdx\n,\t./x/1.png\tcat\n\tx\\2\tant\n\t4.png\tcat\n", ".tsv"),
        ("image,ant,cat\n1,0.0,1.0\n2,1.0,0.0\n4,0,1\n", ".csv"),
    ],
)
def test_labels_stand_in_a_table(images, text, ending, caplog):
    found, classes = _labels(images, text, ending=ending)
    assert classes == ("ant", "cat")
    assert found == {"x/1.png": 1, "x/2.png": 0, "4.png": 1}
    assert "left out: 1 image(s) that it does not name" in caplog.text


def test_a_table_may_be_parquet_and_number_its_classes(images):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = images.parent / "labels.parquet"
    table = pyarrow.table({"file": ["x/1.png", "4.png"], "label": [1.0, 0.0]})
    parquet.write_table(table, path)
    source = _open(images, labels=str(path))
    assert source.labels.tolist() == [0, 1] and source.classes == ("0", "1")


def test_a_table_may_say_the_splits(images):
    text = "file,label,split\n1,a,train\n2,b,Train\n3,a,valid\n4,b,valid\n"
    assert _labels(images, text, "train")[0] == {"x/1.png": 0, "x/2.png": 1}
    assert _labels(images, text, "test")[0] == {"4.png": 1, "y/3.png": 0}
    with pytest.raises(errors.DataError, match="split 'both': one of train, training"):
        _labels(images, "file,label,split\n1,a,both\n")


def test_a_table_leaves_split_folders_and_held_out_images_as_they_are(tmp_path):
    _paint(tmp_path / "in", "train/1.png", "train/2.png", "val/3.png", "val/4.png")
    text = "file,label\n1,a\n2,b\n3,b\n4,a\n"
    assert _labels(tmp_path / "in", text, "val")[0] == {"val/3.png": 1, "val/4.png": 0}
    _paint(tmp_path / "flat", *(f"{i}.png" for i in range(20)))
    text = "file,label\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(20))
    for split, each in (("train", 8), ("val", 2)):
        found, _ = _labels(tmp_path / "flat", text, split, holdout=0.2)
        assert np.bincount([*found.values()]).tolist() == [each, each]


@pytest.mark.parametrize(
    "text, says",
    [
        ("path,colour\n1,red\n", "no column of the labels .*it has: path, colour"),
        ("number,label\n1,red\n", "no column of the files .*it has: number, label"),
        ("file,label\n1,a\n1,b\n", "'1' is 'a' and 'b'; .*data.options.separator=rows"),
        ("file,tags\n1,a|b\n1,b\n", "'1' is 'a', 'b' and 'b'; if images have a row"),
        ("file,a,b\n1,1,1\n1,1,0\n", "'1' has two rows that differ"),
        ("file,a,b\n1,1,2\n", "no column of the labels"),
        ("file,a,b\n1,1,\n", "no column of the labels"),
        ("file,label\n7,a\n", "it names none of 4 images"),
        ("file,label\n", "a table without rows"),
        ("file,label\n1\n", "row 2 has not the 2 columns"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line(images, text, says):
    with pytest.raises(errors.DataError, match=says) as caught:
        _labels(images, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, separator",
    [
        ("file,label\n1,sea|sky\n2,\n4,sky\n", "auto"),
        ("file,Labels\n1,'sky, sea'\n2,\n4,sky\n".replace("'", '"'), "auto"),
        ("Image Index,Finding Labels\n1,sky|sea|sky\n2,\n4,sky\n", "auto"),
        ("file,tags\n1,sea sky\n2,\n4,sky\n", "auto"),
        ("file,classes\n1,~['sea', 'sky']~\n2,~[]~\n4,~['sky']~\n", "auto"),
        ("file,label\n1,sea/sky\n2,\n4,sky\n", "/"),
        ("file,label\n1,sea\n2,\n4,sky\n1,sky\n", "rows"),
        ("file,sea,sky\n1,1,1\n2,0,0\n4,0,1\n", "auto"),
        ("file,sea,sky\n1,True,true\n2,False,false\n4,False,TRUE\n", "auto"),
    ],
)
def test_images_may_have_several_labels_or_none(images, text, separator, caplog):
    path = images.parent / "several.csv"
    path.write_text(text.replace("~", '"'))
    source = _open(images, labels=str(path), separator=separator)
    assert source.classes == ("sea", "sky")
    found = {source.relative(i): source[i]["labels"].tolist() for i in range(3)}
    assert found == {"x/1.png": [1, 1], "x/2.png": [0, 0], "4.png": [0, 1]}
    assert source.labels.tolist() == [-1, -1, -1] and source[0]["label"] == -1
    assert "1.00 of 2 in the mean of 3 images, 1 of them without any" in caplog.text
    layout.once.cache_clear()


def test_lists_in_a_parquet_table_are_several_labels(images):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = images.parent / "several.parquet"
    cells = [["b", "a"], None, ["b"]]
    table = pyarrow.table({"file": ["1", "2", "4"], "label": cells})
    parquet.write_table(table, path)
    several = _open(images, labels=str(path)).several
    assert several[[1, 2, 0]].tolist() == [[1, 1], [0, 0], [0, 1]]


def test_a_name_with_a_separator_is_one_class_where_it_is_said_or_usual(images):
    for text, separator in (
        ("file,label\n1,~Boston, MA~\n2,b\n4,b\n", "auto"),
        ("file,label\n1,a|c\n2,b\n4,b\n", ""),
    ):
        found, classes = _labels(images, text.replace("~", '"'), separator=separator)
        assert sorted(found.values()) == [0, 1, 1] and len(classes) == 2


def test_every_label_is_held_out_where_images_have_several(tmp_path):
    _paint(tmp_path / "in", *(f"{i}.png" for i in range(40)))
    rows = [f"{i},common" + "|rare" * (i % 20 == 3) for i in range(40)]
    text = "file,label\n" + "\n".join(rows) + "\n"
    path = tmp_path / "labels.csv"
    path.write_text(text)
    train, test = (
        _open(tmp_path / "in", split, labels=str(path)) for split in ("train", "test")
    )
    assert train.several.sum(0).tolist() == [35, 1]
    assert test.several.sum(0).tolist() == [5, 1]
    for change, says in (
        (dict(sampling="balanced"), "data.sampling=balanced: images of several"),
    ):
        with pytest.raises(errors.UsageError, match=says):
            pipeline.train(train, views.Evaluate(4), batch_size=4, seed=0, **change)
    with pipeline.evaluate(test, views.Evaluate(4), batch_size=4, threads=0) as batches:
        found = [b["labels"][b["valid"]] for b in batches]
    np.testing.assert_array_equal(np.concatenate(found), test.several)
    part = wrappers.Subset(train, np.array([3, 1]))
    np.testing.assert_array_equal(part.several, train.several[[3, 1]])
    assert layout.counts(part).tolist() == part.several.sum(0).tolist()


def test_an_unknown_kind_of_labels_and_two_images_of_one_name_are_refused(images):
    with pytest.raises(errors.UsageError, match="labels=folders: one of folder, none"):
        _open(images, labels="folders")
    with pytest.raises(
        errors.DataError, match="none.csv: cannot be read: No such file"
    ):
        _open(images, labels="none.csv")
    _paint(images, "z/1.png")
    with pytest.raises(errors.DataError, match="'1' may be x/1.png or z/1.png"):
        _labels(images, "file,label\n1,a\n")


def test_a_list_names_files_and_folders(images, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(f"# Mine.\n\n./x/1.png\n{images}/y\n")
    source = _open(images, listed=str(path))
    assert [source.relative(i) for i in range(len(source))] == ["x/1.png", "y/3.png"]
    assert source.classes == ("x", "y") and source.labels.tolist() == [0, 1]
    path.write_text(".\n")
    assert len(_open(images, listed=str(path), labels="none")) == 4
    path.write_text("x\n../secret.png\n")
    with pytest.raises(errors.DataError, match="1 of 2 lines are no image.*secret"):
        _open(images, listed=str(path))


def test_bands_of_tiff_files_are_channels(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    bands = rng.integers(0, 256, (5, 6, 7), np.uint8)
    tifffile.imwrite(tmp_path / "a/1.tif", bands, photometric="minisblack")
    got = _open(tmp_path, channels=5)[0]["image"]
    np.testing.assert_array_equal(got, bands.transpose(1, 2, 0))
    with pytest.raises(errors.DataError, match="it has 5 channels, the data set 4"):
        _open(tmp_path, channels=4)[0]
    deep = (bands.astype(np.uint16) * 16).transpose(1, 2, 0)
    tifffile.imwrite(tmp_path / "a/1.tif", deep, planarconfig="contig")
    got = _open(tmp_path, channels=5, value_range=(0.0, 4080.0))[0]["image"]
    np.testing.assert_array_equal(got, bands.transpose(1, 2, 0))
    tifffile.imwrite(tmp_path / "a/1.tif", bands.astype(np.float32) / 255)
    with pytest.raises(errors.DataError, match="float image of unknown range"):
        _open(tmp_path, channels=5)[0]
    got = _open(tmp_path, channels=5, value_range=(0.0, 1.0))[0]["image"]
    np.testing.assert_array_equal(got, bands.transpose(1, 2, 0))


def test_radiographs_lie_in_a_plain_folder(tmp_path):
    for n in range(2):
        path = tmp_path / f"class {n}" / "1.dcm"
        path.parent.mkdir()
        path.write_bytes(radiographs.dicom(np.full((6, 5), 40 + n, np.uint8)))
    source = _open(tmp_path, channels=1)
    assert [int(e["image"].mean()) for e in source] == [40, 41]
    assert source[0]["image"].shape == (6, 5, 1)


def test_deep_colours_of_a_tiff_are_read(tmp_path):
    (tmp_path / "a").mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    deep = colours.astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "a/1.tiff", deep, photometric="rgb")
    np.testing.assert_array_equal(_open(tmp_path)[0]["image"], colours)
