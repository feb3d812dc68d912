"""ImageNet-9: nine classes before their own, other, or no backgrounds.

Source: Xiao et al. 2020, arXiv:2006.09994; layout of MadryLab/backgrounds_challenge.
"""

import dataclasses
import os

import numpy as np

from vitssl import errors
from vitssl.data import decode
from vitssl.data.sources import folder, layout, wrappers

EXPECTED = "ROOT/<variant, as original or mixed_rand>/val/<class>/*.JPEG"
FOREGROUNDS, BACKGROUNDS, CUTS = "original", "only_bg_t", "fg_mask"


def variants(root) -> tuple[str, ...]:
    """Return the variants that are there: folders of ROOT with images in "val"."""
    base = layout.root_of("in9", root, EXPECTED)
    found = [
        name
        for name in sorted(os.listdir(base))
        if name != CUTS
        and (base / name / "val").is_dir()
        and folder.folders(base / name / "val")
    ]
    if not found:
        layout.fail("in9", "no variant", base, EXPECTED)
    return tuple(found)


def open(root, split, *, channels=3):
    """One variant; the label is the rank of the class folder.

    Args:
        split: a variant; "train", "val" and "test" are "original".

    Raises:
        DataError: no such variant, or no image in it.
    """
    split = FOREGROUNDS if split in layout.ALIASES else split
    split = layout.split_of("in9", split, {name: name for name in variants(root)})
    base = layout.root_of("in9", root, EXPECTED)
    part = f"{split}/val"
    classes = folder.classes_of(base, [part])
    members = folder.members(base, part, classes)
    about = dict(classes=classes, name="in9", split=split)
    return folder.files(base, members, channels=channels, **about)


@dataclasses.dataclass(frozen=True, eq=False)
class Challenge(wrappers.Wrapper):
    """Every foreground before every one of some backgrounds.

    Image i is foreground i // n, cut out by its mask, before background i % n.

    Attributes:
        whole: the foregrounds.
        chosen: [n] indices of the backgrounds.
        masks: paths of the foregrounds' masks.
    """

    backgrounds: folder.Files
    chosen: np.ndarray
    masks: tuple[str, ...]

    def __len__(self):
        return len(self.whole) * len(self.chosen)

    @property
    def labels(self):
        """[N] int32, of the foregrounds."""
        return np.repeat(self.whole.labels, len(self.chosen))

    def example(self, i: int) -> dict:
        """Return image i.

        Raises:
            DataError: image, background and mask differ in size.
        """
        front, back = divmod(i, len(self.chosen))
        example = self.whole[front]
        behind = self.backgrounds[int(self.chosen[back])]["image"]
        mask = decode.array(self.masks[front]).astype(np.float32)
        image = example["image"]
        if behind.shape != image.shape or mask.shape[:2] != image.shape[:2]:
            raise errors.DataError(
                f"in9: {decode.printable(self.masks[front])}: image {image.shape}, "
                f"background {behind.shape} and mask {mask.shape} differ in size"
            )
        mask = mask.reshape(*mask.shape[:2], -1)[..., :1].clip(0, 1)
        example["image"] = np.rint(behind * (1 - mask) + image * mask).astype(np.uint8)
        return example


def challenge(root, count, *, channels=3) -> Challenge:
    """The backgrounds challenge, with `count` backgrounds that are spread evenly.

    Args:
        root: of the variants "original" and "only_bg_t", and of the masks,
            ROOT/fg_mask/val/<class>/<name of the image>.npy.
        count: backgrounds for every foreground; more than there are = all of them.

    Raises:
        DataError: a variant or a mask is not there.
    """
    front = open(root, FOREGROUNDS, channels=channels)
    back = open(root, BACKGROUNDS, channels=channels)
    cut = len(FOREGROUNDS) + 1
    paths = [front.relative(i)[cut:] for i in range(len(front))]
    masks = layout.beside(paths, os.path.join(front.root, CUTS), ".npy", "mask")
    some = np.linspace(0, len(back) - 1, min(count, len(back))).round().astype(int)
    return Challenge(front, back, some, masks)
