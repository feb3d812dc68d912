"""PASTIS-R: crops of French fields, a year of Sentinel-2 and Sentinel-1 for each patch.

Examples are those of `olmoearth`, with "cover", a class per pixel. A patch is cut into
tiles; dates are averaged month by month, as OlmoEarth's evaluation does it.

Sources: Garnot and Landrieu 2021, arXiv:2107.07933; Garnot et al. 2022,
arXiv:2112.07558; allenai/olmoearth_pretrain olmoearth_pretrain/evals/datasets/
pastis_processor.py.
"""

import dataclasses
import functools
import json
from typing import Literal

import numpy as np

from vitssl import errors
from vitssl.data import decode, modalities
from vitssl.data.sources import geotiff, layout, olmoearth

EXPECTED = (
    "ROOT/metadata.geojson, ROOT/DATA_S2/S2_<id>.npy, ROOT/DATA_S1A/S1A_<id>.npy and "
    "ROOT/ANNOTATIONS/TARGET_<id>.npy"
)
FOLDS = {"train": (1, 2, 3), "val": (4,), "test": (5,)}
SIDE = 128  # Of a patch, in pixels of 10 m.
VOID = 19  # Parcels of no known crop.
COVER = (
    *("background", "meadow", "soft winter wheat", "corn", "winter barley"),
    *("winter rapeseed", "spring barley", "sunflower", "grapevine", "beet"),
    *("winter triticale", "winter durum wheat", "fruits, vegetables, flowers"),
    *("potatoes", "leguminous fodder", "soybeans", "orchard", "mixed cereal"),
    "sorghum",
)
NOTHING = -10000  # What the archive's reflectances have where nothing was seen.
BANDS = {
    "sentinel2_l2a": tuple("B02 B03 B04 B05 B06 B07 B08 B8A B11 B12".split()),
    "sentinel1": ("vv", "vh", ""),  # The third is their ratio.
}


@dataclasses.dataclass(frozen=True, eq=False)
class Parcels(layout.Source):
    """Tiles of patches; the label is -1.

    Attributes:
        patches: (id, {modality: {"0": 20180917, ...}}) of each patch.
        names: modalities of every sample; those that the set lacks are missing.
        orbit: of Sentinel-1.
        tile: side of a sample.
        impute: see `geotiff.impute`.
    """

    root: str
    patches: tuple[tuple[str, dict], ...]
    names: tuple[str, ...]
    orbit: str
    tile: int
    impute: bool
    split: str
    channels: int = 1
    classes: tuple[str, ...] = ()
    name: str = "pastis"

    def __len__(self):
        return len(self.patches) * (SIDE // self.tile) ** 2

    @property
    def labels(self) -> np.ndarray:
        """[N] int32 of -1: a tile has no class of its own."""
        return np.full(len(self), -1, np.int32)

    def example(self, i: int) -> dict:
        """Return tile i: those of a patch come row by row."""
        across = SIDE // self.tile
        which, place = divmod(i, across**2)
        row, column = (self.tile * k for k in divmod(place, across))
        cut = (slice(row, row + self.tile), slice(column, column + self.tile))
        number, dates = self.patches[which]
        # What nobody asked for is not read.
        months, arrays, masks = self._seen(number, dates, cut)
        sample = olmoearth.complete(
            [(1, m % 100 - 1, m // 100) for m in months], arrays, masks, self.names
        )
        truth = self._array("ANNOTATIONS", "TARGET", number, 3)[0][cut]
        truth = np.where(truth == VOID, -1, truth.astype(np.int16)).astype(np.int16)
        return sample | {"label": -1, "cover": truth}

    def _seen(self, number, dates, cut):
        """Return (months, {modality: [S, S, t, C]}, {modality: bool [T]})."""
        every = sorted({m for own in dates.values() for m in _months(own)})
        months = every[: modalities.TIMES]
        arrays, masks = {}, {}
        for name, own in dates.items():
            there = [m in _months(own) for m in months]
            if any(there):
                x = self._file(name, number, len(own))
                held = [m for m, t in zip(months, there, strict=True) if t]
                x = np.stack([_mean(x, own, m, cut) for m in held], axis=2)
                arrays[name] = modalities.arrange(name, x, BANDS[name])
                masks[name] = np.array(there)
        if self.impute and "sentinel2_l2a" in arrays:
            whole = arrays["sentinel2_l2a"]
            arrays["sentinel2_l2a"] = geotiff.impute("sentinel2_l2a", whole)
        return months, arrays, masks

    def _file(self, name, number, count):
        kind = "S2" if name == "sentinel2_l2a" else f"S1{self.orbit}"
        x = self._array(f"DATA_{kind}", kind, number, 4)
        want = (count, len(BANDS[name]), SIDE, SIDE)
        if x.shape != want:
            raise errors.DataError(
                f"pastis: {self._path(f'DATA_{kind}', kind, number)}: shape {x.shape}; "
                f"want {want} by metadata.geojson"
            )
        return x

    def _path(self, folder, kind, number):
        return decode.printable(f"{self.root}/{folder}/{kind}_{number}.npy")

    def _array(self, folder, kind, number, axes):
        path = f"{self.root}/{folder}/{kind}_{number}.npy"
        try:
            # A tile is a quarter of the file, or less.
            x = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise errors.DataError(
                f"pastis: {decode.printable(path)}: cannot be read: {e}"
            ) from e
        if x.ndim != axes or x.shape[-2:] != (SIDE, SIDE):
            raise errors.DataError(
                f"pastis: {decode.printable(path)}: shape {x.shape}; want {axes} axes "
                f"and {SIDE} x {SIDE} pixels"
            )
        return x


def _months(dates) -> set[int]:
    """Return the months, as 201809, of {number: 20180917}."""
    return {int(day) // 100 for day in dates.values()}


def _mean(x, dates, month, cut):  # [T, C, H, W] -> float32 [S, S, C]
    """Return the mean of a month's dates over what was seen, NaN where nothing was."""
    steps = [int(k) for k, day in dates.items() if int(day) // 100 == month]
    seen = np.stack([x[t][(slice(None), *cut)] for t in steps]).astype(np.float64)
    there = np.isfinite(seen) & (seen != NOTHING)
    count = there.sum(0)
    total = np.where(there, seen, 0.0).sum(0)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return np.moveaxis(mean, 0, -1)


def open(
    root,
    split,
    *,
    modalities: tuple[str, ...] = tuple(BANDS),
    orbit: Literal["A", "D"] = "A",
    tile: Literal[16, 32, 64, 128] = 64,
    impute: bool = False,
    channels: int = 1,
):
    """Tiles of the official folds: 1 to 3 train, 4 is "val" and 5 "test".

    Args:
        root: the folder of metadata.geojson.
        modalities: of every sample; those that the set lacks are missing, as are the
            bands B01 and B09.
        orbit: of Sentinel-1: "A" ascending, "D" descending.
        tile: side of a sample in pixels.
        impute: B01 and B09 are copies of B02 and B8A, as in OlmoEarth's evaluation.
        channels: not used: each modality has its own.

    Raises:
        DataError: nothing there, or not of this layout.
    """
    split = layout.split_of("pastis", split, _SPLITS)
    base = layout.root_of("pastis", root, EXPECTED, "PASTIS-R")
    layout.need("pastis", base, ("metadata.geojson",), EXPECTED)
    kept = [k for k in BANDS if k in modalities]
    patches = tuple(
        (number, {k: dates[_DATES[k].format(orbit)] for k in kept})
        for number, fold, dates in _listed(base / "metadata.geojson")
        if fold in FOLDS[split]
    )
    return Parcels(str(base), patches, modalities, orbit, tile, impute, split)


_SPLITS = {a: k for k, names in layout.ALIASES.items() for a in names}
_DATES = {"sentinel2_l2a": "dates-S2", "sentinel1": "dates-S1{}"}


@functools.cache
def _listed(path) -> tuple:
    """Return (id, fold, properties with dates as dicts) of each patch.

    Raises:
        DataError: it is no such file.
    """
    try:
        features = json.loads(path.read_text())["features"]
        return tuple(_patch(f["properties"]) for f in features)
    except (ValueError, KeyError, TypeError) as e:
        raise errors.DataError(
            f"pastis: {decode.printable(path)}: {type(e).__name__} {e}: want features "
            "with ID_PATCH, Fold and dates-S2, dates-S1A, dates-S1D {number: yyyymmdd}"
        ) from e


def _patch(about):
    # Some tools write a column of dicts as text.
    dates = {
        k: json.loads(v) if isinstance(v, str) else v
        for k, v in about.items()
        if k.startswith("dates-")
    }
    return str(about["ID_PATCH"]), int(about["Fold"]), dates
