"""Fields: drawn farmland seen by several sensors through a year, every pixel known.

Parcels, a wood, a river, roads and houses on a 10 m grid. What grows on a parcel shows
in the seasons alone: winter and summer crops, grass and bare soil look alike in some
month. Clouds cover Sentinel-2 and Landsat, speckle Sentinel-1, and time steps are
missing. Roads, houses and the river are thinner than a patch of 8 pixels.

With `told_by="texture"` a pixel's colours name no class: plantings are of trees and
grass, in rows, a grid, clumps or anyhow; roads and houses, rivers and lakes are of the
same matter. What surrounds a pixel says what it is.

Units are those of the real products: digital numbers, dB, metres and map codes.
"""

import dataclasses
import functools
from typing import Annotated, ClassVar, Literal, NamedTuple

import cv2
import numpy as np

from vitssl import ranges
from vitssl.data import modalities
from vitssl.data.sources import drawn

COVER = ("water", "forest", "grass", "winter crop", "summer crop", "built")
PLANTINGS = {"rows": 0.5, "grid": 0.25, "clumps": 0.8, "anyhow": 0.05}  # Of trees.
TEXTURES = ("river", "lake", "house", "road", *PLANTINGS)
LANDSCAPES = ("arable", "pasture", "woodland", "settled")
WATER, FOREST, GRASS, WINTER, SUMMER, BUILT = range(6)
RIVER, LAKE, HOUSE, ROAD = range(4)
SENSORS = ("sentinel2_l2a", "sentinel1", "landsat")
MAPS = modalities.MAPS

# What parcels of each landscape grow: grass, winter crop, summer crop.
_GROWN = ((0.15, 0.45, 0.40), (0.80, 0.10, 0.10), (0.5, 0.25, 0.25), (0.4, 0.3, 0.3))
_WOOD = (0.06, 0.12, 0.50, 0.08)  # Share of wood.
_HOUSES = (3, 3, 2, 26)
# Reflectances in Sentinel-2's bands, in the order of `modalities`.
_SOIL = (0.08, 0.11, 0.15, 0.25, 0.18, 0.20, 0.22, 0.26, 0.32, 0.28, 0.07, 0.24)
_GREEN = (0.03, 0.07, 0.04, 0.42, 0.10, 0.30, 0.38, 0.43, 0.20, 0.10, 0.03, 0.40)
_TREES = (0.02, 0.05, 0.03, 0.30, 0.07, 0.22, 0.27, 0.31, 0.14, 0.07, 0.02, 0.30)
_LAKE = (0.06, 0.06, 0.04, 0.02, 0.04, 0.03, 0.03, 0.02, 0.01, 0.01, 0.07, 0.02)
_ROOFS = (0.14, 0.16, 0.18, 0.24, 0.20, 0.21, 0.22, 0.24, 0.26, 0.24, 0.13, 0.22)
_CODES = {"worldcover": (80, 10, 30, 40, 40, 50), "cdl": (111, 141, 176, 24, 1, 121)}
_PERIOD = 4.0  # Pixels from row to row: both trees and grass under a patch of 4.
_METRES = (4, 5, 6, 7, 8, 9), (10, 11)  # S2 channels of 20 m and 60 m.


class Scene(NamedTuple):
    """A place and what is known of it.

    Attributes:
        cover: uint8 [S, S], the classes: indices of `COVER`, or of `TEXTURES`.
        matter: uint8 [S, S], what reflects: indices of `COVER`.
        landscape: an index of `LANDSCAPES`.
        height: float32 [S, S], metres above the sea.
    """

    cover: np.ndarray
    matter: np.ndarray
    landscape: int
    height: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields(drawn.Drawn):
    """Farmland seen by several sensors through a year, with its land cover.

    Examples are those of `olmoearth`, with "cover" uint8 [S, S]; the label is the
    landscape. They must not be changed in place: `held` of them are kept in memory.

    Attributes:
        modalities: names, of `SENSORS` and `MAPS`.
        size: S, side in 10 m pixels.
        clouds: probability that a time step of an optical sensor has clouds.
        gaps: probability that a time step of Sentinel-2 or 1 is missing; Landsat's is
            twice that.
        noise: relative deviation of a pixel's reflectance.
        told_by: what tells classes apart: "seasons", those of `COVER`; "texture" and
            shape, those of `TEXTURES`, in a summer that lasts.
        held: scenes that stay in memory once they are drawn, 0.2 to 1.5 MB each.
        channels: not used: each modality has its own.
    """

    modalities: tuple[Literal[*SENSORS, *MAPS], ...] = (*SENSORS, *MAPS)
    size: Annotated[int, ranges.Range(16)] = 48
    clouds: Annotated[float, ranges.Range(0, 0.5)] = 0.35
    gaps: Annotated[float, ranges.Range(0, 0.5)] = 0.15
    noise: ranges.NotNegative = 0.12
    told_by: Literal["seasons", "texture"] = "seasons"
    held: ranges.OrNone = 0
    channels: int = 1
    name: ClassVar[str] = "fields"
    classes: ClassVar[tuple[str, ...]] = LANDSCAPES
    COUNTS: ClassVar[dict[str, int]] = {"train": 2000, "test": 400}

    def label(self, i: int) -> int:
        """Return the landscape of scene i; every one equally often."""
        return i % len(LANDSCAPES)

    @functools.cached_property
    def _kept(self):
        return {}

    def example(self, i: int) -> dict:
        """Return scene i, with "cover"."""
        if i in self._kept:
            return dict(self._kept[i])
        sample = self.sample(i)
        if len(self._kept) < self.held:
            self._kept[i] = dict(sample)
        return sample

    def scene(self, i: int) -> Scene:
        """Draw the ground of scene i."""
        rng, n, kind = self.rng(i, 0), self.size, self.label(i)
        draw = _seasonal if self.told_by == "seasons" else _textured
        cover, matter = draw(rng, n, kind)
        height = 350 + 120 * _smooth(rng, n, n / 3)
        height = (height - 25 * (matter == WATER)).astype(np.float32)
        return Scene(cover, matter, kind, height)

    def sample(self, i: int) -> dict:
        """Draw what the sensors see of scene i."""
        scene, rng = self.scene(i), self.rng(i, 1)
        days = rng.integers(1, 29, modalities.TIMES)
        year = int(rng.integers(2016, 2025))
        stamps = [(day, month, year) for month, day in enumerate(days)]
        ground = self._reflectance(i, scene)  # [S, S, T, 12]
        sample = {
            "timestamps": np.array(stamps, np.int32),
            "length": modalities.TIMES,
            "cover": scene.cover,
            "label": scene.landscape,
        }
        sensors = zip(
            SENSORS, (self._sentinel2, self._sentinel1, self._landsat), strict=True
        )
        seen, present = dict(sensors), {}
        for name in self.modalities:
            if name in seen:
                x, there = seen[name](i, scene, ground)
                x[:, :, ~there] = modalities.MISSING
                sample[name], present[name] = x, there
            elif name == "worldcereal" and self.told_by == "texture":
                # Each class has a band: a map that knows the truth.
                one = 100 * np.eye(len(TEXTURES), dtype=np.uint8)
                sample[name] = one[scene.cover][:, :, None]
            else:
                sample[name] = _map(name, scene)
        return sample | {"present": present}

    def _reflectance(self, i, scene):
        """Return the reflectance of the ground through the year: [S, S, 12, bands]."""
        rng, months = self.rng(i, 2), np.arange(modalities.TIMES)
        if self.told_by == "texture":
            months = np.full(modalities.TIMES, 6)  # Summer all year.
        shift = rng.normal(0, 0.5)  # An early or a late year.

        def season(peak, wide):
            return np.exp(-((months - peak - shift) ** 2) / (2 * wide**2))

        green = np.zeros((len(COVER), modalities.TIMES))
        green[FOREST] = 0.75 + 0.2 * season(6, 3)
        green[GRASS] = 0.40 + 0.35 * season(5.5, 3.0)
        green[WINTER] = 0.10 + 0.85 * season(4, 1.5)
        green[SUMMER] = 0.10 + 0.85 * season(7, 1.5)
        green[BUILT] = 0.08 + 0.10 * season(6, 3)
        living = np.tile(np.array(_GREEN), (len(COVER), 1))
        living[FOREST] = _TREES
        bare = np.tile(np.array(_SOIL), (len(COVER), 1))
        bare[WATER], bare[BUILT] = _LAKE, _ROOFS
        table = (
            green[..., None] * living[:, None] + (1 - green[..., None]) * bare[:, None]
        )
        n = self.size
        shade = np.exp(0.12 * _smooth(rng, n, 3) + rng.normal(0, 0.05, (n, n)))
        shade = shade.astype(np.float32)
        return table.astype(np.float32)[scene.matter] * shade[..., None, None]

    def _sentinel2(self, i, scene, ground):
        del scene
        rng = self.rng(i, 3)
        there = _there(rng, self.gaps)
        x = self._seen(rng, ground)
        for channels, factor in zip(_METRES, (2, 6), strict=True):
            x[..., list(channels)] = _coarse(x[..., list(channels)], factor)
        x *= 10000
        return x.clip(1, 30000, out=x).round(out=x), there

    def _landsat(self, i, scene, ground):
        del scene
        rng = self.rng(i, 4)
        there = _there(rng, 2 * self.gaps)
        seen = self._seen(rng, ground)
        pan = seen[..., :3].mean(-1, keepdims=True)
        optical = _coarse(seen[..., [10, 0, 1, 2, 7, 8, 9]], 3)
        cirrus = np.full(pan.shape, 0.01, np.float32)
        dn = (np.concatenate([pan, optical, cirrus], axis=-1) + 0.2) / 2.75e-5
        warm = np.cos((np.arange(modalities.TIMES) - 6.5) * np.pi / 6)[:, None]
        heat = 21000 + 9000 * warm + 8000 * _coarse(ground[..., 8:9] - 0.2, 10)
        dn = np.concatenate([dn, heat, heat - 1500], axis=-1)
        return dn.clip(1, 65535).round().astype(np.float32), there

    def _sentinel1(self, i, scene, ground):
        rng = self.rng(i, 5)
        there = _there(rng, self.gaps)
        index = (ground[..., 3] - ground[..., 2]) / (ground[..., 3] + ground[..., 2])
        base = np.array([-21.0, -8.0, -12.0, -12.5, -12.5, -4.0])[scene.matter][
            ..., None
        ]
        vv = base + 2.5 * (index - 0.4) * (base > -20)
        vh = vv - 6.5 + 3 * (index - 0.4) * (base > -20) - 2 * (base > -5)
        x = np.stack([vv, vh], axis=-1)
        speckle = 10 * np.log10(
            rng.standard_gamma(4.0, x.shape, np.float32) / 4
        )  # Four looks.
        return (x + speckle).astype(np.float32), there

    def _seen(self, rng, ground):
        """Return what an optical sensor sees: the ground, noise and clouds."""
        x = rng.standard_normal(ground.shape, np.float32)
        x *= self.noise
        x += 1
        x *= ground
        n = self.size
        for t in np.flatnonzero(rng.random(modalities.TIMES) < self.clouds):
            white = 1 / (1 + np.exp(-4 * (_smooth(rng, n, n / 4) - rng.uniform(0, 1))))
            x[:, :, t] += white[..., None] * (np.float32(0.65) - x[:, :, t])
        return x


def _seasonal(rng, n, kind):
    """Draw a landscape whose seasons tell its classes: (cover, matter)."""
    of, where = _parcels(rng, n, (45, 140))
    crop = rng.choice([GRASS, WINTER, SUMMER], of, p=_GROWN[kind])
    cover = crop[where].astype(np.uint8)
    wood = _smooth(rng, n, n / 5)
    cover[wood > np.quantile(wood, 1 - _WOOD[kind] * rng.uniform(0.5, 1.5))] = FOREST
    for _ in range(int(rng.integers(1, 3))):
        _line(cover, rng, BUILT, 1)
    for _ in range(int(rng.poisson(_HOUSES[kind]))):
        cover[_block(rng, n)] = BUILT
    if rng.random() < 0.7:
        _line(cover, rng, WATER, int(rng.integers(1, 4)))
    return cover, cover


def _textured(rng, n, kind):
    """Draw a landscape whose textures and shapes tell its classes: (cover, matter)."""
    of, where = _parcels(rng, n, (250, 700))
    planted = rng.integers(len(TEXTURES) - len(PLANTINGS), len(TEXTURES), of)
    cover = planted[where].astype(np.uint8)
    trees = np.zeros((n, n), bool)
    for parcel in range(of):
        own = where == parcel
        trees[own] = _planting(rng, n, TEXTURES[planted[parcel]])[own]
    matter = np.where(trees, FOREST, GRASS).astype(np.uint8)
    for _ in range(int(rng.integers(1, 3))):
        high = _smooth(rng, n, n / 8)
        lake = high > np.quantile(high, 1 - rng.uniform(0.04, 0.1))
        cover[lake] = LAKE
    for _ in range(int(rng.integers(1, 3))):
        _line(cover, rng, ROAD, 2)
    for _ in range(6 + int(rng.poisson(_HOUSES[kind])) // 2):
        cover[_block(rng, n, 3, 6)] = HOUSE
    _line(cover, rng, RIVER, int(rng.integers(2, 4)))
    matter[np.isin(cover, (RIVER, LAKE))] = WATER
    matter[np.isin(cover, (HOUSE, ROAD))] = BUILT
    return cover, matter


def _planting(rng, n, kind):
    """Return where a planting has trees: bool [S, S]."""
    if kind == "anyhow":
        return rng.random((n, n)) < PLANTINGS[kind]
    if kind == "clumps":
        high = _smooth(rng, n, 1.2)
        return high > np.quantile(high, 1 - PLANTINGS[kind])
    angle = rng.uniform(0, np.pi)
    at = np.stack(np.mgrid[:n, :n], axis=-1) @ np.array([np.cos(angle), np.sin(angle)])
    rows = np.sin(2 * np.pi * at / _PERIOD + rng.uniform(0, 2 * np.pi)) > 0
    if kind == "rows":
        return rows
    across = np.stack(np.mgrid[:n, :n], axis=-1) @ np.array(
        [-np.sin(angle), np.cos(angle)]
    )
    return rows & (np.sin(2 * np.pi * across / _PERIOD + rng.uniform(0, 6.28)) > 0)


def _block(rng, n, least=1, most=4):
    """Return the slices of a block somewhere, of fewer than `most` pixels a side."""
    y, x = rng.integers(0, n, 2)
    h, w = rng.integers(least, most, 2)
    return slice(y, y + h), slice(x, x + w)


def _parcels(rng, n, pixels):
    """Return parcels: how many, and whose each pixel is, int [S, S].

    They are the cells of random points, in a random metric, of so many pixels.
    """
    count = max(4, round(n * n / rng.uniform(*pixels)))
    points = rng.uniform(0, n, (count, 2))
    angle, stretch = rng.uniform(0, np.pi), rng.uniform(1, 2.2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    metric = np.diag([stretch, 1 / stretch]) @ turn
    at = np.stack(np.mgrid[:n, :n], axis=-1) + 0.5
    far = ((at @ metric.T)[:, :, None] - points @ metric.T) ** 2
    return count, far.sum(-1).argmin(-1)


def _smooth(rng, n, scale):
    """Return smooth noise [n, n] of mean 0 and deviation 1."""
    x = rng.standard_normal((n, n), np.float32)
    x = cv2.GaussianBlur(x, (0, 0), scale)
    return (x - x.mean()) / (x.std() + 1e-9)


def _line(cover, rng, kind, wide):
    """Draw a bent line from side to side."""
    n = len(cover)
    along = np.linspace(-0.1 * n, 1.1 * n, 24)
    bend = rng.uniform(0.02, 0.12) * n
    phase, waves = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.5)
    across = rng.uniform(0.15, 0.85) * n + rng.uniform(-0.5, 0.5) * (along - n / 2)
    across = across + bend * np.sin(phase + along * waves * 2 * np.pi / n)
    points = np.stack([along, across], axis=1)
    points = points if rng.random() < 0.5 else points[:, ::-1]
    cv2.polylines(cover, [np.rint(points).astype(np.int32)], False, int(kind), wide)


def _there(rng, gaps):
    """Return which time steps are there: bool [12], at least three of them."""
    there = rng.random(modalities.TIMES) >= gaps
    there[rng.permutation(modalities.TIMES)[:3]] = True
    return there


def _coarse(x, factor):
    """Return [S, S, ...] averaged over blocks of pixels, on the same grid."""
    n = len(x)
    starts = np.arange(0, n, factor)
    sizes = np.diff([*starts, n])
    each = (-1, *[1] * (x.ndim - 1))
    rows = np.add.reduceat(x, starts, axis=0) / sizes.reshape(each).astype(x.dtype)
    cells = np.add.reduceat(rows, starts, axis=1)
    cells /= sizes.reshape(1, *each[:-1]).astype(x.dtype)
    return cells.repeat(sizes, axis=0).repeat(sizes, axis=1)


@functools.cache
def _band(modality, band):
    return modalities.MODALITIES[modality].bands.index(band)


def _map(name, scene):
    """Return a map of a scene: [S, S, 1, C]."""
    cover, shape = scene.matter, (*scene.matter.shape, 1)
    if name in _CODES:
        return np.array(_CODES[name], np.uint8)[cover].reshape(*shape, 1)
    if name == "srtm":
        return scene.height.round().astype(np.int16).reshape(*shape, 1)
    if name == "wri_canopy_height_map":
        tall = np.clip(14 + 4 * _smooth(np.random.default_rng(0), len(cover), 2), 3, 30)
        return ((cover == FOREST) * tall).astype(np.uint8).reshape(*shape, 1)
    out = np.zeros((*shape, len(modalities.find(name).bands)), np.uint8)
    if name == "openstreetmap_raster":
        for band, kind in (("building", BUILT), ("river", WATER)):
            out[..., 0, _band(name, band)] = cover == kind
    elif name == "worldcereal":
        grown = {"wintercereals-wintercereals": WINTER, "maize-main-maize": SUMMER}
        for crop, kind in grown.items():
            band = _band(name, f"tc-{crop}-classification")
            out[..., 0, band] = 100 * (cover == kind)
        both = np.isin(cover, (WINTER, SUMMER))
        whole = _band(name, "tc-annual-temporarycrops-classification")
        out[..., 0, whole] = 100 * both
    return out
