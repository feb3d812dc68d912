"""Sensors and maps of an Earth-observation sample: bands, groups, normalisation.

All of them lie on the 10 m grid of a tile; coarser bands are repeated there. Bands that
are embedded together form a bandset, and each (row, column, time, bandset) is a token.

Source: OlmoEarth, arXiv:2511.13655; allenai/olmoearth_pretrain@5411573
olmoearth_pretrain/data/constants.py and data/norm_configs/.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping

import numpy as np

from vitssl import errors

MISSING = -99999  # Stands for a value that is not there; normalisation keeps it.
TIMES = 12  # Most time steps of a sample, one each 30 days.


@dataclasses.dataclass(frozen=True)
class Modality:
    """One sensor or map, an array [H, W, T, C], [T, C] or [C] (T = 1 without time)."""

    name: str  # Key in files and batches.
    bandsets: tuple[tuple[str, ...], ...]  # In each set in the order of the channels.
    space: bool = True  # Has rows and columns.
    time: bool = False  # Has a value for each time step.
    factor: int = 1  # Pixels per 10 m, along a side.

    @property
    def bands(self) -> tuple[str, ...]:
        """Return all bands, in the order of the channels, used in a set or not."""
        whole = MODALITIES.get(self.name, self)
        return tuple(band for group in whole.bandsets for band in group)

    @property
    def channels(self) -> tuple[tuple[int, ...], ...]:
        """Return the channels of each bandset."""
        index = {band: i for i, band in enumerate(self.bands)}
        return tuple(tuple(index[b] for b in group) for group in self.bandsets)

    @property
    def mask_key(self) -> str:
        """Return the key of its mask in a batch."""
        return f"{self.name}_mask"

    def shape(self, side: int, times: int) -> tuple[int, ...]:
        """Return the shape of a sample of `side` 10 m pixels and `times` steps."""
        space = (side * self.factor,) * 2 if self.space else ()
        return (*space, *self._steps(times), len(self.bands))

    def tokens(self, rows: int, times: int, columns: int = 0) -> tuple[int, ...]:
        """Return (h, w, T, S), (T, S) or (S,) of patches; a square without columns."""
        space = (rows, columns or rows) if self.space else ()
        return (*space, *self._steps(times), len(self.bandsets))

    def _steps(self, times):
        return (times,) if self.time else (1,) * self.space


def _sets(*groups: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(group.split()) for group in groups)


_STREET_MAP = (
    "aerialway_pylon aerodrome airstrip amenity_fuel building chimney "
    "communications_tower crane flagpole fountain generator_wind helipad highway "
    "leisure lighthouse obelisk observatory parking petroleum_well power_plant "
    "power_substation power_tower river runway satellite_dish silo storage_tank "
    "taxiway water_tower works"
)
_CROPS = " ".join(
    f"tc-{name}-classification"
    for name in (
        "annual-temporarycrops",
        "maize-main-irrigation",
        "maize-main-maize",
        "maize-second-irrigation",
        "maize-second-maize",
        "springcereals-springcereals",
        "wintercereals-irrigation",
        "wintercereals-wintercereals",
    )
)
_WEATHER = (
    "2m-temperature 2m-dewpoint-temperature surface-pressure "
    "10m-u-component-of-wind 10m-v-component-of-wind total-precipitation"
)
MODALITIES = {
    m.name: m
    for m in (
        Modality(
            "sentinel2_l2a",
            _sets("B02 B03 B04 B08", "B05 B06 B07 B8A B11 B12", "B01 B09"),
            time=True,
        ),
        Modality("sentinel1", _sets("vv vh"), time=True),
        Modality("landsat", _sets("B8", "B1 B2 B3 B4 B5 B6 B7 B9 B10 B11"), time=True),
        Modality("worldcover", _sets("B1")),
        Modality("srtm", _sets("srtm")),
        Modality("openstreetmap_raster", _sets(_STREET_MAP)),
        Modality("wri_canopy_height_map", _sets("B1")),
        Modality("cdl", _sets("cdl")),
        Modality("worldcereal", _sets(_CROPS)),
        Modality("worldpop", _sets("B1")),
        Modality("naip_10", _sets("R G B IR"), factor=4),
        Modality("gse", (tuple(f"A{i:02d}" for i in range(64)),)),
        Modality("era5_10", _sets(_WEATHER), space=False, time=True),
        Modality("latlon", _sets("lat lon"), space=False),
        Modality("rgb", _sets("R G B")),  # An ordinary picture, by its own mean, std.
    )
}
# What the published runs train on; the maps are predicted and never read.
MAPS = (
    "worldcover",
    "srtm",
    "openstreetmap_raster",
    "wri_canopy_height_map",
    "cdl",
    "worldcereal",
)
TRAINED = ("sentinel2_l2a", "sentinel1", "landsat", *MAPS)

# (mean, standard deviation) of each band: x' = (x - (mean - 2 std)) / (4 std).
_COMPUTED = {
    "sentinel2_l2a": {
        "B01": (1115.84944, 1955.69918),
        "B02": (1188.94126, 1859.19240),
        "B03": (1407.77391, 1727.73874),
        "B04": (1513.05739, 1740.77573),
        "B05": (1890.98930, 1754.73204),
        "B06": (2483.78123, 1622.11727),
        "B07": (2722.72825, 1621.82262),
        "B08": (2755.48131, 1612.25657),
        "B8A": (2885.57026, 1611.35875),
        "B09": (3269.81255, 2651.08843),
        "B11": (2562.85261, 1441.54718),
        "B12": (1914.13832, 1328.89144),
    },
    "sentinel1": {"vv": (-11.64899, 10.84035), "vh": (-17.74544, 10.21627)},
    "landsat": {
        "B1": (11000.95952, 7857.92058),
        "B2": (10493.41629, 7872.39214),
        "B3": (10146.31848, 7676.27746),
        "B4": (10236.44603, 8038.21812),
        "B5": (14427.02149, 9302.43161),
        "B6": (12164.08145, 7442.39053),
        "B7": (9712.03295, 6037.71219),
        "B8": (10132.09100, 7788.72825),
        "B9": (4585.46957, 2549.74536),
        "B10": (21347.89357, 10957.28150),
        "B11": (19686.23206, 9911.42122),
    },
    "worldcover": {"B1": (34.04616, 24.23242)},
    "srtm": {"srtm": (677.02197, 993.17213)},
    "cdl": {"cdl": (100.0, 50.0)},
    "worldpop": {"B1": (150.0, 100.0)},
    "wri_canopy_height_map": {"B1": (10.0, 5.0)},
    "gse": {f"A{i:02d}": (8192.0, 4096.0) for i in range(64)},
    "naip_10": {
        "R": (102.38483, 47.60174),
        "G": (109.30740, 41.20184),
        "B": (94.09123, 35.85084),
        "IR": (128.47451, 55.60296),
    },
    "era5_10": {
        "2m-temperature": (294.50472, 8.41194),
        "2m-dewpoint-temperature": (285.45595, 9.40474),
        "surface-pressure": (93020.7548, 9569.32556),
        "10m-u-component-of-wind": (-0.34763, 1.29252),
        "10m-v-component-of-wind": (0.12554, 1.11789),
        "total-precipitation": (0.00273927, 0.00368254),
    },
}
# (least, greatest) where no statistics were computed: x' = (x - min) / (max - min).
_PREDEFINED = {
    "openstreetmap_raster": {band: (0.0, 1.0) for band in _STREET_MAP.split()},
    "worldcereal": {band: (0.0, 100.0) for band in _CROPS.split()},
    "latlon": {"lat": (-90.0, 90.0), "lon": (-180.0, 180.0)},
}


def find(name: str, groups: Mapping[str, tuple] | None = None) -> Modality:
    """Return a modality, with other bandsets if `groups` {modality: sets} names it.

    Later releases of the original override them so, with one set for all bands.

    Raises:
        UsageError: no such modality; a band it does not have, or one given twice.
    """
    if name not in MODALITIES:
        near = difflib.get_close_matches(name, MODALITIES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(MODALITIES)
        raise errors.UsageError(f"modality {name!r}: one of {known}{hint}")
    found = MODALITIES[name]
    if not groups or name not in groups:
        return found
    given = [band for group in groups[name] for band in group]
    for band in given:
        if band not in found.bands:
            known = ", ".join(found.bands)
            raise errors.UsageError(f"modality {name!r} has no band {band!r}: {known}")
    if len(set(given)) < len(given):
        raise errors.UsageError(f"modality {name!r}: a band is in two sets: {given}")
    return dataclasses.replace(found, bandsets=tuple(map(tuple, groups[name])))


def scale(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (offset, divisor) float64 [C]: x' = (x - offset) / divisor."""
    bands = MODALITIES[name].bands
    if name in _COMPUTED:
        mean, std = np.array([_COMPUTED[name][b] for b in bands]).T
        return mean - 2 * std, 4 * std
    low, high = np.array([_PREDEFINED[name][b] for b in bands]).T
    return low, high - low


def normalise(name: str, x: np.ndarray) -> np.ndarray:
    """Return float32 [..., C] mostly in [0, 1], nothing clipped; `MISSING` stays.

    Not of "rgb", which is normalised by its own mean and std.
    """
    offset, divisor = scale(name)
    x = np.asarray(x)
    scaled = ((x - offset) / divisor).astype(np.float32)
    return np.where(x == MISSING, np.float32(MISSING), scaled)


def channel(kind: Modality, band: str) -> int:
    """Return the channel of a band, however it is written: "B02", "B2", "b8a"; or -1.

    A band without a name, and one that the modality does not have, is -1.
    """
    plain = {_plain(name): i for i, name in enumerate(kind.bands)}
    return plain.get(_plain(band), -1)


def _plain(band):
    return re.sub("^B0+(?=[0-9])", "B", band.strip().upper())


def arrange(name: str, x: np.ndarray, bands: Iterable[str]) -> np.ndarray:
    """Return float32 [..., C] with the channels of a modality, of x [..., c].

    Bands that x lacks, and what is no finite number, are `MISSING`.

    Args:
        bands: names of the c bands of x, as `channel` reads them; "" is left out.

    Raises:
        UsageError: another number of names than x has bands, a band that the modality
            does not have, or one named twice.
    """
    kind, x, bands = find(name), np.asarray(x), tuple(bands)
    if x.shape[-1] != len(bands):
        raise errors.UsageError(
            f"modality {name!r}: {len(bands)} names for {x.shape[-1]} bands"
        )
    out = np.full((*x.shape[:-1], len(kind.bands)), MISSING, np.float32)
    for i, place in places(kind, bands).items():
        out[..., place] = np.where(np.isfinite(x[..., i]), x[..., i], MISSING)
    return out


def places(kind: Modality, bands: Iterable[str]) -> dict[int, int]:
    """Return {place in `bands`: channel} of those that have a name; see `arrange`."""
    found: dict[int, int] = {}
    for i, band in enumerate(bands):
        if not band:
            continue
        place = channel(kind, band)
        if place < 0:
            raise errors.UsageError(
                f"modality {kind.name!r} has no band {band!r}: "
                f'{", ".join(kind.bands)}; "" leaves one out'
            )
        if place in found.values():
            raise errors.UsageError(f"modality {kind.name!r}: band {band!r} twice")
        found[i] = place
    if not found:
        raise errors.UsageError(f"modality {kind.name!r}: no band is named")
    return found


def normalise_sensors(
    raw: Mapping, *, bands: Mapping = {}, nodata: float | None = None
) -> dict:  # noqa: B006
    """Return raw values as the features of an OlmoEarth import take them.

        load = vitssl.load("olmoearth-nano")
        raw = {"sentinel2_l2a": dn, "timestamps": dates}  # [B, H, W, T, c], [B, T, 3]
        names = {"sentinel2_l2a": ("B02", "B03", "B04", "B08")}
        load(vitssl.normalise_sensors(raw, bands=names))["pooled"]

    Args:
        raw: {modality: [..., c]} in the sensors' own units: digital numbers of
            Sentinel-2 (10000 times the reflectance) and Landsat, dB of Sentinel-1.
            "timestamps" stay as they are.
        bands: {modality: names of its c bands}, in any order; of one without names
            they are all of its bands, in their own order.
        nodata: a value that stands for nothing; `MISSING` and NaN always do.

    Returns:
        The same with float32 [..., C], normalised by the published statistics, and
        `MISSING` where there is nothing.

    Raises:
        UsageError: names that do not fit, see `arrange`, or of no modality of `raw`.
    """
    if alien := sorted(set(bands) - set(raw)):
        raise errors.UsageError(f"bands: {', '.join(alien)} not among the values given")
    out = dict(raw)
    for name in raw:
        if name == "timestamps":
            continue
        x = np.asarray(raw[name], np.float64)
        if nodata is not None:
            x = np.where(x == nodata, np.nan, x)
        x = arrange(name, x, bands.get(name) or find(name).bands)
        out[name] = normalise(name, x)
    return out
