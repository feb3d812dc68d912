"""ImageNet-9: nine classes before their own, other, or no backgrounds.

Source: Xiao et al. 2020, arXiv:2006.09994; layout of MadryLab/backgrounds_challenge.
"""

import dataclasses
import os

import numpy as np

from vitssl import errors
from vitssl.data import decode
from vitssl.data.sources import folder, layout

EXPECTED = "ROOT/<variant, as original or mixed_rand>/val/<class>/*.JPEG"
MASKS = "ROOT/fg_mask/val/<class>/<name of the image>.npy"
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
        root: of the variants.
        split: a variant; "train", "val" and "test" are "original".
        channels: of the images.

    Raises:
        DataError: no such variant, or no image in it.
    """
    there = variants(root)
    split = FOREGROUNDS if split in layout.ALIASES else split
    split = layout.split_of("in9", split, {name: name for name in there})
    base = layout.root_of("in9", root, EXPECTED)
    below = f"{split}/val"
    classes = tuple(folder.folders(base / below))
    rank = {name: i for i, name in enumerate(classes)}
    members = [
        (f"{below}/{path}", rank[path.partition("/")[0]])
        for path in folder.walk(base / below)
        if "/" in path
    ]
    return folder.files(
        base, members, classes=classes, channels=channels, name="in9", split=split
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Challenge:
    """Every foreground before every one of some backgrounds.

    Image i is foreground i // n, cut out by its mask, before background i % n.

    Attributes:
        foregrounds, backgrounds: sources of files.
        chosen: [n] indices of the backgrounds.
        masks: paths of the foregrounds' masks.
    """

    foregrounds: folder.Files
    backgrounds: folder.Files
    chosen: np.ndarray
    masks: tuple[str, ...]

    def __len__(self):
        return len(self.foregrounds) * len(self.chosen)

    def __getattr__(self, name):
        """Return what the foregrounds know: classes, channels, root, name, split."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(object.__getattribute__(self, "foregrounds"), name)

    @property
    def labels(self):
        """[N] int32, of the foregrounds."""
        return np.repeat(self.foregrounds.labels, len(self.chosen))

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        front, back = divmod(i, len(self.chosen))
        example = self.foregrounds[front]
        behind = self.backgrounds[int(self.chosen[back])]["image"]
        mask = np.load(self.masks[front], allow_pickle=False).astype(np.float32)
        image, mask = example["image"], mask.reshape(*mask.shape[:2], -1)[..., :1]
        if behind.shape != image.shape or mask.shape[:2] != image.shape[:2]:
            raise errors.DataError(
                f"in9: {decode.printable(self.masks[front])}: image {image.shape}, "
                f"background {behind.shape} and mask {mask.shape} differ in size"
            )
        example["image"] = np.rint(behind * (1 - mask) + image * mask).astype(np.uint8)
        return example


def challenge(root, count, *, channels=3):
    """The backgrounds challenge: `Challenge` with `count` backgrounds, spread evenly.

    Args:
        root: of the variants "original" and "only_bg_t", and the masks.
        count: backgrounds for every foreground; more than there are = all of them.
        channels: of the images.

    Raises:
        DataError: a variant or a mask is not there.
    """
    front = open(root, FOREGROUNDS, channels=channels)
    back = open(root, BACKGROUNDS, channels=channels)
    paths = [os.path.relpath(front.path(i), front.root) for i in range(len(front))]
    cut = len(FOREGROUNDS) + 1
    masks = tuple(
        os.path.join(front.root, CUTS, os.path.splitext(p[cut:])[0] + ".npy")
        for p in paths
    )
    missing = [path for path in masks if not os.path.exists(path)]
    if missing:
        problem = f"{len(missing)} of {len(masks)} foregrounds have no mask"
        layout.fail("in9", problem, missing[0], MASKS)
    some = np.linspace(0, len(back) - 1, min(count, len(back))).round().astype(int)
    return Challenge(front, back, some, masks)
