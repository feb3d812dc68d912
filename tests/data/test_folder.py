"""What a folder of images may hold beside images in classes."""

import os

import numpy as np
import pytest
from PIL import Image

from vitssl import errors
from vitssl.data import sources


def _paint(root, *paths):
    for n, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 3, 3), n, np.uint8)).save(file)


def _open(root, split="all", **options):
    return sources.open("folder", str(root), split, **options)


def _names(source):
    return [source.relative(i) for i in range(len(source))]


def test_folders_of_the_system_are_no_classes(tmp_path, caplog):
    system = "@eaDir", "lost+found", "$RECYCLE.BIN", "#recycle", "__MACOSX", ".Trash"
    _paint(tmp_path, "ant/1.png", "bee/2.png", *(f"{name}/3.png" for name in system))
    _paint(tmp_path, "ant/@eaDir/1.png/thumb.png")
    source = _open(tmp_path)
    assert source.classes == ("ant", "bee")
    assert _names(source) == ["ant/1.png", "bee/2.png"]
    (line,) = caplog.messages
    assert line.startswith(f"folder: {tmp_path}: left out: 2 folder(s) @eaDir")
    assert "1 folder(s) $RECYCLE.BIN" in line


def test_what_is_left_out_is_counted_in_one_line(tmp_path, caplog):
    _paint(tmp_path, "ant/1.png", "bee/2.png", "loose.png")
    for name in ("a.HEIC", "b.heic", "ant/c.heic", "cow/d.heic", "bee/notes", "r.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    for split in ("all", "train", "all"):
        _open(tmp_path, split)
    assert [m for m in caplog.messages if "left out" in m] == [
        f"folder: {tmp_path}: left out: 4 .heic, 1 .txt, 1 image(s) beside the folders "
        "(labels='none' takes all), 1 without a suffix"
    ]


def test_where_nothing_is_an_image_the_error_says_what_there_is(tmp_path):
    (tmp_path / "a.heic").write_text("x")
    with pytest.raises(errors.DataError, match=r"'all' \(left out: 1 \.heic\)"):
        _open(tmp_path)


def test_train_dev_and_eval_are_splits(tmp_path):
    _paint(
        tmp_path, *(f"{s}/{c}/1.png" for s in ("train", "dev", "eval") for c in "ab")
    )
    assert _names(_open(tmp_path, "train")) == ["train/a/1.png", "train/b/1.png"]
    assert _names(_open(tmp_path, "val")) == ["dev/a/1.png", "dev/b/1.png"]
    assert _names(_open(tmp_path, "test")) == ["eval/a/1.png", "eval/b/1.png"]
    assert _open(tmp_path, "test").classes == ("a", "b")


@pytest.mark.parametrize(
    "paths",
    [
        ("train/a/1.png", "train/b/2.png", "more/3.png"),  # It has classes of its own.
        ("train/1.png", "train/2.png", "Unlabeled/3.png"),
    ],
)
def test_one_split_beside_another_folder_is_not_guessed(tmp_path, paths, caplog):
    _paint(tmp_path, *paths)
    with pytest.raises(errors.DataError, match="splits or classes.*divided=yes.*or no"):
        _open(tmp_path)
    source = _open(tmp_path, "train", divided="yes")
    assert _names(source) == list(paths[:2])
    other = paths[2].partition("/")[0]
    assert f"left out: 1 image(s) in {other}" in caplog.text
    assert len(_open(tmp_path, divided="no").classes) == 2


def test_a_class_called_train_is_said(tmp_path, caplog):
    _paint(tmp_path, "bus/1.png", "train/2.png")
    assert _open(tmp_path).classes == ("bus", "train")
    assert "'train' beside bus: taken for a class; data.options.divided" in caplog.text


def test_a_folder_beside_two_splits_is_said(tmp_path, caplog):
    _paint(tmp_path, "train/a/1.png", "val/a/2.png", "unlabeled/3.png", "4.png")
    assert _open(tmp_path, "train").classes == ("a",)
    assert "1 image(s) in unlabeled" in caplog.text
    assert "1 image(s) beside the folders" in caplog.text


def test_a_link_to_a_class_is_no_class(tmp_path, caplog):
    _paint(tmp_path, *(f"zebra/{i}.png" for i in range(4)), "ant/1.png")
    (tmp_path / "alias").symlink_to(tmp_path / "zebra")
    source = _open(tmp_path)
    assert source.classes == ("ant", "zebra")
    assert len(source) == 5
    assert "4 second path(s) to one file, by links" in caplog.text
    train, val = (_open(tmp_path, s, holdout=0.5) for s in ("train", "val"))
    assert not {
        os.path.realpath(s.path(i)) for s in (train,) for i in range(len(s))
    } & {os.path.realpath(val.path(i)) for i in range(len(val))}


def test_a_file_with_two_paths_counts_once(tmp_path):
    _paint(tmp_path, "a/1.png", "b/2.png", "b/deep/3.png")
    os.link(tmp_path / "a/1.png", tmp_path / "b/hard.png")
    (tmp_path / "b/soft.png").symlink_to(tmp_path / "b/2.png")
    (tmp_path / "a/down").symlink_to(tmp_path / "b/deep")
    # Pictures that lie elsewhere are reached by links alone.
    _paint(tmp_path / ".pool", "4.png")
    (tmp_path / "a/4.png").symlink_to(tmp_path / ".pool/4.png")
    assert _names(_open(tmp_path)) == ["a/1.png", "a/4.png", "a/down/3.png", "b/2.png"]


def test_a_pipe_is_left_out_and_a_link_to_nothing_named_when_read(tmp_path, caplog):
    _paint(tmp_path, "a/1.png", "b/2.png")
    os.mkfifo(tmp_path / "a/0.png")
    (tmp_path / "b/3.png").symlink_to(tmp_path / "gone.png")
    source = _open(tmp_path)
    assert _names(source) == ["a/1.png", "b/2.png", "b/3.png"]
    assert "left out: 1 pipe(s) or device(s)" in caplog.text
    with pytest.raises(errors.DataError, match="3.png: cannot be read: No such file"):
        source[2]


def test_any_labels_take_every_image(tmp_path):
    _paint(tmp_path, "train/a/1.png", "val/b/2.png", "extra/3.png", "4.png")
    source = _open(tmp_path, labels="any")
    assert dict(zip(_names(source), source.labels.tolist(), strict=True)) == {
        "train/a/1.png": 0,
        "val/b/2.png": 1,
        "4.png": -1,
        "extra/3.png": -1,
    }


def test_the_range_of_values_is_an_option(tmp_path):
    (tmp_path / "a").mkdir()
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "a/1.png")
    assert _open(tmp_path, channels=1)[0]["image"].max() == 16
    source = _open(tmp_path, channels=1, value_range=(0.0, 4095.0))
    assert source[0]["image"].max() == 255
    with pytest.raises(errors.UsageError, match=r"value_range=\(5\.0, 5\.0\)"):
        _open(tmp_path, value_range=(5.0, 5.0))
