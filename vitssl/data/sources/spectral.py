"""Spectral planes beside colour images: further channels of one uint16 image.

A plane lies in a .npy or TIFF file named like its image, or is made up from the
colours. Its values in a given range become 0..65535, so that it is cropped, shipped and
normalised like any channel and keeps 16 bits; a colour v is 257 v, which is the same
share of its range.
"""

import dataclasses
import functools
import os
from typing import Literal

import numpy as np

from vitssl import errors
from vitssl.data import decode, resample, tiff
from vitssl.data.sources import layout, wrappers

DEEP = 65535  # The brightest value.
SUFFIXES = {"npy": (".npy",), "tiff": tiff.SUFFIXES}


def ndvi(image):  # float [H, W, 3] in [0, 1] -> [H, W, 1]
    """Return a stand-in for a vegetation index, from red, green and blue.

    Near infrared is guessed as 0.2 R + 0.5 G + 0.3 B; the index is (N - R) / (N + R).
    It knows no more than the colours do.

    Source: w2sg-arnav/HierarchialViT@80b5e7d phase1_project/dataset.py.
    """
    image = np.asarray(image, np.float32)
    red = image[..., 0]
    near = image @ np.array((0.2, 0.5, 0.3), np.float32)
    return np.clip((near - red) / (near + red + 1e-8), -1.0, 1.0)[..., None]


def read(path, size, channels):
    """Return the planes of a file, resized: float32 [H, W, channels].

    Args:
        path: a .npy or TIFF file of [H, W], [H, W, S] or [S, H, W] numbers.
        size: (H, W) of the image.
        channels: S.

    Raises:
        DataError: it cannot be read, or is of another shape.
    """
    planes = _values(path).astype(np.float32)
    given = planes.shape
    if planes.ndim == 2:
        planes = planes[..., None]
    elif planes.ndim == 3 and planes.shape[-1] != channels:
        planes = np.moveaxis(planes, 0, -1)
    if planes.ndim != 3 or planes.shape[-1] != channels or not planes.size:
        raise errors.DataError(
            f"{decode.printable(path)}: planes of shape {given}; want [H, W], "
            f"[H, W, {channels}] or [{channels}, H, W]"
        )
    return resample.resize(planes, size, None, "bilinear")


def _values(path):
    """Return the numbers of a file as they are."""
    if os.path.splitext(path)[1].lower() in tiff.SUFFIXES:
        return tiff.read(path).values
    return decode.array(path)


@functools.cache
def measured(root: str, kind: str) -> tuple[float, float]:
    """Return the lowest and the highest number in all planes below a folder.

    So that every split has the same. What cannot be read is left out: it is named
    where its image is.

    Raises:
        DataError: there are none, or all are one number.
    """
    low, high, count = np.inf, -np.inf, 0
    for place, _, names in os.walk(root):
        for name in names:
            if os.path.splitext(name)[1].lower() not in SUFFIXES[kind]:
                continue
            try:
                values = _values(os.path.join(place, name))
            except errors.DataError:
                continue
            values, count = values[np.isfinite(values)], count + 1
            low = min(low, values.min(initial=np.inf))
            high = max(high, values.max(initial=-np.inf))
    if not low < high:
        raise errors.DataError(
            f"planes_range=(): {count} file(s) of planes below "
            f"{decode.printable(root)} have no two different numbers"
        )
    layout.once(
        f"planes_range=(): {low:.6g} to {high:.6g}, of {count} file(s) below "
        f"{decode.printable(root)}"
    )
    return float(low), float(high)


@dataclasses.dataclass(frozen=True, eq=False)
class WithPlanes(wrappers.Wrapper):
    """Colour image files with spectral planes as further channels.

    Attributes:
        kind: "npy", "tiff" or "ndvi".
        paths: [N] of the planes; () for "ndvi".
        range: values that become 0 and 65535.
        channels: 3 + S.
    """

    kind: Literal["npy", "tiff", "ndvi"]
    paths: tuple[str, ...]
    range: tuple[float, float]
    channels: int

    def example(self, i: int) -> dict:
        """Return example i."""
        example = self.whole[i]
        image = example["image"]
        if self.kind == "ndvi":
            planes = ndvi(image.astype(np.float32) / 255)
        else:
            count = self.channels - image.shape[-1]
            planes = read(self.paths[i], image.shape[:2], count)
        low, high = self.range
        share = (planes.astype(np.float64) - low) / (high - low)
        # What is no number is nothing, and black.
        share = np.nan_to_num(np.clip(share, 0.0, 1.0))
        planes = np.rint(share * DEEP).astype(np.uint16)
        colours = image.astype(np.uint16) * np.uint16(DEEP // 255)
        return example | {"image": np.concatenate([colours, planes], -1)}


def attach(files, kind, root, bounds, channels) -> WithPlanes:
    """Return a `folder.Files` of three channels with planes.

    Args:
        kind, channels: see `WithPlanes`.
        bounds: (lowest, highest) value, or () = those of the planes themselves.
        root: folder of the planes, laid out like the images.

    Raises:
        UsageError: an empty range, no room for planes.
        DataError: images without planes, with an example.
    """
    if bounds and (len(bounds) != 2 or not bounds[0] < bounds[1]):
        raise errors.UsageError(
            f"planes_range={bounds}: (lowest, highest), or () for those of the planes"
        )
    if channels < 4 or (kind == "ndvi" and channels != 4):
        raise errors.UsageError(
            f"planes={kind!r}: data.channels={channels}; want 3 + the planes"
            + (", which is 4" if kind == "ndvi" else "")
        )
    if kind == "ndvi":
        low, high = bounds or (-1.0, 1.0)
        return WithPlanes(files, kind, (), (float(low), float(high)), channels)
    paths = layout.named_like(files, root, SUFFIXES[kind], "spectral file")
    low, high = bounds or measured(str(root), kind)
    return WithPlanes(files, kind, paths, (float(low), float(high)), channels)
