"""SIIM-ACR pneumothorax: chest X-rays in two classes, with masks of the lesions.

Layout: that of ananthu-aniraj/ifam prepare_siim_acr.py. Its masks need care: the
competition encodes them column by column, which the original reads row by row, and an
image may have several lesions, whose union is the mask.
"""

import os
import pathlib

from vitssl import errors
from vitssl.data import decode
from vitssl.data.sources import folder, layout, wrappers

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


def open(root, split, *, masks=False, channels=3):
    """One split; the label is the parent folder, images sorted by their path.

    Args:
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
            if os.path.splitext(entry)[1].lower() in decode.SUFFIXES:
                members.append((f"{name}/{label}/{entry}", label))
    about = dict(classes=CLASSES, name="siim_acr", split=split)
    files = folder.files(base, members, channels=channels, **about)
    return wrappers.WithColumns(files, {}, _masks(base, members) if masks else ())


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
