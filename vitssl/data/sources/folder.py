"""A folder of images: one sub-folder per class, or no classes at all."""

import dataclasses
import hashlib
import os
import pathlib

import numpy as np

from vitssl import errors
from vitssl.data import decode
from vitssl.data.sources import layout

EXPECTED = (
    "ROOT/{train,val,test}/<class>/**/*.jpg, or ROOT/<class>/**/*.jpg, or "
    f"ROOT/**/*.jpg without classes ({' '.join(sorted(decode.SUFFIXES))})"
)
SPLITS = {
    **{alias: key for key, aliases in layout.ALIASES.items() for alias in aliases},
    "all": "all",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
    """Image files under `root` with one label each.

    The paths are one block of bytes and their ends, not a million strings: quick to
    send to a worker process, and not copied there by reference counting.

    Attributes:
        paths: relative to root, joined.
        ends: int64 [N], where each path ends in `paths`.
        labels: int32 [N], -1 = unlabelled.
    """

    root: str
    paths: bytes
    ends: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    channels: int
    name: str
    split: str

    def __len__(self):
        return len(self.ends)

    def path(self, i):
        """Where image i is."""
        start = self.ends[i - 1] if i else 0
        return os.path.join(self.root, os.fsdecode(self.paths[start : self.ends[i]]))

    def __getitem__(self, i):
        if not 0 <= i < len(self.ends):
            raise IndexError(i)
        image = decode.read(self.path(i), channels=self.channels)
        return {"image": image, "label": int(self.labels[i])}


def files(root, members, *, classes, channels, name, split):
    """A `Files` of the (path relative to root, label) pairs `members`, as ordered."""
    encoded = [os.fsencode(path) for path, _ in members]
    ends = np.cumsum([len(p) for p in encoded], dtype=np.int64)
    labels = np.array([label for _, label in members], np.int32)
    return Files(
        str(root), b"".join(encoded), ends, labels, classes, channels, name, split
    )


def walk(folder, *, above=()):
    """Every image file below `folder`, as sorted paths relative to it.

    Links are followed, except those that lead back to a folder on the way. Names that
    begin with a dot are left out (thumbnails, "._x.jpg").
    """
    stat = os.stat(folder)
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        found = sorted((e for e in entries if e.name[0] != "."), key=lambda e: e.name)
    for entry in found:
        if entry.is_dir():
            for path in walk(entry.path, above=(*above, here)):
                yield f"{entry.name}/{path}"
        elif os.path.splitext(entry.name)[1].lower() in decode.SUFFIXES:
            yield entry.name


def folders(path):
    """Names of the sub-folders of `path` that hold an image somewhere, sorted."""
    with os.scandir(path) as entries:
        names = [e.name for e in entries if e.is_dir() and e.name[0] != "."]
    return sorted(n for n in names if next(walk(os.path.join(path, n)), None))


def split_folders(root, divided):
    """Dict from canonical split to its folder's name, {} if root is not so divided.

    With divided="auto" it is when no other folder of root holds images, or when two
    splits are there: a lone "train" among "bus" and "tram" is a class.
    """
    if divided == "no":
        return {}
    present = folders(root)
    found = {}
    for split, aliases in layout.ALIASES.items():
        for folder in present:
            if folder.lower() in aliases:
                found.setdefault(split, folder)
    sure = divided == "yes" or len(found) in (len(present), 2, 3)
    return found if sure else {}


def held_out(paths, labels, fraction):
    """Which images to hold out: bool [N]; the same whatever their order.

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


def open(root, split, *, channels=3, holdout=0.1, labels="folder", divided="auto"):
    """Images below `root`, any depth; the class is the first folder of the path.

    Without split folders a fixed share of the images is "val" (= "test") and the
    rest "train". A split that has no folder while others have is an error, except
    that "val" and "test" stand in for each other.

    Args:
        root: of the tree.
        split: "train", "val", "test" or "all".
        channels: 1 or 3, or more for `.npy` files.
        holdout: share of the images to hold out where there are no split folders.
        labels: "folder" or "none" (every image is unlabelled, -1).
        divided: "yes", "no" or "auto": whether ROOT's first folders are splits.

    Raises:
        DataError: nothing there, or not that split.
    """
    split = layout.split_of("folder", split, SPLITS)
    if not 0 <= holdout < 1:
        raise errors.UsageError(f"folder: holdout={holdout}: want 0 <= holdout < 1")
    if labels not in ("folder", "none") or divided not in ("auto", "yes", "no"):
        raise errors.UsageError(
            f"folder: labels={labels!r} divided={divided!r}: "
            "labels is 'folder' or 'none'; divided is 'auto', 'yes' or 'no'"
        )
    base = layout.root_of("folder", root, EXPECTED)
    splits = split_folders(base, divided)
    if divided == "yes" and not splits:
        layout.fail("folder", "no train, val or test folder", base, EXPECTED)
    parts = _parts(base, split, splits)
    classes = ()
    if labels == "folder":
        every = splits.values() if splits else ("",)
        # Of all splits together: a class that one of them lacks shifts no label.
        classes = tuple(sorted({c for p in every for c in folders(base / p)}))
    members = _members(base, parts, classes)
    if members and not splits and split != "all":
        paths, targets = zip(*members, strict=True)
        keep = held_out(paths, targets, holdout) == (split != "train")
        members = [m for m, k in zip(members, keep, strict=True) if k]
    if not members:
        layout.fail("folder", f"no image in split {split!r}", base, EXPECTED)
    return files(
        base, members, classes=classes, channels=channels, name="folder", split=split
    )


def _parts(base, split, splits):
    """Folders of `base` to read, "" for base itself."""
    if not splits:
        return ("",)
    if split == "all":
        return tuple(splits[s] for s in layout.ALIASES if s in splits)
    other = {"val": "test", "test": "val"}.get(split, "")
    found = splits.get(split) or splits.get(other)
    if not found:
        layout.fail("folder", f"no folder for split {split!r}", base, EXPECTED)
    return (found,)


def _members(base, parts, classes):
    """(path relative to base, label) of every image, in the order of the paths."""
    members, loose = [], 0
    for part in parts:
        label = {c: i for i, c in enumerate(classes)}
        for path in walk(base / part):
            first, _, rest = path.partition("/")
            if classes and not rest:
                loose += 1
                continue
            members.append((str(pathlib.PurePath(part) / path), label.get(first, -1)))
    if loose:
        layout.logger.warning(
            "folder: %s: %d image(s) lie beside the class folders, in none of them: "
            "left out (labels='none' takes them all)",
            decode.printable(base),
            loose,
        )
    return members
