"""Pictures of the parts that a network found: one colour per part over the image."""

import pathlib

import cv2
import einops
import matplotlib
import numpy as np

from vitssl.pictures import attention, panels

SIDE = 256  # Pixels of a tile.


def labels(maps, size):  # [B, h, w, K+1] -> int [B, *size]
    """Return which part is strongest at every pixel; K is the background.

    Maps are enlarged bilinearly between centres of pixels first.
    """
    x = np.asarray(maps, np.float64)
    for axis, n in ((1, size[0]), (2, size[1])):
        at = np.clip((np.arange(n) + 0.5) * x.shape[axis] / n - 0.5, 0, None)
        low = np.minimum(at.astype(int), x.shape[axis] - 1)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        share = (at - low).reshape([-1 if a == axis else 1 for a in range(4)])
        x = np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
    return x.argmax(-1)


def layout(count):
    """Return (columns, rows) for so many tiles: the most square pair of factors."""
    columns = max(n for n in range(1, int(count**0.5) + 1) if count % n == 0)
    return columns, count // columns


def palette(parts):
    """Return one colour per part, [K, 3] in [0, 1]."""
    names = (*panels.COLOURS, *matplotlib.colormaps["tab20"].colors)
    return np.array(
        [matplotlib.colors.to_rgb(names[k % len(names)]) for k in range(parts)]
    )


def _colours(parts):
    """Return the palette and black for the background, [K+1, 3]."""
    return np.vstack([palette(parts), np.zeros((1, 3))])


@panels.picture
def overlay(images, maps):  # uint8 [B, H, W, C], [B, h, w, K+1]
    """Draw every image with its parts over it; the background stays as it is."""
    where = labels(maps, images.shape[1:3])
    parts = maps.shape[-1] - 1
    colours = _colours(parts)
    title = f"Parts found: {parts} colours, the background left as it is"
    key = [(colours[k], f"part {k + 1}") for k in range(parts)] if parts <= 8 else ()
    figure, axes = panels.tiles(
        2, len(images), title, headings="none", label=False, key=key
    )
    for b, image in enumerate(panels.rgb(images)):
        half = np.where(where[b][..., None] < parts, 0.5, 0.0)
        panels.show(axes[0, b], image)
        panels.show(axes[1, b], image * (1 - half) + colours[where[b]] * half)
    return figure


def write(path, images, maps, *, side=SIDE):
    """Write a `sheet` into a file whose name says the format; folders are made.

    Of many images tiles are smaller, so that a screen shows it.
    """
    side = min(side, panels.SIDE // max(layout(len(images))))
    _save(path, sheet(images, maps, side=side))


def write_one(path, image, fields):  # uint8 [H, W, C]
    """Write one image with what a network makes of it; see `write`.

    Its parts are drawn over it if there are any, else where the network looks.

    Args:
        fields: of `drawing.Material`, of this image alone.
    """
    if fields.get("parts") is not None:
        write(path, image[None], fields["parts"])
        return
    grid, times = fields["grid"], max(1, SIDE // min(image.shape[:2]))
    large = panels.enlarge(image, [n * times for n in image.shape[:2]])
    values, low = attention.rolled(fields["attention"][0], grid[0] * grid[1])
    _save(path, attention.overlay(panels.rgb(large), values, grid, low))


def _save(path, image):  # float [H, W, 3] in [0, 1]
    path, pixels = pathlib.Path(path), np.rint(255 * image).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, pixels[..., ::-1])[1])


def sheet(images, maps, *, side=SIDE):  # uint8 [B, H, W, C], [B, h, w, K+1]
    """Return the pixels [rows side, columns side, 3] in [0, 1] of a sheet, no axes.

    Images and maps are enlarged bilinearly to tiles; a tile shows half the image and
    half the colour of its strongest part, and the image alone where the background is
    strongest. Columns and rows are the most square pair of factors.

    Source: ananthu-aniraj/ifam utils/visualize_att_maps.py.
    """
    count = maps.shape[-1] - 1
    where = labels(maps, (side, side))[..., None]  # [B, s, s, 1]
    tiles = np.stack([cv2.resize(x, (side, side)) for x in panels.rgb(images)])
    colours = _colours(count)[where[..., 0]]
    tiles = np.where(where < count, 0.5 * (tiles + colours), tiles)
    columns, rows = layout(len(tiles))
    return einops.rearrange(tiles, "(r c) h w d -> (r h) (c w) d", r=rows, c=columns)
