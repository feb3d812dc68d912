"""Pictures of patch tokens: principal components as colours, errors of predictions.

Images are [B, H, W, C]. `predicted` and `target` hold one [B, n_k, D] per level k, of
the cells of a square grid; `valid`, bool [B, n_k], says which were predicted.
"""

import numpy as np

from vitssl.pictures import panels


def components(tokens, count=3):  # [B, N, D >= count] -> [B, N, count]
    """Return the principal components of all tokens together, in [0, 1].

    Each component runs from its 1st to its 99th percentile, so that one odd token does
    not take all the contrast; its sign makes its largest weight positive.
    """
    flat = np.asarray(tokens, np.float64).reshape(-1, tokens.shape[-1])  # [BN, D]
    flat = flat - flat.mean(0)
    _, axes = np.linalg.eigh(flat.T @ flat)  # Columns, smallest eigenvalue first.
    axes = axes[:, ::-1][:, :count]
    largest = np.abs(axes).argmax(0)
    axes = axes * np.sign(axes[largest, np.arange(count)])
    values = flat @ axes
    low, high = np.percentile(values, (1, 99), axis=0)
    values = (values - low) / np.maximum(high - low, 1e-12)
    return values.clip(0, 1).reshape(*tokens.shape[:2], count)


@panels.picture
def principal(images, tokens, grid=None):
    """Draw every image over the first three principal components of its tokens.

    Below them those of the tokens without the mean of their position over all images:
    what a token says beyond where it is. Components are of all tokens together: equal
    colours in a row are equal features.

    Args:
        images: [B, H, W, C].
        tokens: [M, N, D], patches only; the first B are of the images, the others make
            the mean of a position less a matter of chance.
        grid: (h, w); None for a square.
    """
    grid = grid or panels.square(tokens.shape[1])
    tokens = np.asarray(tokens, np.float64)
    rows = {"tokens": tokens}
    if len(tokens) > 1:
        rows["without the mean of\ntheir position"] = tokens - tokens.mean(0)
    title = "Patch tokens: three principal components as red, green and blue"
    figure, axes = panels.tiles(1 + len(rows), len(images), title, headings="none")
    for axis, image in zip(axes[0], panels.rgb(images), strict=True):
        panels.show(axis, image)
    for row, (name, each) in zip(axes[1:], rows.items(), strict=True):
        colours = components(each).reshape(len(each), *grid, 3)
        row[0].set_ylabel(name, size=7)
        for axis, view in zip(row, colours, strict=False):
            panels.show(axis, view)
    return figure


def errors(predicted, target):  # [..., N, D] -> [..., N]
    """Return the mean squared difference over the D features of each patch."""
    return np.square(np.asarray(predicted, np.float64) - target).mean(-1)


def cosines(predicted, target):  # [..., N, D] -> [..., N]
    """Return the cosine of predicted and target features; 0 for zero vectors."""
    a, b = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / np.maximum(norms, 1e-12)


@panels.picture
def prediction(images, predicted, target, valid):
    """Draw where the predictor is wrong: a column per image, two rows per level.

    Each row, of squared errors or of cosines, has one scale; cells that were not
    predicted are grey.
    """
    levels = len(predicted)
    figure, axes = panels.tiles(
        1 + 2 * levels,
        len(images),
        "Prediction: squared error and cosine of every predicted cell",
        headings="none",
        right=0.9,
        key=[(panels.HIDDEN, "not to be predicted")],
    )
    for axis, image in zip(axes[0], panels.rgb(images), strict=True):
        panels.show(axis, image)
    for k in range(levels):
        where = np.asarray(valid[k], bool)
        grid = panels.square(where.shape[1])
        for row, measure, name, colours in (
            (axes[1 + 2 * k], errors, "error", "inferno"),
            (axes[2 + 2 * k], cosines, "cosine", "viridis"),
        ):
            values = np.where(where, measure(predicted[k], target[k]), np.nan)
            row[0].set_ylabel(f"level {k}\n{name}", size=7)
            low, high = _range(values[where], name)
            for axis, one in zip(row, values, strict=True):
                axis.set_facecolor(panels.HIDDEN)
                shown = np.ma.masked_invalid(one.reshape(grid))
                panels.show(axis, shown, cmap=colours, vmin=low, vmax=high)
            panels.scale(figure, row[-1], row[-1].images[0], name)
    return figure


def _range(values, name):
    """Return the scale of a row: errors from 0 up, cosines from their lowest to 1."""
    if not len(values):
        return 0.0, 1.0
    if name == "cosine":
        return min(float(values.min()), 1 - 1e-3), 1.0
    return 0.0, max(float(values.max()), 1e-12)


@panels.picture
def level_statistics(predicted, target, valid):
    """Draw the distribution of error and cosine over all predicted cells, by level.

    Levels with nothing to predict stay empty.
    """
    figure, axes = panels.charts(2, "Prediction by level", columns=2)
    names = ("squared error", "cosine of prediction and target")
    for axis, measure, name in zip(axes, (errors, cosines), names, strict=True):
        labels = [f"level {k}" for k in range(len(valid))]
        for k, where in enumerate(valid):
            values = measure(predicted[k], target[k])[np.asarray(where, bool)]
            if not len(values):
                continue
            labels[k] += f"\nmean {values.mean():.3g}"
            low, middle, high = np.percentile(values, (25, 50, 75))
            colour = panels.COLOURS[k % len(panels.COLOURS)]
            parts = axis.violinplot([values], [k], widths=0.8, showextrema=False)
            parts["bodies"][0].set(facecolor=colour, alpha=0.55)
            axis.vlines(k, low, high, color=panels.INK, linewidth=3)
            axis.plot(k, middle, "o", color="white", markersize=3.5, zorder=3)
        axis.set_xticks(range(len(valid)), labels)
        axis.set_xlim(-0.6, len(valid) - 0.4)
        axis.set_title(name)
    return figure
