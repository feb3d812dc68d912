"""Small trees of files in the published layout of every data set that reads files.

`make(source, root)` writes one and returns what to hand to `data.root`. They are the
same every time. Images are 40 x 56 pixels where the data set does not say otherwise,
each with a thing in the colour of its class; see `pictures`.
"""

from tests.layouts import (
    binaries,
    birds,
    earth,
    in9,
    packed,
    prepared,
    radiographs,
    satellites,
    trees,
)


def sarcld(root):
    """Write SAR-CLD-2024 with two spectral planes beside each photograph."""
    return trees.sarcld_planes(trees.sarcld_photographs(root))


MAKERS = {
    "folder": trees.folder,
    "tar": packed.tar,
    "parquet": packed.parquet,
    "array_record": packed.array_record,
    "cifar10": binaries.cifar10,
    "cifar100": binaries.cifar100,
    "stl10": binaries.stl10,
    "imagenet": trees.imagenet,
    "imagenet100": trees.imagenet,
    "in9": in9.in9,
    "tfds": prepared.tfds,
    "cub": birds.cub,
    "waterbirds": birds.waterbirds,
    "siim_acr": radiographs.siim_acr,
    "metashift": trees.metashift,
    "olmoearth": earth.earth,
    "eurosat": satellites.eurosat,
    "pastis": satellites.parcels,
    "mados": satellites.water,
    "geotiff": satellites.folder,
    "sarcld": sarcld,
    "plantvillage": trees.plantvillage,
}


def make(source, root):
    """Write the tree of a source below `root`, a folder; return its data.root."""
    root.mkdir(parents=True, exist_ok=True)
    return MAKERS[source](root)


def table(root):
    """Write a table of several labels of a folder's images beside it; return it."""
    lines = ["file,labels"]
    for n, path in enumerate(sorted(root.rglob("*.jpg"))):
        labels = [path.parent.name] * (n % 5 > 0) + ["odd"] * (n % 2)
        lines.append(f"{path.relative_to(root)},{'|'.join(labels)}")
    file = root.with_name("labels.csv")
    file.write_text("\n".join(lines) + "\n")
    return file


def mixture(root, kinds=("folder", "metashift")):
    """Write several trees; return the option `parts` of the source "mixture"."""
    return ",".join(f"{kind}={make(kind, root / kind)}" for kind in kinds)
