"""Birds, CUB, Waterbirds, SIIM-ACR, MetaShift: layouts, groups, and what is refused."""

import pathlib
import pickle

import cv2
import numpy as np
import pytest

from tests.golden.checks.ifam_data import dicom_bytes
from vitssl import errors
from vitssl.data import dicom, sources
from vitssl.data.sources import siim_acr
from vitssl.data.worlds import birds


def _image(path, size=(20, 24), value=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((*size, 3), value, np.uint8))


def _text(root, name, lines):
    path = pathlib.Path(root) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def test_a_bird_is_a_pure_function_of_seed_and_index():
    world = birds.World(size=32)
    one, other = world.bird(5), world.bird(6)
    again = pickle.loads(pickle.dumps(world)).bird(5)
    for a, b in zip(one, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.image != other.image).any()
    assert (birds.World(size=32, split="test").bird(5).image != one.image).any()


def test_the_background_follows_the_class_in_training_only():
    train, test = (
        sources.open("birds", "", s, count=400, purity=0.9) for s in ("train", "test")
    )
    home = [
        np.mean([s.world.place(i) == s.world.label(i) for i in range(400)])
        for s in (train, test)
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
        bird = birds.World(size=48).bird(i)
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
    with pytest.raises(errors.UsageError, match=f"birds: {key}="):
        sources.open("birds", "", "train", **fields)


def _cub(root, masks=2):
    names = [f"00{k}.Kind/bird_{i}.jpg" for i, k in enumerate((1, 2, 2, 3))]
    for name in names:
        _image(root / "images" / name)
    for name in names[:masks]:
        _image(root / "segmentations" / name.replace(".jpg", ".png"), value=255)
    _text(root, "images.txt", [f"{i + 1} {n}" for i, n in enumerate(names)])
    _text(root, "image_class_labels.txt", ["1 1", "2 2", "3 2", "4 3"])
    _text(root, "train_test_split.txt", ["1 1", "2 1", "3 0", "4 0"])
    _text(root, "classes.txt", [f"{k} 00{k}.Kind" for k in (1, 2, 3)])
    _text(root, "bounding_boxes.txt", [f"{i} 1 2 10 12" for i in range(1, 5)])
    _text(root, "parts/parts.txt", ["1 beak", "2 tail"])
    _text(root, "parts/part_locs.txt", ["1 2 5.0 6.0 1", "3 1 7.0 8.0 1"])
    return root


def test_cub_numbers_classes_over_all_images(tmp_path):
    root = _cub(tmp_path)
    test = sources.open("cub", str(root), "test")
    assert test.labels.tolist() == [1, 2]  # Class 1 is in the training set alone.
    assert test.classes == ("001.Kind", "002.Kind", "003.Kind")
    own = sources.open("cub", str(root), "test", labels="split")
    assert own.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(test[0]["keypoints"], [[7, 8, 1], [0, 0, 0]])
    # Read twice: nothing is scaled in place.
    np.testing.assert_array_equal(test[0]["keypoints"], test[0]["keypoints"])
    np.testing.assert_array_equal(test[0]["box"], [1, 2, 10, 12])
    assert pickle.loads(pickle.dumps(test))[1]["label"] == 2


def test_cub_faults_name_the_file(tmp_path):
    root = _cub(tmp_path)
    with pytest.raises(errors.DataError, match="1 of 2 images have no mask.*bird_3"):
        sources.open("cub", str(_cub(tmp_path, masks=3)), "test", masks=True)
    train = sources.open("cub", str(root), "train", masks=True)
    assert train[0]["mask"].max() == 1 and train[0]["mask"].shape == (20, 24)
    (root / "classes.txt").unlink()
    with pytest.raises(errors.DataError, match="no file classes.txt"):
        sources.open("cub", str(root), "train")
    _text(root, "image_class_labels.txt", ["1"])
    with pytest.raises(errors.DataError, match="2 columns are needed"):
        sources.open("cub", str(root), "train")


def test_waterbirds_without_its_columns_says_which(tmp_path):
    _text(tmp_path, "metadata.csv", ["img_id,img_filename,y,split", "1,a.jpg,0,0"])
    with pytest.raises(errors.DataError, match="no column place; there is: img_id"):
        sources.open("waterbirds", str(tmp_path), "train")
    with pytest.raises(errors.DataError, match="no metadata.csv"):
        (tmp_path / "metadata.csv").unlink()
        sources.open("waterbirds", str(tmp_path), "train")


def test_waterbirds_groups(tmp_path):
    head = "img_id,img_filename,y,split,place,place_filename"
    rows = [
        f"{i},k/{i}.jpg,{y},2,{p},x"
        for i, (y, p) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)])
    ]
    _text(tmp_path, "metadata.csv", [head, *rows])
    for i in range(4):
        _image(tmp_path / "k" / f"{i}.jpg")
    source = sources.open("waterbirds", str(tmp_path), "test")
    assert [int(source[i]["group"]) for i in range(4)] == [0, 1, 2, 3]
    worst = sources.open("waterbirds", str(tmp_path), "worst_case")
    assert worst.labels.tolist() == [1, 0]


def test_metashift_contexts_are_groups(tmp_path):
    for name in (
        "train/cat/cat(sofa)/a",
        "train/dog/dog(bench)/b",
        "test/cat/cat(shelf)/c",
        "test/dog/dog(shelf)/d",
    ):
        _image(tmp_path / f"{name}.jpg")
    train, test = (
        sources.open("metashift", str(tmp_path), s) for s in ("train", "test")
    )
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.tolist() == test.labels.tolist() == [0, 1]
    groups = [int(s[i]["group"]) for s in (train, test) for i in range(2)]
    assert groups == [1, 2, 0, 3]  # cat(shelf), cat(sofa), dog(bench), dog(shelf).
    with pytest.raises(errors.DataError, match="no folder val"):
        sources.open("metashift", str(tmp_path), "val")


def _siim(root):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for name in ("train_set/0/a.dcm", "train_set/1/b.dcm"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dicom_bytes(pixels))
    return pixels


def test_siim_acr_masks_and_images_must_match(tmp_path):
    pixels = _siim(tmp_path)
    source = sources.open("siim_acr", str(tmp_path), "train")
    np.testing.assert_array_equal(source[1]["image"], np.stack([pixels] * 3, -1))
    with pytest.raises(errors.DataError, match="1/b.dcm has no mask"):
        sources.open("siim_acr", str(tmp_path), "train", masks=True)
    for stem in ("b", "stranger"):
        _image(tmp_path / "all_masks" / f"{stem}.png", (8, 8), 255)
    with pytest.raises(errors.DataError, match="without an image.*stranger.png"):
        sources.open("siim_acr", str(tmp_path), "train", masks=True)
    (tmp_path / "all_masks" / "stranger.png").unlink()
    source = sources.open("siim_acr", str(tmp_path), "train", masks=True)
    assert source[0]["mask"].sum() == 0 and source[1]["mask"].sum() == 64
    with pytest.raises(errors.DataError, match="no folder full_test_set/0"):
        sources.open("siim_acr", str(tmp_path), "test")


def test_lesions_of_one_image_are_united(tmp_path):
    path = tmp_path / "train-rle.csv"
    path.write_text("ImageId, EncodedPixels\na, 0 2\na, 6 1\nb, -1\n")
    found = siim_acr.lesions(path, 4, 2)
    # Columns first: pixels 0 and 1 of column 0, pixel 2 of column 1.
    np.testing.assert_array_equal(found["a"] > 0, [[1, 0], [1, 0], [0, 1], [0, 0]])
    assert not found["b"].any()


def test_dicom_with_a_jpeg_inside_and_other_syntaxes():
    pixels = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (16, 1))
    plain = dicom_bytes(pixels)
    np.testing.assert_array_equal(dicom.decode(plain), pixels)
    jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    jpeg += b"\0" * (len(jpeg) % 2)
    item = lambda b: b"\xfe\xff\x00\xe0" + len(b).to_bytes(4, "little") + b  # noqa: E731
    at = plain.index(b"\xe0\x7f\x10\x00")
    inside = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff" + item(b"") + item(jpeg)
    inside += b"\xfe\xff\xdd\xe0\0\0\0\0"
    old, new = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.4.50"
    head = plain[:at].replace(
        len(old).to_bytes(2, "little") + old, len(new).to_bytes(2, "little") + new
    )
    got = dicom.decode(head + inside)
    assert np.abs(got.astype(int) - pixels).max() <= 2
    light = plain.replace(b"MONOCHROME2 ", b"MONOCHROME1 ")
    np.testing.assert_array_equal(dicom.decode(light), 255 - pixels)
    with pytest.raises(errors.DataError, match="x.dcm.*no DICM"):
        dicom.decode(b"\0" * 200, name="x.dcm")
    with pytest.raises(errors.DataError, match="transfer syntax .* not supported"):
        dicom.decode(plain.replace(old, b"1.2.840.10008.1.2.9\0"))
