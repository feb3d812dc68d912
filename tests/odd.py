"""Odd inputs made by code, each with what must come of it.

`images()` are files with the pixels `data.decode` must return, or words of the refusal;
`trees` are folders with the classes and images a folder source must find; `PICTURE` is
what most images show.
"""

import dataclasses
import io
import os
import pathlib
import struct
import zlib

import cv2
import numpy as np
from PIL import Image

from tests.layouts import radiographs

SIDE = (12, 20)  # Rows and columns; of blocks of eight no whole number.
_Y, _X = np.mgrid[: SIDE[0], : SIDE[1]]
PICTURE = np.stack([40 + 9 * _Y + _X, 200 - 5 * _Y, 30 + 9 * _X], -1).astype(np.uint8)
LUMA = np.rint(PICTURE @ np.array([0.299, 0.587, 0.114]))[..., None].astype(np.uint8)
DEEP = (_Y * SIDE[1] + _X).astype(np.uint16) * 273  # 0 .. 65247.
ORIENTATION, RESOLUTIONS = 0x0112, 0x011A


@dataclasses.dataclass(frozen=True)
class Odd:
    """A file and what must come of it.

    Attributes:
        data: its bytes.
        want: uint8 [H, W, C] for `channels`, or words of the one line that refuses it.
        off: most levels that a pixel may differ, for formats that lose some.
        name: with a suffix, which may lie.
        channels: that are asked for.
        bounds: see `decode.decode`.
    """

    data: bytes
    want: np.ndarray | str
    off: float = 0
    name: str = "x.png"
    channels: int = 3
    bounds: tuple = ()


def saved(image, kind, **options) -> bytes:
    """Return the bytes of a Pillow image, or of an array, in a format."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def npy(array, **options) -> bytes:
    """Return the bytes of a `.npy` file."""
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def _grey(image):
    return np.repeat(np.asarray(image, np.uint8).reshape(*SIDE, 1), 3, -1)


def _upright(tag):
    """Return the picture as it is to be seen when EXIF says `tag`: TIFF 6.0, 274."""
    x = PICTURE.transpose(1, 0, 2) if tag > 4 else PICTURE
    return (
        {2: x[:, ::-1], 3: x[::-1, ::-1], 4: x[::-1]}.get(tag, x)
        if tag < 5
        else {
            5: x,
            6: x[:, ::-1],
            7: x[::-1, ::-1],
            8: x[::-1],
        }[tag]
    )


def _formats() -> dict[str, Odd]:
    kinds = ("BMP", "DIB", "GIF", "PPM", "TGA", "TIFF", "PNG", "WEBP", "JPEG2000")
    exact = {
        kind: Odd(
            saved(PICTURE, kind, **({"lossless": True} if kind == "WEBP" else {})),
            PICTURE,
            off=8 if kind == "GIF" else 0,
        )
        for kind in kinds
    }
    lossy = dict(quality=98, subsampling=0)
    return exact | {
        "jpeg": Odd(saved(PICTURE, "JPEG", **lossy), PICTURE, 6),
        "progressive jpeg": Odd(
            saved(PICTURE, "JPEG", progressive=True, **lossy), PICTURE, 6
        ),
        "cmyk jpeg": Odd(
            saved(Image.fromarray(PICTURE).convert("CMYK"), "JPEG", **lossy), PICTURE, 9
        ),
        "grey jpeg": Odd(saved(LUMA[..., 0], "JPEG", quality=98), _grey(LUMA), 4),
        "several pictures in a jpeg": Odd(
            saved(
                Image.fromarray(PICTURE),
                "MPO",
                save_all=True,
                append_images=[Image.new("RGB", SIDE[::-1])],
                **lossy,
            ),
            PICTURE,
            6,
        ),
        "a jpeg named png": Odd(saved(PICTURE, "JPEG", **lossy), PICTURE, 6, "x.png"),
        "a png named jpg": Odd(saved(PICTURE, "PNG"), PICTURE, 0, "x.jpg"),
        "a png named npy": Odd(saved(PICTURE, "PNG"), PICTURE, 0, "x.npy"),
    }


def _modes() -> dict[str, Odd]:
    colour = Image.fromarray(PICTURE)
    alpha = np.dstack([PICTURE, np.full(SIDE, 90, np.uint8)])
    cells = np.zeros((*SIDE, 3), np.uint8)
    cells[:4], cells[4:, :7] = (255, 0, 0), (0, 200, 9)
    palette = Image.fromarray(cells).convert("P", palette=Image.Palette.ADAPTIVE)
    bits = (LUMA[..., 0] > 128).astype(np.uint8) * 255
    two = Image.fromarray(np.dstack([LUMA[..., 0], alpha[..., 3]]), "LA")
    return {
        "png, alpha": Odd(saved(alpha, "PNG"), PICTURE),
        "webp, alpha": Odd(saved(alpha, "WEBP", lossless=True, exact=True), PICTURE),
        "png, grey": Odd(saved(LUMA[..., 0], "PNG"), _grey(LUMA)),
        "png, grey and alpha": Odd(saved(two, "PNG"), _grey(LUMA)),
        "png, palette": Odd(saved(palette, "PNG"), cells),
        "png, palette with a clear colour": Odd(
            saved(palette, "PNG", transparency=0), cells
        ),
        "png, palette with many opacities": Odd(
            saved(palette, "PNG", transparency=bytes([0, 9, 255])), cells
        ),
        "png, one bit": Odd(
            saved(Image.fromarray(bits).convert("1"), "PNG"), _grey(bits)
        ),
        "png, colour as grey": Odd(saved(colour, "PNG"), LUMA, 1, channels=1),
        "pbm": Odd(saved(Image.fromarray(bits).convert("1"), "PPM"), _grey(bits)),
        "tiff, one bit": Odd(
            saved(Image.fromarray(bits).convert("1"), "TIFF", compression="group4"),
            _grey(bits),
        ),
        "tiff, cmyk": Odd(saved(colour.convert("CMYK"), "TIFF"), PICTURE, 1),
        "tiff, packed": Odd(saved(colour, "TIFF", compression="tiff_lzw"), PICTURE),
    }


def _deep() -> dict[str, Odd]:
    by_257 = np.rint(DEEP / 257)
    twelve = DEEP // 273  # 0 .. 239, of 12 bits.
    bounded = np.rint(twelve / 4095 * 255)
    colour = np.stack([DEEP, DEEP[::-1], DEEP // 2], -1)
    deep = cv2.imencode(".png", colour[..., ::-1])[1].tobytes()
    real = DEEP.astype(np.float32) / 65535
    gap = real.copy()
    gap[0, 0] = np.nan
    unit = np.rint(np.nan_to_num(gap) * 255)
    return {
        "png, 16 bits": Odd(saved(DEEP, "PNG"), _grey(by_257), 1),
        "png, 16 bits of colour": Odd(deep, colour / 257, 1),
        "png, 16 bits of colour in a range": Odd(
            deep, (colour / 1000).clip(0, 1) * 255, 1, bounds=(0, 1000)
        ),
        "png, 12 bits in 16": Odd(
            saved(twelve, "PNG"), _grey(bounded), 0, bounds=(0, 4095)
        ),
        "tiff, 16 bits": Odd(saved(DEEP, "TIFF"), _grey(by_257), 1),
        "tiff, 16 bits, big-endian": Odd(_tiff(DEEP, ">"), _grey(by_257), 1),
        "tiff, 32 bits": Odd(saved(DEEP.astype(np.int32), "TIFF"), _grey(by_257), 1),
        "tiff, 32 bits and negative": Odd(
            saved(DEEP.astype(np.int32) - 9, "TIFF"), "outside 0..65535; give its range"
        ),
        "tiff, float": Odd(saved(real, "TIFF"), "float image of unknown range"),
        "tiff, float in a range": Odd(
            saved(gap, "TIFF"), _grey(unit), 0, bounds=(0, 1)
        ),
        "pfm": Odd(
            b"Pf\n20 12\n-1.0\n" + real[::-1].astype("<f4").tobytes(),
            _grey(np.rint(real * 255)),
            0,
            bounds=(0, 1),
        ),
        "pgm, 16 bits": Odd(
            b"P5\n20 12\n65535\n" + DEEP.astype(">u2").tobytes(), _grey(by_257), 1
        ),
        "dicom, 12 bits": Odd(
            radiographs.values(twelve.astype("<u2")), _grey(bounded), 0
        ),
    }


def _tiff(values, order) -> bytes:
    """Return a TIFF of 16-bit grey in a byte order, with nothing it need not have."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    rows, columns = values.shape
    entries = [(256, columns), (257, rows), (258, 16), (259, 1), (262, 1)]
    entries += [(277, 1), (278, rows), (279, values.nbytes), (273, 8 + 6 + 12 * 9)]
    entries.sort()
    pack = lambda form, *v: struct.pack(order + form, *v)  # noqa: E731
    out = mark + pack("I", 8) + pack("H", len(entries))
    out += b"".join(pack("HHII", tag, 4, 1, value) for tag, value in entries)
    return out + pack("I", 0) + values.astype(f"{order}u2").tobytes()


def _frames() -> dict[str, Odd]:
    more = dict(save_all=True, append_images=[Image.new("RGB", SIDE[::-1])])
    first = Image.fromarray(PICTURE)
    return {
        "gif, moving": Odd(saved(first, "GIF", **more), PICTURE, 8),
        "webp, moving": Odd(saved(first, "WEBP", lossless=True, **more), PICTURE),
        "png, moving": Odd(saved(first, "PNG", **more), PICTURE),
        "tiff, several pages": Odd(saved(first, "TIFF", **more), PICTURE),
    }


def _turned() -> dict[str, Odd]:
    out = {}
    for tag in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = tag
        for kind, more, off in (
            ("JPEG", dict(quality=98, subsampling=0), 6),
            ("PNG", {}, 0),
            ("WEBP", dict(lossless=True), 0),
        ):
            data = saved(PICTURE, kind, exif=exif, **more)
            out[f"{kind.lower()}, orientation {tag}"] = Odd(data, _upright(tag), off)
    exif = Image.Exif()
    exif[ORIENTATION] = 99
    out["png, orientation 99"] = Odd(saved(PICTURE, "PNG", exif=exif), PICTURE)
    return out


def _refused() -> dict[str, Odd]:
    png, jpeg = saved(PICTURE, "PNG"), saved(PICTURE, "JPEG")
    wide = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 2**30, 2**30)
    visits = saved(PICTURE, "JPEG", progressive=True)
    at = visits.rindex(b"\xff\xda")
    scan = visits[at:-2]
    many = visits[:at] + scan * 20 + b"\xff\xd9"
    large = many.index(b"\xff\xc2") + 5  # Rows and columns of a frame header.
    many = many[:large] + struct.pack(">HH", 11_000, 11_000) + many[large + 4 :]
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 12\nshowpage\n"
    return {
        "nothing": Odd(b"", "zero bytes"),
        "a png cut in half": Odd(png[: len(png) // 2], "cannot be decoded"),
        "a jpeg cut in half": Odd(jpeg[: len(jpeg) // 2], "cannot be decoded"),
        "a jpeg of three bytes": Odd(jpeg[:3], "cannot be decoded"),
        "a page of the web": Odd(b"<html>404</html>", "cannot identify image file"),
        "postscript": Odd(script, "cannot identify image file"),
        "pdf": Odd(b"%PDF-1.4\n1 0 obj", "cannot identify image file"),
        "svg": Odd(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot identify"),
        "an icon": Odd(saved(PICTURE, "ICO"), "cannot identify image file"),
        "a bomb": Odd(wide + b"\x08\x02\0\0\0" + bytes(4), "cannot be decoded"),
        "a png of more than its bytes": Odd(_claiming(png, 9000), "9000 x 9000 pixels"),
        "a jpeg of many visits": Odd(many, "11000 x 11000 pixels in"),
        "npy of objects": Odd(npy(np.array([{}]), allow_pickle=True), "no numbers"),
        "npy of four axes": Odd(npy(np.zeros((1, 2, 3, 4), np.uint8)), "want uint8"),
        "npy of nothing": Odd(npy(np.zeros((0, 4, 3), np.uint8)), "want uint8"),
        "npy of floats": Odd(npy(np.ones((2, 2, 3))), "want uint8"),
        "npy, cut": Odd(npy(PICTURE)[:-1], "is more than its"),
        "npy, five channels": Odd(npy(np.zeros((2, 2, 5), np.uint8)), "5 channels"),
        "png for five channels": Odd(
            png, r"only \.npy and TIFF files can give 5", channels=5
        ),
        "dicom without rows": Odd(_dicom(rows=0), "0 rows x 20 columns"),
        "dicom of 4e8 pixels": Odd(_dicom(rows=20_000, columns=20_000), "20000 rows"),
        "dicom of 7 bits in 12": Odd(
            _dicom(allocated=12, stored=7), "7 bits stored in"
        ),
        "dicom of no bits": Odd(_dicom(stored=0), "0 bits stored in 16"),
        "dicom of too many bits": Odd(_dicom(stored=17), "17 bits stored in 16"),
        "dicom, cut": Odd(_dicom()[:-40], "cannot be decoded"),
        "dicom, a slope of 1e999": Odd(
            radiographs.values(DEEP, stored=16, slope="1e999"), "RescaleSlope is inf"
        ),
        "dicom without pixels": Odd(_dicom()[: -8 - DEEP.nbytes], "no element"),
    }


def _claiming(png, side) -> bytes:
    """Return a PNG that says it is larger, with a checksum that agrees."""
    head = b"IHDR" + struct.pack(">II", side, side) + png[24:29]
    return png[:12] + head + struct.pack(">I", zlib.crc32(head)) + png[33:]


def _dicom(**fields) -> bytes:
    """Return a DICOM of `DEEP` that says other numbers in some fields."""
    data = radiographs.values(DEEP, stored=16)
    tags = dict(rows=0x10, columns=0x11, allocated=0x100, stored=0x101)
    for name, value in fields.items():
        at = data.index(struct.pack("<HH", 0x28, tags[name]) + b"US") + 8
        data = data[:at] + struct.pack("<H", value) + data[at + 2 :]
    return data


def images() -> dict[str, Odd]:
    """Return {what it is: the file and what must come of it}."""
    groups = (_formats, _modes, _deep, _frames, _turned, _refused)
    return {name: odd for group in groups for name, odd in group().items()}


# Folders.


@dataclasses.dataclass(frozen=True)
class Tree:
    """A folder and what must come of it.

    Attributes:
        files: paths of images; one that ends in / is an empty folder, one with "->" is
            a link.
        classes: that are found for the split "all".
        images: that are found for it.
        refused: words of the error instead.
        options: of the source.
    """

    files: tuple[str, ...]
    classes: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    refused: str = ""
    options: dict = dataclasses.field(default_factory=dict)

    def write(self, root) -> None:
        """Make the folder below `root`."""
        for name in self.files:
            link, _, to = name.partition("->")
            path = pathlib.Path(root, link)
            path.parent.mkdir(parents=True, exist_ok=True)
            if to:
                path.symlink_to(to)
            elif name.endswith("/"):
                path.mkdir(exist_ok=True)
            elif name.endswith("|"):
                os.mkfifo(str(path)[:-1])
            else:
                path.write_bytes(saved(PICTURE, "PNG"))


TREES = {
    "classes": Tree(
        ("cat/a.png", "dog/b.PNG", "dog/deep/er/c.png"),
        ("cat", "dog"),
        ("cat/a.png", "dog/b.PNG", "dog/deep/er/c.png"),
    ),
    "splits": Tree(
        ("train/a/1.png", "test/b/2.png"), ("a", "b"), ("train/a/1.png", "test/b/2.png")
    ),
    "no classes": Tree(("1.png", "2.jpg"), (), ("1.png", "2.jpg")),
    "an empty class": Tree(("a/1.png", "b/"), ("a",), ("a/1.png",)),
    "what systems leave": Tree(
        ("a/1.png", "@eaDir/a/1.png", "a/._1.png", "a/.thumb/1.png", "__MACOSX/1.png")
        + ("$RECYCLE.BIN/1.png", "lost+found/1.png", "a/@eaDir/1.png"),
        ("a",),
        ("a/1.png",),
    ),
    "a pipe among images": Tree(("a/1.png", "a/2.png|"), ("a",), ("a/1.png",)),
    "a link back": Tree(("a/1.png", "a/up->.."), ("a",), ("a/1.png",)),
    "a second name of a class": Tree(("a/1.png", "b->a"), ("a",), ("a/1.png",)),
    "a link to nowhere": Tree(
        ("a/1.png", "a/2.png->gone.png"), ("a",), ("a/1.png", "a/2.png")
    ),
    "images beside the classes": Tree(("a/1.png", "2.png"), ("a",), ("a/1.png",)),
    "all of them": Tree(
        ("a/1.png", "2.png"), (), ("2.png", "a/1.png"), options={"labels": "none"}
    ),
    "train beside unlabeled": Tree(
        ("train/a/1.png", "unlabeled/2.png"), refused="splits or classes"
    ),
    "no image": Tree(("a/", "b/c/"), refused="no image in split 'all'"),
    "accents and spaces": Tree(
        ("caf\u00e9 noir/\U0001f40c.png", "z/1.png"),
        ("caf\u00e9 noir", "z"),
        ("caf\u00e9 noir/\U0001f40c.png", "z/1.png"),
    ),
}
