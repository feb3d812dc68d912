"""Sets whose layout is class folders: ImageNet, leaves, cats and dogs, anything."""

import os

import numpy as np

from tests.layouts import pictures
from vitssl.data.sources import sarcld

IN_LIST = ("n01498041", "n01537544", "n01580077", "n01592084")
OTHERS = ("n01440764",)  # Not one of the 100.
PLANTS = (
    "Apple___Apple_scab",
    "Apple___healthy",
    "Corn_(maize)___healthy",
    "Tomato___Late_blight",
)
CONTEXTS = {  # split: {class: contexts}
    "train": {"cat": ("sofa", "bed"), "dog": ("bench", "bike")},
    "test": {"cat": ("shelf",), "dog": ("shelf",)},
}


def classes(base, names, count, file, *, first=0):
    """Write `count` pictures of each class folder of `base`.

    Args:
        names: of the folders; the colour of a thing is the rank of its folder here.
        file: name of a file, of the fields {name} and {i}, i from `first` on.
    """
    for label, name in enumerate(names):
        for i in range(first, first + count):
            path = base / name / file.format(name=name, i=i)
            pictures.save(path, pictures.thing(label, i).image)


def folder(root, *, names=("ant", "bee", "cow"), train=8, val=4):
    """Write {train,val}/<class>/*.jpg."""
    classes(root / "train", names, train, "{name} {i}.jpg")
    classes(root / "val", names, val, "{name} {i}.jpg", first=train)
    return root


def imagenet(root, *, wnids=(*OTHERS, *IN_LIST), train=6, val=3):
    """Write {train,val}/<wnid>/*.JPEG."""
    classes(root / "train", wnids, train, "{name}_{i}.JPEG")
    # Validation images are numbered over all classes, under a name of their own.
    for k, wnid in enumerate(wnids):
        for i in range(val):
            name = f"ILSVRC2012_val_{k * val + i + 1:08d}.JPEG"
            picture = pictures.thing(k, train + i)
            pictures.save(root / "val" / wnid / name, picture.image)
    return root


def metashift(root, *, count=6):
    """Write MetaDatasetCatDog/{train,test}/<class>/<class>(<context>)/*.jpg."""
    base = root / "MetaDatasetCatDog"
    number = 2300000  # Numbers of Visual Genome.
    for split, kinds in CONTEXTS.items():
        for label, (name, contexts) in enumerate(kinds.items()):
            for context in contexts:
                for _ in range(count):
                    path = base / split / name / f"{name}({context})" / f"{number}.jpg"
                    pictures.save(path, pictures.thing(label, number).image)
                    number += 1
    return base


def plantvillage(root, *, names=PLANTS, train=6, val=3):
    """Write {train,valid}/<plant>___<condition>/*.JPG."""
    classes(root / "train", names, train, "{i:08x}___FREC_Leaf {i}.JPG")
    classes(root / "valid", names, val, "{i:08x}___FREC_Leaf {i}.JPG", first=train)
    return root


def leaf(c, i):
    """Return the stem of photograph i of class c of SAR-CLD-2024."""
    return f"X{c}{i:03d}"


def sarcld_photographs(root, *, count=15, copied=(0, 1)):
    """Write the archives of SAR-CLD-2024: photographs and augmented copies of some.

    Args:
        count: photographs of each class; one is a PNG.
        copied: numbers of those that have a copy.
    """
    for c, name in enumerate(sarcld.CLASSES):
        for i in range(count):
            suffix = ".PNG" if (c, i) == (2, 0) else ".jpg"
            path = root / sarcld.ORIGINAL / name / f"{leaf(c, i)}{suffix}"
            pictures.save(path, pictures.thing(c, i).image)
        for i in copied:
            path = root / sarcld.AUGMENTED / name / f"aug_{leaf(c, i)}_1.jpg"
            pictures.save(path, pictures.thing(c, i).image[:, ::-1])
    return root


def sarcld_planes(root, *, count=15):
    """Write two planes for each photograph: i / 10, and -1 everywhere."""
    for c, name in enumerate(sarcld.CLASSES):
        os.makedirs(root / sarcld.ORIGINAL / name, exist_ok=True)
        for i in range(count):
            planes = np.stack([np.full((5, 4), i / 10), np.full((5, 4), -1.0)])
            path = root / sarcld.ORIGINAL / name / f"{leaf(c, i)}.npy"
            np.save(path, planes.astype(np.float32))
    return root
