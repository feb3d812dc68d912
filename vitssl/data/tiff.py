"""TIFF and GeoTIFF files of any number of bands, in their own numbers."""

import html
import io
import logging
import os
import re
from typing import NamedTuple

import numpy as np

from vitssl import errors

SUFFIXES = (".tif", ".tiff")
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_PIXELS = 1 << 27
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
    where = os.fsencode(path).decode("utf-8", "backslashreplace")
    try:
        return _read(path)
    except OSError as e:
        why = e.strerror or e
        raise errors.DataError(f"{where}: cannot be read: {why}") from e
    except Exception as e:  # noqa: BLE001 - decoders raise whatever they like.
        why = str(e) or type(e).__name__
        raise errors.DataError(f"{where}: cannot be decoded: {why}") from e


def decode(data: bytes) -> Raster:
    """Read a file that is in memory; raises whatever is wrong."""
    return _read(io.BytesIO(data))


def _read(file) -> Raster:
    import tifffile

    # What it logs of a damaged file is in the error, once.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    try:
        with tifffile.TiffFile(file) as opened:
            return _raster(opened)
    except OSError:
        raise
    except Exception as e:  # noqa: BLE001 - decoders raise whatever they like.
        if "imagecodecs" in str(e):
            raise ValueError(f"{e} (extra 'geo')") from e
        raise


def _raster(file) -> Raster:
    series, tags = file.series[0], file.pages[0].tags
    axes = series.axes
    if "X" not in axes or "Y" not in axes or series.dtype.kind not in "iuf":
        raise ValueError(
            f"{series.dtype} along {axes}; want real numbers along Y and X"
        )
    if np.prod([series.shape[axes.index(a)] for a in "YX"]) > MAX_PIXELS:
        raise OverflowError(f"{series.shape} are more than {MAX_PIXELS} pixels")
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
