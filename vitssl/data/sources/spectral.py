"""Spectral planes beside colour images: further channels of one uint8 image.

A plane lies in a .npy file named like its image, or is made up from the colours. Its
values in a given range become 0..255, so that it is cropped, shipped and normalised
like any channel.
"""

import dataclasses
from typing import Literal

import numpy as np

from vitssl import errors
from vitssl.data import decode, resample
from vitssl.data.sources import layout, wrappers


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
        path: a .npy file of [H, W], [H, W, S] or [S, H, W] numbers.
        size: (H, W) of the image.
        channels: S.

    Raises:
        DataError: another shape.
    """
    planes = np.load(path, allow_pickle=False).astype(np.float32)
    given = planes.shape
    if planes.ndim == 2:
        planes = planes[..., None]
    elif planes.ndim == 3 and planes.shape[-1] != channels:
        planes = np.moveaxis(planes, 0, -1)
    if planes.ndim != 3 or planes.shape[-1] != channels:
        raise errors.DataError(
            f"{decode.printable(path)}: planes of shape {given}; want [H, W], "
            f"[H, W, {channels}] or [{channels}, H, W]"
        )
    return resample.resize(planes, size, None, "bilinear")


@dataclasses.dataclass(frozen=True, eq=False)
class WithPlanes(wrappers.Wrapper):
    """Colour image files with spectral planes as further channels.

    Attributes:
        kind: "npy" or "ndvi".
        paths: [N] of the planes; () for "ndvi".
        range: values that become 0 and 255.
        channels: 3 + S.
    """

    kind: Literal["npy", "ndvi"]
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
        grey = np.clip((planes - low) / (high - low), 0.0, 1.0) * 255
        planes = np.rint(grey).astype(np.uint8)
        return example | {"image": np.concatenate([image, planes], -1)}


def attach(files, kind, root, bounds, channels) -> WithPlanes:
    """Return a `folder.Files` of three channels with planes.

    Args:
        kind, bounds, channels: see `WithPlanes`.
        root: folder of the .npy files, laid out like the images.

    Raises:
        UsageError: an empty range, no room for planes.
        DataError: images without planes, with an example.
    """
    low, high = bounds
    if not low < high:
        raise errors.UsageError(f"planes_range={bounds}: (lowest, highest)")
    if channels < 4 or (kind == "ndvi" and channels != 4):
        raise errors.UsageError(
            f"planes={kind!r}: data.channels={channels}; want 3 + the planes"
            + (", which is 4" if kind == "ndvi" else "")
        )
    paths = ()
    if kind == "npy":
        own = [files.relative(i) for i in range(len(files))]
        paths = layout.beside(own, root, ".npy", "spectral file")
    return WithPlanes(files, kind, paths, (float(low), float(high)), channels)
