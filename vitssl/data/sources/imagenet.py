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
        split: "train" or "val" ("test" is the same).
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
        name = f"imagenet{len(classes)}"
    else:
        both = [s for s in ("train", "val") if (base / s).is_dir()]
        classes, name = folder.classes_of(base, both), "imagenet"
    members = folder.members(base, split, classes)
    if not members:
        problem = f"no image of the {len(classes)} classes of "
        problem += classes_file or "the tree"
        layout.fail("imagenet", problem, base / split, EXPECTED)
    there = {label for _, label in members}
    absent = [c for label, c in enumerate(classes) if label not in there]
    if absent:
        layout.logger.warning(
            "imagenet: %s: no image of %d of %d classes: %s",
            decode.printable(base / split),
            len(absent),
            len(classes),
            ", ".join(absent[:8]),
        )
    about = dict(classes=classes, name=name, split=split)
    return folder.files(base, members, channels=channels, **about)


def open100(root, split, *, channels=3, classes_file=""):
    """ImageNet-100: 100 of the classes, labels 0..99; otherwise as `open`.

    Args:
        classes_file: another list than the built-in one.
    """
    listed = classes_file or str(LIST_100)
    return open(root, split, channels=channels, classes_file=listed)


def read_list(path) -> tuple[str, ...]:
    """Return the wnids of a text file, one per line; "#" begins a comment.

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
