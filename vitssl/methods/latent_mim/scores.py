"""Land cover of every pixel from frozen features: half of a test split teaches.

Probes are trained on every other image and scored on the rest: one on the features,
one on the pixels themselves, which says what the network adds.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from vitssl.evals import segmentation


@dataclasses.dataclass(frozen=True)
class Measures:
    """Config section `measures`.

    Attributes:
        classes: of a pixel; 0 where the data set knows no class per pixel.
        epochs, lr, decay, batch_size: of the probe, see `segmentation.Recipe`.
        pixels: also probe the pixels themselves.
    """

    classes: int = 0
    epochs: int = 50
    lr: float = 0.1
    decay: float = 0.01
    batch_size: int = 8
    pixels: bool = True

    @property
    def recipe(self) -> segmentation.Recipe:
        """Return how probes are trained."""
        return segmentation.Recipe(self.epochs, self.lr, self.decay, self.batch_size)

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        if self.classes < 0 or self.classes == 1:
            yield f"classes={self.classes}: 0 (none known per pixel), or 2 or more"
        for key in ("epochs", "batch_size"):
            if getattr(self, key) < 1:
                yield f"{key}={getattr(self, key)}: 1 or more"
        if self.lr <= 0 or self.decay < 0:
            yield f"lr={self.lr}: above 0; decay={self.decay}: 0 or more"


def scores(rows: dict, measures: Measures) -> dict:
    """Return the measures of `segmentation.measure`, and those of the pixels.

    Args:
        rows: "tokens" [M, h, w, D], "truth" [M, H, W], perhaps "pixels" [M, H, W, K];
            without a truth there is nothing to score.
        measures: see `Measures`.

    Returns:
        "miou", "accuracy", "macro_f1" of the features; "miou_pixels" of the pixels;
        "miou_guess" of always saying the most frequent class; "iou" [C].
    """
    if not measures.classes or "truth" not in rows or len(rows["truth"]) < 2:
        return {}
    truth = rows["truth"]
    found = _one(rows["tokens"], truth, measures)
    found.pop("macro_accuracy")
    if "pixels" in rows:
        found["miou_pixels"] = _one(rows["pixels"], truth, measures)["miou"]
    known = truth[::2][truth[::2] >= 0]
    most = np.full_like(truth[1::2], np.bincount(known).argmax())
    guess = segmentation.measure(most, truth[1::2], measures.classes)
    return found | {"miou_guess": guess["miou"]}


def _one(features, truth, measures):
    """Return the measures of one kind of features [M, h, w, D]."""
    size, n = truth.shape[1:], features.shape[1]
    pixels = max(1, size[0] // n)
    params = segmentation.fit(
        features[::2],
        truth[::2],
        classes=measures.classes,
        pixels=pixels,
        recipe=measures.recipe,
    )
    said = segmentation.predict(params, features[1::2], pixels, size)
    return segmentation.measure(said, truth[1::2], measures.classes)
