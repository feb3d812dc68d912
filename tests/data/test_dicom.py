"""DICOM values as a screen shows them; every file is made here."""

import numpy as np
import pytest

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
