"""Grey images out of DICOM files: just enough for chest X-rays.

Little-endian files with one frame of 8 or 16 bits, raw or as a JPEG (the transfer
syntaxes of SIIM-ACR). Source: DICOM PS3.5, sections 7 and 8.
"""

import struct

import cv2
import numpy as np

IMPLICIT = "1.2.840.10008.1.2"
RAW = (IMPLICIT, "1.2.840.10008.1.2.1")
JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
_LONG = (b"OB", b"OD", b"OF", b"OL", b"OW", b"SQ", b"UC", b"UN", b"UR", b"UT")
_ROWS, _COLUMNS, _BITS = (0x0028, 0x0010), (0x0028, 0x0011), (0x0028, 0x0100)
_SYNTAX, _PIXELS, _ITEM = (0x0002, 0x0010), (0x7FE0, 0x0010), (0xFFFE, 0xE000)
_PHOTOMETRIC = (0x0028, 0x0004)
_UNDEFINED, _END_OF_SEQUENCE = 0xFFFFFFFF, b"\xfe\xff\xdd\xe0\0\0\0\0"


def pixels(data: bytes) -> np.ndarray:
    """Return the pixels uint8 [H, W] of a DICOM file in memory.

    16-bit values are divided by 257; MONOCHROME1 (white is 0) is inverted.

    Raises:
        ValueError, KeyError, IndexError, struct.error, cv2.error: not such a file.
    """
    found = dict(_elements(data))
    syntax = found[_SYNTAX].rstrip(b"\0 ").decode("ascii")
    number = lambda tag: struct.unpack("<H", found[tag][:2])[0]  # noqa: E731
    rows, columns = number(_ROWS), number(_COLUMNS)
    if syntax in JPEG:
        raw = np.frombuffer(found[_PIXELS], np.uint8)
        image = cv2.imdecode(raw, cv2.IMREAD_GRAYSCALE)
        if image is None:
            raise ValueError("the JPEG inside does not decode")
    elif syntax in RAW:
        kind = np.uint8 if number(_BITS) == 8 else np.dtype("<u2")
        image = np.frombuffer(found[_PIXELS], kind, rows * columns)
        image = image.reshape(rows, columns)
    else:
        raise ValueError(f"transfer syntax {syntax} is not supported")
    if image.dtype != np.uint8:
        image = (image / 257 + 0.5).astype(np.uint8)
    if found.get(_PHOTOMETRIC, b"").strip(b"\0 ") == b"MONOCHROME1":
        image = 255 - image
    return image


def _elements(data):
    """Yield (tag, value bytes) of the top level, up to the pixels."""
    at, syntax = 132, b""
    while at + 8 <= len(data):
        tag = struct.unpack_from("<HH", data, at)
        meta = tag[0] == 0x0002
        implicit = not meta and syntax.rstrip(b"\0 ") == IMPLICIT.encode()
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
