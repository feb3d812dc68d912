"""OlmoEarth's tables, reader, sampling and augmentation."""

import pathlib
import tempfile

import h5py
import numpy as np

from tests.golden import reading
from vitssl import errors
from vitssl.data import modalities
from vitssl.data.sources import olmoearth
from vitssl.methods.latent_mim import shapes, views


def _dtype(name, dtypes):
    if name == "timestamps":
        return dtypes["timestamps"]
    if name == "latlon":
        return dtypes["latlon"]
    if name.startswith(olmoearth.MASKS):
        return dtypes["masks"]
    if name.startswith(("sentinel2", "landsat")):
        return dtypes["s2_landsat"]
    return dtypes.get(name, dtypes["static"])


def _reader(case):
    c = case.config
    names = c["training_modalities"]
    absent = [name for name in names if f"h5/{name}" not in case.inputs]
    reading.agree(c, absent=absent)
    with tempfile.TemporaryDirectory() as root:
        path = pathlib.Path(root) / "sample_0.h5"
        with h5py.File(path, "w") as file:
            for key, value in case.inputs.items():
                name = key.removeprefix("h5/")
                file[name] = value.astype(_dtype(name, c["h5_dtypes"]).split()[0])
        sample = olmoearth.read(path, names)
    for key in ("timestamps", *names):
        if f"unsubset_raw/{key}" in case.out:
            case.close(f"unsubset_raw/{key}", sample[key])
    kinds = [modalities.find(name) for name in names]
    times = shapes.max_times(kinds, c["token_budget"], c["sampled_hw_p"])
    starts = views.valid_starts(sample["present"], times, sample["length"])
    assert starts.tolist() == [0]
    pixels = np.arange(c["sampled_hw_p"] * c["patch_size"])
    crop = views.subset(sample, names, 0, times, pixels, pixels)
    crop = views.normalise(crop)
    for key in ("timestamps", *names):
        case.close(key, crop[key])


def _normalizer(case):
    reading.agree(case.config, std_multiplier=2)
    for name, x in case.inputs.items():
        kind = modalities.find(name)
        assert list(kind.bands) == case.config["band_order"][name]
        computed = "computed" if name in modalities._COMPUTED else "predefined"
        reading.agree(case.config["strategy_used"], **{name: computed})
        case.close(name, modalities.normalise(name, x))


def _budget(case):
    c = case.config
    for one in c["max_t"]:
        kinds = [modalities.find(name) for name in one["modalities"]]
        try:
            found = shapes.max_times(kinds, one["budget"], one["hw_p"])
        except errors.UsageError:
            found = None
        assert found == one["max_t"], one
    for one in c["valid_starts"]:
        masks = dict(one["masks"].items())
        starts = views.valid_starts(masks, one["max_t"], one["current_length"])
        assert starts.tolist() == one["valid_starts"], one
    for one in c["crop"]:
        masks = {k: np.array(v) for k, v in one["masks"].items()}
        rows = np.arange(len(next(iter(masks.values()))))
        kept, cropped = olmoearth.crop_times(rows, masks)
        assert (kept[0], len(kept)) == (one["first_row"], one["length"])
        want = dict(one["cropped"].items())
        assert {k: v.tolist() for k, v in cropped.items()} == want


def _turns(case):
    order = [name for name, _, _ in views.TURNS]
    assert order == case.config["order"]
    reading.agree(case.config, modalities=list(case.inputs))
    for which, name in enumerate(order):
        for key, x in case.inputs.items():
            turned = np.stack([views.turn(one, which) for one in x])
            case.close(f"{name}/{key}", turned)


def microbatches(batch: int, most: int) -> int:
    """Into how many equal parts of at most `most` samples a batch splits."""
    count = -(-batch // most)
    while batch % count:
        count += 1
    return count


def _microbatch(case):
    """Ours are of one size, the largest that divides the batch and fits.

    The original's last one may be short, and then weighs like the others.
    """
    for one in case.config:
        sizes = one["sizes"]
        assert sum(sizes) == one["batch"] and max(sizes) <= one["microbatch"]
        count = microbatches(one["batch"], one["microbatch"])
        assert one["batch"] % count == 0
        assert one["batch"] // count <= one["microbatch"]
        if len(set(sizes)) == 1:
            assert [one["batch"] // count] * count == sizes


CHECKS = {
    "OlmoEarthDataset.__getitem__": _reader,
    "Normalizer": _normalizer,
    "token budget / temporal subsetting": _budget,
    "FlipAndRotateSpace": _turns,
    "split_batch": _microbatch,
}
