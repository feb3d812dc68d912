"""A folder of images: one sub-folder per class, or no classes at all."""

import collections
import dataclasses
import hashlib
import os
import sys
from typing import Literal

import numpy as np

from vitssl import errors, ranges
from vitssl.data import decode, reduced
from vitssl.data.sources import layout, scan, tables

EXPECTED = (
    "ROOT/{train,val,test}/<class>/**/*.jpg, or ROOT/<class>/**/*.jpg, or "
    f"ROOT/**/*.jpg without classes ({' '.join(sorted(decode.SUFFIXES))})"
)
SPLITS = {alias: key for key, names in layout.ALIASES.items() for alias in names}
SPLITS["all"] = "all"
LABELS = ("folder", "none", "any")
# Folders that lie beside those of splits, and are no classes beside one of them.
BESIDE = frozenset("unlabeled unlabelled unsupervised extra holdout heldout".split())
_ENCODING = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()


@dataclasses.dataclass(frozen=True, eq=False)
class Files(layout.Images):
    """Image files under `root` with one label each.

    The paths are one block of bytes and their ends, not a million strings: quick to
    send to a worker process, and not copied there by reference counting.

    Attributes:
        paths: relative to root, joined.
        ends: int64 [N], where each path ends in `paths`.
        bounds: see `decode.decode`.
        several: uint8 [N, K], 1 for every label of an image, where images have several
            or none; then `labels` are -1.
        reduction: of the transform that gets the images, see `reduced`; None = none.
    """

    root: str
    paths: bytes
    ends: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    channels: int
    name: str
    split: str
    bounds: tuple[float, ...] = ()
    several: np.ndarray | None = None
    reduction: reduced.Reduction | None = None

    def relative(self, i: int) -> str:
        """Return where image i is, from `root`."""
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.paths[start : self.ends[i]])

    def path(self, i: int) -> str:
        """Return where image i is."""
        return os.path.join(self.root, self.relative(i))

    def encoded(self, i: int) -> bytes:
        """Return the bytes of image i as they are stored."""
        return decode.contents(self.path(i))

    def reduced(self, reduction) -> "Files":
        """Return the files that are decoded for a transform; see `layout.Source`."""
        return dataclasses.replace(self, reduction=reduction)

    @property
    def _how(self) -> dict:
        keys = ("channels", "bounds", "reduction")
        return {key: getattr(self, key) for key in keys}

    def image(self, i: int) -> np.ndarray:
        """Return image i, decoded."""
        return decode.read(self.path(i), **self._how)


def files(root, members, *, classes, channels, name, split, bounds=()) -> Files:
    """Return the (path relative to root, label) pairs `members`, as ordered.

    Labels are numbers, or tuples of them where images have several.
    """
    encoded = [path.encode(*_ENCODING) for path, _ in members]
    ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))
    said, several = [label for _, label in members], None
    if said and isinstance(said[0], tuple):
        several, said = matrix(said, len(classes)), [-1] * len(said)
    about = (classes, channels, name, split, tuple(bounds), several)
    labels = np.array(said, np.int32)
    return Files(str(root), b"".join(encoded), ends, labels, *about)


def matrix(sets, count: int) -> np.ndarray:
    """Return tuples of labels below `count` as uint8 [N, count] of 0 and 1."""
    found = np.zeros((len(sets), count), np.uint8)
    for row, labels in zip(found, sets, strict=True):
        row[list(labels)] = 1
    return found


class Census:
    """What a walk meets and does not return: what is no image, what it met before.

    Attributes:
        out: {what: how many}.
        seen: the files that were met: {device: their inodes}.
    """

    def __init__(self, seen=None):
        self.out = collections.Counter()
        self.seen = collections.defaultdict(set)
        for device, inodes in (seen or {}).items():
            self.seen[device] |= inodes

    def leave_out(self, entry) -> None:
        """Count a `scan.Entry` that is no image: by its suffix, or what it is."""
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.kind == scan.SYSTEMS:
            self.out[f"folder(s) {entry.name}"] += 1
        elif entry.kind == scan.PIPE:
            self.out["pipe(s) or device(s)"] += 1
        else:
            self.out[suffix or "without a suffix"] += 1

    def all_new(self, inodes, device: int) -> bool:
        """Return whether no file was met before, and then note them all."""
        seen, these = self.seen[device], set(inodes)
        if len(these) < len(inodes) or not seen.isdisjoint(these):
            return False
        seen |= these
        return True

    def first(self, entry, path, device: int) -> bool:
        """Return whether a file is met for the first time; links are followed.

        Args:
            path: of the entry.
            device: of the folder that it is in.
        """
        inode = entry.inode
        # A folder may tell other numbers than its files do.
        if (entry.link or inode in self.seen[device]) and os.path.exists(path):
            found = os.stat(path)
            device, inode = found.st_dev, found.st_ino
        if inode in self.seen[device]:
            self.out["second path(s) to one file, by links"] += 1
            return False
        self.seen[device].add(inode)
        return True

    def __str__(self) -> str:
        """Return "3 .heic, 1 without a suffix", most first."""
        most = sorted(self.out.items(), key=lambda item: (-item[1], item[0]))
        more = f", {len(most) - 8} more kinds" if len(most) > 8 else ""
        return ", ".join(f"{n} {decode.printable(k)}" for k, n in most[:8]) + more


def _identity(folder):
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def walk(folder, *, above=(), census=None):
    """Yield every image file below a folder, as sorted paths relative to it.

    Names that begin with a dot are left out (thumbnails, "._x.jpg"). Links are
    followed, except those that lead back to a folder on the way.

    Args:
        above: identities of the folders on the way.
        census: counts what is left out; a file that it has met comes once.
    """
    here = _identity(folder)
    if here in above:
        return
    found = scan.read(folder)
    if found.plain() and (not census or census.all_new(found.inodes, here[0])):
        for entry in found.rest if census else ():
            census.leave_out(entry)
        yield from found.images()
        return
    for entry in found.entries():
        path = os.path.join(folder, entry.name)
        if entry.kind == scan.FOLDER:
            below = walk(path, above=(*above, here), census=census)
            yield from (f"{entry.name}/{path}" for path in below)
        elif entry.kind != scan.IMAGE:
            if census:
                census.leave_out(entry)
        elif not census or census.first(entry, path, here[0]):
            yield entry.name


def folders(path) -> list[str]:
    """Return the names of the sub-folders that hold an image somewhere, sorted."""
    there = sorted(e.name for e in scan.read(path).rest if e.kind == scan.FOLDER)
    return [name for name in there if any(walk(os.path.join(path, name)))]


def classes_of(base, parts) -> tuple[str, ...]:
    """Return the class folders of all splits together, sorted.

    So a class that one split lacks shifts no label.
    """
    places = [base / part for part in parts]
    names = {c for at in places for c in folders(at) if not _second_name(at / c)}
    return tuple(sorted(names))


def _second_name(path) -> bool:
    """Return whether a folder is a link to one beside it."""
    return path.is_symlink() and path.resolve().parent == path.parent.resolve()


def members(base, part: str, classes, census=None) -> list[tuple[str, int]]:
    """Return (path relative to base, label) of the class folders of a split.

    Class by class, in the order of `classes`; images beside the folders are left out.

    Args:
        part: folder of the split, "" for `base` itself.
        census: see `walk`.
    """
    above, found = (_identity(base / part),), []
    for label, name in enumerate(classes):
        if (base / part / name).is_dir():
            inside = walk(base / part / name, above=above, census=census)
            start = os.path.join(part, name, "")
            found += [(start + path, label) for path in inside]
    return found


def split_folders(root, divided: str) -> dict[str, str]:
    """Return {canonical split: its folder's name}, {} if root is not so divided.

    With divided="auto" it is when no other folder of root holds images, or when two
    splits are there: a lone "train" among "bus" and "tram" is a class.

    Raises:
        DataError: it may be either.
    """
    if divided == "no":
        return {}
    present, found = folders(root), {}
    for split, aliases in layout.ALIASES.items():
        if own := [name for name in present if name.lower() in aliases]:
            found[split] = own[0]
    others = [name for name in present if name not in found.values()]
    if divided == "auto" and len(found) == 1 and others:
        _decide(root, *found.values(), others)
        return {}
    return found


def _decide(root, lone, others) -> None:
    """Warn that a folder with the name of a split is taken for a class.

    Raises:
        DataError: it has folders of its own, or what lies beside it is no class.
    """
    said = ", ".join(map(decode.printable, others[:4])) + ", ..." * (len(others) > 4)
    beside = f"folder: {decode.printable(root)}: {lone!r} beside {said}"
    if folders(root / lone) or BESIDE & {name.lower() for name in others}:
        raise errors.DataError(
            f"{beside}: splits or classes? Set data.options.divided=yes (splits; the "
            "others are left out) or no (classes); extract has --divided"
        )
    layout.once(
        f"{beside}: taken for a class; data.options.divided=yes makes it a split"
    )


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
    labels: str = "folder",
    divided: Literal["auto", "yes", "no"] = "auto",
    value_range: tuple[float, ...] = (),
    listed: str = "",
    separator: str = "auto",
):
    """Images below `root`, any depth; the class is the first folder of the path.

    Without split folders a fixed share of the images is "val" (= "test") and the
    rest "train". A split that has no folder while others have is an error, except
    that "val" and "test" stand in for each other.

    Args:
        split: "train", "val", "test" or "all".
        channels: 1 or 3, or more for `.npy` files.
        holdout: share of the images to hold out where there are no split folders.
        labels: "folder" (images beside the class folders are left out), "none" (every
            image is unlabelled, -1) or "any" (only those beside are); or a table of
            labels, `.csv`, `.tsv` or `.parquet`, see `tables.read`: images that it
            does not name are left out.
        separator: of several labels in a cell of the table, see `tables.read`.
        divided: "yes", "no" or "auto": whether ROOT's first folders are splits.
        value_range: lowest and highest value, which become 0 and 255, of images of
            more than 8 bits; () = 0 and 65535.
        listed: text file of the images and folders to take, one per line, from ROOT on;
            "" = all.

    Raises:
        DataError: nothing there, or not that split.
    """
    bounds = bounds_of(value_range)
    split = layout.split_of("folder", split, SPLITS)
    base = layout.root_of("folder", root, EXPECTED)
    table = None if labels in LABELS else tables.read(labels, separator)
    splits = {} if table and table.splits else split_folders(base, divided)
    if divided == "yes" and not splits:
        layout.fail("folder", "no train, val or test folder", base, EXPECTED)
    parts = _parts(base, split, splits)
    classes, census = (), Census()
    if labels != "none" and not table:
        classes = classes_of(base, splits.values() or ("",))
    found = [m for part in parts for m in _members(base, part, classes, census)]
    if labels == "any":
        rest = ("",) if split == "all" else parts
        more = Census(census.seen)
        found += [m for part in rest for m in _members(base, part, (), more)]
    else:
        for place, known in ((base / p, classes) for p in parts if classes):
            _beside(place, known, census)
        if splits:
            _beside(base, splits.values(), census)
    if census.out:
        where = decode.printable(base / (parts[0] if len(parts) == 1 else ""))
        layout.once(f"folder: {where}: left out: {census}")
    if listed:
        found = tables.listed(listed, base, found)
    if table:
        found, classes = table.labelled(found, split), table.classes
    if found and not (splits or table and table.splits) and split != "all":
        found = _part(found, split, holdout)
    if not found:
        out = f" (left out: {census})" if census.out else ""
        layout.fail("folder", f"no image in split {split!r}{out}", base, EXPECTED)
    about = dict(classes=classes, name="folder", split=split, bounds=bounds)
    return files(base, found, channels=channels, **about)


def _part(members, split, holdout):
    """Return the members that are held out, or for "train" the others."""
    paths, labels = zip(*members, strict=True)
    strata = _rarest(labels) if isinstance(labels[0], tuple) else labels
    keep = held_out(paths, strata, holdout) == (split != "train")
    return [m for m, k in zip(members, keep, strict=True) if k]


def _rarest(sets) -> list[int]:
    """Return of each image's labels the one that the fewest images have; -1 of none."""
    count = collections.Counter(label for labels in sets for label in labels)
    return [min(x, key=lambda k: (count[k], k), default=-1) for x in sets]


def bounds_of(value_range) -> tuple[float, ...]:
    """Return the option `value_range` as it is, if it is a range or ().

    Raises:
        UsageError: it is not.
    """
    if value_range and (len(value_range) != 2 or value_range[0] >= value_range[1]):
        raise errors.UsageError(
            f"data.options.value_range={value_range}: (lowest, highest), or ()"
        )
    return tuple(value_range)


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


def _members(base, part, classes, census):
    """Return (path relative to base, label) of every image of a part."""
    if classes:
        return members(base, part, classes, census)
    return [(os.path.join(part, p), -1) for p in walk(base / part, census=census)]


def _beside(place, known, census):
    """Count what lies in a folder beside the folders of it that are known."""
    above = (_identity(place),)
    for entry in scan.read(place).entries():
        if entry.kind == scan.IMAGE:
            census.out["image(s) beside the folders (labels='none' takes all)"] += 1
        elif entry.kind != scan.FOLDER:
            census.leave_out(entry)
        elif entry.name not in known:
            images = sum(
                1 for _ in walk(place / entry.name, above=above, census=census)
            )
            if images:
                census.out[f"image(s) in {entry.name}"] += images
