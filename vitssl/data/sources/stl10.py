"""STL-10 as distributed: raw bytes, each plane stored column by column.

Source: Coates, Lee & Ng 2011, "An Analysis of Single-Layer Networks in Unsupervised
Feature Learning".
"""

from typing import Annotated

import numpy as np

from vitssl import errors, ranges
from vitssl.data.sources import blocks, layout, wrappers

SHAPE = (3, 96, 96)
SPLITS = {k: k for k in ("train", "test", "unlabeled", "train+unlabeled")}
SPLITS["val"] = "test"
EXPECTED = (
    "ROOT/stl10_binary/{train_X,train_y,test_X,test_y,unlabeled_X}.bin and "
    "class_names.txt"
)


def open(root, split, *, fold: Annotated[int, ranges.Range(-1, 9)] = -1):
    """STL-10, 96x96: 5000 to train, 8000 to test, 100 000 unlabelled (label -1).

    Args:
        root: folder with `stl10_binary`, or that folder itself.
        fold: 0..9 takes that predefined fold of 1000 training images, -1 all.

    Raises:
        DataError: files are missing, or their sizes do not fit each other.
        UsageError: a fold of another split than train.
    """
    split = layout.split_of("stl10", split, SPLITS)
    base = layout.root_of("stl10", root, EXPECTED, "stl10_binary")
    parts = [_part(base, part) for part in split.split("+")]
    names = base / "class_names.txt"
    classes = names.read_text().split() if names.is_file() else range(1, 11)
    source = blocks.Blocks(
        blocks=tuple(block for block, _ in parts),
        shape=SHAPE,
        transposed=True,
        labels=np.concatenate([labels for _, labels in parts]),
        classes=tuple(str(c) for c in classes),
        root=str(base),
        name="stl10",
        split=split,
    )
    if fold == -1:
        return source
    if split != "train":
        raise errors.UsageError(f"stl10: fold={fold} split={split!r}: of train only")
    path = base / "fold_indices.txt"
    layout.need("stl10", base, [path.name], EXPECTED)
    folds = [line.split() for line in path.read_text().splitlines() if line.strip()]
    keep = np.array(folds[fold] if fold < len(folds) else [], np.int64)
    if not len(keep) or keep.min() < 0 or keep.max() >= len(source):
        raise errors.DataError(f"{path}: no fold {fold} of {len(source)} images")
    return wrappers.Subset(source, keep)


def _part(base, part):
    """Return the images of one file as a `Block`, and their labels 0..9 or -1."""
    images, labels = base / f"{part}_X.bin", base / f"{part}_y.bin"
    needed = [images] if part == "unlabeled" else [images, labels]
    layout.need("stl10", base, [p.name for p in needed], EXPECTED)
    size, each = images.stat().st_size, int(np.prod(SHAPE))
    count, rest = divmod(size, each)
    if rest or not count:
        raise errors.DataError(
            f"{images}: {size} bytes are not a whole number of images of {each}; the "
            "download is incomplete"
        )
    if part == "unlabeled":
        y = np.full(count, -1, np.int32)
    else:
        y = np.fromfile(labels, np.uint8).astype(np.int32) - 1
        if len(y) != count or y.min() < 0 or y.max() > 9:
            raise errors.DataError(
                f"{labels}: want {count} labels 1..10, one per image; found {len(y)} "
                f"in {y.min() + 1}..{y.max() + 1}"
            )
    block = blocks.Block(str(images), 0, count, np.empty(0, np.uint8))
    return block, y
