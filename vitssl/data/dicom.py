"""Grey DICOM files: what their values mean, as a radiologist's screen shows them.

Source: DICOM PS3.5, sections 7 and 8; PS3.3, C.7.6.3, C.11.1 and C.11.2.
"""

import io
import struct

import cv2
import numpy as np
from PIL import Image

_IMPLICIT = "1.2.840.10008.1.2"
_RAW = (_IMPLICIT, "1.2.840.10008.1.2.1")
_JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
# Kinds of values with a long length.
_LONG = (b"OB", b"OD", b"OF", b"OL", b"OW", b"SQ", b"UC", b"UN", b"UR", b"UT")
_SYNTAX, _PIXELS, _ITEM = (0x0002, 0x0010), (0x7FE0, 0x0010), (0xFFFE, 0xE000)
_SAMPLES, _PHOTOMETRIC = (0x0028, 0x0002), (0x0028, 0x0004)
_ROWS, _COLUMNS = (0x0028, 0x0010), (0x0028, 0x0011)
_ALLOCATED, _STORED, _SIGNED = (0x0028, 0x0100), (0x0028, 0x0101), (0x0028, 0x0103)
_CENTRE, _WIDTH, _CURVE = (0x0028, 0x1050), (0x0028, 0x1051), (0x0028, 0x1056)
_INTERCEPT, _SLOPE = (0x0028, 0x1052), (0x0028, 0x1053)
_MOST = 1e12  # Of a number in a file.
_UNDEFINED, _END_OF_SEQUENCE = 0xFFFFFFFF, b"\xfe\xff\xdd\xe0\0\0\0\0"


def decode(data: bytes, most: int) -> np.ndarray:  # -> uint8 [H, W, 1]
    """Decode little-endian grey pixels, raw or JPEG, of one frame and 8 or 16 bits.

    Values are rescaled and seen through the first window of the file; without one all
    that the stored bits can hold becomes 0..255. MONOCHROME1 (white is 0) is inverted.

    Args:
        data: of the file.
        most: pixels.

    Raises:
        ValueError: not such a file, or damaged.
    """
    found = dict(_elements(data))
    kind = _text(found, _PHOTOMETRIC, "MONOCHROME2")
    if _whole(found, _SAMPLES, 1) != 1 or kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"a DICOM of {kind}; only grey ones are read")
    allocated = _whole(found, _ALLOCATED)
    stored = _whole(found, _STORED, allocated)
    if allocated not in (8, 16) or not 1 <= stored <= allocated:
        raise ValueError(f"{stored} bits stored in {allocated}; want 1 to 8, 16 in 16")
    image = _values(found, allocated, most)
    table = _table(found, stored, _whole(found, _SIGNED, 0))
    table = 255 - table if kind == "MONOCHROME1" else table
    out = np.empty(image.shape, np.uint8)
    for row, into in zip(image, out, strict=True):  # A row at a time: indices are long.
        # The bits above are no part of the value.
        np.take(table, row & np.uint16((1 << stored) - 1), out=into, mode="clip")
    return out[..., None]


def size(data: bytes) -> tuple[int, int]:
    """Return (rows, columns) of a file, its pixels unread.

    Raises:
        ValueError, KeyError: not such a file.
    """
    found = {tag: value for tag, value in _elements(data) if tag in (_ROWS, _COLUMNS)}
    if len(found) < 2:
        raise ValueError("a DICOM without rows and columns")
    return _whole(found, _ROWS), _whole(found, _COLUMNS)


def _values(found, allocated, most):  # -> unsigned integers [H, W]
    """Return the pixels as they are stored."""
    rows, columns = _whole(found, _ROWS), _whole(found, _COLUMNS)
    if not 1 <= rows * columns <= most:
        raise ValueError(f"{rows} rows x {columns} columns; want 1 to {most} pixels")
    syntax, pixels = _text(found, _SYNTAX), _needed(found, _PIXELS)
    if syntax in _JPEG:
        with Image.open(io.BytesIO(pixels), formats=("JPEG",)) as image:
            if image.size != (columns, rows):
                raise ValueError(f"the JPEG inside is not {columns} x {rows}")
        raw = np.frombuffer(pixels, np.uint8)
        image = cv2.imdecode(raw, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise ValueError("the JPEG inside does not decode")
        return image
    if syntax not in _RAW:
        raise ValueError(f"transfer syntax {syntax} is not supported")
    kind = np.uint8 if allocated == 8 else np.dtype("<u2")
    return np.frombuffer(pixels, kind, rows * columns).reshape(rows, columns)


def _table(found, stored, signed):  # -> uint8 [2**stored]
    """Return the grey of every value that the stored bits can hold."""
    values = np.arange(1 << stored)
    if signed:  # The highest bit is the sign.
        values = values - ((values >> stored - 1) << stored)
    values = _rescaled(found, values)
    ends = np.array([values.min(), values.max()])
    with np.errstate(over="ignore"):  # Of a steep sigmoid.
        share = _windowed(found, values, ends).clip(0, 1)
    return (share * 255 + 0.5).astype(np.uint8)


def _rescaled(found, values):
    return values * _number(found, _SLOPE, 1.0) + _number(found, _INTERCEPT, 0.0)


def _windowed(found, values, ends):
    """Return values as shares of white, in [0, 1] or beyond.

    Args:
        ends: the values that are black and white without a window.
    """
    width = _number(found, _WIDTH, 0.0)
    if _CENTRE not in found or width <= 0:
        return (values - ends.min()) / (np.ptp(ends) or 1)
    centre = _number(found, _CENTRE, 0.0)
    curve = _text(found, _CURVE, "LINEAR")
    if curve == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - centre) / width))
    if curve == "LINEAR_EXACT":
        return (values - centre) / width + 0.5
    # The standard's LINEAR: both ends are pixels of the window.
    return (values - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5


def _whole(found, tag, default=None) -> int:
    if tag not in found and default is not None:
        return default
    return struct.unpack("<H", _needed(found, tag)[:2])[0]


def _needed(found, tag) -> bytes:
    if tag not in found:
        raise ValueError("it has no element ({:04X},{:04X})".format(*tag))
    return found[tag]


def _text(found, tag, default="") -> str:
    """Return the first value of a text."""
    text = found.get(tag, default.encode()).decode("ascii", "replace")
    return text.split("\\")[0].strip("\0 ")


def _number(found, tag, default: float) -> float:
    value = float(_text(found, tag) or default)
    if not abs(value) < _MOST:
        raise ValueError("element ({:04X},{:04X}) is {}".format(*tag, value))
    return value


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
