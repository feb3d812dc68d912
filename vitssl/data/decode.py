"""Bytes of an image file -> uint8 [H, W, C], or one error that names the file."""

import io
import os
import pathlib
import re
import struct

import cv2
import numpy as np
from PIL import Image, ImageOps

from vitssl import errors

try:
    import simplejpeg
except ImportError:  # An optional speed-up: 0.76 against 0.95 ms per photograph.
    simplejpeg = None

# A file of a few kilobytes can declare terabytes of pixels.
MAX_PIXELS = 1 << 27
ORIENTATION = 0x0112  # The EXIF tag; 1 = upright.
SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .jfif .jp2 .jpe .jpeg .jpg .npy .pbm .pgm .png .pnm .ppm "
    ".tga .tif .tiff .webp".split()
)

# DICOM: transfer syntaxes, kinds of values with a long length, tags.
_IMPLICIT = "1.2.840.10008.1.2"
_RAW = (_IMPLICIT, "1.2.840.10008.1.2.1")
_JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
_LONG = (b"OB", b"OD", b"OF", b"OL", b"OW", b"SQ", b"UC", b"UN", b"UR", b"UT")
_ROWS, _COLUMNS, _BITS = (0x0028, 0x0010), (0x0028, 0x0011), (0x0028, 0x0100)
_SYNTAX, _PIXELS, _ITEM = (0x0002, 0x0010), (0x7FE0, 0x0010), (0xFFFE, 0xE000)
_PHOTOMETRIC = (0x0028, 0x0004)
_UNDEFINED, _END_OF_SEQUENCE = 0xFFFFFFFF, b"\xfe\xff\xdd\xe0\0\0\0\0"


def decode(data: bytes, *, channels: int, name="image") -> np.ndarray:
    """Decode an image file that is in memory: uint8 [H, W, channels].

    EXIF orientation is applied, the first frame of an animation is taken,
    transparency is dropped, 16-bit values are divided by 257.

    Args:
        data: of a file in any format that Pillow reads, of a `.npy` array, or of a
            chest X-ray in DICOM (see `_dicom`).
        channels: 1 (gray, ITU-R 601 luma), 3 (RGB), or, for `.npy`, any number.
        name: what to call it in the error.

    Raises:
        DataError: not an image, truncated, too large, or of other channels.
    """
    try:
        if not data:
            raise ValueError("the file has zero bytes")
        if data[:6] == b"\x93NUMPY":
            array = np.load(io.BytesIO(data), allow_pickle=False)
            return _channels(_checked_array(array), channels)
        if channels not in (1, 3):
            raise ValueError(f"only .npy arrays can give {channels} channels")
        if data[128:132] == b"DICM":
            return _channels(_dicom(data), channels)
        if data[:3] == b"\xff\xd8\xff":
            image = _jpeg(data, channels)
            if image is not None:
                return image
        return _pillow(data, channels)
    except Exception as e:  # noqa: BLE001 - decoders raise whatever they like.
        # PIL names its buffer where a file has a name.
        what = re.sub(r" <_io\.BytesIO.*?>", "", str(e)) or type(e).__name__
        raise errors.DataError(f"{name}: cannot be decoded: {what}") from e


def read(path, *, channels: int) -> np.ndarray:
    """Read and decode the image file at `path`; see `decode`.

    Raises:
        DataError: also when the file cannot be read.
    """
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as e:
        raise errors.DataError(
            f"{printable(path)}: cannot be read: {e.strerror}"
        ) from e
    return decode(data, channels=channels, name=printable(path))


def printable(path) -> str:
    """Return a path as text that any terminal or log takes, whatever bytes it has."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _jpeg(data, channels):
    """Decode an ordinary, complete JPEG fast; None when Pillow should judge."""
    if b"Exif\x00\x00" in data[: 1 << 16]:
        with Image.open(io.BytesIO(data)) as image:
            if image.getexif().get(ORIENTATION, 1) != 1:
                return None
    if simplejpeg is not None:
        return _simplejpeg(data, "RGB" if channels == 3 else "GRAY")
    # Some versions of OpenCV fill what is missing of a truncated file with gray and
    # say nothing, so it may only see files that end as they should.
    if data[-2:] != b"\xff\xd9":
        return None
    with Image.open(io.BytesIO(data)) as image:
        _bounded(*image.size)
        if image.mode not in ("RGB", "L"):
            return None
    flag = cv2.IMREAD_COLOR_RGB if channels == 3 else cv2.IMREAD_GRAYSCALE
    image = cv2.imdecode(
        np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION
    )
    return None if image is None else image.reshape(*image.shape[:2], channels)


def _simplejpeg(data, space):
    """Decode a JPEG, or raise ValueError where parts of it are missing."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        _bounded(width, height)
        return simplejpeg.decode_jpeg(data, space)
    except ValueError as e:
        # What is missing Pillow would fill with gray: do not ask it. But a few bytes
        # too many, as in some of ImageNet's files, hurt nobody.
        if any(fault in str(e) for fault in ("remature end", "bad Huffman")):
            raise
        return None


def _pillow(data, channels):
    """Decode every other format, and every doubtful JPEG."""
    with Image.open(io.BytesIO(data)) as image:
        _bounded(*image.size)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            wide = np.asarray(image).astype(np.int64)
            if wide.min() < 0 or wide.max() > 65535:
                raise ValueError("integer image outside 0..65535; store it as .npy")
            return _channels((wide[..., None] / 257 + 0.5).astype(np.uint8), channels)
        if image.mode == "F":
            raise ValueError("float image of unknown range; store it as uint8 .npy")
        if image.mode in ("P", "PA") and "transparency" in image.info:
            image = image.convert("RGBA")
        image = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    return image.reshape(*image.shape[:2], channels)


def _bounded(width, height):
    if width * height > MAX_PIXELS:
        raise OverflowError(
            f"{width} x {height} pixels are more than {MAX_PIXELS}; "
            "shrink it, or leave it out"
        )


def _checked_array(array):
    """Return an array of a `.npy` file as uint8 [H, W, C]."""
    if array.ndim == 2:
        array = array[:, :, None]
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


def _dicom(data):  # -> uint8 [H, W, 1]
    """Decode a grey DICOM: little-endian, one frame of 8 or 16 bits, raw or JPEG.

    These are the transfer syntaxes of SIIM-ACR's chest X-rays. MONOCHROME1 (white is
    0) is inverted. Source: DICOM PS3.5, sections 7 and 8.
    """
    found = dict(_elements(data))
    syntax = found[_SYNTAX].rstrip(b"\0 ").decode("ascii")
    number = lambda tag: struct.unpack("<H", found[tag][:2])[0]  # noqa: E731
    rows, columns = number(_ROWS), number(_COLUMNS)
    if syntax in _JPEG:
        raw = np.frombuffer(found[_PIXELS], np.uint8)
        image = cv2.imdecode(raw, cv2.IMREAD_GRAYSCALE)
        if image is None:
            raise ValueError("the JPEG inside does not decode")
    elif syntax in _RAW:
        kind = np.uint8 if number(_BITS) == 8 else np.dtype("<u2")
        image = np.frombuffer(found[_PIXELS], kind, rows * columns)
        image = image.reshape(rows, columns)
    else:
        raise ValueError(f"transfer syntax {syntax} is not supported")
    if image.dtype != np.uint8:
        image = (image / 257 + 0.5).astype(np.uint8)
    if found.get(_PHOTOMETRIC, b"").strip(b"\0 ") == b"MONOCHROME1":
        image = 255 - image
    return image[..., None]


def _elements(data):
    """Yield (tag, value bytes) of the top level, up to the pixels."""
    at, syntax = 132, b""
    while at + 8 <= len(data):
        tag = struct.unpack_from("<HH", data, at)
        meta = tag[0] == 0x0002
        implicit = not meta and syntax.rstrip(b"\0 ") == _IMPLICIT.encode()
        length, at = _length(data, at, implicit)
        if length == _UNDEFINED:
            if tag == _PIXELS:
                yield tag, _fragments(data, at)
                return
            at = data.index(_END_OF_SEQUENCE, at) + len(_END_OF_SEQUENCE)
            continue
        value = data[at : at + length]
        if tag == _SYNTAX:
            syntax = value
        yield tag, value
        at += length
        if tag == _PIXELS:
            return


def _length(data, at, implicit):
    """Return (length of the value, where it starts)."""
    if implicit:
        return struct.unpack_from("<I", data, at + 4)[0], at + 8
    if data[at + 4 : at + 6] in _LONG:
        return struct.unpack_from("<I", data, at + 8)[0], at + 12
    return struct.unpack_from("<H", data, at + 6)[0], at + 8


def _fragments(data, at):
    """Return the joined fragments of encapsulated pixels, without the offset table."""
    parts = []
    while struct.unpack_from("<HH", data, at) == _ITEM:
        (size,) = struct.unpack_from("<I", data, at + 4)
        parts.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    return b"".join(parts[1:])
