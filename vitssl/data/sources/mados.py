"""MADOS: oil spills and marine debris on Sentinel-2, few pixels of which have a class.

Examples are those of `olmoearth`, with "cover", a class per pixel, -1 where nobody
looked. A crop is cut into tiles, of which those without a class are left out.

Sources: Kikaki et al. 2024, doi:10.1016/j.isprsjprs.2024.02.017;
allenai/olmoearth_pretrain olmoearth_pretrain/evals/datasets/mados_dataset.py.
"""

import dataclasses
import functools
import os
from typing import Literal

import numpy as np

from vitssl import errors
from vitssl.data import decode, modalities, resample, tiff
from vitssl.data.sources import geotiff, layout, olmoearth

EXPECTED = (
    "ROOT/splits/{train,val,test}_X.txt of lines Scene_<s>_<i>, and for each "
    "ROOT/Scene_<s>/{10,20,60}/Scene_<s>_L2R_rhorc_<nm>_<i>.tif and "
    "ROOT/Scene_<s>/10/Scene_<s>_L2R_cl_<i>.tif"
)
SIDE = 240  # Of a crop, in pixels of 10 m.
COVER = (
    *("marine debris", "dense sargassum", "sparse floating algae"),
    *("natural organic material", "ship", "oil spill", "marine water"),
    *("sediment-laden water", "foam", "turbid water", "shallow water"),
    *("waves and wakes", "oil platform", "jellyfish", "sea snot"),
)
# Metres of a pixel, and the wavelength in nm by which Sentinel-2A or 2B names a band.
BANDS = {
    "B01": (60, (443, 442)),
    "B02": (10, (492,)),
    "B03": (10, (560, 559)),
    "B04": (10, (665,)),
    "B05": (20, (704,)),
    "B06": (20, (740, 739)),
    "B07": (20, (783, 780)),
    "B08": (10, (833,)),
    "B8A": (20, (865, 864)),
    "B11": (20, (1614, 1610)),
    "B12": (20, (2202, 2186)),
}
# Mean and deviation over the training split, reflectances in [0, 1]. Water is dark,
# and corrected otherwise than L2A: by these it looks as land does to the network.
STATISTICS = {
    "B01": (0.0583494, 0.0210283),
    "B02": (0.0525997, 0.0241274),
    "B03": (0.0441005, 0.0270778),
    "B04": (0.0360415, 0.0288926),
    "B05": (0.0337057, 0.0282822),
    "B06": (0.0349336, 0.0327317),
    "B07": (0.0361614, 0.0402699),
    "B08": (0.0318582, 0.0378670),
    "B8A": (0.0348930, 0.0432585),
    "B11": (0.0235180, 0.0293065),
    "B12": (0.0179423, 0.0223080),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Water(layout.Source):
    """Tiles of crops; the label is -1.

    Attributes:
        tiles: (scene, number of the crop, row and column of the tile in pixels).
        names: modalities of every sample; those that the set lacks are missing.
        tile: side of a sample.
        own: whether values are standardised by `STATISTICS`, in place of the sensor's.
        impute: see `geotiff.impute`.
    """

    root: str
    tiles: tuple[tuple[str, str, int, int], ...]
    names: tuple[str, ...]
    tile: int
    own: bool
    impute: bool
    split: str
    channels: int = 1
    classes: tuple[str, ...] = ()
    name: str = "mados"

    def __len__(self):
        return len(self.tiles)

    @property
    def labels(self) -> np.ndarray:
        """[N] int32 of -1: a tile has no class of its own."""
        return np.full(len(self), -1, np.int32)

    def example(self, i: int) -> dict:
        """Return tile i."""
        scene, number, row, column = self.tiles[i]
        cut = (slice(row, row + self.tile), slice(column, column + self.tile))
        x = np.concatenate([self._band(scene, number, b)[cut] for b in BANDS], -1)
        x = units(x, self.own)
        x = modalities.arrange("sentinel2_l2a", x, BANDS)
        x = geotiff.impute("sentinel2_l2a", x) if self.impute else x
        arrays = {"sentinel2_l2a": x[:, :, None]}
        sample = olmoearth.complete([_STAMP], arrays, {}, self.names)
        truth = classes_of(self.root, scene, number)[cut]
        return sample | {"label": -1, "cover": truth}

    def _band(self, scene, number, band):
        """Return a band on the 10 m grid, float32 [240, 240, 1]."""
        metres, lengths = BANDS[band]
        form = f"{self.root}/{scene}/{metres}/{scene}_L2R_rhorc_{{}}_{number}.tif"
        paths = [form.format(n) for n in lengths]
        found = next((p for p in paths if os.path.isfile(p)), None)
        if found is None:
            raise errors.DataError(
                f"mados: {scene}_{number}: no band {band}: want "
                f"{decode.printable(paths[0])}"
            )
        x = _square(found, SIDE * 10 // metres)
        return resample.resize(x.astype(np.float32), (SIDE, SIDE), None, "bilinear")


def units(x, own=False):  # [..., 11] reflectances -> digital numbers
    """Return reflectances in the order of `BANDS` in the units of Sentinel-2.

    Args:
        own: so that the mean and deviation of this set become the sensor's, by which
            networks normalise.
    """
    if not own:
        return 10000.0 * x
    at = [modalities.channel(modalities.find("sentinel2_l2a"), b) for b in BANDS]
    offset, divisor = (v[at] for v in modalities.scale("sentinel2_l2a"))
    mean, std = np.array([STATISTICS[b] for b in BANDS]).T
    return offset + divisor * (x - (mean - 2 * std)) / (4 * std)


def classes_of(root, scene, number):  # -> int16 [240, 240]
    """Return the class of every pixel of a crop, -1 where it has none."""
    path = f"{root}/{scene}/10/{scene}_L2R_cl_{number}.tif"
    return (_square(path, SIDE)[..., 0].astype(np.int32) - 1).astype(np.int16)


def _square(path, side):
    x = tiff.read(path).values
    if x.shape != (side, side, 1):
        raise errors.DataError(
            f"mados: {decode.printable(path)}: shape {x.shape}; want {side} x {side} "
            "pixels of one band"
        )
    return x


def open(
    root,
    split,
    *,
    modalities: tuple[str, ...] = ("sentinel2_l2a",),
    statistics: Literal["sensor", "own"] = "own",
    tile: Literal[40, 80, 120, 240] = 80,
    impute: bool = False,
    channels: int = 1,
):
    """Tiles with a class of the published splits.

    Args:
        root: the folder of the scenes.
        split: "train", "val" or "test".
        modalities: of every sample; those that the set lacks are missing, as is the
            band B09.
        statistics: what normalises values: the set's own, as in OlmoEarth's
            evaluation, or the sensor's.
        tile: side of a sample in pixels.
        impute: B09 is a copy of B8A, as in OlmoEarth's evaluation.
        channels: not used: each modality has its own.

    Raises:
        DataError: nothing there, or not of this layout.
    """
    split = layout.split_of("mados", split, _SPLITS)
    base = layout.root_of("mados", root, EXPECTED, "MADOS")
    listed = f"splits/{split}_X.txt"
    layout.need("mados", base, (listed,), EXPECTED)
    crops = (base / listed).read_text().split()
    tiles = _labelled(str(base), tuple(crops), tile)
    own = statistics == "own"
    return Water(str(base), tiles, modalities, tile, own, impute, split)


_SPLITS = {a: k for k, names in layout.ALIASES.items() for a in names}
_STAMP = (1, 6, 2020)  # Day, month 0-11, year, as OlmoEarth's evaluation has it.


@functools.cache
def _labelled(root, crops, tile) -> tuple:
    """Return the tiles that have a class.

    All tiles of a crop whose classes cannot be read are in it: they count as broken.

    Raises:
        DataError: a line that is no name of a crop.
    """
    found = []
    for crop in crops:
        scene, _, number = crop.rpartition("_")
        if not scene.startswith("Scene_") or not number.isdigit():
            raise errors.DataError(f"mados: {crop!r}: want Scene_<s>_<i>; {EXPECTED}")
        try:
            known = classes_of(root, scene, number) >= 0
        except errors.DataError:
            known = np.ones((SIDE, SIDE), bool)
        for row in range(0, SIDE, tile):
            for column in range(0, SIDE, tile):
                if known[row : row + tile, column : column + tile].any():
                    found.append((scene, number, row, column))
    return tuple(found)
