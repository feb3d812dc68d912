"""TIFF and GeoTIFF files of any number of bands, in their own numbers."""

import html
import logging
import re
from typing import NamedTuple

import numpy as np

from vitssl import errors
from vitssl.data import decode

SUFFIXES = (".tif", ".tiff")
_METADATA, _NODATA = 42112, 42113  # GDAL's tags.
_DESCRIPTION = re.compile(
    r'<Item name="DESCRIPTION" sample="(\d+)" role="description">([^<]*)</Item>'
)


class Raster(NamedTuple):
    """What a file holds.

    Attributes:
        values: [H, W, C] in the file's dtype.
        names: of its bands, "" where the file says none.
        nodata: the value that stands for nothing, None where the file says none.
    """

    values: np.ndarray
    names: tuple[str, ...]
    nodata: float | None


def read(path) -> Raster:
    """Read a file: one image of many bands, or one image for each band.

    Of a pyramid it is the largest level. Compressions beyond deflate and PackBits need
    the package imagecodecs (extra "geo").

    Raises:
        DataError: no TIFF, truncated, too large, of numbers that are not real, or of a
            compression that cannot be read.
    """
    import tifffile

    # What it logs of a damaged file is in the error, once.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    where = decode.printable(path)
    try:
        with tifffile.TiffFile(path) as file:
            return _raster(file)
    except OSError as e:
        why = e.strerror or e
        raise errors.DataError(f"{where}: cannot be read: {why}") from e
    except Exception as e:  # noqa: BLE001 - decoders raise whatever they like.
        why = str(e) or type(e).__name__
        if "imagecodecs" in why:
            why = f"{why} (extra 'geo')"
        raise errors.DataError(f"{where}: cannot be decoded: {why}") from e


def _raster(file) -> Raster:
    series, tags = file.series[0], file.pages[0].tags
    axes = series.axes
    if "X" not in axes or "Y" not in axes or series.dtype.kind not in "iuf":
        raise ValueError(
            f"{series.dtype} along {axes}; want real numbers along Y and X"
        )
    if np.prod([series.shape[axes.index(a)] for a in "YX"]) > decode.MAX_PIXELS:
        raise OverflowError(f"{series.shape} are more than {decode.MAX_PIXELS} pixels")
    x = np.moveaxis(series.asarray(), [axes.index(a) for a in "YX"], [0, 1])
    x = x.reshape(*x.shape[:2], -1)
    names = [""] * x.shape[-1]
    for number, name in _DESCRIPTION.findall(_text(tags, _METADATA)):
        if int(number) < len(names):
            names[int(number)] = html.unescape(name).strip()
    nodata = _text(tags, _NODATA).strip("\0 ")
    return Raster(x, tuple(names), float(nodata) if nodata else None)


def _text(tags, code) -> str:
    return str(tags[code].value) if code in tags else ""
