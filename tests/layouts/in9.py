"""ImageNet-9: foregrounds, what they are put before, and masks to cut them out."""

import json

import numpy as np

from tests.layouts import pictures

CLASSES = (
    "00_dog",
    "01_bird",
    "02_wheeled vehicle",
    "03_reptile",
    "04_carnivore",
    "05_insect",
    "06_musical instrument",
    "07_primate",
    "08_fish",
)
VARIANTS = ("original", "mixed_same", "mixed_rand", "mixed_next", "only_fg", "no_fg")


def in9(root, *, size=pictures.SIZE, names=CLASSES, count=2, backgrounds=2, masks=True):
    """Write <variant>/val/<class>/*.JPEG and fg_mask/val/<class>/*.npy.

    Args:
        names: of the classes.
        count: images of each class, in each variant.
        backgrounds: images of each class in "only_bg_t".
        masks: write those of "original".
    """
    for label, name in enumerate(names):
        for k, variant in enumerate(VARIANTS):
            for i in range(count):
                picture = pictures.thing(label, 10 * k + i, size=size)
                path = root / variant / "val" / name / f"{name}_{i}.JPEG"
                pictures.save(path, picture.image)
                if variant == "original" and masks:
                    path = root / "fg_mask" / "val" / name / f"{name}_{i}.npy"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    np.save(path, picture.mask > 0)
        for i in range(backgrounds):
            picture = pictures.thing(label, 100 + i, size=size)
            path = root / "only_bg_t" / "val" / name / f"{name}_{i}.JPEG"
            pictures.save(path, np.where(picture.mask[..., None], 0, picture.image))
    return root


def mapping(path, classes):
    """Write a mapping from class i of a model to class i modulo 9; the last to none."""
    table = {str(i): i % len(CLASSES) for i in range(classes)}
    path.write_text(json.dumps(table | {str(classes - 1): -1}))
    return path
