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

    The components are those of all images together: equal colours are equal features.
    Tokens [B, N, D] are patches only, of a grid (h, w); None for a square.
    """
    grid = grid or panels.square(tokens.shape[1])
    colours = components(tokens).reshape(len(images), *grid, 3)
    title = "Patch tokens: three principal components as red, green, blue"
    figure, axes = panels.tiles(2, len(images), title, headings="none", label=False)
    for b, image in enumerate(panels.rgb(images)):
        panels.show(axes[0, b], image)
        panels.show(axes[1, b], colours[b])
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
    """Draw where the predictor is wrong: error and cosine of every level, by image.

    Cells that were not predicted are grey.
    """
    levels = len(predicted)
    figure, axes = panels.tiles(
        len(images),
        1 + 2 * levels,
        "Prediction: squared error (bright is wrong) and cosine (blue is right)",
        label=False,
        right=0.6,
    )
    for b, image in enumerate(panels.rgb(images)):
        panels.show(axes[b, 0], image, "image")
    for k in range(levels):
        where = np.asarray(valid[k], bool)
        grid = panels.square(where.shape[1])
        error = np.where(where, errors(predicted[k], target[k]), np.nan)
        cosine = np.where(where, cosines(predicted[k], target[k]), np.nan)
        # One scale per level, over all images: brighter is worse everywhere.
        top = max(float(np.nanmax(error)) if where.any() else 0.0, 1e-12)
        for b in range(len(images)):
            for axis, values, name, limits, colours in (
                (axes[b, 1 + k], error, "error", (0, top), "inferno"),
                (axes[b, 1 + levels + k], cosine, "cosine", (-1, 1), "RdBu"),
            ):
                axis.set_facecolor(panels.HIDDEN)
                panels.show(
                    axis,
                    np.ma.masked_invalid(values[b].reshape(grid)),
                    f"{name}, level {k}",
                    cmap=colours,
                    vmin=limits[0],
                    vmax=limits[1],
                )
    for row in axes:
        panels.scale(figure, row[-1], row[-1].images[0], "cosine")
    return figure


@panels.picture
def level_statistics(predicted, target, valid):
    """Draw the distribution of error and cosine over all predicted cells, by level.

    Levels with nothing to predict stay empty.
    """
    figure, axes = panels.charts(
        2, "Prediction by level (the number is the mean)", columns=2
    )
    names = ("squared error", "cosine of prediction and target")
    for axis, measure, name in zip(axes, (errors, cosines), names, strict=True):
        for k, where in enumerate(valid):
            values = measure(predicted[k], target[k])[np.asarray(where, bool)]
            if not len(values):
                continue
            low, middle, high = np.percentile(values, (25, 50, 75))
            colour = panels.COLOURS[k % len(panels.COLOURS)]
            parts = axis.violinplot([values], [k], widths=0.8, showextrema=False)
            parts["bodies"][0].set(facecolor=colour, alpha=0.55)
            axis.vlines(k, low, high, color=panels.INK, linewidth=3)
            axis.plot(k, middle, "o", color="white", markersize=3.5, zorder=3)
            axis.annotate(
                f"{values.mean():.3g}",
                (k, values.mean()),
                xytext=(14, 0),
                textcoords="offset points",
                size=7,
                va="center",
            )
        axis.set_xticks(range(len(valid)), [f"level {k}" for k in range(len(valid))])
        axis.set_xlim(-0.6, len(valid) - 0.2)
        axis.set_title(name)
    return figure
