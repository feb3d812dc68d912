"""Folders of multi-band GeoTIFF or TIFF files: EuroSAT, and one's own.

Each file is one date of one sensor; bands that it lacks, and pixels without a value,
are missing. Examples are those of `olmoearth`, with "cover", a class per pixel, where
there are masks.

Sources: EuroSAT, Helber et al. 2019, arXiv:1709.00029, its 13 bands in GDAL's order,
which puts B8A last; processed to L1C, so that digital numbers are 10000 times the
reflectance above the atmosphere.
"""

import dataclasses
import datetime
import os
import pathlib
from typing import Literal

import numpy as np

from vitssl import errors, ranges
from vitssl.data import decode, modalities, tiff
from vitssl.data.sources import folder, layout, olmoearth, wrappers

SENSORS = tuple(
    k.name for k in modalities.MODALITIES.values() if k.space and k.name != "rgb"
)
EXPECTED = "ROOT/{train,val,test}/<class>/*.tif, ROOT/<class>/*.tif or ROOT/**/*.tif"
CLASSES = (
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
)
EUROSAT = "ROOT/<class>/<class>_<i>.tif with the classes AnnualCrop to SeaLake"
INSIDE = ("EuroSAT_MS", "allBands", "ds/images/remote_sensing/otherDatasets/sentinel_2")
# B10, cirrus, is no band of L2A.
EUROSAT_BANDS = (
    *("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", ""),
    *("B11", "B12", "B8A"),
)
# What OlmoEarth's evaluations put in place of bands that a set lacks: their means.
STAND_INS = {"B01": ("B02",), "B06": ("B05", "B07"), "B09": ("B8A",)}
DATE = "2020-07-01"  # OlmoEarth's evaluations take it where a set says none.


@dataclasses.dataclass(frozen=True)
class Sensor:
    """How the numbers of files become those of a modality.

    Attributes:
        name: of the modality.
        bands: of a file, in its order; () = those that each file names.
        scale, offset: x' = scale x + offset, in the modality's own units.
        nodata: values that stand for nothing, beside the one that a file names.
        impute: see `impute`.
    """

    name: str
    bands: tuple[str, ...] = ()
    scale: float = 1.0
    offset: float = 0.0
    nodata: tuple[float, ...] = ()
    impute: bool = False

    def read(self, path) -> np.ndarray:  # -> float32 [S, S, 1, C]
        """Return the largest central square of a file, `MISSING` where nothing is.

        Raises:
            DataError: damaged, of other bands, or of bands without names.
        """
        raster = tiff.read(path)
        x = raster.values.astype(np.float64)
        for value in (raster.nodata, *self.nodata):
            if value is not None:
                x[raster.values == value] = np.nan
        x = self.scale * x + self.offset
        try:
            x = modalities.arrange(self.name, x, self._bands(raster))
        except errors.UsageError as e:
            hint = "set data.options.bands to the file's bands, in its order"
            raise errors.DataError(f"{decode.printable(path)}: {e}; {hint}") from e
        if (x == modalities.MISSING).all():
            raise errors.DataError(
                f"{decode.printable(path)}: no value of {self.name} in it"
            )
        if self.impute:
            x = impute(self.name, x)
        return central(x, modalities.find(self.name).factor)[:, :, None]

    def _bands(self, raster):
        if self.bands:
            return self.bands
        kind = modalities.find(self.name)
        if len(kind.bands) == 1 and raster.names == ("",):
            return kind.bands
        # A file may hold more than the modality: cirrus, masks of clouds.
        return [b if modalities.channel(kind, b) >= 0 else "" for b in raster.names]


def central(x, factor=1):  # [H, W, ...] -> [S, S, ...]
    """Return the largest central square whose side is a multiple of `factor`."""
    side = min(x.shape[:2]) // factor * factor
    top, left = ((n - side) // 2 for n in x.shape[:2])
    return x[top : top + side, left : left + side]


def impute(name, x):
    """Return x [..., C] with missing bands made up by `STAND_INS` where they can be."""
    kind, out = modalities.find(name), x.copy()
    for band, others in STAND_INS.items():
        i = modalities.channel(kind, band)
        if i < 0 or not (x[..., i] == modalities.MISSING).all():
            continue
        given = x[..., [modalities.channel(kind, b) for b in others]]
        whole = (given != modalities.MISSING).all(-1)
        out[..., i] = np.where(whole, given.mean(-1), modalities.MISSING)
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class Rasters(wrappers.Wrapper):
    """The files of a `folder.Files` as samples.

    Attributes:
        sensor: that took them.
        names: modalities of every sample; those of other sensors are missing.
        stamp: (day, month 0-11, year) of all.
        masks: paths [N] of a class per pixel, or ().
        ignore: values of a mask that are no class.
        shift: what is taken from the values of a mask.
    """

    sensor: Sensor
    names: tuple[str, ...]
    stamp: tuple[int, int, int]
    masks: tuple[str, ...] = ()
    ignore: tuple[int, ...] = ()
    shift: int = 0

    def example(self, i: int) -> dict:
        """Return sample i."""
        x = self.sensor.read(self.whole.path(i))
        sample = olmoearth.complete([self.stamp], {self.sensor.name: x}, {}, self.names)
        sample["label"] = int(self.whole.labels[i])
        if self.masks:
            sample["cover"] = cover(self.masks[i], self.ignore, self.shift)
            scale = modalities.find(self.sensor.name).factor
            if len(sample["cover"]) * scale != len(x):
                raise errors.DataError(
                    f"{decode.printable(self.masks[i])}: a mask of "
                    f"{len(sample['cover'])} pixels a side; want {len(x) // scale}, "
                    "on the 10 m grid"
                )
        return sample


def cover(path, ignore=(), shift=0):  # -> int16 [S, S]
    """Return the central square of a mask, -1 where it names no class."""
    if os.path.splitext(path)[1].lower() in tiff.SUFFIXES:
        values = tiff.read(path).values
    else:
        values = decode.read(path, channels=1)
    if values.shape[-1] != 1 or values.dtype.kind not in "iu":
        raise errors.DataError(
            f"{decode.printable(path)}: a mask is whole numbers in one band; this is "
            f"{values.dtype} in {values.shape[-1]}"
        )
    found = central(values[..., 0]).astype(np.int64)
    gone = np.isin(found, ignore) | (found < shift)
    return np.where(gone, -1, found - shift).astype(np.int16)


def open(
    root,
    split,
    *,
    modality: Literal[SENSORS] = "sentinel2_l2a",
    modalities: tuple[str, ...] = (),
    bands: tuple[str, ...] = (),
    scale: float = 1.0,
    offset: float = 0.0,
    nodata: tuple[float, ...] = (),
    impute: bool = False,
    date: str = "",
    masks: str = "",
    ignore: tuple[int, ...] = (255,),
    labels: Literal["folder", "none"] = "folder",
    divided: Literal["auto", "yes", "no"] = "auto",
    holdout: ranges.BelowOne = 0.1,
    channels: int = 1,
):
    """Files of one sensor below `root`; classes and splits are those of `folder`.

    Args:
        modality: the sensor, whose own units the values are in after scale and offset:
            10000 times the reflectance for Sentinel-2, dB for Sentinel-1.
        modalities: of every sample; those of other sensors are missing. () = the one.
        bands: names of the bands of a file, in its order, "" for one to leave out; () =
            as each file names them.
        scale, offset: x' = scale x + offset: 10000 and 0 for reflectances in [0, 1], 1
            and -1000 for Sentinel-2's products since January 2022.
        nodata: values that stand for nothing, beside the one that a file names.
        impute: bands that are missing are copied from their neighbours, as in
            OlmoEarth's evaluations, and not left out.
        date: of all files, as 2020-07-01.
        masks: folder of one mask for each file, laid out like the files: a class per
            pixel from 0 on.
        ignore: values of a mask that are no class.
        labels, divided, holdout: see `folder.open`.
        channels: not used: each modality has its own.

    Raises:
        DataError: nothing there, or files without masks.
        UsageError: a band that the sensor does not have, or no date.
    """
    layout.root_of("geotiff", root, EXPECTED)
    found = folder.open(root, split, labels=labels, divided=divided, holdout=holdout)
    found = _only(found, lambda path: path.lower().endswith(tiff.SUFFIXES), "geotiff")
    endings = (*tiff.SUFFIXES, ".png")
    where = layout.named_like(found, masks, endings, "mask") if masks else ()
    sensor = Sensor(modality, bands, scale, offset, nodata, impute)
    _check(sensor)
    names = modalities or (modality,)
    return Rasters(found, sensor, names, _stamp("geotiff", date), where, ignore)


def eurosat(
    root,
    split,
    *,
    modalities: tuple[str, ...] = ("sentinel2_l2a",),
    date: str = DATE,
    holdout: ranges.BelowOne = 0.2,
    channels: int = 1,
):
    """EuroSAT, all 13 bands: ROOT/<class>/<class>_<i>.tif.

    Args:
        root: the folder of the classes, or one above it, as either archive unpacks.
        split: "train", "val" or "test": as the lists eurosat-{train,val,test}.txt name
            them, where they lie in `root`; without them, by a hash of the name.
        modalities: of every sample; those of other sensors are missing.
        date: of all files, which say none.
        holdout: share of every class that is "val" (= "test") without lists.
        channels: not used: each modality has its own.

    Raises:
        DataError: nothing there, or not of this layout.
    """
    split = layout.split_of("eurosat", split, folder.SPLITS)
    top = layout.root_of("eurosat", root, EUROSAT)
    base = next((top / p for p in INSIDE if (top / p).is_dir()), top)
    base = base / "tif" if (base / "tif").is_dir() else base
    if not set(CLASSES) & set(folder.folders(base)):
        layout.fail("eurosat", "no folder of a class", base, EUROSAT)
    lists = [p / f"eurosat-{split}.txt" for p in (top, base)]
    named = next((p for p in lists if p.is_file()), None)
    own = "all" if named else split
    found = folder.open(str(base), own, divided="no", holdout=holdout)
    keep = {pathlib.Path(x).stem for x in named.read_text().split()} if named else None

    def chosen(path):
        one = pathlib.PurePath(path)
        return one.suffix.lower() in tiff.SUFFIXES and (not named or one.stem in keep)

    found = _only(found, chosen, "eurosat", split)
    sensor = Sensor("sentinel2_l2a", EUROSAT_BANDS)
    return Rasters(found, sensor, modalities, _stamp("eurosat", date))


def _only(files, chosen, name, split="") -> folder.Files:
    """Return the files whose path from the root is chosen.

    Raises:
        DataError: there is none.
    """
    paths = [files.relative(i) for i in range(len(files))]
    pairs = zip(paths, files.labels.tolist(), strict=True)
    members = [(path, label) for path, label in pairs if chosen(path)]
    if len(members) < len(paths) and not split:
        layout.once(
            f"{name}: {decode.printable(files.root)}: left out: "
            f"{len(paths) - len(members)} file(s) that are no TIFF"
        )
    if not members:
        split = split or files.split
        layout.fail(name, f"no TIFF file in split {split!r}", files.root, EXPECTED)
    about = dict(classes=files.classes, channels=1, name=name)
    return folder.files(files.root, members, split=split or files.split, **about)


def _check(sensor) -> None:
    if sensor.bands:
        modalities.places(modalities.find(sensor.name), sensor.bands)


def _stamp(name, date) -> tuple[int, int, int]:
    """Return (day, month 0-11, year); a date that nobody said is a guess, and said.

    Raises:
        UsageError: it is none.
    """
    if not date:
        layout.once(
            f"{name}: no date is known: {DATE} is a guess; set data.options.date"
        )
    try:
        found = datetime.date.fromisoformat(date or DATE)
    except ValueError as e:
        raise errors.UsageError(
            f"data.options.date={date!r}: {e}; as {DATE}, year-month-day"
        ) from e
    return found.day, found.month - 1, found.year
