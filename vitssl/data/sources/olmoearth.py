"""OlmoEarth's pretraining set: a folder of HDF5 files, one for each sample.

A sample as it is used is a dict: "timestamps" int32 [12, 3] (day 1-31, month 0-11,
year), "length" (steps before padding), "present" {modality: bool [12]} and for each
modality an array, [H, W, T, C] ([T, C] and [C] without space), in its own units, with
`modalities.MISSING` where there is nothing. Static ones have T = 1.

Source: arXiv:2511.13655; allenai/olmoearth_pretrain@5411573
olmoearth_pretrain/data/dataset.py.
"""

import csv
import dataclasses
import functools
import math
import pathlib

import numpy as np

from vitssl import errors, ranges
from vitssl.data import decode
from vitssl.data.modalities import MISSING, TIMES, TRAINED, find
from vitssl.data.sources import layout

EXPECTED = (
    "ROOT/sample_<i>.h5 for i below the number that names ROOT, and "
    "ROOT/sample_metadata.csv (sample_index, then 0 or 1 for each modality)"
)
MASKS = "missing_timesteps_masks"  # Group of bool [12]; True is PRESENT.
MAX_BYTES = 2**28  # Of an array of one sample; the published ones have 5 MB.
SPLITS = {"train": "train", "val": "test", "test": "test"}


@dataclasses.dataclass(frozen=True, eq=False)
class Samples(layout.Source):
    """Samples of several modalities; `[i]` is what `read` returns, and a label -1."""

    root: str  # The folder of the files.
    indices: np.ndarray  # Numbers of the files.
    names: tuple[str, ...]  # Modalities of every sample, there or not.
    split: str
    channels: int
    classes: tuple[str, ...] = ()
    name: str = "olmoearth"

    @property
    def labels(self) -> np.ndarray:
        """[N] int32 of -1: there are none."""
        return np.full(len(self.indices), -1, np.int32)

    def example(self, i):
        """Return sample i, which exists."""
        path = f"{self.root}/sample_{self.indices[i]}.h5"
        return read(path, self.names) | {"label": -1}


def open(
    root,
    split,
    *,
    modalities: tuple[str, ...] = TRAINED,
    channels: int = 1,
    filter_file: str = "",
    max_samples: ranges.OrNone = 0,
    share: ranges.Share = 1.0,
    holdout: ranges.OrNone = 0,
    seed: int = 3622,
):
    """Samples that have at least one sensor of the modalities asked for.

    Args:
        root: the folder of the samples, or one above it.
        split: "train" or "test" ("val" is the same): see holdout.
        modalities: names.
        channels: not used: each modality has its own.
        filter_file: .npy of sample numbers to keep, "" for all.
        max_samples: of the training split, drawn without replacement; 0 = all.
        share: of the training split, where max_samples is 0.
        holdout: number of samples that are the test split, the last ones; with 0 both
            splits are all samples.
        seed: of what is drawn.

    Raises:
        DataError: no such folder, or not of this layout.
        UsageError: an unknown modality.
    """
    split = layout.split_of("olmoearth", split, SPLITS)
    names = tuple(modalities)
    folder = directory(layout.root_of("olmoearth", root, EXPECTED))
    index, has = metadata(folder)
    keep = np.zeros(len(index), bool)
    for kind in map(find, names):
        if kind.time and kind.space and kind.name in has:
            keep |= has[kind.name]
    if filter_file:
        keep &= np.isin(index, decode.array(filter_file))
    index = index[keep]
    if holdout:
        index = index[-holdout:] if split == "test" else index[:-holdout]
    if split == "train":
        count = max_samples or round(share * len(index))
        if count < len(index):
            rng = np.random.default_rng(seed)
            index = np.sort(rng.choice(index, count, replace=False))
    return Samples(str(folder), index, names, split, channels)


# Files.


def read(path, names) -> dict:
    """Return one file's sample with the modalities `names`.

    Raises:
        DataError: no such file, damaged, without timestamps, an array that does not
            fit its mask or lies in another file, or compressed by a filter that is not
            installed.
    """
    import h5py

    _filters()
    where = decode.printable(path)
    try:
        decode.regular(path)
        with h5py.File(path, "r") as file:
            if "timestamps" not in file:
                raise errors.DataError(
                    f"olmoearth: {where} has no 'timestamps' int [12, 3] (day, month "
                    f"0-11, year); it has: {errors.told(', '.join(file) or 'nothing')}"
                )
            timestamps = _numbers(file, "timestamps")
            arrays = {n: _numbers(file, n) for n in names if n in file}
            masks = {}
            if MASKS in file:
                group = _held(file, MASKS, h5py.Group)
                there = (n for n in names if n in group)
                masks = {n: _numbers(group, n).astype(bool) for n in there}
        return complete(timestamps, arrays, masks, names)
    except errors.DataError:
        raise
    except Exception as e:  # noqa: BLE001 - damage shows in any way it likes.
        hint = ""
        if "filter" in str(e) or "plugin" in str(e):
            hint = "; its compression needs the package hdf5plugin (extra 'olmoearth')"
        raise errors.DataError(f"olmoearth: {where}: {errors.told(e)}{hint}") from e


def _held(group, name, kind):
    """Return a member of a group that lies in the group's own file."""
    import h5py

    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is a link; only what lies in the file is read")
    if not isinstance(group[name], kind):
        raise ValueError(f"{name} is a {type(group[name]).__name__}")
    return group[name]


def _numbers(group, name) -> np.ndarray:
    """Return an array of a group, of numbers in its own file and of sane size."""
    import h5py

    found = _held(group, name, h5py.Dataset)
    if found.is_virtual or found.external:
        raise ValueError(f"{name} lies in other files, which are not read")
    if found.dtype.kind not in "fiub" or found.shape is None:
        raise ValueError(f"{name} holds {found.dtype}, no numbers")
    chunk = math.prod(found.chunks or ()) * found.dtype.itemsize
    if max(found.nbytes, chunk) > MAX_BYTES:
        raise ValueError(
            f"{name} {list(found.shape)} claims more than {MAX_BYTES} bytes"
        )
    return found[()]


@functools.cache
def _filters():
    """Make the compression of the published files known to HDF5, if it is there."""
    try:
        import hdf5plugin  # noqa: F401
    except ImportError:
        pass


def complete(timestamps, arrays, masks, names) -> dict:
    """Return a sample of the modalities `names` on one time line of 12 steps.

    Args:
        timestamps: [T, 3], T <= 12.
        arrays: {modality: array}: those that are there, time steps that are missing
            left out.
        masks: {modality: bool [T]}, True where a time step is there; a modality
            without one is there all the time.

    Raises:
        ValueError: an array has another number of steps than its mask, or a shape
            that is not its modality's.
    """
    timestamps = np.asarray(timestamps)
    shape = timestamps.shape
    if len(shape) != 2 or shape[1] != 3 or not 1 <= len(timestamps) <= TIMES:
        raise ValueError(f"timestamps {list(shape)}; want [1 to {TIMES}, 3]")
    for name, mask in masks.items():
        if mask.shape != shape[:1]:
            raise ValueError(
                f"the mask of {name} {list(mask.shape)}; want [{shape[0]}]"
            )
    timestamps, masks = crop_times(timestamps, masks)
    length = len(timestamps)
    pad = TIMES - length
    padded = np.concatenate([timestamps, np.repeat(timestamps[-1:], pad, axis=0)])
    sample = {"timestamps": padded.astype(np.int32), "length": length}
    present = {}
    side = _side(arrays)
    for name in names:
        kind = find(name)
        if name not in arrays:
            shape = kind.shape(side, TIMES)
            sample[name] = np.full(shape, MISSING, np.float32)
            if kind.time:
                present[name] = np.zeros(TIMES, bool)
            continue
        there = masks.get(name, np.ones(length, bool))
        want, x = kind.shape(side, int(there.sum())), arrays[name]
        if kind.time and x.ndim == len(want) and x.shape[-2] != want[-2]:
            raise ValueError(
                f"{name} holds {x.shape[-2]} time steps, its mask {want[-2]}"
            )
        if x.shape != want:
            raise ValueError(f"{name} {list(x.shape)}; want {list(want)}")
        sample[name] = x
        if kind.time:
            sample[name], present[name] = _scatter(x, there)
    return sample | {"present": present}


def _side(arrays) -> int:
    """Return the side in 10 m pixels of any array that has space."""
    for name, x in arrays.items():
        kind = find(name)
        if kind.space and x.ndim:
            return x.shape[0] // kind.factor
    return 0


def _scatter(x, there):
    """Return (array of 12 steps, bool [12]) of the steps [..., t, C] that are there."""
    full = np.zeros(TIMES, bool)
    full[: len(there)] = there
    if full.all():
        return x, full
    shape = (*x.shape[:-2], TIMES, x.shape[-1])
    out = np.full(shape, MISSING, np.float32)
    out[..., full, :] = x
    return out, full


def crop_times(timestamps, masks):
    """Return (timestamps, masks) from the first to the last step any modality has.

    Masks are {modality: bool [T]}; {} leaves all steps.
    """
    if not masks:
        return timestamps, masks
    steps = np.flatnonzero(np.any(list(masks.values()), axis=0))
    if not len(steps):
        return timestamps, masks
    cut = slice(int(steps[0]), int(steps[-1]) + 1)
    return timestamps[cut], {name: mask[cut] for name, mask in masks.items()}


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
    try:
        head, *rows = csv.reader(decode.contents(file).decode().splitlines())
        table = np.array(rows, np.float64).reshape(len(rows), len(head)).astype(int)
    except (ValueError, csv.Error) as e:
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
