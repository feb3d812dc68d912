"""Image files with further columns: groups, keypoints, boxes, masks."""

import dataclasses
import os

import numpy as np

from vitssl import errors
from vitssl.data import decode
from vitssl.data.sources import folder


@dataclasses.dataclass(frozen=True, eq=False)
class Annotated:
    """A source of files whose examples carry further columns.

    Attributes:
        files: the images and labels.
        columns: {name: array [N, ...]}, one row per image.
        masks: paths [N] of mask images ("" = all background), or () for none. A mask
            is read as uint8 [H, W], 1 where a pixel is above 0.
    """

    files: folder.Files
    columns: dict = dataclasses.field(default_factory=dict)
    masks: tuple[str, ...] = ()

    def __len__(self):
        return len(self.files)

    def __getattr__(self, name):
        """Return what the files know: classes, channels, labels, root, name, split."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(object.__getattribute__(self, "files"), name)

    def __getitem__(self, i):
        example = self.files[i]
        for name, values in self.columns.items():
            example[name] = values[i]
        if self.masks:
            example["mask"] = self._mask(i, example["image"].shape[:2])
        return example

    def _mask(self, i, size):
        if not self.masks[i]:
            return np.zeros(size, np.uint8)
        mask = decode.read(self.masks[i], channels=1)[..., 0]
        return (mask > 0).astype(np.uint8)


def same_class_numbers(labels, how):
    """Return (labels from 0, the distinct ones): numbered over what is given.

    Args:
        labels: any integers.
        how: of these the distinct ones, to number by.
    """
    known = np.unique(how)
    return np.searchsorted(known, labels).astype(np.int32), known


def mask_paths(paths, root, suffix=".png"):
    """Return the mask file of every image path relative to a root.

    Raises:
        DataError: masks without image or images without mask, with an example.
    """
    found = [os.path.join(root, os.path.splitext(p)[0] + suffix) for p in paths]
    missing = [p for p in found if not os.path.exists(p)]
    if missing:
        raise errors.DataError(
            f"{len(missing)} of {len(found)} images have no mask, for example "
            f"{decode.printable(missing[0])}"
        )
    return tuple(found)
