"""The contract every method fulfils, and the table of methods.

To add a method: write `methods/x.py` with a frozen dataclass like the ones here,
add its line to `METHODS`, write `configs/x.py`. Nothing else changes.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

from vitssl import sizes

Tree = Any  # Nested dicts of arrays.


@dataclasses.dataclass(frozen=True)
class Run:
    """What a method may know about the run it takes part in.

    Attributes:
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of one pass over the training set.
        batch_size: images per optimizer step, over all devices.
        classes: number of labelled classes (0 for an unlabelled set).
        channels: channels of an image.
        mean, std: per-channel normalisation, in units of [0, 1] pixel values.
        counts: training images per class, () if not known.
        dtype: compute dtype, "float32" or "bfloat16" (parameters are float32).
    """

    total_steps: int
    steps_per_epoch: int
    batch_size: int
    classes: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str = "float32"
    counts: tuple[int, ...] = ()


class Method(Protocol):
    """A frozen dataclass of `run` and one typed field per section of its config.

    It holds numbers and linen modules, no state. The trainer alone jits, counts
    steps, owns devices and files.
    """

    run: Run
    couples_batch: bool  # The loss mixes samples, so a batch may not be split.
    # Also, False where absent: images need not be square, and training needs labels.
    rectangles: bool
    labelled: bool

    @staticmethod
    def training_size(c) -> sizes.Size:
        """Return the size of training images of a config: what sizes of 0 follow."""

    def transform(self) -> Callable:
        """Return the training transform: (example, numpy Generator) -> example."""

    def init(self, rng, batch) -> tuple[Tree, Tree]:
        """Return (params, extra): what is trained, and what is not."""

    def loss(self, params, extra, batch, rng, *, phase):
        """Return (loss [], (extra, metrics)) of the global batch."""

    def after(self, params, extra, step) -> Tree:
        """Return `extra` after update number `step` (0-based): EMA and the like."""

    def adopt(self, params, extra) -> Tree:
        """Return `extra` for parameters loaded from elsewhere: targets follow them."""

    def phase(self, step: int) -> Hashable:
        """Return the static part of step `step`: each distinct value is compiled."""

    def features(self, params, extra, image) -> dict:
        """Return {"pooled": [B, D], "tokens": [B, N, D], ...} of [B, H, W, C].

        Where batches hold "image/<part>" instead of "image": of {part: array}.
        """

    def check(self) -> Iterator[str]:
        """Yield one line per impossible combination of the sections."""


class Sized(Protocol):
    """What a method adds that asks more of sizes than its model's `check_image`."""

    def check_size(self, size: sizes.Size) -> Iterator[str]:
        """Yield one line per reason why `evals.image_size` cannot be `size`."""


class Layered(Protocol):
    """What a method adds so that `freeze.schedule` alone switches FreezeOut on."""

    def freeze_layers(self) -> tuple:
        """Return the default of `freeze.layers`; see `freezeout.FreezeOut`."""


class Scored(Protocol):
    """What a method adds that is scored on the test split by its own measure.

    A classifier, a part discoverer: `outputs` runs on the devices for every batch of
    the test split, `scores` once on the host over all rows. The results are metrics
    "test/<name>", online and at the end, and may choose the best checkpoint.
    """

    def outputs(self, params, extra, batch) -> dict:
        """Return {name: [B, ...]} of one evaluation batch; pure, jitted once.

        "label" and "index" are added, rows of padding are taken away.
        """

    def scores(self, rows: dict) -> dict:
        """Return {name: float} of all rows {name: numpy [M, ...]}, by rising index.

        Arrays are allowed too (a confusion matrix); they go to WORKDIR/scores.npz.
        """

    def written(self, scores: dict) -> str:
        """Return scores {name: float} as text; if absent, all in one line."""

    def evaluation_transform(self, size: int) -> Callable:
        """Return the transform of evaluation images, `views.Evaluate(size)` if absent.

        It may hand on further columns of the source's examples.
        """


class Examined(Protocol):
    """What a scored method adds that is measured once, at the end."""

    def final_scores(self, rows: Callable) -> dict:
        """Return {name: float or array}, on the host; metrics "test/<name>".

        `rows(function, *arguments, split="test", source=None)` returns {name: [M, ...]}
        of function(params, extra, *arguments, batch), jitted once, over the final
        images of the "test" or "bank" split, or all of another source.
        """


class Drawn(Protocol):
    """What a method adds to draw batches of the test split as training goes on."""

    def drawn(self, step: int) -> float:
        """Return the probability that a batch is drawn after `step` updates."""

    def snapshot(self, params, extra, batch, path) -> None:
        """Write a picture of one evaluation batch (numpy) into a file."""
