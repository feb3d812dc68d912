"""Pictures of multi-crop: the crops of every image, and where they lie in it."""

import numpy as np
from matplotlib.patches import Rectangle

from vitssl.pictures import panels


@panels.picture
def crops(global_crops, local_crops=None, *, original=None, boxes=None):
    """Draw one row per image: the image with its crop boxes, then every crop.

    Args:
        global_crops, local_crops: [B, G, s, s, C]; [B, L, l, l, C] or None.
        original: B images [H, W, C] that were cropped; None leaves them out.
        boxes: (global [B, G, 5], local [B, L, 5] or None): (y0, x0, h, w) relative to
            the image, flipped 0 or 1. Needs `original`. A mirrored crop's heading has
            an arrow.
    """
    sets = [("global", global_crops, panels.COLOURS[4])]
    if local_crops is not None and local_crops.shape[1]:
        sets.append(("local", local_crops, panels.COLOURS[1]))
    first = 0 if original is None else 1
    columns = first + sum(crop.shape[1] for _, crop, _ in sets)
    title = "Crops: " + ", ".join(
        f"{crop.shape[1]} {name} of {crop.shape[2]} px" for name, crop, _ in sets
    )
    key = [(colour, f"{name} crop, and where it lies") for name, _, colour in sets]
    figure, axes = panels.tiles(
        len(global_crops), columns, title, label=False, key=key if first else ()
    )
    for b, row in enumerate(axes):
        if first:
            panels.show(row[0], panels.rgb(original[b]), "image")
        column = first
        for kind, (name, crop, colour) in enumerate(sets):
            for i in range(crop.shape[1]):
                box = None if boxes is None else boxes[kind][b, i]
                flipped = box is not None and box[4] > 0.5
                heading = f"{name} {i}" + (" ⇄" if flipped else "")
                panels.show(row[column], panels.rgb(crop[b, i]), heading)
                _frame(row[column], colour)
                if first and box is not None:
                    _draw_box(row[0], box, np.shape(original[b]), colour)
                column += 1
    return figure


def _frame(axis, colour):
    axis.spines[:].set(visible=True, color=colour, linewidth=1.5)


def _draw_box(axis, box, shape, colour):
    """Draw (y0, x0, h, w), relative, on an image of shape (H, W, ...)."""
    y, x, h, w = (
        float(v) * side for v, side in zip(box[:4], shape[:2] * 2, strict=True)
    )
    axis.add_patch(
        Rectangle((x - 0.5, y - 0.5), w, h, fill=False, color=colour, linewidth=1.1)
    )
