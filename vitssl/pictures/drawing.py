"""Pictures of what a run does and has learned, from plain arrays (matplotlib).

    vitssl pictures WORKDIR [--out=DIR] [--images=N]

Every function returns a figure and takes `path=` to write it. `write_all` writes all
those for which there is material.
"""

import dataclasses
import pathlib
from functools import partial

from vitssl import progress
from vitssl.pictures import (
    attention,
    confusion,
    curves,
    landscape,
    masking,
    multicrop,
    overlays,
    reconstruction,
    space,
)
from vitssl.pictures import features as tokens

MOST_CLASSES = 200  # Of a drawn confusion matrix.


@dataclasses.dataclass(frozen=True)
class Material:
    """The arrays to draw, all on the host; what is None or empty is not drawn.

    Attributes:
        images: uint8 [B, H, W, C], of the evaluation.
        grid: (h, w) of their patches; None for a square.
        attention: [B, layers, heads, T, T] of these images.
        tokens: [M >= B, N, D], patches only; the first B are of these images.
        batch: training batch of B images: "global", "local", the masks and boxes.
        originals: the B images [H, W, C] that the batch was cropped from.
        crop_masks: (context [H, N], targets [H, T, N]) to draw on the first crop,
            block by block; None takes the batch's own, in which blocks are united.
        draws: (context, targets) bool [S, H, N]: many masks of one generator.
        samplers: {name: (context [N], targets [T, N])} to compare.
        parts: [B, h, w, K+1] of these images: soft maps of parts, background last.
        prediction: (images [B, H, W, C], predicted, target, valid), see
            `tokens.prediction`.
        reconstruction: (images [B, H, W, C], hidden, stages), see
            `reconstruction.reconstruction`.
        features: {name: [M, D]}; the first is the one to look at.
        labels: int [M] of `features`, -1 unknown; None if there are none.
        classes: names of the labels.
        neighbours: arguments of `space.neighbours`.
        metrics_path: a metrics.jsonl.
        plane: (offsets, losses), see `landscape.plane`.
        scores: arrays of the final evaluation: the method's own of the test split, see
            `confusion.page`, and "knn_confusion".
    """

    images: object = None
    grid: tuple[int, int] | None = None
    attention: object = None
    tokens: object = None
    parts: object = None
    batch: dict = dataclasses.field(default_factory=dict)
    originals: list | None = None
    crop_masks: tuple | None = None
    draws: tuple | None = None
    samplers: dict = dataclasses.field(default_factory=dict)
    prediction: tuple | None = None
    reconstruction: tuple | None = None
    features: dict = dataclasses.field(default_factory=dict)
    labels: object = None
    classes: tuple[str, ...] = ()
    neighbours: dict = dataclasses.field(default_factory=dict)
    metrics_path: str | pathlib.Path = ""
    plane: tuple | None = None
    scores: dict = dataclasses.field(default_factory=dict)


def write_all(directory, material: Material) -> list[pathlib.Path]:
    """Write every picture there is material for; return the files, in order.

    The directory is made if it is missing; files of the same names are replaced.
    """
    groups = (_of_batch, _of_masks, _of_images, _of_features, _of_run)
    todo = [pair for group in groups for pair in group(material)]
    written = []
    for name, draw in progress.each(todo, "pictures"):
        path = pathlib.Path(directory) / name
        draw(path=path)
        written.append(path)
    return written


def _of_batch(m: Material):
    """Yield (file name, picture) of a training batch: crops and their masks."""
    if not m.batch:
        return
    local = m.batch.get("local")
    boxes = None
    if m.originals is not None and "global_box" in m.batch:
        boxes = m.batch["global_box"], m.batch.get("local_box")
    origin = dict(original=m.originals, boxes=boxes)
    yield "crops.png", partial(multicrop.crops, m.batch["global"], local, **origin)
    if "global_context" not in m.batch:
        return
    first = {k: v[0] for k, v in m.batch.items() if "context" in k or "targets" in k}
    own = first["global_context"][0], first["global_targets"][0]
    image, (context, targets) = m.batch["global"][0, 0], m.crop_masks or own
    levels = image, context, targets
    finest = image, context[0], targets[0]
    yield "masks.png", partial(masking.hierarchical, *levels)
    yield "masks_combined.png", partial(masking.combined, *levels)
    yield "masks_single.png", partial(masking.single, *finest)
    yield "masks_animation.gif", partial(masking.animation, *levels)
    pair = m.batch["global"][0], None if local is None else local[0]
    yield "masks_multicrop.png", partial(masking.multicrop, *pair, first)


def _of_masks(m: Material):
    """Yield (file name, picture) of mask generators."""
    if m.draws is not None:
        yield "masks_statistics.png", partial(masking.statistics, *m.draws)
    if m.samplers and m.batch:
        image = m.batch["global"][0, 0]
        yield "masks_samplers.png", partial(masking.strategies, image, m.samplers)


def _of_images(m: Material):
    """Yield (file name, picture) of what the network does with single images."""
    if m.attention is not None:
        first = m.images[0], m.attention[0]
        h, w = m.grid or attention.infer_grid(m.attention.shape[-1])
        middle = partial(attention.patch, *first, (h // 2, w // 2), m.grid)
        yield "attention_heads.png", partial(attention.heads, *first, m.grid)
        every = partial(attention.layers, m.images, m.attention, m.grid)
        yield "attention_layers.png", every
        yield "attention_patch.png", middle
    if m.tokens is not None and m.tokens.shape[-1] >= 3:
        yield "tokens_pca.png", partial(tokens.principal, m.images, m.tokens, m.grid)
    if m.parts is not None:
        yield "parts.png", partial(overlays.overlay, m.images, m.parts)
    if m.prediction is not None:
        yield "prediction.png", partial(tokens.prediction, *m.prediction)
        levels = partial(tokens.level_statistics, *m.prediction[1:])
        yield "prediction_levels.png", levels
    if m.reconstruction is not None:
        drawn = partial(reconstruction.reconstruction, *m.reconstruction)
        yield "reconstruction.png", drawn


def _of_features(m: Material):
    """Yield (file name, picture) of images as points."""
    if m.neighbours:
        near = partial(space.neighbours, classes=m.classes, **m.neighbours)
        yield "neighbours.png", near
    matrix = m.scores.get("knn_confusion")
    if matrix is not None and len(matrix) <= MOST_CLASSES:
        yield "confusion.png", partial(confusion.neighbours, matrix, m.classes)
    if not m.features:
        return
    yield "features.png", partial(space.distributions, m.features)
    chosen = next(iter(m.features.values()))
    if len(chosen) >= 8:
        names = {"classes": m.classes}
        draw = partial(space.feature_space, chosen, m.labels, **names)
        yield "feature_space.png", draw


def _of_run(m: Material):
    """Yield (file name, picture) of the run as a whole."""
    if confusion.chosen(m.scores)[1]:
        yield "report.png", partial(confusion.page, m.scores, m.classes)
        yield "report.json", partial(confusion.write, m.scores, m.classes)
    if m.metrics_path and pathlib.Path(m.metrics_path).exists():
        yield from _of_metrics(curves.read(m.metrics_path), m)
    if m.plane is not None:
        yield "landscape.png", partial(landscape.landscape, *m.plane)


def _of_metrics(metrics, m: Material):
    """Yield (file name, picture) of what has a course over the steps."""
    if curves.courses(metrics):
        yield "training.png", partial(curves.training, metrics)
    for name, draw, pattern in (
        ("training_levels.png", curves.levels, curves.LEVELS),
        ("training_momentum.png", curves.momentum, curves.MOMENTUM),
        ("training_gradients.png", curves.gradients, curves.GRADIENTS),
    ):
        if curves.matching(metrics, pattern):
            yield name, partial(draw, metrics)
    if m.features and curves.matching(metrics, "|".join(curves.COLLAPSE.values())):
        width = next(iter(m.features.values())).shape[1]
        yield "collapse.png", partial(curves.collapse, metrics, width)
