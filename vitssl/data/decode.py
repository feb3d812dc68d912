"""Bytes of an image file -> uint8 [H, W, C], or one error that names the file."""

import functools
import io
import math
import os
import re
import stat

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vitssl import errors
from vitssl.data import dicom, npy, reduced, tiff

try:
    import simplejpeg
except ImportError:  # An optional speed-up: 0.76 against 0.95 ms per photograph.
    simplejpeg = None

# A file of a few kilobytes can declare terabytes of pixels.
MAX_PIXELS = 1 << 27
MAX_BYTES = 1 << 30  # Of a file.
# Pixels times scans of a progressive JPEG: a scan of a few bytes visits every pixel.
MAX_VISITS = 1 << 31
# The only ones that Pillow may try, whatever a name says: it hands PostScript on to
# Ghostscript, which runs it.
FORMATS = tuple("AVIF BMP DIB GIF JPEG JPEG2000 PNG PPM TGA TIFF WEBP".split())
DEFLATED = 8 * 1032  # Pixels of one bit that a byte of a PNG can stand for, at most.
_BLOCK = 1 << 20  # Values that are scaled at once.
_GIVE = (
    "give its range (data.options.value_range of a folder), or store it as uint8 .npy"
)
ORIENTATION = 0x0112  # The EXIF tag; 1 = upright.
TURNED = (5, 6, 7, 8)  # Its values where height and width change places.
# Whether (rows, columns) then run backwards, by its value.
FLIPPED = {2: (0, 1), 3: (1, 1), 4: (1, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
SUFFIXES = frozenset(
    ".avif .bmp .dcm .dib .gif .jfif .jp2 .jpe .jpeg .jpg .npy .pbm .pgm .png .pnm "
    ".ppm .tga .tif .tiff .webp".split()
)


def decode(
    data: bytes, *, channels: int, bounds=(), name="image", reduction=None
) -> np.ndarray | reduced.Reduced:
    """Decode an image file that is in memory: uint8 [H, W, channels].

    EXIF orientation is applied, the first frame of an animation is taken,
    transparency is dropped, 16-bit values are divided by 257 unless `bounds` are given.

    Args:
        data: of a file in one of `FORMATS`, of a `.npy` array, or of a grey DICOM
            (see `dicom.decode`).
        channels: 1 (gray, ITU-R 601 luma), 3 (RGB), or, for `.npy` and TIFF, any
            number, which the file must have.
        bounds: (lowest, highest) value of images of more than 8 bits, which become 0
            and 255; () = 0 and 65535 of integers, and no other kinds.
        name: what to call it in the error.
        reduction: of the transform that gets the image, if it takes `reduced.Reduced`,
            which a large JPEG then may be.

    Raises:
        DataError: not an image, truncated, too large, or of other channels.
        UsageError: a package that reads it is not installed.
    """
    try:
        if not data:
            raise ValueError("the file has zero bytes")
        if data[:6] == b"\x93NUMPY":
            return _channels(_checked_array(npy.array(data), bounds), channels)
        if data[:4] in tiff.MAGIC and (channels not in (1, 3) or _is_deep(data)):
            return _channels(_bands(tiff.decode(data).values, bounds), channels)
        if channels not in (1, 3):
            raise ValueError(f"only .npy and TIFF files can give {channels} channels")
        if data[128:132] == b"DICM":
            grey = dicom.decode(data, MAX_PIXELS, _opened)
            return _channels(grey, channels)
        if data[:3] == b"\xff\xd8\xff":
            image = _jpeg(data, channels, reduction)
            if image is not None:
                return image
        if bounds and data[:4] == b"\x89PNG" and data[24:25] == b"\x10":
            return _channels(_scaled(_deep_png(data), bounds), channels)
        return _pillow(data, channels, bounds, reduction)
    except errors.UsageError as e:
        raise errors.UsageError(f"{name}: {e}") from e
    except Exception as e:  # noqa: BLE001 - decoders raise whatever they like.
        # PIL names its buffer where a file has a name.
        what = re.sub(r" <_io\.BytesIO.*?>", "", errors.told(e))
        raise errors.DataError(f"{name}: cannot be decoded: {what}") from e


def read(
    path, *, channels: int, bounds=(), reduction=None
) -> np.ndarray | reduced.Reduced:
    """Read and decode the image file at `path`; see `decode`.

    Raises:
        DataError: also when the file cannot be read.
    """
    data = contents(path)
    given = dict(channels=channels, bounds=bounds, reduction=reduction)
    return decode(data, **given, name=printable(path))


def stored(path) -> np.ndarray | None:
    """Return the values of an image of more than 8 bits, or of any `.npy`; else None.

    [H, W] or [H, W, C], as they are stored.

    Raises:
        DataError: it cannot be read.
    """
    data = contents(path)
    try:
        if data[:6] == b"\x93NUMPY":
            return npy.array(data)
        if data[:4] == b"\x89PNG" and data[24:25] == b"\x10":
            return _deep_png(data)
        if data[128:132] == b"DICM" or data[:3] == b"\xff\xd8\xff":
            return None
        with _opened(data) as image:
            return np.asarray(image) if image.mode[0] in "IF" else None
    except Exception as e:  # noqa: BLE001 - decoders raise whatever they like.
        raise errors.DataError(
            f"{printable(path)}: cannot be decoded: {errors.told(e)}"
        ) from e


def contents(path, most: int = MAX_BYTES) -> bytes:
    """Return the bytes of a regular file, of at most so many.

    Raises:
        DataError: no such file, one that is larger or no regular one (a pipe would be
            waited for, a device read for ever), or the system refuses.
    """
    try:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise OSError(0, "no regular file")
            if info.st_size > most:
                raise OSError(0, f"{info.st_size} bytes, at most {most} are read")
            return file.read(most)
    except (OSError, ValueError) as e:  # ValueError: a null character in the path.
        what = getattr(e, "strerror", None) or e
        raise errors.DataError(f"{printable(path)}: cannot be read: {what}") from e


def regular(path) -> None:
    """Raise an OSError where a path is no regular file: readers would wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(0, "no regular file")


def array(path) -> np.ndarray:
    """Return the array in a `.npy` file, read-only.

    Raises:
        DataError: it cannot be read, or holds no plain numbers.
    """
    try:
        return npy.array(contents(path))
    except errors.DataError:
        raise
    except ValueError as e:
        what = errors.told(e)
        raise errors.DataError(f"{printable(path)}: cannot be decoded: {what}") from e


def printable(path) -> str:
    """Return a path as text that any terminal or log takes, whatever bytes it has."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _jpeg(data, channels, reduction):
    """Decode an ordinary, complete JPEG fast; None when Pillow should judge."""
    if _may_be_turned(data):
        with _opened(data) as image:
            if image.getexif().get(ORIENTATION, 1) != 1:
                return None
    if simplejpeg is not None:
        return _simplejpeg(data, "RGB" if channels == 3 else "GRAY", reduction)
    # Some versions of OpenCV fill what is missing of a truncated file with gray and
    # say nothing, so it may only see files that end as they should.
    if data[-2:] != b"\xff\xd9":
        return None
    with _opened(data) as image:
        if image.mode not in ("RGB", "L"):
            return None
        if reduced.factor(reduction, image.size[::-1]) > 1:
            return None
    flag = cv2.IMREAD_COLOR_RGB if channels == 3 else cv2.IMREAD_GRAYSCALE
    image = cv2.imdecode(
        np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION
    )
    return None if image is None else image.reshape(*image.shape[:2], channels)


def _may_be_turned(data) -> bool:
    """Return whether a JPEG has EXIF or XMP, or headers that are not as they should be.

    Headers may be megabytes: profiles and previews come before or after them.
    """
    at = 2
    while data[at : at + 1] == b"\xff":
        if data[at + 1] == 0xFF:  # Fill.
            at += 1
            continue
        if data[at + 1] == 0xDA:  # The pixels begin.
            return False
        if data[at + 1] == 0xE1 and data[at + 4 : at + 10] in (b"Exif\0\0", b"http:/"):
            return True
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True


def _simplejpeg(data, space, reduction):
    """Decode a JPEG, or raise ValueError where parts of it are missing."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        _bounded(width, height, _scans(data))
        factor = reduced.factor(reduction, (height, width))
        if factor == 1:
            return simplejpeg.decode_jpeg(data, space)
        least = dict(min_height=-(-height // factor), min_width=-(-width // factor))
        pixels = simplejpeg.decode_jpeg(data, space, **least)
        return reduced.Reduced(pixels, (height, width, pixels.shape[-1]), factor)
    except ValueError as e:
        # What is missing Pillow would fill with gray: do not ask it. But a few bytes
        # too many, as in some of ImageNet's files, hurt nobody.
        if any(fault in str(e) for fault in ("remature end", "bad Huffman")):
            raise
        return None


@functools.cache
def _formats():
    """Return those of `FORMATS` that this Pillow knows; AVIF is young."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _opened(data) -> Image.Image:
    """Return an image of which only the header is read, and is fine."""
    image = Image.open(io.BytesIO(data), formats=_formats())
    _bounded(*image.size, _scans(data))
    if image.format == "PNG" and math.prod(image.size) > DEFLATED * len(data):
        raise ValueError(
            f"{image.size[0]} x {image.size[1]} pixels in {len(data)} bytes"
        )
    return image


def _scans(data) -> int:
    """Return how often a JPEG visits its pixels, at most; 1 of other files."""
    return data.count(b"\xff\xda") if data[:3] == b"\xff\xd8\xff" else 1


def _pillow(data, channels, bounds, reduction=None):
    """Decode every other format, and every doubtful JPEG."""
    with _opened(data) as image:
        how = image.getexif().get(ORIENTATION, 1) if image.format == "JPEG" else 0
        size, factor = image.size[:: 1 if how in TURNED else -1], 1  # As it will be.
        if how:
            factor = reduced.factor(reduction, size)
        if factor > 1:
            image.draft(image.mode, tuple(n // factor for n in image.size))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F" and not bounds:
            raise ValueError(f"float image of unknown range; {_GIVE}")
        if image.mode[0] in "IF":
            grey = _scaled(np.asarray(image)[..., None], bounds)
            return _channels(grey, channels)
        if image.mode in ("P", "PA") and "transparency" in image.info:
            image = image.convert("RGBA")
        mode = "RGB" if channels == 3 else "L"
        image = np.asarray(image if image.mode == mode else image.convert(mode))
    image = image.reshape(*image.shape[:2], channels)
    if factor == 1:
        return image
    # The last row and column are parts; where they come first, by turning, the others
    # begin later.
    ends = zip(size, image.shape, FLIPPED.get(how, (0, 0)), strict=False)
    origin = tuple(flip * (n - factor * m) for n, m, flip in ends)
    return reduced.Reduced(image, (*size, channels), factor, origin)


def _is_deep(data) -> bool:
    """Return whether a TIFF is one that Pillow does not know: deep colours, say."""
    try:
        with _opened(data):
            return False
    except UnidentifiedImageError:
        return True


def _bands(values, bounds):  # [H, W, C] -> uint8 [H, W, C]
    """Return bands of numbers as 0..255; bytes stay as they are."""
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype.kind == "f" and not bounds:
        raise ValueError(f"float image of unknown range; {_GIVE}")
    return _scaled(values, bounds)


def _deep_png(data):  # -> uint16 [H, W, 1 or 3]
    """Decode a PNG of 16 bits, of which Pillow keeps eight where it has colours."""
    with _opened(data):
        pass
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise ValueError("the PNG is damaged")
    return image[..., 2::-1] if image.ndim == 3 else image[..., None]


def _scaled(image, bounds):  # -> uint8, of the same shape
    """Return values from the lowest to the highest of `bounds` as 0..255."""
    if not bounds and (image.min() < 0 or image.max() > 65535):
        raise ValueError(f"integer image outside 0..65535; {_GIVE}")
    low, high = bounds or (0, 65535)
    grey = np.empty(image.shape, np.uint8)
    long = np.swapaxes if image.shape[1] > image.shape[0] else lambda x, *_: x
    given, out = long(image, 0, 1), long(grey, 0, 1)
    step = max(1, _BLOCK // max(1, given[0].size))
    for at in range(0, len(given), step):  # As float64 all of it would be eight times.
        share = (given[at : at + step].astype(np.float64) - low) / (high - low)
        # What is no number is nothing, and black.
        share = np.nan_to_num(share.clip(0, 1)) * 255 + 0.5
        out[at : at + step] = share.astype(np.uint8)
    return grey


def _bounded(width, height, scans=1):
    if width * height * scans > MAX_VISITS:
        raise OverflowError(
            f"{width} x {height} pixels in {scans} scans; save it again, or leave it "
            "out"
        )
    if width * height > MAX_PIXELS:
        raise OverflowError(
            f"{width} x {height} pixels are more than {MAX_PIXELS}; "
            "shrink it, or leave it out"
        )


def _checked_array(array, bounds):
    """Return an array of a `.npy` file as uint8 [H, W, C]."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim == 3 and array.dtype.kind in "iuf" and array.size and bounds:
        return array if array.dtype == np.uint8 else _scaled(array, bounds)
    if array.ndim != 3 or array.dtype != np.uint8 or not array.size:
        raise ValueError(f"want uint8 [H, W, C], got {array.dtype} {list(array.shape)}")
    return array


def _channels(image, channels):
    """Make an image [H, W, any] one of `channels` channels, where that is defined."""
    have = image.shape[-1]
    if have == channels:
        return image
    if have == 1 and channels == 3:
        return np.repeat(image, 3, axis=-1)
    if have == 3 and channels == 1:
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None]
    raise ValueError(f"it has {have} channels, the data set {channels}")
