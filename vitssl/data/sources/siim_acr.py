"""SIIM-ACR pneumothorax: chest X-rays in two classes, with masks of the lesions.

Layout: that of ananthu-aniraj/ifam prepare_siim_acr.py, whose masks are corrected here:
the competition encodes them column by column, and an image may have several lesions.
"""

import csv
import dataclasses
import os
import pathlib

import numpy as np

from vitssl import errors
from vitssl.data import decode, dicom
from vitssl.data.sources import annotated, folder, layout

EXPECTED = (
    "ROOT/{train_set,full_test_set,robust_test_set,non_robust_test_set}/{0,1}/"
    "<id>.{dcm,png,jpg} and, for masks, ROOT/all_masks/<id>.png"
)
SPLITS = {
    "train": "train_set",
    "test": "full_test_set",
    "robust": "robust_test_set",
    "non_robust": "non_robust_test_set",
}
CLASSES = ("healthy", "pneumothorax")


@dataclasses.dataclass(frozen=True, eq=False)
class Radiographs(folder.Files):
    """Files of which some are DICOM."""

    def __getitem__(self, i):
        path = self.path(i)
        if not path.endswith(".dcm"):
            return super().__getitem__(i)
        data = pathlib.Path(path).read_bytes()
        image = dicom.decode(data, name=decode.printable(path))[..., None]
        image = np.repeat(image, self.channels, axis=-1)
        return {"image": image, "label": int(self.labels[i])}


def open(root, split, *, masks=False, channels=3):
    """One split; the label is the parent folder, images sorted by their path.

    Args:
        root: of the prepared set.
        split: "train", "test", "robust" or "non_robust".
        masks: examples also have "mask" uint8 [H, W]. An image of class 1 needs one.
        channels: 1 or 3 (grey, repeated).

    Raises:
        DataError: no such folder; an image without mask; a mask without image.
    """
    name = layout.split_of("siim_acr", split, SPLITS)
    base = layout.root_of("siim_acr", root, EXPECTED)
    members = []
    for label in (0, 1):
        place = base / name / str(label)
        if not place.is_dir():
            layout.fail("siim_acr", f"no folder {name}/{label}", base, EXPECTED)
        for entry in sorted(os.listdir(place)):
            if os.path.splitext(entry)[1].lower() in (".dcm", *decode.SUFFIXES):
                members.append((f"{name}/{label}/{entry}", label))
    made = folder.files(
        base,
        members,
        classes=CLASSES,
        channels=channels,
        name="siim_acr",
        split=split,
    )
    fields = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
    files = Radiographs(**fields)
    return annotated.Annotated(files, {}, _masks(base, members) if masks else ())


def _masks(base, members):
    """Return the mask of every image; "" where a healthy one has none."""
    found = []
    for path, label in members:
        mask = base / "all_masks" / f"{pathlib.Path(path).stem}.png"
        if not mask.exists() and label:
            raise errors.DataError(f"siim_acr: {path} has no mask: {mask} is missing")
        found.append(str(mask) if mask.exists() else "")
    orphans = {p.stem for p in (base / "all_masks").glob("*.png")}
    orphans -= {p.stem for s in SPLITS.values() for p in (base / s).glob("*/*")}
    if orphans:
        raise errors.DataError(
            f"siim_acr: {base / 'all_masks'}: {len(orphans)} mask(s) without an image, "
            f"for example {sorted(orphans)[0]}.png"
        )
    return tuple(found)


def run_lengths(text, height, width, *, transposed=True):
    """Decode a mask from "start length start length ...".

    Starts count from the end of the run before; pixels run down the columns.

    Args:
        text: of train-rle.csv; "-1" or "" is an empty mask.
        height, width: of the mask.
        transposed: False reads along the rows, as the original does.

    Returns:
        uint8 [height, width] of 0 and 255.
    """
    numbers = [int(v) for v in text.split()]
    if numbers in ([], [-1]):
        return np.zeros((height, width), np.uint8)
    flat, at = np.zeros(height * width, np.uint8), 0
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        at += start
        flat[at : at + length] = 255
        at += length
    if transposed:
        return flat.reshape(width, height).T
    return flat.reshape(height, width)


def lesions(path, height=1024, width=1024):
    """Return {image id: mask} of train-rle.csv, all lesions of an image united."""
    found = {}
    with pathlib.Path(path).open(newline="") as file:
        for row in csv.DictReader(file, skipinitialspace=True):
            mask = run_lengths(row["EncodedPixels"].strip(), height, width)
            old = found.get(row["ImageId"])
            found[row["ImageId"]] = mask if old is None else np.maximum(old, mask)
    return found
