"""Caltech-UCSD Birds 200-2011: labels, 15 keypoints, boxes and segmentations.

Layout: https://www.vision.caltech.edu/datasets/cub_200_2011. NABirds has the same.
"""

from typing import Literal

import numpy as np

from vitssl import errors, ranges
from vitssl.data.sources import folder, layout, wrappers

EXPECTED = (
    "CUB_200_2011/{images.txt, image_class_labels.txt, train_test_split.txt, "
    "classes.txt, bounding_boxes.txt, parts/part_locs.txt, images/<class>/*.jpg, "
    "segmentations/<class>/*.png}"
)
SPLITS = {key: key for key in ("train", "val", "test")}


def _table(root, name, columns):
    """Return the rows of an index file, split at white space.

    Raises:
        DataError: it is missing, or a row has fewer columns.
    """
    layout.need("cub", root, [name], EXPECTED)
    path = root / name
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    if bad := [row for row in rows if len(row) < columns]:
        raise errors.DataError(
            f"cub: {path}: {' '.join(bad[0])!r}: {columns} columns are needed"
        )
    return rows


def open(
    root,
    split,
    *,
    images="images",
    image_sub_path_train="",
    image_sub_path_test="",
    mask_sub_path="segmentations",
    train_share: ranges.Share = 1.0,
    labels: Literal["all", "split"] = "all",
    keypoints=True,
    masks=False,
    channels=3,
):
    """One split of CUB-200-2011.

    Examples also have "keypoints" float32 [P, 3] (x, y, visible), "box" float32 [4]
    (x, y, width, height), "mask" uint8 [H, W].

    Args:
        root: the folder CUB_200_2011.
        split: "train", "test", or "val": what train_share leaves of the training set.
        images: folder of the images, relative to root or absolute: another one with
            the same file names gives the birds before other backgrounds (Waterbirds).
        image_sub_path_train, image_sub_path_test: the same of one split alone, "val"
            being a part of training; "" = `images`.
        mask_sub_path: folder of the segmentations, like `images`.
        train_share: first part of the training set that is "train"; the rest, in file
            order, is "val".
        labels: "all": numbered over all images; "split": over those of the split, as
            in the original, where a class that is missing shifts the numbers.
        keypoints: read parts/part_locs.txt and bounding_boxes.txt.
        masks: read the segmentations.

    Raises:
        DataError: what is missing or does not fit.
    """
    split = layout.split_of("cub", split, SPLITS)
    base = layout.root_of("cub", root, EXPECTED)
    names = {int(i): path for i, path, *_ in _table(base, "images.txt", 2)}
    label = {int(i): int(c) for i, c, *_ in _table(base, "image_class_labels.txt", 2)}
    train = {int(i): t == "1" for i, t, *_ in _table(base, "train_test_split.txt", 2)}
    called = {int(i): name for i, name, *_ in _table(base, "classes.txt", 2)}
    own = image_sub_path_test if split == "test" else image_sub_path_train
    images = own or images
    if not (base / images).is_dir():
        layout.fail("cub", f"no folder {images}", base, EXPECTED)
    ids = _members(list(names), train, split, train_share)
    known = sorted({label[i] for i in ids} if labels == "split" else {*label.values()})
    rank = {c: k for k, c in enumerate(known)}
    files = folder.files(
        base / images,
        [(names[i], rank[label[i]]) for i in ids],
        classes=tuple(called.get(c, str(c)) for c in known),
        channels=channels,
        name="cub",
        split=split,
    )
    columns = _points(base, ids) if keypoints else {}
    shown = ()
    if masks:
        paths = [names[i] for i in ids]
        shown = layout.beside(paths, base / mask_sub_path, ".png", "mask")
    return wrappers.WithColumns(files, columns, shown)


def _members(ids, train, split, share):
    """Return the ids of a split, in file order."""
    if split == "test":
        return [i for i in ids if not train[i]]
    ids = [i for i in ids if train[i]]
    cut = int(share * len(ids))
    return ids[:cut] if split == "train" else ids[cut:]


def _points(base, ids):
    """Return {"keypoints" [N, P, 3], "box" [N, 4]}."""
    count = len(_table(base, "parts/parts.txt", 2))
    row = {image: r for r, image in enumerate(ids)}
    points = np.zeros((len(ids), count, 3), np.float32)
    for image, part, x, y, visible in _table(base, "parts/part_locs.txt", 5):
        if int(image) in row:
            points[row[int(image)], int(part) - 1] = float(x), float(y), float(visible)
    boxes = np.zeros((len(ids), 4), np.float32)
    for image, *box in _table(base, "bounding_boxes.txt", 5):
        if int(image) in row:
            boxes[row[int(image)]] = [float(v) for v in box]
    return {"keypoints": points, "box": boxes}
