"""SIIM-ACR pneumothorax: chest X-rays in two classes, with masks of the lesions.

Layout: that of ananthu-aniraj/ifam prepare_siim_acr.py; `vitssl prepare siim_acr` makes
it of the published files. Its masks need care: the competition encodes them column by
column, which the original reads row by row, and an image may have several lesions,
whose union is the mask.
"""

import os
import pathlib

import numpy as np

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


def open(
    root,
    split,
    *,
    image_sub_path_train="train_set",
    image_sub_path_test="full_test_set",
    mask_sub_path="all_masks",
    masks=False,
    channels=3,
):
    """One split; the label is the parent folder, images sorted by their path.

    Args:
        split: "train", "test", "robust" or "non_robust".
        image_sub_path_train, image_sub_path_test: folders of the first two splits.
        mask_sub_path: folder of the masks.
        masks: examples also have "mask" uint8 [H, W]. An image of class 1 needs one.
        channels: 1 or 3 (grey, repeated).

    Raises:
        DataError: no such folder; an image without mask; a mask without image.
    """
    own = {"train": image_sub_path_train, "test": image_sub_path_test}
    name = layout.split_of("siim_acr", split, SPLITS | own)
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
    folders = {name, *SPLITS.values(), *own.values()}
    shown = _masks(base, members, mask_sub_path, folders) if masks else ()
    return wrappers.WithColumns(files, {}, shown)


def run_lengths(text: str, shape: tuple[int, int]) -> np.ndarray:
    """Return the mask uint8 [H, W], 0 or 1, of one lesion's run lengths.

    They are pairs: pixels to skip since the end of the last run, and pixels of the run,
    counted down the columns, from the left. "-1" is no lesion.

    Raises:
        ValueError: no such pairs, or they leave the image.
    """
    flat = np.zeros(shape[0] * shape[1], np.uint8)
    numbers = [int(word) for word in text.split()]
    if numbers == [-1]:
        numbers = []
    if len(numbers) % 2 or min(numbers, default=0) < 0:
        raise ValueError(f"run lengths {text[:20]!r}...: want pairs of whole numbers")
    at = 0
    for skip, run in zip(numbers[::2], numbers[1::2], strict=True):
        at += skip
        flat[at : at + run] = 1
        at += run
    if at > flat.size:
        raise ValueError(f"run lengths end at pixel {at}, the image has {flat.size}")
    return flat.reshape(shape[::-1]).T


def lesions(texts, shape: tuple[int, int]) -> np.ndarray:
    """Return the union uint8 [H, W] of the run lengths of an image's lesions.

    Raises:
        ValueError: see `run_lengths`.
    """
    masks = [run_lengths(text, shape) for text in texts]
    return np.ascontiguousarray(np.max(masks, axis=0, initial=0))


def _masks(base, members, sub_path, folders):
    """Return the mask of every image; "" where a healthy one has none."""
    found = []
    for path, label in members:
        mask = base / sub_path / f"{pathlib.Path(path).stem}.png"
        if not mask.exists() and label:
            raise errors.DataError(f"siim_acr: {path} has no mask: {mask} is missing")
        found.append(str(mask) if mask.exists() else "")
    orphans = {p.stem for p in (base / sub_path).glob("*.png")}
    orphans -= {p.stem for s in folders for p in (base / s).glob("*/*")}
    if orphans:
        raise errors.DataError(
            f"siim_acr: {base / sub_path}: {len(orphans)} mask(s) without an image, "
            f"for example {sorted(orphans)[0]}.png"
        )
    return tuple(found)
