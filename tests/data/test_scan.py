import os

import pytest

from vitssl.data import sources
from vitssl.data.sources import folder, scan

PAST = 1_000_000_000


@pytest.fixture
def reads(monkeypatch):
    """Paths of the folders that are read from the disk, and an empty memory."""
    seen, read = [], scan._read
    monkeypatch.setattr(scan, "_read", lambda path: seen.append(path) or read(path))
    monkeypatch.setattr(scan, "_kept", scan._Kept())
    monkeypatch.setattr(scan, "SETTLED", -1.0)  # Whatever is new is settled.
    return seen


def _tree(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def _names(root, split="all"):
    source = sources.open("folder", str(root), split)
    return [source.relative(i) for i in range(len(source))]


def test_the_splits_of_a_run_read_every_folder_once(tmp_path, reads):
    _tree(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png")
    found = [_names(tmp_path, split) for split in ("train", "train", "val")]
    assert found == [["train/a/1.png", "train/b/2.png"]] * 2 + [
        ["val/a/3.png", "val/b/4.png"]
    ]
    assert len(reads) == len(set(reads)) == 7


def test_what_changed_is_read_again(tmp_path, reads):
    _tree(tmp_path, "a/1.png", "b/2.png")
    before = _names(tmp_path)
    (tmp_path / "a" / "0.png").touch()
    os.utime(tmp_path / "a", (PAST, PAST))  # As those who copy with times do.
    assert _names(tmp_path) == ["a/0.png", *before]
    (tmp_path / "a" / "1.png").unlink()
    (tmp_path / "a" / "1.png").mkdir()
    assert _names(tmp_path) == ["a/0.png", "b/2.png"]
    (tmp_path / "b" / "2.png").rename(tmp_path / "b" / "3.png")
    assert _names(tmp_path) == ["a/0.png", "b/3.png"]


def test_a_folder_put_in_the_place_of_another_is_read(tmp_path, reads):
    _tree(tmp_path, "data/a/1.png", "new/a/2.png")
    assert _names(tmp_path / "data") == ["a/1.png"]
    (tmp_path / "data").rename(tmp_path / "old")
    (tmp_path / "new").rename(tmp_path / "data")
    assert _names(tmp_path / "data") == ["a/2.png"]


def test_what_may_still_change_in_the_same_moment_is_read_each_time(
    tmp_path, reads, monkeypatch
):
    monkeypatch.setattr(scan, "SETTLED", 1e6)
    _tree(tmp_path, "a/1.png")
    assert _names(tmp_path) == _names(tmp_path) == ["a/1.png"]
    assert len(reads) > len(set(reads))


def test_links_are_followed_anew_each_time(tmp_path, reads):
    _tree(tmp_path, "one/1.png", "two/2.png", "data/a/9.png")
    link = tmp_path / "data" / "a" / "more"
    link.symlink_to(tmp_path / "one")
    assert _names(tmp_path / "data") == ["a/9.png", "a/more/1.png"]
    (tmp_path / "one").rename(tmp_path / "three")
    (tmp_path / "two").rename(tmp_path / "one")
    assert _names(tmp_path / "data") == ["a/9.png", "a/more/2.png"]


def test_not_more_is_kept_than_fits(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(scan, "MOST", 3)
    _tree(tmp_path, *(f"{c}/{i}.png" for c in "abc" for i in "12"))
    for _ in range(2):
        assert len(_names(tmp_path)) == 6
    assert scan._kept.images == sum(
        len(found.inodes) for _, found in scan._kept.of.values()
    )
    assert scan._kept.images <= 3
    assert len(reads) > 7


def test_images_and_folders_come_in_one_order_with_links_between(tmp_path):
    _tree(tmp_path, "b/2.png", "a.png", "c.png", "d.txt", "b/.hidden.png")
    (tmp_path / "aa.png").symlink_to(tmp_path / "nowhere")
    assert list(folder.walk(tmp_path)) == ["a.png", "aa.png", "b/2.png", "c.png"]
    os.link(tmp_path / "a.png", tmp_path / "z.png")
    census = folder.Census()
    assert list(folder.walk(tmp_path, census=census)) == [
        "a.png", "aa.png", "b/2.png", "c.png"
    ]  # fmt: skip
    assert census.out == {".txt": 1, "second path(s) to one file, by links": 1}
