"""MetaShift cats and dogs: classes in training contexts that change in the test.

Source: Liang & Zou 2022, arXiv:2202.06523; layout of the cat-dog task as in
ananthu-aniraj/ifam: MetaDatasetCatDog/{train,test}/{cat,dog}/<context>/*.jpg.
"""

import numpy as np

from vitssl.data.sources import folder, layout, wrappers

EXPECTED = "ROOT/{train,test}/{cat,dog}/<context, as cat(sofa)>/*.jpg"
SPLITS = {key: key for key in ("train", "val", "test")}


def open(
    root, split, *, image_sub_path_train="train", image_sub_path_test="test", channels=3
):
    """One split; the class is the first folder, the group the folder of the image.

    Examples also have "group", the rank of that folder among those of all splits.

    Args:
        root: MetaDatasetCatDog.
        split: "train" or "test"; "val" only where there is such a folder.
        image_sub_path_train, image_sub_path_test: folders of these two.

    Raises:
        DataError: no such folder, or no image in it.
    """
    own = {"train": image_sub_path_train, "test": image_sub_path_test}
    place = layout.split_of("metashift", split, SPLITS | own)
    base = layout.root_of("metashift", root, EXPECTED)
    if not (base / place).is_dir():
        layout.fail("metashift", f"no folder {place}", base, EXPECTED)
    # Two splits may be one folder, and it is read once.
    there = [s for s in dict.fromkeys((SPLITS | own).values()) if (base / s).is_dir()]
    classes = folder.classes_of(base, there)
    members = {s: folder.members(base, s, classes) for s in there}
    contexts = {s: [_context(path, s) for path, _ in members[s]] for s in there}
    every = sorted({c for own in contexts.values() for c in own})
    rank = {context: i for i, context in enumerate(every)}
    group = np.array([rank[c] for c in contexts[place]], np.int32)
    about = dict(classes=classes, name="metashift", split=split)
    files = folder.files(base, members[place], channels=channels, **about)
    return wrappers.WithColumns(files, {"group": group})


def _context(path, place):
    """Return the folder of an image, relative to that of its split."""
    return path.removeprefix(f"{place}/").rpartition("/")[0]
