"""A folder of images: one sub-folder per class, or no classes at all."""

import dataclasses
import hashlib
import os
from typing import Literal

import numpy as np

from vitssl import ranges
from vitssl.data import decode
from vitssl.data.sources import layout

EXPECTED = (
    "ROOT/{train,val,test}/<class>/**/*.jpg, or ROOT/<class>/**/*.jpg, or "
    f"ROOT/**/*.jpg without classes ({' '.join(sorted(decode.SUFFIXES))})"
)
SPLITS = {alias: key for key, names in layout.ALIASES.items() for alias in names}
SPLITS["all"] = "all"


@dataclasses.dataclass(frozen=True, eq=False)
class Files(layout.Source):
    """Image files under `root` with one label each.

    The paths are one block of bytes and their ends, not a million strings: quick to
    send to a worker process, and not copied there by reference counting.

    Attributes:
        paths: relative to root, joined.
        ends: int64 [N], where each path ends in `paths`.
    """

    root: str
    paths: bytes
    ends: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    channels: int
    name: str
    split: str

    def relative(self, i: int) -> str:
        """Return where image i is, from `root`."""
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.paths[start : self.ends[i]])

    def path(self, i: int) -> str:
        """Return where image i is."""
        return os.path.join(self.root, self.relative(i))

    def image(self, i: int) -> np.ndarray:
        """Return image i, decoded."""
        return decode.read(self.path(i), channels=self.channels)


def files(root, members, *, classes, channels, name, split) -> Files:
    """Return the (path relative to root, label) pairs `members`, as ordered."""
    encoded = [os.fsencode(path) for path, _ in members]
    ends = np.cumsum([len(p) for p in encoded], dtype=np.int64)
    labels = np.array([label for _, label in members], np.int32)
    return Files(
        str(root), b"".join(encoded), ends, labels, classes, channels, name, split
    )


def _entries(folder):
    """Return what lies in a folder, sorted.

    Names that begin with a dot are left out (thumbnails, "._x.jpg").
    """
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if e.name[0] != "."), key=lambda e: e.name)


def _is_image(entry):
    suffix = os.path.splitext(entry.name)[1].lower()
    return suffix in decode.SUFFIXES and not entry.is_dir()


def _identity(folder):
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def walk(folder, *, above=()):
    """Yield every image file below a folder, as sorted paths relative to it.

    Links are followed, except those that lead back to a folder on the way.
    """
    here = _identity(folder)
    if here in above:
        return
    for entry in _entries(folder):
        if entry.is_dir():
            below = walk(entry.path, above=(*above, here))
            yield from (f"{entry.name}/{path}" for path in below)
        elif _is_image(entry):
            yield entry.name


def folders(path) -> list[str]:
    """Return the names of the sub-folders that hold an image somewhere, sorted."""
    return [e.name for e in _entries(path) if e.is_dir() and any(walk(e.path))]


def classes_of(base, parts) -> tuple[str, ...]:
    """Return the class folders of all splits together, sorted.

    So a class that one split lacks shifts no label.
    """
    return tuple(sorted({c for part in parts for c in folders(base / part)}))


def members(base, part: str, classes) -> list[tuple[str, int]]:
    """Return (path relative to base, label) of the class folders of a split.

    Class by class, in the order of `classes`; images beside the folders are left out.

    Args:
        part: folder of the split, "" for `base` itself.
    """
    above = (_identity(base / part),)
    return [
        (os.path.join(part, name, path), label)
        for label, name in enumerate(classes)
        if (base / part / name).is_dir()
        for path in walk(base / part / name, above=above)
    ]


def split_folders(root, divided: str) -> dict[str, str]:
    """Return {canonical split: its folder's name}, {} if root is not so divided.

    With divided="auto" it is when no other folder of root holds images, or when two
    splits are there: a lone "train" among "bus" and "tram" is a class.
    """
    if divided == "no":
        return {}
    present, found = folders(root), {}
    for split, aliases in layout.ALIASES.items():
        if own := [name for name in present if name.lower() in aliases]:
            found[split] = own[0]
    sure = divided == "yes" or len(found) in (len(present), 2, 3)
    return found if sure else {}


def held_out(paths, labels, fraction: float) -> np.ndarray:
    """Return which images to hold out: bool [N]; the same whatever their order.

    Of each class, the round(fraction * n) images (at least one of two or more) with
    the smallest hash of their relative path.
    """
    rank = [hashlib.blake2b(os.fsencode(p), digest_size=8).digest() for p in paths]
    out = np.zeros(len(paths), bool)
    labels = np.asarray(labels)
    for label in np.unique(labels):
        own = sorted(np.flatnonzero(labels == label), key=lambda i: rank[i])
        count = max(round(fraction * len(own)), int(len(own) > 1))
        out[own[:count]] = True
    return out


def open(
    root,
    split,
    *,
    channels=3,
    holdout: ranges.BelowOne = 0.1,
    labels: Literal["folder", "none"] = "folder",
    divided: Literal["auto", "yes", "no"] = "auto",
):
    """Images below `root`, any depth; the class is the first folder of the path.

    Without split folders a fixed share of the images is "val" (= "test") and the
    rest "train". A split that has no folder while others have is an error, except
    that "val" and "test" stand in for each other.

    Args:
        split: "train", "val", "test" or "all".
        channels: 1 or 3, or more for `.npy` files.
        holdout: share of the images to hold out where there are no split folders.
        labels: "folder" or "none" (every image is unlabelled, -1).
        divided: "yes", "no" or "auto": whether ROOT's first folders are splits.

    Raises:
        DataError: nothing there, or not that split.
    """
    split = layout.split_of("folder", split, SPLITS)
    base = layout.root_of("folder", root, EXPECTED)
    splits = split_folders(base, divided)
    if divided == "yes" and not splits:
        layout.fail("folder", "no train, val or test folder", base, EXPECTED)
    parts = _parts(base, split, splits)
    classes = ()
    if labels == "folder":
        classes = classes_of(base, splits.values() or ("",))
    found = [m for part in parts for m in _members(base, part, classes)]
    if found and not splits and split != "all":
        keep = held_out(*zip(*found, strict=True), holdout) == (split != "train")
        found = [m for m, k in zip(found, keep, strict=True) if k]
    if not found:
        layout.fail("folder", f"no image in split {split!r}", base, EXPECTED)
    about = dict(classes=classes, name="folder", split=split)
    return files(base, found, channels=channels, **about)


def plantvillage(root, split, *, channels=3):
    """PlantVillage: ROOT/{train,valid}/<38 classes>/*, as the New Plant Diseases set.

    Args:
        split: "train", "val" ("test" is the same) or "all".
    """
    return open(root, split, channels=channels, divided="yes")


def _parts(base, split, splits):
    """Return the folders of `base` to read, "" for base itself."""
    if not splits:
        return ("",)
    if split == "all":
        return tuple(splits.values())
    other = {"val": "test", "test": "val"}.get(split, "")
    found = splits.get(split) or splits.get(other)
    if not found:
        layout.fail("folder", f"no folder for split {split!r}", base, EXPECTED)
    return (found,)


def _members(base, part, classes):
    """Return (path relative to base, label) of every image of a part."""
    if not classes:
        return [(os.path.join(part, path), -1) for path in walk(base / part)]
    loose = sum(map(_is_image, _entries(base / part)))
    if loose:
        layout.logger.warning(
            "folder: %s: %d image(s) lie beside the class folders, in none of them: "
            "left out (labels='none' takes them all)",
            decode.printable(base),
            loose,
        )
    return members(base, part, classes)
