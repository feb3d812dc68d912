"""OlmoEarth's pretraining set: HDF5 samples with absent sensors and time gaps."""

import csv
import json
import os
import pathlib

import h5py
import numpy as np

from vitssl.data import modalities
from vitssl.data.sources import olmoearth

SIDE = 16
FEW = ("sentinel2_l2a", "sentinel1", "worldcover")
STEPS = {  # Of a sensor that is not there all the time.
    "sentinel1": np.arange(12) % 3 == 1,
    "landsat": np.arange(12) % 4 == 2,
}
GAPS = np.isin(np.arange(12), (2, 3, 7))
SAMPLES = 24
TYPES = {"sentinel1": np.float32, "sentinel2_l2a": np.uint16, "landsat": np.uint16}
HIGH = {"sentinel2_l2a": 9000, "landsat": 30000, "openstreetmap_raster": 2}


def sample(seed=0, there=None, *, names=FEW, side=SIDE):
    """Return a sample as it is written: only the time steps that are there.

    Args:
        there: bool [12] of Sentinel-2; None = always.
        names: modalities it has.
    """
    rng = np.random.default_rng(seed)
    months = np.arange(12)
    steps = {"sentinel2_l2a": np.ones(12, bool) if there is None else there, **STEPS}
    masks = {name: steps[name] for name in names if name in steps}
    return dict(
        timestamps=np.stack([months + 1, months, np.full(12, 2020)], axis=1),
        latlon=np.array([47.5, 8.5], np.float32),
        **{name: _array(rng, name, side, masks) for name in names},
        masks=masks,
    )


def _array(rng, name, side, masks):
    times = masks[name].sum() if name in masks else modalities.TIMES
    shape = modalities.find(name).shape(side, times)
    kind = TYPES.get(name, np.uint8)
    if kind is np.float32:
        return rng.normal(-12, 3, shape).astype(kind)
    return rng.integers(0 if name in HIGH else 1, HIGH.get(name, 90), shape, kind)


def absent(i):
    """Return the modalities that sample i does not have."""
    gone = {1: ("landsat",), 2: ("cdl", "worldcereal"), 3: ("sentinel1", "srtm")}
    return gone.get(i % 6, ())


def samples(*, count=SAMPLES, side=64):
    """Return samples of everything the published runs train on, and one of maps only.

    Every fourth has Sentinel-2 at three steps; see also `absent`.
    """
    made = []
    for i in range(count):
        names = [n for n in modalities.TRAINED if n not in absent(i)]
        made.append(sample(i, GAPS if i % 4 == 1 else None, names=names, side=side))
    return [*made, sample(count, names=modalities.MAPS, side=side)]


def earth(root, *, count=SAMPLES, side=64):
    """Write the samples, compressed as the published files are."""
    write(root, samples(count=count, side=side), compression="zstd")
    return root


def write(root, samples, *, compression="gzip") -> pathlib.Path:
    """Write samples in the layout of the published set; return their folder.

    Args:
        root: an existing folder.
        samples: each a dict of "timestamps" [12, 3], "latlon" [2], arrays by modality
            that hold the steps that are there, and "masks" {modality: bool [12]}.
        compression: of HDF5 ("gzip", "lzf"), or "zstd" as the published files have it.
    """
    packed = dict(compression=compression)
    if compression == "zstd":
        import hdf5plugin

        packed = dict(hdf5plugin.Zstd())
    names = sorted({n for s in samples for n in s if n in modalities.MODALITIES})
    names = [n for n in names if n != "latlon"]
    side = next(
        s[n].shape[0] for s in samples for n in names if n in s and s[n].ndim == 4
    )
    kind = f"h5py_data_w_missing_timesteps_{compression}_{side}_x_1"
    folder = pathlib.Path(root) / kind / "_".join(names) / str(len(samples))
    os.makedirs(folder)
    rows = []
    for i, sample in enumerate(samples):
        with h5py.File(folder / f"sample_{i}.h5", "w") as file:
            for key in ("timestamps", "latlon", *names):
                if key in sample:
                    file.create_dataset(key, data=sample[key], **packed)
            for name, mask in sample.get("masks", {}).items():
                file[f"{olmoearth.MASKS}/{name}"] = np.asarray(mask, bool)
        rows.append([i, *(int(name in sample) for name in names)])
    with (folder / "sample_metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["sample_index", *names], *rows])
    where = [s.get("latlon", (0, 0)) for s in samples]
    np.save(folder / "latlon_distribution.npy", np.array(where, np.float32))
    settings = {"compression": compression}
    (folder / "compression_settings.json").write_text(json.dumps(settings))
    return folder
