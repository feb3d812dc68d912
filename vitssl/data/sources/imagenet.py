"""ImageNet trees, and the part of them that some list of classes names.

Source of the 100 classes: the fixed list of jonwiggins/H-JEPA, src/data/datasets.py.
"""

import pathlib

from vitssl.data import decode
from vitssl.data.sources import folder, layout

SPLITS = {"train": "train", "val": "val", "test": "val"}
EXPECTED = "ROOT/{train,val}/<wnid>/*.JPEG"
LIST_100 = pathlib.Path(__file__).parent / "imagenet100.txt"


def open(root, split, *, channels=3, classes_file=""):
    """ImageNet: label = index of the folder's name in sorted order.

    Args:
        root: of the tree, `ROOT/{train,val}/<wnid>/*.JPEG`.
        split: "train" or "val" ("test" is the same).
        channels: 1 or 3.
        classes_file: keep only the wnids of this text file, one per line; the label
            is then the wnid's index in that file. "" = every folder.

    Raises:
        DataError: the tree or the list is not there, or they share no class.
    """
    split = layout.split_of("imagenet", split, SPLITS)
    base = layout.root_of("imagenet", root, EXPECTED)
    if not (base / split).is_dir():
        layout.fail("imagenet", f"no folder {split!r}", base, EXPECTED)
    if classes_file:
        classes = read_list(classes_file)
    else:
        # Of both splits together, so that a folder missing in one shifts no label.
        both = [base / s for s in ("train", "val") if (base / s).is_dir()]
        classes = tuple(sorted({c for part in both for c in folder.folders(part)}))
    members, absent = [], []
    for label, wnid in enumerate(classes):
        below = base / split / wnid
        found = list(folder.walk(below)) if below.is_dir() else []
        if not found:
            absent.append(wnid)
        members += [(f"{split}/{wnid}/{path}", label) for path in found]
    if not members:
        layout.fail(
            "imagenet",
            f"no image of the {len(classes)} classes of {classes_file or 'the tree'}",
            base / split,
            EXPECTED,
        )
    if absent:
        layout.logger.warning(
            "imagenet: %s: no image of %d of %d classes: %s",
            decode.printable(base / split),
            len(absent),
            len(classes),
            ", ".join(absent[:8]),
        )
    name = "imagenet" if not classes_file else f"imagenet{len(classes)}"
    return folder.files(
        base, members, classes=classes, channels=channels, name=name, split=split
    )


def open100(root, split, *, channels=3, classes_file=""):
    """ImageNet-100: 100 of the classes, labels 0..99; otherwise as `open`.

    Args:
        classes_file: another list than the built-in one.
    """
    return open(
        root, split, channels=channels, classes_file=classes_file or str(LIST_100)
    )


def read_list(path):
    """The wnids of a text file, one per line; "#" begins a comment.

    Raises:
        DataError: no such file, no name in it, or one twice.
    """
    path = pathlib.Path(path).expanduser()
    expected = "a text file, one wnid (name of a class folder) per line"
    if not path.is_file():
        layout.fail("imagenet", "no such list of classes", path, expected)
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    names = tuple(line for line in lines if line)
    if not names or len(set(names)) < len(names):
        layout.fail("imagenet", "the list is empty or repeats a name", path, expected)
    return names
