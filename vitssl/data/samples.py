"""Samples of OlmoEarth: one HDF5 file each, with a time line and what is missing on it.

A sample as it is used is a dict: "timestamps" int32 [12, 3] (day 1-31, month 0-11,
year), "length" (steps before padding), "present" {modality: bool [12]} and for each
modality an array, [H, W, T, C] ([T, C] and [C] without space), in its own units, with
`modalities.MISSING` where there is nothing. Static ones have T = 1.

Source: arXiv:2511.13655; allenai/olmoearth_pretrain@5411573
olmoearth_pretrain/data/dataset.py.
"""

import csv
import functools
import json
import os
import pathlib

import numpy as np

from vitssl import errors
from vitssl.data import decode, modalities

EXPECTED = (
    "ROOT/sample_<i>.h5 for i below the number that names ROOT, and "
    "ROOT/sample_metadata.csv (sample_index, then 0 or 1 for each modality)"
)
MASKS = "missing_timesteps_masks"  # Group of bool [12]; True is PRESENT.


def read(path, names) -> dict:
    """Return one file's sample with the modalities `names`.

    Raises:
        DataError: no such file, damaged, without timestamps, an array that does not
            fit its mask, or compressed by a filter that is not installed.
    """
    import h5py

    _filters()
    where = decode.printable(path)
    try:
        with h5py.File(path, "r") as file:
            if "timestamps" not in file:
                raise errors.DataError(
                    f"olmoearth: {where} has no 'timestamps' int [12, 3] (day, month "
                    f"0-11, year); it has: {', '.join(sorted(file)) or 'nothing'}"
                )
            timestamps = file["timestamps"][:]
            arrays = {n: file[n][:] for n in names if n in file}
            group = file.get(MASKS, {})
            masks = {n: group[n][:].astype(bool) for n in names if n in group}
    except OSError as e:
        hint = ""
        if "filter" in str(e) or "plugin" in str(e):
            hint = "; its compression needs the package hdf5plugin (extra 'olmoearth')"
        raise errors.DataError(f"olmoearth: {where}: {e}{hint}") from e
    try:
        return complete(timestamps, arrays, masks, names)
    except ValueError as e:
        raise errors.DataError(f"olmoearth: {where}: {e}") from e


@functools.cache
def _filters():
    """Make the compression of the published files known to HDF5, if it is there."""
    try:
        import hdf5plugin  # noqa: F401
    except ImportError:
        pass


def complete(timestamps, arrays, masks, names) -> dict:
    """Return a sample on one time line of 12 steps; see the module.

    Args:
        timestamps: [T, 3], T <= 12.
        arrays: {modality: array}: those that are there, time steps that are missing
            left out.
        masks: {modality: bool [T]}, True where a time step is there; a modality
            without one is there all the time.
        names: modalities the sample shall have, there or not.

    Raises:
        ValueError: an array has another number of steps than its mask.
    """
    timestamps, masks = crop_times(np.asarray(timestamps), masks)
    length = len(timestamps)
    pad = modalities.TIMES - length
    padded = np.concatenate([timestamps, np.repeat(timestamps[-1:], pad, axis=0)])
    sample = {"timestamps": padded.astype(np.int32), "length": length}
    present = {}
    side = _side(arrays)
    for name in names:
        kind = modalities.find(name)
        if name not in arrays:
            shape = kind.shape(side, modalities.TIMES)
            sample[name] = np.full(shape, modalities.MISSING, np.float32)
            if kind.time:
                present[name] = np.zeros(modalities.TIMES, bool)
        elif kind.time:
            there = masks.get(name, np.ones(length, bool))
            sample[name], present[name] = _scatter(name, arrays[name], there)
        else:
            sample[name] = arrays[name]
    return sample | {"present": present}


def _side(arrays) -> int:
    """Return the side in 10 m pixels of any array that has space."""
    for name, x in arrays.items():
        kind = modalities.find(name)
        if kind.space:
            return x.shape[0] // kind.factor
    return 0


def _scatter(name, x, there):
    """Return (array of 12 steps, bool [12]) of the steps [..., t, C] that are there."""
    if x.shape[-2] != there.sum():
        raise ValueError(
            f"{name} holds {x.shape[-2]} time steps, its mask {int(there.sum())}"
        )
    full = np.zeros(modalities.TIMES, bool)
    full[: len(there)] = there
    if full.all():
        return x, full
    shape = (*x.shape[:-2], modalities.TIMES, x.shape[-1])
    out = np.full(shape, modalities.MISSING, np.float32)
    out[..., full, :] = x
    return out, full


def crop_times(timestamps, masks):
    """Return (timestamps, masks) from the first to the last step any modality has.

    Args:
        timestamps: [T, 3].
        masks: {modality: bool [T]}; {} leaves all steps.
    """
    if not masks:
        return timestamps, masks
    steps = np.flatnonzero(np.any(list(masks.values()), axis=0))
    if not len(steps):
        return timestamps, masks
    cut = slice(int(steps[0]), int(steps[-1]) + 1)
    return timestamps[cut], {name: mask[cut] for name, mask in masks.items()}


def valid_starts(masks, times: int, length: int) -> np.ndarray:
    """Return the steps at which a crop of `times` steps may start.

    Args:
        masks: {modality: bool [at least length]}, True where a step is there; {} if
            that is not known.
        times: steps of the crop.
        length: steps of the sample before padding.

    Returns:
        int [n >= 1]; only 0 for a sample no longer than the crop.
    """
    if length <= times:
        return np.zeros(1, int)
    starts = np.arange(length - times + 1)
    if not masks:
        return starts
    any_there = np.any([np.asarray(m)[: len(starts)] for m in masks.values()], axis=0)
    return starts[any_there] if any_there.any() else starts


def subset(sample: dict, names, start: int, times: int, rows, columns) -> dict:
    """Return a crop of a sample, in time and space.

    Args:
        sample: see the module.
        names: modalities to keep.
        start, times: of the time steps.
        rows, columns: int [n], 10 m pixels to keep, in order.
    """
    out = {"timestamps": sample["timestamps"][start : start + times]}
    for name in names:
        kind, x = modalities.find(name), sample[name]
        if kind.time:
            x = x[..., start : start + times, :]
        if kind.space:
            x = x[fine(rows, kind.factor)][:, fine(columns, kind.factor)]
        out[name] = x
    return out


def fine(pixels, factor: int) -> np.ndarray:
    """Return the pixels of a finer grid that lie in 10 m pixels [n]: [n factor]."""
    pixels = np.asarray(pixels)
    return (pixels[:, None] * factor + np.arange(factor)).reshape(-1)


def normalise(sample: dict, mean=(), std=()) -> dict:
    """Return the sample with every modality in float32 and normalised.

    Args:
        sample: modalities by name; other keys are handed on.
        mean, std: of "rgb", in units of [0, 1].
    """
    out = dict(sample)
    for name, x in sample.items():
        if name == "rgb":
            scaled = np.asarray(x, np.float32) / 255
            out[name] = (scaled - np.float32(mean)) / np.float32(std)
        elif name in modalities.MODALITIES:
            out[name] = modalities.normalise(name, x)
    return out


# Directories.


def directory(root) -> pathlib.Path:
    """Return the folder of samples at or below `root`, if there is only one way down.

    Raises:
        DataError: it holds no sample_metadata.csv, with what is there.
    """
    path = pathlib.Path(root)
    while not (path / "sample_metadata.csv").is_file():
        inner = [p for p in path.iterdir() if p.is_dir()] if path.is_dir() else []
        if len(inner) != 1:
            from vitssl.data.sources import layout

            layout.fail("olmoearth", "no sample_metadata.csv", path, EXPECTED)
        path = inner[0]
    return path


def metadata(path: pathlib.Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return (sample indices [N], {modality: bool [N]}) of sample_metadata.csv.

    Raises:
        DataError: another number of rows than the folder's name says, or a row that
            is not made of whole numbers.
    """
    file = path / "sample_metadata.csv"
    with file.open(newline="") as lines:
        head, *rows = csv.reader(lines)
    try:
        table = np.array(rows, np.float64).reshape(len(rows), len(head)).astype(int)
    except ValueError as e:
        raise errors.DataError(f"olmoearth: {decode.printable(file)}: {e}") from e
    if path.name.isdigit() and int(path.name) != len(table):
        raise errors.DataError(
            f"olmoearth: {decode.printable(file)} lists {len(table)} samples; its "
            f"folder says {path.name}"
        )
    columns = dict(zip(head, table.T, strict=True))
    if "sample_index" not in columns:
        raise errors.DataError(
            f"olmoearth: {decode.printable(file)}: no column 'sample_index'; it has: "
            f"{', '.join(head)}"
        )
    index = columns.pop("sample_index")
    return index, {name: column > 0 for name, column in columns.items()}


def write(root, samples, *, compression="gzip") -> pathlib.Path:
    """Write samples in the layout of the published set; return their folder.

    Args:
        root: an existing folder.
        samples: each a dict of "timestamps" [12, 3], "latlon" [2], arrays by modality
            that hold the steps that are there, and "masks" {modality: bool [12]}.
        compression: of HDF5 ("gzip", "lzf"), "zstd" as the published files have it
            (needs the extra "olmoearth"), or "" for none.

    Raises:
        UsageError: the package for zstd is missing.
    """
    import h5py

    packed = dict(compression=compression) if compression else {}
    if compression == "zstd":
        try:
            import hdf5plugin
        except ImportError as e:
            raise errors.UsageError(
                "compression=zstd: needs pip install 'vitssl[olmoearth]'"
            ) from e
        packed = dict(hdf5plugin.Zstd())
    names = sorted({n for s in samples for n in s if n in modalities.MODALITIES})
    names = [n for n in names if n != "latlon"]
    side = _side({n: s[n] for s in samples for n in names if n in s})
    kind = f"h5py_data_w_missing_timesteps{f'_{compression}' * bool(compression)}"
    folder = pathlib.Path(root) / f"{kind}_{side}_x_1" / "_".join(names)
    folder = folder / str(len(samples))
    os.makedirs(folder)
    rows = []
    for i, sample in enumerate(samples):
        with h5py.File(folder / f"sample_{i}.h5", "w") as file:
            for key in ("timestamps", "latlon", *names):
                if key in sample:
                    file.create_dataset(key, data=sample[key], **packed)
            for name, mask in sample.get("masks", {}).items():
                file[f"{MASKS}/{name}"] = np.asarray(mask, bool)
        rows.append([i, *(int(name in sample) for name in names)])
    with (folder / "sample_metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["sample_index", *names], *rows])
    where = [s.get("latlon", (0, 0)) for s in samples]
    np.save(folder / "latlon_distribution.npy", np.array(where, np.float32))
    settings = {"compression": compression or None}
    (folder / "compression_settings.json").write_text(json.dumps(settings))
    return folder
