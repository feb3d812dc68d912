"""A sheet of images with their parts laid over them, as pixels, without axes."""

import pathlib

import cv2
import einops
import numpy as np

from vitssl.pictures import overlays, panels

SIDE = 256  # Pixels of a tile.


def write(path, images, maps, *, side=SIDE):
    """Write `sheet` into a file whose name says the format; folders are made."""
    pixels = np.rint(255 * sheet(images, maps, side=side)).astype(np.uint8)
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), pixels[..., ::-1])


def sheet(images, maps, *, side=SIDE):
    """Return the pixels [rows side, columns side, 3] in [0, 1] of a sheet.

    Images and maps are enlarged bilinearly to tiles; a tile shows half the image and
    half the colour of its strongest part, and the image alone where the background is
    strongest. Columns and rows are the most square pair of factors.

    Args:
        images: uint8 [B, H, W, C].
        maps: [B, h, w, K+1].
        side: of a tile.

    Source: ananthu-aniraj/ifam utils/visualize_att_maps.py.
    """
    count = maps.shape[-1] - 1
    where = overlays.labels(maps, (side, side))[..., None]  # [B, s, s, 1]
    tiles = np.stack([cv2.resize(x, (side, side)) for x in panels.rgb(images)])
    colours = np.vstack([overlays.palette(count), np.zeros((1, 3))])[where[..., 0]]
    tiles = np.where(where < count, 0.5 * (tiles + colours), tiles)
    columns, rows = overlays.layout(len(tiles))
    return einops.rearrange(tiles, "(r c) h w d -> (r h) (c w) d", r=rows, c=columns)
