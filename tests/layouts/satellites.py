"""Labelled satellite sets: EuroSAT, PASTIS-R, MADOS, and a folder of GeoTIFF files.

Values tell what they are: band number b of Sentinel-2 of image i is 100 b + i, or that
times a known factor.
"""

import json

import numpy as np

from vitssl.data.sources import geotiff, mados, pastis

DATES = (20180917, 20181002, 20181027, 20190215)  # Two of them in October.
RADAR = (20180920, 20190301)  # No Sentinel-2 in March.


def tiff(path, planes, *, names=(), nodata=None, **options):
    """Write planes [C, H, W] as GDAL does: one file, bands one after the other."""
    import tifffile

    path.parent.mkdir(parents=True, exist_ok=True)
    items = "".join(
        f'<Item name="DESCRIPTION" sample="{i}" role="description">{n}</Item>'
        for i, n in enumerate(names)
    )
    tags = [(42112, "s", 0, f"<GDALMetadata>{items}</GDALMetadata>", True)] * bool(
        names
    )
    tags += [(42113, "s", 0, str(nodata), True)] * (nodata is not None)
    own = dict(photometric="minisblack", metadata=None, planarconfig="separate")
    own = own if len(planes) > 1 else own | {"planarconfig": None}
    tifffile.imwrite(
        path, planes if len(planes) > 1 else planes[0], extratags=tags, **own | options
    )


def level(i, bands, side, dtype=np.uint16):
    """Return [C, side, side]: 100 b + i of the band b, counted from 1."""
    values = 100 * np.arange(1, bands + 1) + i
    return np.broadcast_to(values[:, None, None], (bands, side, side)).astype(dtype)


def eurosat(root, *, each=8):
    """Write EuroSAT_MS/<class>/<class>_<i>.tif: 13 bands interleaved by pixel."""
    for name in geotiff.CLASSES:
        for i in range(1, each + 1):
            x = np.moveaxis(level(i, 13, 64), 0, -1)
            path = root / "EuroSAT_MS" / name / f"{name}_{i}.tif"
            tiff(path, x, planarconfig="contig")
    return root


def folder(root, *, train=8, val=4, side=32):
    """Write {train,val}/<class>/*.tif: six bands with names, one of no sensor.

    B02, B03, B04 and B08 are a bandset; of B11's the others are missing.
    """
    names = ("B4", "B03", "B02", "clouds", "B8", "B11")
    for label, kind in enumerate(("field", "town", "wood")):
        for i in range(train + val):
            x = level(i + 1000 * label, 6, side)
            x[:, :4, :4] = 0
            part = "train" if i < train else "val"
            tiff(root / part / kind / f"s{i}.tif", x, names=names, nodata=0)
    return root


def parcels(root, *, folds=(1, 1, 2, 2, 3, 3, 4, 5, 5, 5)):
    """Write PASTIS-R: one patch for each of `folds`."""
    features, side = [], pastis.SIDE
    for kind in ("DATA_S2", "DATA_S1A", "ANNOTATIONS"):
        (root / kind).mkdir(parents=True)
    for i, fold in enumerate(folds):
        number = 10000 + i
        seen = np.stack([level(i + 10 * t, 10, side) for t in range(len(DATES))])
        np.save(root / f"DATA_S2/S2_{number}.npy", seen.astype(np.int16))
        radar = np.float32([-11.5 - i, -17.25, 0.5])[None, :, None, None]
        radar = radar.repeat(len(RADAR), 0).repeat(side, 2).repeat(side, 3)
        np.save(root / f"DATA_S1A/S1A_{number}.npy", radar)
        target = np.zeros((3, side, side), np.uint8)
        target[0] = np.arange(side)[:, None] // 6 % 20  # Rows of every class.
        np.save(root / f"ANNOTATIONS/TARGET_{number}.npy", target)
        dates = {"dates-S2": DATES, "dates-S1A": RADAR, "dates-S1D": ()}
        own = {k: {str(t): d for t, d in enumerate(v)} for k, v in dates.items()}
        about = dict(ID_PATCH=number, Fold=fold, TILE="t30uxv", **own)
        features.append(dict(type="Feature", id=str(number), properties=about))
    made = dict(type="FeatureCollection", features=features)
    (root / "metadata.geojson").write_text(json.dumps(made))
    return root


def water(root, *, splits=(("train", 3), ("val", 1), ("test", 2))):
    """Write MADOS: one scene for each split, of Sentinel-2A and 2B in turn."""
    (root / "splits").mkdir(parents=True)
    for s, (split, count) in enumerate(splits):
        scene, lines = f"Scene_{s}", []
        for i in range(count):
            for b, (metres, lengths) in enumerate(mados.BANDS.values()):
                n = lengths[(s + i) % len(lengths)]
                name = f"{scene}_L2R_rhorc_{n}_{i}.tif"
                shape = (1, *[mados.SIDE * 10 // metres] * 2)
                plane = np.full(shape, 0.01 * (b + 1) + 0.001 * i, np.float32)
                tiff(root / scene / str(metres) / name, plane)
            classes = np.zeros((1, mados.SIDE, mados.SIDE), np.uint8)
            classes[0, ::40] = 1 + np.arange(mados.SIDE) % 15
            tiff(root / scene / "10" / f"{scene}_L2R_cl_{i}.tif", classes)
            lines.append(f"{scene}_{i}")
        (root / "splits" / f"{split}_X.txt").write_text("\n".join(lines) + "\n")
    return root
