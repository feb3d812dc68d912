"""Waterbirds: birds pasted on land or water, mostly, but not always, as they live.

Source: Sagawa et al. 2020, arXiv:1911.08731; split names as in ananthu-aniraj/ifam
data_sets/waterbirds_dataset.py.
"""

import csv

import numpy as np

from vitssl import errors
from vitssl.data.sources import folder, layout, wrappers

FOLDER = "waterbird_complete95_forest2water2"
EXPECTED = f"ROOT/metadata.csv (or ROOT/{FOLDER}/metadata.csv) and the images beside it"
COLUMNS = ("img_filename", "y", "split", "place")
SPLITS = {k: k for k in ("train", "val", "test", "worst_case", "best_case")}
CLASSES = ("landbird", "waterbird")


def open(
    root,
    split,
    *,
    image_sub_path_train=FOLDER,
    image_sub_path_test=FOLDER,
    mask_sub_path="",
    channels=3,
):
    """One split of Waterbirds.

    Examples also have "group" = 2 y + place: a landbird on land, on water, a waterbird
    on land, on water.

    Args:
        root: the folder with metadata.csv, or the one above it.
        split: "train", "val", "test"; "worst_case" and "best_case" are the test images
            whose place is not, or is, the bird's own; waterbirds come first.

        image_sub_path_train, image_sub_path_test: folder below root, if it is not
            root itself, that holds metadata.csv and the images; of "train" and "val",
            and of the others.
        mask_sub_path: folder below root of masks by the names of the images, such as
            CUB's "segmentations": examples also have "mask" uint8 [H, W]; "" = none.

    Raises:
        DataError: no metadata, columns that are missing from it, images without mask.
    """
    split = layout.split_of("waterbirds", split, SPLITS)
    given = layout.root_of("waterbirds", root, EXPECTED)
    learns = split in ("train", "val")
    own = image_sub_path_train if learns else image_sub_path_test
    there = [p for p in (given, given / own) if (p / "metadata.csv").is_file()]
    if not there:
        layout.fail("waterbirds", "no metadata.csv", given, EXPECTED)
    number = {"train": 0, "val": 1}.get(split, 2)
    rows = [r for r in _rows(there[0] / "metadata.csv") if r[2] == number]
    if split.endswith("_case"):
        rows = [r for r in rows if (r[1] == r[3]) == (split == "best_case")]
        rows.sort(key=lambda r: -r[1])  # Stable: file order inside either class.
    members = [(name, y) for name, y, _, _ in rows]
    about = dict(classes=CLASSES, name="waterbirds", split=split)
    files = folder.files(there[0], members, channels=channels, **about)
    group = np.array([2 * y + place for _, y, _, place in rows], np.int32)
    shown = ()
    if mask_sub_path:
        paths, masks = [name for name, _ in members], given / mask_sub_path
        shown = layout.beside(paths, masks, ".png", "mask")
    return wrappers.WithColumns(files, {"group": group}, shown)


def _rows(path):
    """Return [(file name, y, split, place)].

    Raises:
        DataError: a column is missing.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
        if missing:
            raise errors.DataError(
                f"waterbirds: {path}: no column {', '.join(missing)}; "
                f"there is: {', '.join(reader.fieldnames or ())}"
            )
        rows = [[row[c] for c in COLUMNS] for row in reader]
    return [(name, *map(int, numbers)) for name, *numbers in rows]
