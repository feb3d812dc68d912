"""SIIM-ACR pneumothorax: DICOM files, raw or with a JPEG inside."""

import io

import cv2
import numpy as np
import pydicom
from PIL import Image
from pydicom import encaps, uid

from tests.layouts import pictures

KINDS = ("raw", "jpeg")


def _element(group, number, kind, value):
    head = group.to_bytes(2, "little") + number.to_bytes(2, "little") + kind
    if kind in (b"OB", b"OW"):
        return head + b"\0\0" + len(value).to_bytes(4, "little") + value
    return head + len(value).to_bytes(2, "little") + value


def _item(value):
    return b"\xfe\xff\x00\xe0" + len(value).to_bytes(4, "little") + value


def _encapsulated(pixels):
    """Return the element of pixels as one JPEG, after an empty offset table."""
    options = (cv2.IMWRITE_JPEG_QUALITY, 100)
    jpeg = cv2.imencode(".jpg", pixels, options)[1].tobytes()
    jpeg += b"\0" * (len(jpeg) % 2)
    end = b"\xfe\xff\xdd\xe0\0\0\0\0"
    head = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff"
    return head + _item(b"") + _item(jpeg) + end


def dicom(pixels, kind="raw"):
    """Return a minimal explicit little-endian DICOM file of uint8 [H, W]."""
    raw = kind == "raw"
    syntax = b"1.2.840.10008.1.2.1\0" if raw else b"1.2.840.10008.1.2.4.50"
    return b"".join(
        [
            b"\0" * 128 + b"DICM",
            _element(0x0002, 0x0010, b"UI", syntax),
            _element(0x0028, 0x0004, b"CS", b"MONOCHROME2 "),
            _element(0x0028, 0x0010, b"US", pixels.shape[0].to_bytes(2, "little")),
            _element(0x0028, 0x0011, b"US", pixels.shape[1].to_bytes(2, "little")),
            _element(0x0028, 0x0100, b"US", (8).to_bytes(2, "little")),
            _element(0x7FE0, 0x0010, b"OW", pixels.tobytes())
            if raw
            else _encapsulated(pixels),
        ]
    )


def values(pixels, *, stored=12, signed=0, kind=b"MONOCHROME2 ", samples=1, **texts):
    """Return an explicit little-endian DICOM of 16 bits a value."""
    short = lambda n: int(n).to_bytes(2, "little")  # noqa: E731
    tags = dict(centre=0x1050, width=0x1051, intercept=0x1052, slope=0x1053)
    tags["curve"] = 0x1056
    more = []
    for name, text in texts.items():
        value = str(text).encode()
        kinds = b"LO" if name == "curve" else b"DS"
        value += b" " * (len(value) % 2)
        more.append(_element(0x0028, tags[name], kinds, value))
    return b"".join(
        [
            b"\0" * 128 + b"DICM",
            _element(0x0002, 0x0010, b"UI", b"1.2.840.10008.1.2.1\0"),
            _element(0x0028, 0x0002, b"US", short(samples)),
            _element(0x0028, 0x0004, b"CS", kind),
            _element(0x0028, 0x0010, b"US", short(pixels.shape[0])),
            _element(0x0028, 0x0011, b"US", short(pixels.shape[1])),
            _element(0x0028, 0x0100, b"US", short(16)),
            _element(0x0028, 0x0101, b"US", short(stored)),
            _element(0x0028, 0x0103, b"US", short(signed)),
            *more,
            _element(0x7FE0, 0x0010, b"OW", pixels.tobytes()),
        ]
    )


def written(pixels, syntax=uid.ExplicitVRLittleEndian, *, stored=12, **elements):
    """Return a DICOM of uint16 [H, W], or of frames, as pydicom writes it."""
    ds = pydicom.Dataset()
    ds.Rows, ds.Columns = pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, stored, stored - 1
    ds.PixelRepresentation, ds.PixelData = 0, pixels.tobytes()
    for name, value in elements.items():
        setattr(ds, name, value)
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = uid.DigitalXRayImageStorageForPresentation
    ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    out = io.BytesIO()
    pydicom.dcmwrite(out, ds, enforce_file_format=True)
    return out.getvalue()


def jpeg2000(pixels):
    """Return a DICOM of uint16 [H, W] with a JPEG 2000 inside, without loss."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG2000", no_jp2=True)
    packed = encaps.encapsulate([out.getvalue()])
    return written(pixels, uid.JPEG2000Lossless, stored=16, PixelData=packed)


def lut(values, first=0, bits=8):
    """Return the sequence of a table that begins with the value `first`."""
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(values), first, bits]
    item.LUTData = np.array(values, "<u2").tobytes()
    return [item]


def radiograph(number):
    """Return (pixels uint8 [H, W], mask [H, W]) of an image."""
    picture = pictures.thing(6, number)  # White.
    return np.ascontiguousarray(picture.image[..., 0]), picture.mask


def siim_acr(root, kind="raw", *, train=12, test=6):
    """Write {train_set,full_test_set,...}/{0,1}/<id>.dcm and all_masks/<id>.png.

    Of the test images the first half of either class is "robust", the rest not. The
    healthy ones have no masks.

    Args:
        kind: of the pixels in the DICOM files, "raw" or "jpeg".
        train, test: images of each class.
    """
    half = test // 2
    for label in (0, 1):
        for i in range(train + test):
            number = 1000 * (label + 1) + i
            pixels, mask = radiograph(number)
            name = f"1.2.276.0.7230010.3.1.4.8323329.{number}.1517875178.953520"
            subset = "robust_test_set" if i < train + half else "non_robust_test_set"
            places = ["train_set"] if i < train else ["full_test_set", subset]
            for place in places:
                path = root / place / str(label) / f"{name}.dcm"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(dicom(pixels, kind))
            if label:
                pictures.save(root / "all_masks" / f"{name}.png", mask)
    return root
