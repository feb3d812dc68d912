import io
import logging
import os
import pickle
import threading
import tracemalloc

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.layouts import radiographs
from vitssl import errors
from vitssl.data import decode
from vitssl.data.sources import wrappers


def _smooth(h, w, channels=3):
    """A picture that JPEG keeps to within a few levels: [h, w, channels]."""
    y, x = np.mgrid[:h, :w]
    planes = [40 + 3 * y + x, 220 - 2 * y, 30 + 4 * x][:channels]
    return np.stack(planes, -1).clip(0, 255).astype(np.uint8)


def _file(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


PICTURE = _smooth(24, 40)


@pytest.fixture(params=["simplejpeg", "opencv"])
def backend(request, monkeypatch):
    """Every JPEG test runs with and without the optional fast decoder."""
    if request.param == "opencv":
        monkeypatch.setattr(decode, "simplejpeg", None)
    else:
        assert decode.simplejpeg is not None
    return request.param


def test_a_jpeg_is_what_pillow_says(backend):
    data = _file(Image.fromarray(PICTURE), "JPEG", quality=92)
    truth = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode.decode(data, channels=3), truth)
    assert np.abs(truth.astype(int) - PICTURE).mean() < 4


def test_a_jpeg_becomes_gray_or_colour_as_wanted(backend):
    colour = _file(Image.fromarray(PICTURE), "JPEG", quality=95)
    gray = _file(Image.fromarray(PICTURE[..., 0]), "JPEG", quality=95)
    luma = PICTURE @ np.array([0.299, 0.587, 0.114])
    got = decode.decode(colour, channels=1)
    assert got.shape == (24, 40, 1)
    assert np.abs(got[..., 0] - luma).max() < 8
    got = decode.decode(gray, channels=3)
    assert got.shape == (24, 40, 3)
    assert (got[..., 0] == got[..., 2]).all()
    assert np.abs(got[..., 0].astype(int) - PICTURE[..., 0]).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, backend):
    image = np.zeros((16, 32, 3), np.uint8)
    image[:8, :16] = 250, 10, 10  # Red in the upper left corner of what is stored.
    exif = Image.Exif()
    exif[decode.ORIENTATION] = orientation
    data = _file(Image.fromarray(image), "JPEG", quality=95, exif=exif)
    got = decode.decode(data, channels=3)
    # The EXIF table: where row 0 and column 0 of the stored image are to be seen.
    upright = {
        1: image,
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.transpose(1, 0, 2),
        6: image.transpose(1, 0, 2)[:, ::-1],
        7: image.transpose(1, 0, 2)[::-1, ::-1],
        8: image.transpose(1, 0, 2)[::-1],
    }[orientation]
    assert got.shape == upright.shape
    assert np.abs(got.astype(int) - upright).mean() < 6


def test_cmyk_is_not_inverted(backend):
    data = _file(Image.fromarray(PICTURE).convert("CMYK"), "JPEG", quality=95)
    got = decode.decode(data, channels=3)
    assert np.abs(got.astype(int) - PICTURE).mean() < 6
    luma = PICTURE @ np.array([0.299, 0.587, 0.114])
    got = decode.decode(data, channels=1)
    assert np.abs(got[..., 0] - luma).mean() < 6


def test_a_few_bytes_too_many_are_no_fault(backend):
    data = _file(Image.fromarray(PICTURE), "JPEG", quality=92)
    truth = decode.decode(data, channels=3)
    at = data.index(b"\xff\xda")  # Between two segments.
    for extra in (data[:at] + b"\x00\x11\x22" + data[at:], data + b"\x00\x01\x02"):
        np.testing.assert_array_equal(decode.decode(extra, channels=3), truth)


def test_a_hole_in_a_jpeg_is_not_filled_with_gray():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 64, 3), np.uint8)
    data = _file(Image.fromarray(noise), "JPEG")
    holed = data[: len(data) * 2 // 3] + b"\xff\xd9"
    assert Image.open(io.BytesIO(holed)).convert("RGB").getpixel((63, 63)) is not None
    with pytest.raises(errors.DataError, match="premature end"):
        decode.decode(holed, channels=3)


def test_sixteen_bits_keep_their_range():
    wide = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    got = decode.decode(cv2.imencode(".png", wide)[1].tobytes(), channels=3)
    assert got.shape == (24, 40, 3)
    assert np.abs(got[..., 1] - wide / 257).max() <= 0.5
    colour = np.stack([wide, wide[::-1], wide // 2], -1)
    data = cv2.imencode(".png", colour[..., ::-1])[1].tobytes()
    got = decode.decode(data, channels=3)
    assert np.abs(got - colour / 257).max() <= 1


def test_palette_alpha_and_one_bit_images():
    flat = np.zeros((8, 8, 3), np.uint8)
    flat[:4] = 255, 0, 0
    palette = Image.fromarray(flat).convert("P", palette=Image.Palette.ADAPTIVE)
    got = decode.decode(_file(palette, "PNG"), channels=3)
    np.testing.assert_array_equal(got, flat)
    got = decode.decode(_file(palette, "PNG", transparency=0), channels=3)
    np.testing.assert_array_equal(got, flat)
    alpha = Image.fromarray(np.dstack([flat, np.full((8, 8), 128, np.uint8)]))
    np.testing.assert_array_equal(decode.decode(_file(alpha, "PNG"), channels=3), flat)
    bits = Image.fromarray(flat[..., 0]).convert("1")
    got = decode.decode(_file(bits, "PNG"), channels=1)
    np.testing.assert_array_equal(got[..., 0], flat[..., 0])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_one_pixel(kind, backend):
    data = _file(Image.new("RGB", (1, 1), (200, 200, 200)), kind)
    got = decode.decode(data, channels=3)
    assert got.shape == (1, 1, 3)
    assert got.dtype == np.uint8
    assert np.abs(got.astype(int) - 200).max() <= 3


def test_npy_gives_any_number_of_channels():
    bands = np.random.default_rng(0).integers(0, 256, (5, 6, 12), np.uint8)
    out = io.BytesIO()
    np.save(out, bands)
    np.testing.assert_array_equal(decode.decode(out.getvalue(), channels=12), bands)
    with pytest.raises(errors.DataError, match="12 channels, the data set 4"):
        decode.decode(out.getvalue(), channels=4)


def test_npy_never_unpickles():
    out = io.BytesIO()
    np.save(out, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(errors.DataError, match="x.npy"):
        decode.decode(out.getvalue(), channels=3, name="x.npy")


def _broken():
    jpeg = _file(Image.fromarray(_smooth(64, 64)), "JPEG")
    png = _file(Image.fromarray(_smooth(64, 64)), "PNG")
    return {
        "zero bytes": b"",
        "half a jpeg": jpeg[: len(jpeg) // 2],
        "a jpeg without its end": jpeg[:-40],
        "half a jpeg that ends well": jpeg[: len(jpeg) // 2] + b"\xff\xd9",
        "a jpeg's first bytes": jpeg[:3],
        "half a png": png[: len(png) // 2],
        "text": b"<html>404 not found</html>",
        "noise": bytes(range(256)) * 8,
    }


@pytest.mark.parametrize("kind", sorted(_broken()))
def test_broken_files_are_one_error_with_the_name(kind, backend):
    with pytest.raises(errors.DataError, match=r"^some/file\.jpg: cannot be decoded"):
        decode.decode(_broken()[kind], channels=3, name="some/file.jpg")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_decompression_bomb_is_refused(kind, backend, monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    data = _file(Image.new("RGB", (50, 21)), kind)
    with pytest.raises(errors.DataError, match="50 x 21 pixels"):
        decode.decode(data, channels=3)
    fits = _file(Image.new("RGB", (50, 20)), kind)
    assert decode.decode(fits, channels=3).shape == (20, 50, 3)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(errors.DataError, match="gone.png: cannot be read: No such"):
        decode.read(tmp_path / "gone.png", channels=3)


def test_a_path_of_any_bytes_can_be_printed(tmp_path):
    path = bytes(tmp_path) + b"/caf\xe9 \xf0\x9f\x90\x8c.png"
    with open(path, "wb") as f:
        f.write(_file(Image.fromarray(PICTURE), "PNG"))
    name = path.decode("utf-8", "surrogateescape")
    np.testing.assert_array_equal(decode.read(name, channels=3), PICTURE)
    with open(path, "wb") as f:
        f.write(b"no")
    with pytest.raises(errors.DataError, match="caf") as error:
        decode.read(name, channels=3)
    str(error.value).encode("utf-8")


class _Some:
    """A source of which the images `bad` cannot be decoded."""

    root, name, split, channels, classes = "here", "some", "train", 1, ("a", "b")

    def __init__(self, count, bad):
        self.count, self.bad, self.reads = count, bad, []

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        self.reads.append(i)
        if i in self.bad:
            raise errors.DataError(f"file {i}: cannot be decoded")
        return {"image": np.full((2, 2, 1), i % 256, np.uint8), "label": i % 2}


def test_a_broken_image_is_replaced_by_the_next_good_one(caplog):
    source = wrappers.Tolerant(_Some(400, {3, 4, 399}), "skip")
    with caplog.at_level(logging.WARNING, "vitssl.data"):
        got = [source[i] for i in (2, 3, 4, 5, 399, 3)]
    assert [g["index"] for g in got] == [2, 5, 5, 5, 0, 5]
    assert [int(g["image"][0, 0, 0]) for g in got] == [2, 5, 5, 5, 0, 5]
    assert [g["label"] for g in got] == [0, 1, 1, 1, 0, 1]
    assert [r.getMessage() for r in caplog.records] == [
        f"skipped a broken image: file {i}: cannot be decoded" for i in (3, 4, 399)
    ]
    assert sorted(source.bad) == [3, 4, 399]
    assert source.whole.reads.count(3) == 1  # It is not tried again and again.


def test_more_than_one_percent_broken_stops():
    source = wrappers.Tolerant(_Some(200, {7, 8, 9}), "skip")
    assert source[8]["index"] == 10  # 8 and 9: just 1 %.
    with pytest.raises(errors.DataError, match="3 of 200 images are broken") as error:
        source[7]
    assert "file 8" in str(error.value)
    assert "more than data.bad_share=0.01 allows" in str(error.value)


def test_policy_raise_names_the_file():
    source = wrappers.Tolerant(_Some(400, {3}), "raise")
    assert source[2]["index"] == 2
    with pytest.raises(errors.DataError, match="^file 3"):
        source[3]
    with pytest.raises(errors.UsageError, match="on_bad_image='zero'"):
        wrappers.Tolerant(_Some(4, ()), "zero")


def test_tolerant_passes_attributes_on_and_travels_by_pickle():
    source = wrappers.Tolerant(_Some(400, {3}), "skip")
    assert source[3]["index"] == 4
    assert (source.classes, source.split) == (("a", "b"), "train")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.bad == {}
    assert copy[3]["index"] == 4
    with pytest.raises(AttributeError):
        _ = source.labels


def test_many_threads_count_each_broken_image_once():
    source = wrappers.Tolerant(_Some(1000, set(range(0, 1000, 100))), "skip")
    got = [None] * 8

    def read(k):
        got[k] = [source[i]["index"] for i in range(1000)]

    threads = [threading.Thread(target=read, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    truth = [i + (i % 100 == 0) for i in range(1000)]
    assert got == [truth] * 8
    assert len(source.bad) == 10


def _xmp(orientation):
    """Return the APP1 segment of an XMP packet that alone tells the orientation."""
    packet = (
        b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'>"
        b'<rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % orientation
    )
    return b"\xff\xe1" + (len(packet) + 2).to_bytes(2, "big") + packet


def test_orientation_is_found_behind_long_headers_and_in_xmp_alone(backend):
    image = np.zeros((16, 32, 3), np.uint8)
    image[:8, :16] = 250, 10, 10
    turned = image.transpose(1, 0, 2)[:, ::-1]
    exif = Image.Exif()
    exif[decode.ORIENTATION] = 6
    plain = _file(Image.fromarray(image), "JPEG", quality=95)
    tagged = _file(Image.fromarray(image), "JPEG", quality=95, exif=exif)
    profile = b"\xff\xe2" + (60_002).to_bytes(2, "big") + bytes(60_000)
    for data in (
        tagged[:2] + 2 * profile + tagged[2:],
        plain[:2] + _xmp(6) + plain[2:],
        plain[:2] + 2 * profile + _xmp(6) + plain[2:],
    ):
        got = decode.decode(data, channels=3)
        assert got.shape == turned.shape
        assert np.abs(got.astype(int) - turned).mean() < 6
    upright = decode.decode(plain[:2] + 2 * profile + _xmp(1) + plain[2:], channels=3)
    np.testing.assert_array_equal(upright, decode.decode(plain, channels=3))


def _saved(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def test_a_given_range_becomes_black_to_white():
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    want = np.rint(np.arange(4096) / 4095 * 255).reshape(64, 64)
    twelve = dict(channels=1, bounds=(0, 4095))
    png = cv2.imencode(".png", ramp)[1].tobytes()
    assert decode.decode(png, channels=1).max() == 16  # Of all 16 bits.
    np.testing.assert_array_equal(decode.decode(png, **twelve)[..., 0], want)
    for kind in (np.int32, np.float32):
        tiff = _file(Image.fromarray(ramp.astype(kind)), "TIFF")
        np.testing.assert_array_equal(decode.decode(tiff, **twelve)[..., 0], want)
        data = _saved(ramp.astype(kind))
        np.testing.assert_array_equal(decode.decode(data, **twelve)[..., 0], want)
    colour = np.stack([ramp, ramp[::-1], ramp // 2], -1)
    png = cv2.imencode(".png", colour[..., ::-1])[1].tobytes()
    got = decode.decode(png, channels=3, bounds=(0, 4095))
    np.testing.assert_array_equal(got, np.rint(colour / 4095 * 255))
    # Outside it is cut, and images of eight bits are what they are.
    assert decode.decode(_saved(ramp), channels=1, bounds=(100, 200)).max() == 255
    data = _file(Image.fromarray(PICTURE), "PNG")
    got = decode.decode(data, channels=3, bounds=(0, 4095))
    np.testing.assert_array_equal(got, PICTURE)
    gap = np.array([[[np.nan], [1.0]]], np.float32)
    got = decode.decode(_saved(gap), channels=1, bounds=(0, 1))
    assert got.ravel().tolist() == [0, 255]


def test_without_a_range_what_has_none_is_refused_with_the_option():
    ramp = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    for array in (ramp, ramp.astype(np.int32) - 9):
        with pytest.raises(errors.DataError, match=r"data\.options\.value_range"):
            decode.decode(_file(Image.fromarray(array), "TIFF"), channels=1)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(errors.DataError, match=r"a\.jpg: cannot be read: no regular"):
        decode.read(tmp_path / "a.jpg", channels=3)


def test_one_broken_image_of_a_few_ends_nothing():
    source = wrappers.Tolerant(_Some(12, {3}), "skip")
    assert source[3]["index"] == 4
    with pytest.raises(errors.DataError, match=r"2 of 12 .*bad_share=0\.01 allows"):
        wrappers.Tolerant(_Some(12, {3, 4}), "skip")[3]
    source = wrappers.Tolerant(_Some(12, {3, 4, 5}), "skip", 0.25)
    assert source[3]["index"] == 6
    assert pickle.loads(pickle.dumps(source)).share == 0.25


def _peak(call):
    """Return the most bytes that numpy and Python hold while a function runs."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_deep_images_never_stand_in_memory_as_floats():
    ramp = np.arange(2**22, dtype=np.uint16)
    dicom = radiographs.values(ramp.reshape(2048, 2048), stored=16)
    for shape in ((2000, 2000), (4, 10**6), (10**6, 4)):
        png = cv2.imencode(".png", ramp[: 4 * 10**6].reshape(shape))[1].tobytes()
        for data, bounds in ((png, ()), (png, (0, 9)), (dicom, ())):
            options = dict(channels=1, bounds=bounds)
            # As float64, with two copies, it is a hundred megabytes.
            assert _peak(lambda: decode.decode(data, **options)) < 60e6  # noqa: B023
