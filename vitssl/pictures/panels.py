"""What every picture shares: the style, tiles of images, painted patches, saving.

No picture uses pyplot: a figure is an ordinary object drawn by Agg, so that nothing
here needs a display, keeps global state, or has to be closed.
"""

import functools
import pathlib

import cv2
import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, which colour-blind people tell apart.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#F0E442")
HIDDEN = "#B9BDC9"  # Neither black nor white, the backgrounds of most images.
EMPTY = "#ECEDF1"
INK = "#2B2D36"
DPI = 130
SIDE = 2000  # Pixels of the longer side of a picture, at most: a screen's.
STYLE = {
    "axes.edgecolor": "#8A8D99",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "grid.color": "#E4E5EA",
    "grid.linewidth": 0.6,
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "text.color": INK,
    "xtick.color": "#5A5D69",
    "ytick.color": "#5A5D69",
}


def picture(draw):
    """Turn a function that returns a figure into a picture.

    It is drawn in the style of this module, and takes one more keyword, `path`: a file
    to write it to ("" writes none). The figure is returned either way.
    """

    @functools.wraps(draw)
    def drawn(*args, path="", **kwargs):
        with matplotlib.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            if path:
                pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=min(DPI, SIDE / max(figure.get_size_inches())))
        return figure

    return drawn


def rgb(
    image,
):  # uint8 or uint16, or float in [0, 1], [..., H, W, C] -> float32 [..., H, W, 3]
    """Return an image of any number of channels in colour, in [0, 1].

    One channel becomes grey; of more than three the first three are shown; two leave
    blue black.
    """
    x = np.asarray(image)
    whole = x.dtype in (np.uint8, np.uint16)
    x = x.astype(np.float32) / (np.iinfo(x.dtype).max if whole else 1)
    if x.shape[-1] == 1:
        x = np.repeat(x, 3, -1)
    elif x.shape[-1] == 2:
        x = np.concatenate([x, np.zeros_like(x[..., :1])], -1)
    return x[..., :3].clip(0, 1)


def square(count):
    """Return the grid (h, w) of `count` patches of a square image."""
    side = round(count**0.5)
    if side * side != count:
        raise ValueError(f"{count} patches are no square; say grid=(h, w)")
    return side, side


def enlarge(grid, shape):  # [h, w, ...] -> [H, W, ...]
    """Return a value per patch as pixels of any shape: nearest."""
    grid = np.asarray(grid)
    rows = np.arange(shape[0]) * grid.shape[0] // shape[0]
    columns = np.arange(shape[1]) * grid.shape[1] // shape[1]
    return grid[rows][:, columns]


def smooth(grid, shape):  # [h, w] -> [H, W]
    """Return a value per patch as pixels of any shape, without steps between patches.

    Cubic between the centres of patches, and never beyond the values that there are.
    """
    grid = np.asarray(grid, np.float32)
    wide = cv2.resize(grid, tuple(shape[1::-1]), interpolation=cv2.INTER_CUBIC)
    return wide.clip(grid.min(), grid.max())


def paint(image, mask, colour, alpha):  # [H, W, 3], bool [h, w] -> [H, W, 3]
    """Return an image with `colour` over the patches of `mask`; alpha 1 hides it."""
    over = np.asarray(matplotlib.colors.to_rgb(colour), np.float32)
    where = enlarge(mask, image.shape)[..., None]
    return np.where(where, (1 - alpha) * image + alpha * over, image)


def outline(axis, mask, shape, colour, width=1.2):
    """Draw a line around the patches of `mask` [h, w] on an image of `shape` pixels."""
    mask = np.pad(np.asarray(mask, bool), 1)
    dy, dx = shape[0] / (mask.shape[0] - 2), shape[1] / (mask.shape[1] - 2)
    lines = []
    for y, x in zip(*np.nonzero(mask[1:] != mask[:-1]), strict=True):
        lines.append([((x - 1) * dx, y * dy), (x * dx, y * dy)])
    for y, x in zip(*np.nonzero(mask[:, 1:] != mask[:, :-1]), strict=True):
        lines.append([(x * dx, (y - 1) * dy), (x * dx, y * dy)])
    # The middle of the first pixel is the origin of an image's coordinates.
    lines = np.asarray(lines).reshape(-1, 2, 2) - 0.5
    axis.add_collection(
        LineCollection(lines, colors=colour, linewidths=width, capstyle="projecting"),
        autolim=False,
    )


def tiles(
    rows,
    columns,
    title="",
    *,
    size=1.25,
    headings="every",
    label=True,
    right=0.08,
    key=(),
):
    """Return (figure, axes [rows, columns]): equal squares with hardly a gap.

    Args:
        size: side of a tile, in inches; less where so many would not fit into `SIDE`.
        headings: leave room for titles over the tiles of "every" row, of the "first"
            one, or of "none".
        label: leave room for a label left of every row.
        right: inches left free at the right.
        key: [(colour, what it means)], written below the tiles.
    """
    head, gap = (0.2 if headings == "every" else 0.0), 0.06
    left = 0.34 if label else 0.08
    top = (0.3 if title else 0.06) + (0.2 if headings == "first" else 0.0)
    bottom = 0.32 if key else 0.06
    most = SIDE / DPI
    size = min(
        size,
        (most - left - right) / columns - gap,
        (most - top - bottom) / rows - head - gap,
    )
    # A title, or a key, is longer than a single tile is wide.
    words = max(0.075 * len(title), sum(0.4 + 0.065 * len(text) for _, text in key))
    width = min(most, max(left + columns * (size + gap) + right, words + 0.2))
    height = top + rows * (size + head + gap) + bottom
    figure = Figure(figsize=(width, height))
    if key:
        figure.legend(
            handles=[Patch(color=colour, label=text) for colour, text in key],
            loc="lower left",
            bbox_to_anchor=(0, 0),
            ncols=len(key),
            fontsize=7.5,
            handlelength=1,
        )
    if title:
        figure.text(0.08 / width, 1 - 0.08 / height, title, size=10, va="top")
    axes = np.empty((rows, columns), object)
    for r in range(rows):
        y = height - top - (r + 1) * (size + head + gap) + gap
        for c in range(columns):
            x = left + c * (size + gap)
            box = (x / width, y / height, size / width, size / height)
            axes[r, c] = figure.add_axes(box)
            bare(axes[r, c])
    return figure, axes


def bare(axis):
    """Leave of an axis only its place: no ticks, no grid, no frame."""
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)


def show(axis, image, title="", **kwargs):
    """Draw an image on a tile, with a title over it."""
    axis.imshow(image, **kwargs)
    if title:
        axis.set_title(title, size=7.5, pad=2.5)


def words(axis, text):
    """Draw an empty tile that says why it is empty."""
    axis.set_facecolor(EMPTY)
    axis.text(
        0.5, 0.5, text, ha="center", va="center", size=7.5, transform=axis.transAxes
    )


def scale(figure, axis, mappable, text):
    """Draw the colour scale of `mappable` right of a tile (see `right` of tiles)."""
    box = axis.get_position()
    inch = 1 / figure.get_figwidth()
    low, height = box.y0 + 0.07 * box.height, 0.86 * box.height  # Room for numbers.
    place = figure.add_axes((box.x1 + 0.08 * inch, low, 0.1 * inch, height))
    bar = figure.colorbar(mappable, cax=place, ticks=MaxNLocator(4))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=6.5, length=2)
    bar.set_label(text, size=7)


def charts(count, title="", *, columns=3, size=(3.1, 2.2)):
    """Return (figure, axes [count]): a table of charts, as many as asked for."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(columns * size[0], rows * size[1] + 0.3))
    figure.set_layout_engine("constrained")
    if title:
        figure.suptitle(title, size=10, x=0.01, ha="left")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]
