"""DICOM values as a screen shows them; every file is made here."""

import io
import struct
import sys

import numpy as np
import pytest
from PIL import Image
from pydicom import encaps, uid

from tests.layouts import radiographs
from vitssl import errors
from vitssl.data import decode

RAMP = np.arange(4096, dtype="<u2").reshape(64, 64)  # All values of 12 bits.


def _grey(*args, **options):
    return decode.decode(radiographs.values(*args, **options), channels=1)[
        ..., 0
    ].ravel()


def test_twelve_bits_fill_the_range():
    got = _grey(RAMP)
    np.testing.assert_array_equal(got, np.rint(np.arange(4096) / 4095 * 255))
    assert (got[0], got[-1]) == (0, 255)
    np.testing.assert_array_equal(_grey(RAMP, kind=b"MONOCHROME1 "), 255 - got)
    # Bits above those stored are an overlay, no part of the value.
    np.testing.assert_array_equal(_grey(RAMP | 0xA000), got)


def test_bits_may_stand_high():
    left = radiographs.written(RAMP * np.uint16(16), HighBit=15)
    np.testing.assert_array_equal(_ramp(left), FULL)
    for high in (10, 16):
        with pytest.raises(errors.DataError, match=f"its high bit is {high}, of 12 in"):
            _ramp(radiographs.written(RAMP, HighBit=high))


def test_sixteen_bits_are_as_before():
    wide = np.linspace(0, 65535, 4096).astype("<u2").reshape(64, 64)
    assert np.abs(_grey(wide, stored=16) - wide.ravel() / 257).max() <= 0.5


def test_a_window_is_what_becomes_black_to_white():
    # The standard's example: a width of 1001 around 1000.5 runs from 500 to 1500.
    got = _grey(RAMP, centre="1000.5", width="1001").astype(int)
    assert (got[500], got[1500]) == (0, 255)
    assert got[:501].max() == 0 and got[1500:].min() == 255
    assert got[1000] in (127, 128) and got[750] in (63, 64)
    # The first of several windows.
    several = _grey(RAMP, centre="1000.5\\40", width="1001\\400")
    np.testing.assert_array_equal(several, got)


def test_the_curve_of_a_window_may_be_a_sigmoid():
    got = _grey(RAMP, centre=1000, width=400, curve="SIGMOID")
    want = 255 / (1 + np.exp(-4 * (np.arange(4096) - 1000) / 400))
    assert np.abs(got - want).max() <= 0.51
    exact = _grey(RAMP, centre=1000, width=400, curve="LINEAR_EXACT")
    assert (exact[800], exact[1000], exact[1200]) == (0, 128, 255)


def test_hounsfield_units_are_rescaled_before_the_window():
    # Stored 1024 is 0 HU; a soft-tissue window of 401 around 40.5 ends at -160, 240.
    tissue = dict(intercept=-1024, slope=1, centre="40.5", width=401)
    got = _grey(RAMP, **tissue)
    assert (got[1024 - 160], got[1024 + 240]) == (0, 255)
    assert got[1024 + 40] in (127, 128)
    # Signed values hold them as they are.
    signed = (RAMP.astype(np.int32) - 2048).astype("<i2")
    got = _grey(signed, signed=1, centre="40.5", width=401)
    assert (got[2048 - 160], got[2048 + 240]) == (0, 255)
    got = _grey(signed, signed=1)
    np.testing.assert_array_equal(got, np.rint(np.arange(4096) / 4095 * 255))


def test_a_colour_dicom_is_refused_by_name():
    for kind, samples in ((b"RGB ", 3), (b"PALETTE COLOR ", 1)):
        with pytest.raises(errors.DataError, match="only grey ones are read"):
            _grey(RAMP, kind=kind, samples=samples)


def _ramp(data):
    return decode.decode(data, channels=1, name="x.dcm")[..., 0].ravel().astype(int)


FULL = np.rint(np.arange(4096) / 4095 * 255)


def test_other_encodings_hold_the_same_values():
    np.testing.assert_array_equal(
        _ramp(radiographs.written(RAMP, uid.ImplicitVRLittleEndian)), FULL
    )
    wide = RAMP * np.uint16(16)  # Pillow writes no 12 bits.
    got = _ramp(radiographs.jpeg2000(wide))
    np.testing.assert_array_equal(got, np.rint(wide.ravel() / 257))


def test_of_several_frames_the_first_is_taken():
    two = np.stack([RAMP, RAMP[::-1]])
    np.testing.assert_array_equal(
        _ramp(radiographs.written(two, NumberOfFrames=2)), FULL
    )


def test_a_table_of_values_goes_before_a_window():
    upside = radiographs.lut(range(255, -1, -1), first=1000)
    window = dict(WindowCenter=9, WindowWidth=2)
    got = _ramp(radiographs.written(RAMP, VOILUTSequence=upside, **window))
    want = 255 - np.clip(np.arange(4096) - 1000, 0, 255)
    np.testing.assert_array_equal(got, want)
    # The modality's table gives the values that a window is of.
    doubled = radiographs.lut([2 * k for k in range(4096)], bits=13)
    seen = dict(WindowCenter=1000.5, WindowWidth=1001)
    got = _ramp(radiographs.written(RAMP, ModalityLUTSequence=doubled, **seen))
    assert (got[250], got[750]) == (0, 255) and got[500] in (127, 128)
    got = _ramp(radiographs.written(RAMP, ModalityLUTSequence=doubled))
    assert (got[0], got[2048], got[-1]) == (0, 128, 255)


def test_a_window_without_a_width_is_none():
    for about in (dict(WindowCenter=5, WindowWidth=0), dict(WindowCenter=5), {}):
        np.testing.assert_array_equal(_ramp(radiographs.written(RAMP, **about)), FULL)


@pytest.mark.parametrize(
    "syntax, said",
    [
        (uid.JPEGLosslessSV1, "JPEG Lossless, .*1.2.840.10008.1.2.4.70"),
        (uid.JPEGLSLossless, "JPEG-LS Lossless"),
        (uid.RLELossless, "RLE Lossless"),
        (uid.DeflatedExplicitVRLittleEndian, "Deflated Explicit"),
        (uid.HTJ2KLossless, "High-Throughput JPEG 2000"),
        (uid.MPEG2MPML, "MPEG2"),
        (uid.UID("1.2.3.4"), "transfer syntax 1.2.3.4 is"),
    ],
)
def test_what_is_packed_otherwise_is_one_line_with_its_name(syntax, said):
    data = radiographs.written(RAMP).replace(b"1.2.840.10008.1.2.1\0", b"@" * 20)
    name = str(syntax).encode()
    name += b"\0" * (len(name) % 2)
    at = data.index(b"@" * 20)
    data = data[: at - 2] + struct.pack("<H", len(name)) + name + data[at + 20 :]
    with pytest.raises(errors.DataError, match=said) as told:
        _ramp(data)
    assert "x.dcm: cannot be decoded" in str(told.value)
    assert "save it uncompressed" in str(told.value) and "\n" not in str(told.value)


def test_a_jpeg_of_twelve_bits_is_named_too():
    packed = dict(PixelData=encaps.encapsulate([b"\xff\xd8\xff\xc1"]))
    with pytest.raises(errors.DataError, match="JPEG Extended .*is not supported"):
        _ramp(radiographs.written(RAMP, uid.JPEGExtended12Bit, **packed))


def test_a_jpeg_that_is_larger_than_the_file_says_is_refused():
    jpeg = io.BytesIO()
    Image.new("L", (640, 480)).save(jpeg, "JPEG")
    packed = encaps.encapsulate([jpeg.getvalue()])
    data = radiographs.written(
        RAMP, uid.JPEGBaseline8Bit, stored=8, BitsAllocated=8, PixelData=packed
    )
    with pytest.raises(errors.DataError, match="inside is not 64 x 64"):
        _ramp(data)


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    want = r"x.dcm: DICOM files need pydicom: pip install 'vitssl\[dicom\]'$"
    with pytest.raises(errors.UsageError, match=want):
        _ramp(radiographs.values(RAMP))
