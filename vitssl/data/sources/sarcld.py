"""SAR-CLD-2024: cotton leaves in seven classes, and any folder of one leaf per file.

Layout: https://data.mendeley.com/datasets/b3jy2p6k8w/2, whose two archives are the
photographs and augmented copies of them. The published split mixes both, so that
copies of a photograph lie on both sides; the default here takes photographs alone,
class by class, with files of the same content on one side.
"""

import collections
import hashlib
import os
from typing import Literal

import numpy as np

from vitssl import errors, ranges
from vitssl.data import decode
from vitssl.data.sources import folder, layout, spectral

CLASSES = (
    "Bacterial Blight",
    "Curl Virus",
    "Healthy Leaf",
    "Herbicide Growth Damage",
    "Leaf Hopper Jassids",
    "Leaf Redding",
    "Leaf Variegation",
)
ORIGINAL, AUGMENTED = "Original Dataset", "Augmented Dataset"
EXPECTED = (
    f"ROOT/{ORIGINAL}/<class>/*.jpg, and ROOT/{AUGMENTED}/<class>/* where augmented "
    "copies are wanted; without either, ROOT/<class>/*.jpg"
)
SUFFIXES = (".jpg", ".jpeg", ".png")


def open(
    root,
    split,
    *,
    channels=3,
    rule: Literal["clean", "legacy"] = "clean",
    val: ranges.BelowOne = 0.1,
    test: ranges.BelowOne = 0.1,
    augmented=False,
    legacy_train: ranges.Probability = 0.8,
    seed=42,
    planes: Literal["", "npy", "tiff", "ndvi"] = "",
    planes_root="",
    planes_range: tuple[float, ...] = (-1.0, 1.0),
):
    """One split.

    Args:
        root: with the two collections, or with one folder per class.
        channels: with `planes`, 3 + those of the planes.
        rule: "clean": stratified by class, photographs only, duplicates together;
            "legacy": the published one, of all images, where val = test.
        val, test: shares of the clean split.
        augmented: the clean split's "train" also has the augmented copies whose
            photograph is in it, as far as a copy's name has that of the photograph.
        legacy_train: share of the legacy split that trains.
        seed: of either split.
        planes: "" none; "npy", "tiff": spectral planes from files; "ndvi": made up from
            the colours (see `spectral`). They follow the three colours as channels.
        planes_root: folder of those files, in the classes' folders; "" is `root`.
        planes_range: values that become 0 and 1; () = the lowest and the highest of all
            planes. Between them 16 bits are kept.

    Raises:
        DataError: nothing there; a class folder that cannot be read; a class with
            fewer than two images; images without planes.
    """
    split = layout.split_of("sarcld", split, folder.SPLITS)
    if val + test >= 1:
        raise errors.UsageError(f"sarcld: val={val}, test={test}: shares of one split")
    base = layout.root_of("sarcld", root, EXPECTED)
    classes, photographs, copies = _listed(base)
    if not photographs and not (copies and rule == "legacy"):
        layout.fail("sarcld", "no image", base, EXPECTED)
    if rule == "legacy":
        members = photographs + copies
        train, held = legacy_split(len(members), legacy_train, seed)
        rows = {"train": train, "all": range(len(members))}.get(split, held)
        members = [members[i] for i in rows]
    else:
        members = _clean(base, classes, photographs, split, (test, val), seed)
        if augmented and split == "train":
            members = members + _copies_of(members, copies)
    about = dict(classes=classes, name="sarcld", split=split)
    colours = 3 if planes else channels
    made = folder.files(base, members, channels=colours, **about)
    if not planes:
        return made
    where = planes_root or str(base)
    return spectral.attach(made, planes, where, planes_range, channels)


def legacy_split(count, share, seed=42):
    """Return (indices to train on, the others) of the published split."""
    order = np.arange(count)
    np.random.default_rng(seed).shuffle(order)
    cut = int(count * share)
    return order[:cut], order[cut:]


def _listed(base):
    """Return (classes, [(path, label)] of photographs, of augmented copies)."""
    known = any((base / c).is_dir() for c in (ORIGINAL, AUGMENTED))
    if known:
        classes = CLASSES
        return classes, *(_images(base, c, classes) for c in (ORIGINAL, AUGMENTED))
    classes = tuple(folder.folders(base))
    if set(classes) <= set(CLASSES):
        # The published numbers, whatever the alphabet says.
        classes = tuple(c for c in CLASSES if c in classes)
    return classes, _images(base, "", classes), []


def _images(base, collection, classes):
    """Return [(path relative to base, label)]: class by class, sorted, not recursive.

    Raises:
        DataError: a class folder that cannot be read.
    """
    found = []
    for label, name in enumerate(classes):
        place = os.path.join(collection, name)
        if not (base / place).exists():
            continue
        try:
            entries = sorted(os.listdir(base / place))
        except OSError as e:
            raise errors.DataError(
                f"sarcld: class folder {decode.printable(base / place)} cannot be "
                f"read: {e.strerror}"
            ) from e
        for entry in entries:
            if entry[0] != "." and entry.lower().endswith(SUFFIXES):
                found.append((os.path.join(place, entry), label))
    return found


def _clean(base, classes, members, split, shares, seed):
    """Return the members of a split that keeps files of one content together."""
    count = np.bincount([y for _, y in members], minlength=len(classes))
    if few := [c for c, n in zip(classes, count, strict=True) if 0 < n < 2]:
        raise errors.DataError(
            f"sarcld: {', '.join(few)}: one image; a class needs two or more to be "
            f"split\n  path: {decode.printable(base)}"
        )
    if split == "all":
        return members
    group = _content(base, [p for p, _ in members])
    first = {}
    for i, g in enumerate(group):
        first.setdefault(g, i)
    side = {}
    for label in range(len(classes)):
        own = [g for g, i in first.items() if members[i][1] == label]
        own.sort(key=lambda g: _rank(members[first[g]][0], seed))
        cut = 0
        for name, share in zip(("test", "val"), shares, strict=True):
            take = max(round(share * len(own)), int(share > 0 and len(own) > 2))
            side |= dict.fromkeys(own[cut : cut + take], name)
            cut += take
    both = zip(group, members, strict=True)
    return [m for g, m in both if side.get(g, "train") == split]


def _rank(path, seed):
    return hashlib.blake2b(f"{seed}/{path}".encode(), digest_size=8).digest()


def _content(base, paths):
    """Return a number per file, the same for files of equal bytes.

    Only files of equal length are read.
    """
    sizes = [os.path.getsize(base / p) for p in paths]
    seen, number, groups = collections.Counter(sizes), {}, []
    for path, size in zip(paths, sizes, strict=True):
        key = path
        if seen[size] > 1:
            with (base / path).open("rb") as file:
                key = (size, hashlib.file_digest(file, "sha256").digest())
        groups.append(number.setdefault(key, len(number)))
    return groups


def _copies_of(members, copies):
    """Return the augmented copies whose photograph is among `members`."""
    stems = {}
    for path, label in members:
        stem = os.path.splitext(os.path.basename(path))[0].lower()
        stems.setdefault(label, set()).add(stem)
    chosen = []
    for path, label in copies:
        name = os.path.splitext(os.path.basename(path))[0].lower()
        words = "".join(c if c.isalnum() else " " for c in name).split()
        if stems.get(label, set()) & {*words, name}:
            chosen.append((path, label))
    layout.logger.info(
        "sarcld: %d of %d augmented images are copies of photographs that train",
        len(chosen),
        len(copies),
    )
    return chosen
