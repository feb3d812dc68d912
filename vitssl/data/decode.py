"""Bytes of an image file -> uint8 [H, W, C], or one error that names the file."""

import dataclasses
import io
import logging
import os
import pathlib
import re
import threading
import typing

import cv2
import numpy as np
from PIL import Image, ImageOps

from vitssl import errors

try:
    import simplejpeg
except ImportError:  # An optional speed-up: 0.76 against 0.95 ms per photograph.
    simplejpeg = None

logger = logging.getLogger("vitssl.data")

# A file of a few kilobytes can declare terabytes of pixels.
MAX_PIXELS = 1 << 27
ORIENTATION = 0x0112  # The EXIF tag; 1 = upright.
SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .jfif .jp2 .jpe .jpeg .jpg .npy .pbm .pgm .png .pnm .ppm "
    ".tga .tif .tiff .webp".split()
)


def decode(data, *, channels, name="image"):
    """Decode an image file that is in memory.

    EXIF orientation is applied, the first frame of an animation is taken,
    transparency is dropped, 16-bit values are divided by 257.

    Args:
        data: bytes of a file in any format that Pillow reads, or of a `.npy` array.
        channels: 1 (gray, ITU-R 601 luma), 3 (RGB), or, for `.npy`, any number.
        name: what to call it in the error.

    Returns:
        uint8 [H, W, channels].

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
        if data[:3] == b"\xff\xd8\xff":
            image = _jpeg(data, channels)
            if image is not None:
                return image
        return _pillow(data, channels)
    except Exception as e:  # noqa: BLE001 - decoders raise whatever they like.
        # PIL names its buffer where a file has a name.
        what = re.sub(r" <_io\.BytesIO.*?>", "", str(e)) or type(e).__name__
        raise errors.DataError(f"{name}: cannot be decoded: {what}") from e


def read(path, *, channels):
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


def printable(path):
    """A path as text that any terminal or log can take, whatever bytes are in it."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _jpeg(data, channels):
    """The fast way for an ordinary, complete JPEG; None when Pillow should judge."""
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
    """Every other format, and every doubtful JPEG."""
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
    """An array of a `.npy` file as uint8 [H, W, C]."""
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


@dataclasses.dataclass(eq=False)
class Tolerant:
    """A source that survives broken images, but not many of them.

    `[i]` gives the example i with its own `index`; where image i cannot be decoded
    and the policy is "skip", the next one that can (i + 1, i + 2, ..., around the
    end). Which one is a pure function of the files: order, threads and processes do
    not matter. Each process keeps its own count of what it met.

    Attributes:
        source: any source; broken means that `source[i]` raises a DataError.
        policy: "skip", or "raise" at the first broken image.
        max_bad_fraction: share of the set that may be broken.

    Raises:
        DataError: from `[i]`, as the policy and the share say.
    """

    source: typing.Any
    policy: typing.Literal["skip", "raise"]
    max_bad_fraction: float = 0.01

    def __post_init__(self):
        if self.policy not in ("skip", "raise"):
            raise errors.UsageError(
                f"data.on_bad_image={self.policy!r}: one of 'skip', 'raise'"
            )
        self.bad = {}
        self._lock = threading.Lock()

    def __getstate__(self):
        return (self.source, self.policy, self.max_bad_fraction)

    def __setstate__(self, state):
        self.source, self.policy, self.max_bad_fraction = state
        self.__post_init__()

    def __getattr__(self, key):
        # Only what this object lacks: classes, channels, labels, root, name, split.
        if key.startswith("_") or key == "source":
            raise AttributeError(key)
        return getattr(self.source, key)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return self.at(i, 0)

    def at(self, i, epoch):
        """Example i as it is in an epoch; only mixtures differ between epochs."""
        if self.policy == "raise":
            return {**self._take(i, epoch), "index": i}
        where = getattr(self.source, "where", None)
        for at in range(i, i + len(self)):
            at %= len(self)
            # In a mixture item i is another file in another epoch.
            file = where(at, epoch) if where else at
            if file in self.bad:
                continue
            try:
                return {**self._take(at, epoch), "index": at}
            except errors.DataError as e:
                self._count(file, e)
        raise errors.DataError(
            f"{self.name}: {printable(self.root)}: no image can be decoded"
        )

    def _take(self, i, epoch):
        at = getattr(self.source, "at", None)
        return at(i, epoch) if at else self.source[i]

    def _count(self, file, error):
        with self._lock:
            if file not in self.bad:
                self.bad[file] = str(error)
                logger.warning("skipped a broken image: %s", error)
            bad = list(self.bad.values())
        if len(bad) > self.max_bad_fraction * len(self):
            shown = "\n  ".join(bad[:5])
            raise errors.DataError(
                f"{self.name}: {printable(self.root)}: {len(bad)} of {len(self)} "
                f"images are broken, more than {self.max_bad_fraction:.0%} of the set; "
                "repair them or take them out of the folder"
                f"\n  {shown}" + "\n  ..." * (len(bad) > 5)
            )
