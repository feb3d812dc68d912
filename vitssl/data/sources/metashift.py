"""MetaShift cats and dogs: classes in training contexts that change in the test.

Source: Liang & Zou 2022, arXiv:2202.06523; layout of the cat-dog task as in
ananthu-aniraj/ifam: MetaDatasetCatDog/{train,test}/{cat,dog}/<context>/*.jpg.
"""

import pathlib

import numpy as np

from vitssl.data.sources import annotated, folder, layout

EXPECTED = "ROOT/{train,test}/{cat,dog}/<context, as cat(sofa)>/*.jpg"
SPLITS = {key: key for key in ("train", "val", "test")}


def open(root, split, *, channels=3):
    """One split; the class is the first folder, the group the folder of the image.

    Args:
        root: MetaDatasetCatDog.
        split: "train" or "test"; "val" only where there is such a folder.
        channels: of the images.

    Returns:
        Examples also have "group", the rank of the folder among those of all splits.

    Raises:
        DataError: no such folder, or no image in it.
    """
    split = layout.split_of("metashift", split, SPLITS)
    base = layout.root_of("metashift", root, EXPECTED)
    if not (base / split).is_dir():
        layout.fail("metashift", f"no folder {split}", base, EXPECTED)
    there = [s for s in SPLITS if (base / s).is_dir()]
    classes = sorted({c for s in there for c in folder.folders(base / s)})
    paths = {s: list(folder.walk(base / s)) for s in there}
    contexts = sorted({_context(p) for part in paths.values() for p in part})
    members = [
        (f"{split}/{path}", classes.index(path.partition("/")[0]))
        for path in paths[split]
        if "/" in path
    ]
    files = folder.files(
        base,
        members,
        classes=tuple(classes),
        channels=channels,
        name="metashift",
        split=split,
    )
    rank = {context: i for i, context in enumerate(contexts)}
    own = [rank[_context(path.partition("/")[2])] for path, _ in members]
    return annotated.Annotated(files, {"group": np.array(own, np.int32)})


def _context(path):
    """Return the folder of an image, relative to the split."""
    return str(pathlib.PurePosixPath(path).parent)
