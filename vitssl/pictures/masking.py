"""Pictures of masks: what the encoder sees, what is to be predicted, at every level.

Masks are bool, patches in raster order, as in `hjepa.masks`: `context` True =
visible, `targets` True = to predict. Targets are either blocks [..., T, N], each drawn
in a colour of its own, or their union [..., N]. Images are [H, W, C]; a grid is (h, w)
of the patches, None for a square.
"""

import pathlib

import matplotlib
import numpy as np
from matplotlib.animation import PillowWriter
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from vitssl.pictures import panels

SEEN, WANTED, UNUSED = panels.COLOURS[5], panels.COLOURS[0], "#D9DBE2"


def context_view(image, context, grid):
    """Return [H, W, 3]: the visible patches of an image [H, W, 3], the others grey."""
    return panels.paint(image, ~context.reshape(grid), panels.HIDDEN, 0.93)


def targets_view(image, blocks, grid):
    """Return [H, W, 3]: a pale image, every block [T, N] of targets in a colour."""
    view = 0.45 * image + 0.55
    for i, block in enumerate(blocks):
        colour = panels.COLOURS[i % len(panels.COLOURS)]
        view = panels.paint(view, block.reshape(grid), colour, 0.6)
    return view


def _blocks(targets, levels):
    """Return [..., T, N] of [..., T, N] or the union [..., N]; `levels` axes before."""
    targets = np.asarray(targets, bool)
    return targets[..., None, :] if targets.ndim == levels + 1 else targets


def _show_targets(axis, image, blocks, grid, title=""):
    panels.show(axis, targets_view(image, blocks, grid), title)
    for i, block in enumerate(blocks):
        colour = panels.COLOURS[i % len(panels.COLOURS)]
        panels.outline(axis, block.reshape(grid), image.shape, colour)


def _key(blocks):  # [..., T, N]
    """Return what the colours of masks mean, for `panels.tiles`."""
    count = blocks.shape[-2]
    if count > len(panels.COLOURS):
        return [(panels.HIDDEN, "hidden")]
    one = "targets" if count == 1 else "target block {}"
    colours = enumerate(panels.COLOURS[:count], 1)
    return [(panels.HIDDEN, "hidden"), *((c, one.format(i)) for i, c in colours)]


def _percent(mask):
    return f"{100 * np.mean(mask):.0f} %"


@panels.picture
def hierarchical(image, context, targets, grid=None):  # Of masks [H, ...].
    """Draw the masks of one crop: 2 rows, context and targets, by H levels."""
    image, context = panels.rgb(image), np.asarray(context, bool)
    grid = grid or panels.square(context.shape[-1])
    blocks = _blocks(targets, 1)
    title, key = "Masks of one crop", _key(blocks)
    figure, axes = panels.tiles(2, len(context), title, size=1.7, key=key)
    for k, (seen, wanted) in enumerate(zip(context, blocks, strict=True)):
        title = f"level {k}: sees {_percent(seen)}"
        panels.show(axes[0, k], context_view(image, seen, grid), title)
        title = f"predicts {_percent(wanted.any(0))}"
        _show_targets(axes[1, k], image, wanted, grid, title)
    axes[0, 0].set_ylabel("context")
    axes[1, 0].set_ylabel("targets")
    return figure


def combined_view(context, targets, grid):  # [H, N], [H, N] -> [h, w, 3]
    """Return each patch as a blend of what its levels do with it.

    The share of levels that predict the patch is in orange, of those that see it in
    blue, of those that do neither in grey.
    """
    shares = np.stack([targets, context & ~targets, ~(targets | context)])
    weights = shares.mean(1).T.reshape(*grid, 3)  # [h, w, 3]
    return weights @ np.array([to_rgb(c) for c in (WANTED, SEEN, UNUSED)])


@panels.picture
def combined(image, context, targets, grid=None):  # Of masks [H, ...].
    """Draw all levels in one: the image, and each patch coloured by its use."""
    context = np.asarray(context, bool)
    grid = grid or panels.square(context.shape[-1])
    view = combined_view(context, _blocks(targets, 1).any(-2), grid)
    figure, axes = panels.tiles(
        1, 2, f"{len(context)} levels in one", size=1.9, label=False, right=1.15
    )
    panels.show(axes[0, 0], panels.rgb(image), "image")
    panels.show(axes[0, 1], view, "use of each patch")
    names = ((WANTED, "predicted"), (SEEN, "visible"), (UNUSED, "unused"))
    axes[0, 1].legend(
        handles=[Patch(color=c, label=f"{name}\nat every level") for c, name in names],
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )
    return figure


@panels.picture
def multicrop(global_crops, local_crops, masks):
    """Draw the masks of all crops of one image: 2H rows by G + L columns.

    A tile reads "N/A" where the strategy gives a crop no masks, and "No Targets" where
    nothing of it is predicted.

    Args:
        global_crops, local_crops: [G, s, s, C]; [L, l, l, C] or None.
        masks: as in a batch: "global_context" [G, H, N] and "global_targets"; the same
            with "local" if the strategy uses local crops.
    """
    columns = []
    for name, crops in (("global", global_crops), ("local", local_crops)):
        context = masks.get(f"{name}_context")
        targets = None
        if context is not None:
            targets = _blocks(masks[f"{name}_targets"], 2)
        for i in range(0 if crops is None else len(crops)):
            pair = (None, None) if context is None else (context[i], targets[i])
            columns.append((f"{name} {i}", panels.rgb(crops[i]), *pair))
    levels = np.shape(masks["global_context"])[1]
    title, key = "Masks of all crops", _key(_blocks(masks["global_targets"], 2))
    figure, axes = panels.tiles(
        2 * levels, len(columns), title, size=1.1, headings="first", key=key
    )
    for c, (name, image, context, targets) in enumerate(columns):
        axes[0, c].set_title(name, size=7.5, pad=2.5)
        for k in range(levels):
            pair = axes[2 * k : 2 * k + 2, c]
            if context is None:
                for axis in pair:
                    panels.words(axis, "N/A")
                continue
            grid = panels.square(context.shape[-1])
            panels.show(pair[0], context_view(image, context[k], grid))
            if targets[k].any():
                _show_targets(pair[1], image, targets[k], grid)
            else:
                panels.words(pair[1], "No Targets")
    for k in range(levels):
        axes[2 * k, 0].set_ylabel(f"level {k}\ncontext", size=7.5)
        axes[2 * k + 1, 0].set_ylabel(f"level {k}\ntargets", size=7.5)
    return figure


@panels.picture
def single(image, context, targets, grid=None):  # Of masks [N], [T, N].
    """Draw a pair of masks: image, mask, masked image, context and target regions."""
    image, context = panels.rgb(image), np.asarray(context, bool)
    grid = grid or panels.square(context.shape[-1])
    blocks = _blocks(targets, 0)
    union = blocks.any(0)
    key = [*_key(blocks), (SEEN, "visible"), (UNUSED, "neither")]
    figure, axes = panels.tiles(1, 5, "One mask", size=1.6, label=False, key=key)
    panels.show(axes[0, 0], image, "image")
    view = combined_view(context[None], union[None], grid)
    panels.show(axes[0, 1], view, "mask: all targets")
    masked = panels.paint(image, union.reshape(grid), panels.HIDDEN, 1.0)
    panels.show(axes[0, 2], masked, "image without targets")
    title = f"context: {_percent(context)}"
    panels.show(axes[0, 3], context_view(image, context, grid), title)
    _show_targets(axes[0, 4], image, blocks, grid, f"targets: {_percent(union)}")
    return figure


@panels.picture
def strategies(image, masks, grid=None):
    """Compare ways to draw masks, {name: (context, targets)}: a column for each."""
    image = panels.rgb(image)
    key = _key(max((_blocks(t, 0) for _, t in masks.values()), key=len))
    title = "Masking compared"
    figure, axes = panels.tiles(2, len(masks), title, size=1.7, key=key)
    for c, (name, (context, targets)) in enumerate(masks.items()):
        context, blocks = np.asarray(context, bool), _blocks(targets, 0)
        cells = grid or panels.square(context.shape[-1])
        title = f"{name}: {_percent(context)}"
        panels.show(axes[0, c], context_view(image, context, cells), title)
        title = f"predicts {_percent(blocks.any(0))}"
        _show_targets(axes[1, c], image, blocks, cells, title)
    axes[0, 0].set_ylabel("context")
    axes[1, 0].set_ylabel("targets")
    return figure


@panels.picture
def statistics(context, targets, grid=None):  # Of masks [draws, H, ...].
    """Draw how much, and where, many draws of a mask generator see and predict.

    A row per level: a histogram of both shares, and how often each patch is visible
    and predicted.
    """
    context = np.asarray(context, bool)
    targets = _blocks(targets, 2).any(-2)
    levels, grid = context.shape[1], grid or panels.square(context.shape[-1])
    figure, axes = panels.charts(
        3 * levels, f"Masks of {len(context)} draws", size=(2.6, 2.0)
    )
    for k, (left, *maps) in enumerate(axes.reshape(levels, 3)):
        for mask, colour, name in (
            (context, SEEN, "visible"),
            (targets, WANTED, "predicted"),
        ):
            share = mask[:, k].mean(-1)
            left.hist(share, np.linspace(0, 1, 41), color=colour, alpha=0.75)
            left.axvline(share.mean(), color=colour, linestyle="--", linewidth=1)
            left.plot([], [], color=colour, label=f"{name}, mean {share.mean():.2f}")
        left.set(xlim=(0, 1), ylabel=f"level {k}: draws", xlabel="share of patches")
        above = dict(loc="lower center", bbox_to_anchor=(0.5, 1), handlelength=1)
        left.legend(fontsize=6.5, ncols=2, columnspacing=1, **above)
        for axis, mask, name in zip(
            maps, (context, targets), ("visible", "predicted"), strict=True
        ):
            often = mask[:, k].mean(0).reshape(grid)
            drawn = axis.imshow(often, cmap="viridis", vmin=0, vmax=1)
            panels.bare(axis)
            axis.set_title(f"how often {name}")
            figure.colorbar(drawn, ax=axis, shrink=0.9)
    return figure


def animation(image, context, targets, path, grid=None, *, fps=2):
    """Write a GIF: the image, then for each level its context and block by block.

    Returns the number of frames.
    """
    image, context = panels.rgb(image), np.asarray(context, bool)
    grid = grid or panels.square(context.shape[-1])
    frames = [("image", image)]
    for k, blocks in enumerate(_blocks(targets, 1)):
        frames.append((f"level {k}: context", context_view(image, context[k], grid)))
        for i in range(len(blocks)):
            view = targets_view(image, blocks[: i + 1], grid)
            frames.append((f"level {k}: {i + 1} of {len(blocks)} targets", view))
    with matplotlib.rc_context(panels.STYLE):
        figure, axes = panels.tiles(1, 1, size=2.6, label=False)
        writer = PillowWriter(fps=fps)
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        with writer.saving(figure, path, panels.DPI):
            for title, view in frames:
                axes[0, 0].clear()
                panels.bare(axes[0, 0])
                panels.show(axes[0, 0], view, title)
                writer.grab_frame()
    return len(frames)
