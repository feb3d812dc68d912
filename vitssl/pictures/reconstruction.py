"""Pictures of hidden patches, filled in: predicted beside true, a pair per stage.

Maps are [B, h, w, C], of any cells: "hog" holds histograms of gradient orientations,
"pixels" colours in [0, 1], "tokens" features.
"""

import numpy as np

from vitssl.pictures import features, panels

SIDE = 224  # Of a drawn map of histograms, in pixels, at least.


def glyphs(histograms, side=SIDE):  # [B, h, w, bins] -> [B, h G, w G]
    """Return histograms of orientations as strokes along the edges of every cell.

    Bin k is of gradients (sin t, cos t) in x and y with t = pi (k + 1/2) / bins.
    """
    b, h, w, bins = histograms.shape
    size = max(4, side // max(h, w))
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    angle = np.pi * (np.arange(bins)[:, None, None] + 0.5) / bins
    # An edge runs across its gradient; this is the distance from it.
    apart = np.abs(np.sin(angle) * x + np.cos(angle) * y)
    strokes = np.clip(size / 12 + 0.5 - apart, 0, 1)  # [bins, G, G]
    strokes = strokes * (np.hypot(x, y) <= size / 2)
    out = np.zeros((b, h, size, w, size))
    for share, stroke in zip(np.moveaxis(histograms, -1, 0), strokes, strict=True):
        # Not their sum: all strokes meet in the middle.
        each = np.clip(share, 0, 1)[:, :, None, :, None] * stroke[:, None]
        out = np.maximum(out, each)
    return out.reshape(b, h * size, w * size)


def _views(kind, pair):
    """Return (predicted, target) as pictures [B, H, W, 3]."""
    pair = [np.asarray(x, np.float64) for x in pair]
    if kind == "pixels":
        return [panels.rgb(x) for x in pair]
    if kind == "hog":
        return [panels.rgb(glyphs(x)[..., None]) for x in pair]
    both = np.concatenate(pair)  # One set of components for both.
    n, h, w, d = both.shape
    colours = features.components(both.reshape(n, h * w, d), 3)
    return np.split(colours.reshape(n, h, w, 3), 2)


@panels.picture
def reconstruction(images, hidden, stages):
    """Draw what is predicted for hidden patches, and what would be right, by image.

    What was seen is grey in predictions.

    Args:
        images: [B, H, W, C].
        hidden: bool [B, h, w], patches that were not seen.
        stages: {title: {kind: (predicted, target)}}.
    """
    columns = 2 + 2 * len(stages)
    title = "Hidden patches, filled in"
    key = [(panels.HIDDEN, "hidden in the image; in a prediction: seen, so not asked")]
    figure, axes = panels.tiles(
        len(images), columns, title, size=1.7, label=False, key=key
    )
    for b, image in enumerate(panels.rgb(images)):
        panels.show(axes[b, 0], image, "image")
        masked = panels.paint(image, hidden[b], panels.HIDDEN, 1.0)
        panels.show(axes[b, 1], masked, "what is seen")
    for k, (name, held) in enumerate(stages.items()):
        ((kind, pair),) = held.items()
        predicted, target = _views(kind, pair)
        for b, seen in enumerate(~np.asarray(hidden, bool)):
            view = panels.paint(predicted[b], seen, panels.HIDDEN, 1.0)
            panels.show(axes[b, 2 + 2 * k], view, f"{name}, predicted")
            panels.show(axes[b, 3 + 2 * k], target[b], "target")
    return figure
