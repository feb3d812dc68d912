"""Pictures of attention: by layer and head, rolled out, and of one patch.

Attention is float [layers, heads, T, T], rows (queries) summing to 1, as the encoder
sows it. The T tokens are the prefix (the class token first, then registers) and the
h * w patches of the grid in raster order; a grid of None is the largest square that
fits. Images are [H, W, C].
"""

import matplotlib
import numpy as np
from matplotlib.patches import Rectangle

from vitssl.pictures import panels

HEAT = "magma"
MARK = panels.COLOURS[1]  # Of the patch that looks.


def rollout(attention):  # [layers, heads, T, T] -> [T, T]
    """Return how much of each input token reaches each output token.

    The product of the layers, last to first, of the head-averaged attention mixed half
    and half with the identity (the residual branch), rows normalised to 1.

    Source: Abnar and Zuidema 2020, arXiv:2005.00928; H-JEPA (jonwiggins/H-JEPA
    src/visualization/attention_viz.py).
    """
    attention = np.asarray(attention)
    residual = np.eye(attention.shape[-1])
    rolled = residual
    for layer in attention.astype(np.float64).mean(1):  # [T, T]
        mixed = 0.5 * layer + 0.5 * residual
        rolled = mixed / mixed.sum(-1, keepdims=True) @ rolled
    return rolled


def on_patches(matrix, count):  # [..., T, T] -> [..., N]
    """Return how the image as a whole looks at its N = `count` patches.

    That is the row of the class token, or, if there is no prefix, the mean over all
    rows. `matrix` is attention or its rollout.
    """
    prefix = matrix.shape[-1] - count
    row = matrix[..., 0, :] if prefix else matrix.mean(-2)
    return row[..., prefix:]


def depths(layers):
    """Return {name: index} of an early, a middle and the last layer, none twice."""
    found = {}
    for name, i in (("early", layers // 4), ("middle", layers // 2)):
        if i < layers - 1 and i not in found.values():
            found[name] = i
    return found | {"last": layers - 1}


def _heat(axis, values, grid, title="", low=0.0, top=None):
    """Draw a map of a value per patch, from `low` to `top` or its largest."""
    top = max(float(values.max()) if top is None else top, low + 1e-12)
    panels.show(axis, values.reshape(grid), title, cmap=HEAT, vmin=low, vmax=top)


def overlay(image, values, grid, low=0.0):  # [H, W, 3], [N] -> [H, W, 3]
    """Return an image under the colours of values, from `low` to the largest.

    Between the centres of patches the colours change smoothly.
    """
    light = (values.reshape(grid) - low) / max(float(values.max()) - low, 1e-12)
    heat = matplotlib.colormaps[HEAT](panels.smooth(light, image.shape))[..., :3]
    return 0.4 * image + 0.6 * heat


def rolled(attention, count):  # [layers, heads, T, T] -> [N], number
    """Return the rollout on N = `count` patches, and its minimum, to draw it from.

    What all patches get alike, such as the half of the residual branch, says nothing.
    """
    values = on_patches(rollout(attention), count)
    return values, float(values.min())


@panels.picture
def heads(image, attention, grid=None, *, layers=6, most=12):
    """Draw one map per layer (rows) and head (columns) of an image.

    At most `layers` layers and `most` heads, evenly spread from the first to the last;
    the maps of a layer have one scale.
    """
    grid = grid or infer_grid(attention.shape[-1])
    count = grid[0] * grid[1]
    chosen, shown = (
        np.unique(np.linspace(0, n - 1, min(limit, n)).round().astype(int))
        for n, limit in zip(attention.shape, (layers, most), strict=False)
    )
    figure, axes = panels.tiles(
        len(chosen),
        1 + len(shown),
        "Attention of the whole image by layer and head",
        size=1.0,
        headings="first",
        right=0.9,
    )
    for r, layer in enumerate(chosen):
        mean = on_patches(attention[layer].mean(0), count)
        view = overlay(panels.rgb(image), mean, grid)
        panels.show(axes[r, 0], view, "mean of heads" if r == 0 else "")
        axes[r, 0].set_ylabel(f"layer {layer}", size=7.5)
        maps = on_patches(attention[layer, shown], count)
        for axis, h, values in zip(axes[r, 1:], shown, maps, strict=True):
            title = f"head {h}" if r == 0 else ""
            _heat(axis, values, grid, title, top=float(maps.max()))
        panels.scale(figure, axes[r, -1], axes[r, -1].images[0], "attention")
    return figure


def infer_grid(tokens):
    """Return (h, w) of the largest square grid that leaves a prefix of `tokens`.

    Without a class token T is a square itself; with one, T - 1 is, and so on.
    """
    side = int(tokens**0.5)
    return side, side


@panels.picture
def layers(images, attention, grid=None):  # [B, ...], [B, layers, heads, T, T]
    """Draw a column per image: early, middle and last layer, and the rollout.

    Each row has one scale; the last shows the rollout as light on the image.
    """
    grid = grid or infer_grid(attention.shape[-1])
    count = grid[0] * grid[1]
    rows = {
        f"{name}\n(layer {i})": [on_patches(a[i].mean(0), count) for a in attention]
        for name, i in depths(attention.shape[1]).items()
    }
    rolls = [rolled(each, count) for each in attention]
    rows["rollout"] = [values for values, _ in rolls]
    title = "Attention of the whole image: mean of heads, and rollout"
    figure, axes = panels.tiles(
        2 + len(rows), len(images), title, headings="none", right=0.9
    )
    axes[-1, 0].set_ylabel("rollout\non image", size=7)
    for b, image in enumerate(panels.rgb(images)):
        panels.show(axes[0, b], image)
        panels.show(axes[-1, b], overlay(image, rolls[b][0], grid, rolls[b][1]))
    for row, (name, maps) in zip(axes[1:-1], rows.items(), strict=True):
        row[0].set_ylabel(name, size=7)
        low = min(low for _, low in rolls) if name == "rollout" else 0.0
        top = max(float(values.max()) for values in maps)
        for axis, values in zip(row, maps, strict=True):
            _heat(axis, values, grid, low=low, top=top)
        panels.scale(figure, row[-1], row[-1].images[0], "attention")
    return figure


@panels.picture
def patch(image, attention, position, grid=None):
    """Draw what the patch at (y, x) of the grid attends to, by depth and rolled out."""
    grid = grid or infer_grid(attention.shape[-1])
    prefix = attention.shape[-1] - grid[0] * grid[1]
    query = prefix + position[0] * grid[1] + position[1]
    maps = {
        f"{name} (layer {i})": attention[i].mean(0)[query, prefix:]
        for name, i in depths(len(attention)).items()
    }
    maps["rollout"] = rollout(attention)[query, prefix:]
    # Half of a rollout is the patch itself: the others would all be black.
    rest = np.delete(maps["rollout"], query - prefix)
    maps["rollout"] = maps["rollout"].clip(max=float(rest.max(initial=0.0)))
    title = f"Attention of patch {tuple(map(int, position))}, each map on its own scale"
    key = [(MARK, "the patch that looks")]
    figure, axes = panels.tiles(1, 1 + len(maps), title, size=1.5, label=False, key=key)
    image = panels.rgb(image)
    panels.show(axes[0, 0], image, "image")
    cell = image.shape[0] / grid[0], image.shape[1] / grid[1]
    _mark(axes[0, 0], position, cell)
    for axis, (name, values) in zip(axes[0, 1:], maps.items(), strict=True):
        _heat(axis, values, grid, name)
        _mark(axis, position, (1, 1))
    return figure


def _mark(axis, position, cell):
    """Frame the patch at `position` on tiles of `cell` = (height, width) units."""
    y, x = position[0] * cell[0] - 0.5, position[1] * cell[1] - 0.5
    axis.add_patch(
        Rectangle((x, y), cell[1], cell[0], fill=False, color=MARK, linewidth=1.6)
    )
