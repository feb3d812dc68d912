"""Pictures of the parts that a network found: one colour per part over the image."""

import matplotlib
import numpy as np

from vitssl.pictures import panels


def labels(maps, size):
    """Return which part is strongest at every pixel: int [B, H, W]; K = background.

    Args:
        maps: [B, h, w, K+1]; enlarged bilinearly between centres of pixels first.
        size: (H, W).
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


@panels.picture
def overlay(images, maps):
    """Draw every image with its parts over it; the background stays as it is.

    Args:
        images: uint8 [B, H, W, C].
        maps: [B, h, w, K+1].
    """
    where = labels(maps, images.shape[1:3])
    parts = maps.shape[-1] - 1
    colours = np.vstack([palette(parts), np.zeros((1, 3))])
    title = f"Parts found: {parts} colours, the background left as it is"
    figure, axes = panels.tiles(2, len(images), title, headings="none", label=False)
    for b, image in enumerate(panels.rgb(images)):
        half = np.where(where[b][..., None] < parts, 0.5, 0.0)
        panels.show(axes[0, b], image)
        panels.show(axes[1, b], image * (1 - half) + colours[where[b]] * half)
    return figure
