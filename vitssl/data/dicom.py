"""Grey DICOM files: what their values mean, as a radiologist's screen shows them.

Source: DICOM PS3.5, sections 7 and 8; PS3.3, C.7.6.3, C.11.1 and C.11.2.
"""

import struct

import cv2
import numpy as np

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
_UNDEFINED, _END_OF_SEQUENCE = 0xFFFFFFFF, b"\xfe\xff\xdd\xe0\0\0\0\0"


def decode(data: bytes) -> np.ndarray:  # -> uint8 [H, W, 1]
    """Decode little-endian grey pixels, raw or JPEG, of one frame and 8 or 16 bits.

    Values are rescaled and seen through the first window of the file; without one all
    that the stored bits can hold becomes 0..255. MONOCHROME1 (white is 0) is inverted.

    Raises:
        ValueError, KeyError: not such a file.
    """
    found = dict(_elements(data))
    kind = _text(found, _PHOTOMETRIC, "MONOCHROME2")
    if _whole(found, _SAMPLES, 1) != 1 or kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"a DICOM of {kind}; only grey ones are read")
    stored = _whole(found, _STORED, _whole(found, _ALLOCATED))
    signed = _whole(found, _SIGNED, 0)
    image = _values(found, stored, signed)
    low = -(1 << stored - 1) if signed else 0
    ends = _rescaled(found, np.array([low, low + (1 << stored) - 1.0]))
    share = _windowed(found, _rescaled(found, image), ends).clip(0, 1)
    grey = (share * 255 + 0.5).astype(np.uint8)
    return (255 - grey if kind == "MONOCHROME1" else grey)[..., None]


def _values(found, stored, signed):  # -> integers [H, W]
    """Return the stored values, without the bits that are no part of them."""
    rows, columns = _whole(found, _ROWS), _whole(found, _COLUMNS)
    syntax = _text(found, _SYNTAX)
    if syntax in _JPEG:
        raw = np.frombuffer(found[_PIXELS], np.uint8)
        image = cv2.imdecode(raw, cv2.IMREAD_GRAYSCALE)
        if image is None:
            raise ValueError("the JPEG inside does not decode")
    elif syntax in _RAW:
        kind = np.uint8 if _whole(found, _ALLOCATED) == 8 else np.dtype("<u2")
        image = np.frombuffer(found[_PIXELS], kind, rows * columns)
        image = image.reshape(rows, columns)
    else:
        raise ValueError(f"transfer syntax {syntax} is not supported")
    image = image.astype(np.int64) & (1 << stored) - 1
    # The highest bit is the sign.
    return image - ((image >> stored - 1) << stored) if signed else image


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
    return struct.unpack("<H", found[tag][:2])[0]


def _text(found, tag, default="") -> str:
    """Return the first value of a text."""
    text = found.get(tag, default.encode()).decode("ascii", "replace")
    return text.split("\\")[0].strip("\0 ")


def _number(found, tag, default: float) -> float:
    return float(_text(found, tag) or default)


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
