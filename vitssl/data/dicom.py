"""Grey DICOM files: what their values mean, as a radiologist's screen shows them.

pydicom (extra [dicom]) reads the file; what becomes black and white is decided here.

Source: DICOM PS3.5, section 8; PS3.3, C.7.6.3, C.11.1 and C.11.2.
"""

import io
from collections.abc import Callable

import numpy as np

from vitssl import errors

_RAW = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")
# What Pillow decodes: JPEG of eight bits, JPEG 2000 without and with loss.
_JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
_JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
_SIZE = ("Rows", "Columns")
_LUTS = ("ModalityLUTSequence", "VOILUTSequence")
_NUMBERS = ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth")
_READ = (
    *_SIZE,
    *_LUTS,
    *_NUMBERS,
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "VOILUTFunction",
    "PixelData",
)
_MOST = 1e12  # Of a number in a file.


def decode(data: bytes, most: int, opened: Callable) -> np.ndarray:
    """Decode grey pixels of 8 or 16 bits, raw, JPEG or JPEG 2000: uint8 [H, W, 1].

    Values are rescaled by slope and intercept, or by the modality LUT, then seen
    through the file's first VOI LUT, or else its first window. Without one all that
    the stored bits can hold becomes 0..255. MONOCHROME1 (white is 0) is inverted. Of
    several frames it is the first.

    Args:
        data: of the file.
        most: pixels.
        opened: encoded image -> Pillow's, of which only the header is read, and judged.

    Raises:
        UsageError: pydicom is not installed.
        ValueError: not such a file, or damaged.
    """
    ds = _read(data, _READ)
    kind = str(ds.setdefault("PhotometricInterpretation", "MONOCHROME2").value)
    grey = kind in ("MONOCHROME1", "MONOCHROME2")
    if ds.setdefault("SamplesPerPixel", 1).value != 1 or not grey:
        raise ValueError(f"a DICOM of {kind}; only grey ones are read")
    allocated = _whole(ds, "BitsAllocated")
    stored = _whole(ds, "BitsStored", allocated)
    if allocated not in (8, 16) or not 1 <= stored <= allocated:
        raise ValueError(f"{stored} bits stored in {allocated}; want 1 to 8, 16 in 16")
    below = _whole(ds, "HighBit", stored - 1) + 1 - stored
    if not 0 <= below <= allocated - stored:
        raise ValueError(f"its high bit is {ds.HighBit}, of {stored} in {allocated}")
    if stored > 8 and ds.file_meta.TransferSyntaxUID in _JPEG:
        raise ValueError(_unread(ds.file_meta.TransferSyntaxUID))
    signed = _whole(ds, "PixelRepresentation", 0)
    image, table = _values(ds, most, opened), _table(ds, stored, signed)
    table = 255 - table if kind == "MONOCHROME1" else table
    out = np.empty(image.shape, np.uint8)
    for row, into in zip(image, out, strict=True):  # A row at a time: indices are long.
        # The bits above and below are no part of the value.
        place = row >> below & np.uint16((1 << stored) - 1)
        np.take(table, place, out=into, mode="clip")
    return out[..., None]


def size(data: bytes) -> tuple[int, int]:
    """Return (rows, columns) of a file, its pixels unread.

    Raises:
        UsageError: pydicom is not installed.
        ValueError: not such a file.
    """
    ds = _read(data, _SIZE)
    return _whole(ds, "Rows"), _whole(ds, "Columns")


def _read(data, names):
    """Return the dataset of a file with no more than some elements in it."""
    try:
        import pydicom
        from pydicom import filereader
    except ImportError as e:
        raise errors.UsageError(
            "DICOM files need pydicom: pip install 'vitssl[dicom]'"
        ) from e
    # Of a syntax that deflates, pydicom would unpack whatever there is.
    head = io.BytesIO(data)
    head.seek(132)
    only = dict(is_implicit_VR=False, is_little_endian=True)
    meta = filereader.read_dataset(
        head, **only, stop_when=lambda tag, *_: tag.group > 2
    )
    syntax = pydicom.uid.UID(str(meta.get("TransferSyntaxUID") or "missing"))
    if syntax not in (*_RAW, *_JPEG, *_JPEG_2000):
        raise ValueError(_unread(syntax))
    tags = [pydicom.datadict.tag_for_keyword(name) for name in names]
    return pydicom.dcmread(io.BytesIO(data), specific_tags=tags)


def _unread(syntax) -> str:
    known = "" if syntax.name == syntax else f"{syntax.name}, "
    return (
        f"transfer syntax {known}{syntax} is not supported; save it uncompressed "
        "(Explicit VR Little Endian), say by `dcmdjpeg` or `gdcmconv --raw`"
    )


def _past_the_head(tag, *_) -> bool:
    return tag.group > 2


def _values(ds, most, opened) -> np.ndarray:  # [H, W]
    """Return the pixels of the first frame as they are stored, unsigned."""
    from pydicom import encaps, pixels

    rows, columns = _whole(ds, "Rows"), _whole(ds, "Columns")
    if not 1 <= rows * columns <= most:
        raise ValueError(f"{rows} rows x {columns} columns; want 1 to {most} pixels")
    if not ds.get("PixelData"):
        raise ValueError("it has no element (7FE0,0010)")
    if ds.file_meta.TransferSyntaxUID not in _RAW:
        frames = max(1, int(ds.get("NumberOfFrames") or 1))
        frame = encaps.get_frame(ds.PixelData, 0, number_of_frames=frames)
        with opened(frame) as image:
            if image.size != (columns, rows):
                raise ValueError(f"the image inside is not {columns} x {rows}")
    found = pixels.pixel_array(ds, index=0, raw=True, correct_unused_bits=False)
    return found.view(f"u{found.itemsize}")


def _table(ds, stored, signed) -> np.ndarray:  # uint8 [2**stored]
    """Return the grey of every value that the stored bits can hold."""
    values = np.arange(1 << stored)
    if signed:  # The highest bit is the sign.
        values = values - ((values >> stored - 1) << stored)
    with np.errstate(over="ignore"):  # Of a steep sigmoid.
        share = _shown(ds, *_rescaled(ds, values)).clip(0, 1)
    return (share * 255 + 0.5).astype(np.uint8)


def _rescaled(ds, values):
    """Return values in the file's unit, and the ends that are black and white."""
    if ds.get("ModalityLUTSequence"):
        return _looked_up(ds.ModalityLUTSequence[0], values)
    values = values * _number(ds, "RescaleSlope", 1.0)
    values = values + _number(ds, "RescaleIntercept", 0.0)
    return values, (values.min(), values.max())


def _shown(ds, values, ends):
    """Return values as shares of white, in [0, 1] or beyond."""
    width = _number(ds, "WindowWidth", 0.0)
    centre = _number(ds, "WindowCenter", np.nan)
    if ds.get("VOILUTSequence"):
        values, ends = _looked_up(ds.VOILUTSequence[0], values)
    if ds.get("VOILUTSequence") or np.isnan(centre) or width <= 0:
        return (values - ends[0]) / ((ends[1] - ends[0]) or 1)
    curve = str(ds.get("VOILUTFunction") or "LINEAR")
    if curve == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - centre) / width))
    if curve == "LINEAR_EXACT":
        return (values - centre) / width + 0.5
    # The standard's LINEAR: both ends are pixels of the window.
    return (values - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5


def _looked_up(item, values):
    """Return what a table makes of values, and the ends of what it can hold."""
    _, first, bits = (int(x) for x in item.LUTDescriptor)
    data = item.LUTData
    table = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.array(data)
    if not table.size or not 1 <= bits <= 16:
        raise ValueError(f"a LUT of {table.size} values of {bits} bits")
    place = np.clip(np.rint(values) - first, 0, table.size - 1).astype(np.int64)
    return table[place].astype(np.float64), (0, (1 << bits) - 1)


def _whole(ds, name, default=None) -> int:
    value = ds.get(name)
    if value is None and default is None:
        raise ValueError(f"it has no element {name}")
    return int(ds.setdefault(name, default).value)


def _number(ds, name, default: float) -> float:
    """Return the first value of an element."""
    found = ds.get(name)
    first = found if isinstance(found, float | int | str | None) else found[0]
    value = float(default if first in (None, "") else first)
    if abs(value) >= _MOST:
        raise ValueError(f"element {name} is {value:g}")
    return value
