"""What a method is to the trainer: five functions, and defaults for all the rest.

To add a method: a room `methods/x/` whose `method.py` has a frozen dataclass like
`Method`, its line in `methods.table.METHODS`, and `configs/x.py`. Nothing else changes.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import errors, sizes
from vitssl.data import views
from vitssl.evals import accuracy
from vitssl.models import patches
from vitssl.ops import random_masking

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
        accumulate: micro-batches of an optimizer step.
        log_every: a line of metrics is written each so many steps, and at the end.
        weights: (path, part) -> `convert.backbone.Backbone` of a run or an import, for
            methods that need a network trained before (`opened.Past.network`).
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
    accumulate: int = 1
    log_every: int = 1
    weights: Callable | None = None

    def when_logged(self, step, function, *args):
        """Return function(*args) at steps whose metrics are written, else nan.

        Means leave nan out: what is dear to measure is measured once per line.

        Args:
            step: int32 [], optimizer steps done before this one.
            function: arrays to a tree of float32 arrays.
        """
        if self.log_every == 1:
            return function(*args)
        due = ((step + 1) % self.log_every == 0) | (step + 1 == self.total_steps)
        shapes = jax.eval_shape(function, *args)
        nothing = jax.tree.map(lambda s: jnp.full(s.shape, jnp.nan, s.dtype), shapes)
        return jax.lax.cond(due, lambda *a: function(*a), lambda *_: nothing, *args)

    @property
    def micro_batch(self) -> int:
        """Return how many images, over all devices, a network sees at a time."""
        return self.batch_size // self.accumulate


class Method(abc.ABC):
    """A frozen dataclass of `run` and one typed field per section of its config.

    It holds numbers and linen modules, no state. The trainer alone jits, counts
    steps, owns devices and files.
    """

    run: Run
    couples_batch = False  # Whether the loss mixes samples.
    embeds = False  # Whether it does so after embedding each: see `Embedding`.
    rectangles = False  # Whether images need not be square.
    labelled = False  # Whether training needs labels.
    several = False  # Whether an image may have several of them: batch["labels"].

    # What every method states.

    @staticmethod
    @abc.abstractmethod
    def training_size(c) -> sizes.Size:
        """Return the size of a config's training images, which sizes of 0 follow."""

    @abc.abstractmethod
    def transform(self) -> Callable:
        """Return the training transform: (example, numpy Generator) -> example."""

    @abc.abstractmethod
    def init(self, rng, batch) -> tuple[Tree, Tree]:
        """Return (params, extra): what is trained, and what is not."""

    @abc.abstractmethod
    def loss(self, params, extra, batch, rng, *, step=0, phase):
        """Return (loss [], (extra, metrics)) of the global batch.

        Metrics are {name: []}; nan says not measured at this step (`Run.when_logged`).

        Args:
            step: int32 [], optimizer steps done before this one.
            phase: static `step.Phase`: what is frozen, and `phase(step)` below.
        """

    @abc.abstractmethod
    def features(self, params, extra, image) -> dict:
        """Return {"pooled": [B, D], "tokens": [B, N, D], ...} of [B, H, W, C].

        Where batches hold "image/<part>" instead of "image": of {part: array}.
        """

    # What a method may add to training.

    def after(self, params, extra, step) -> Tree:
        """Return `extra` after update number `step` (0-based): EMA and the like."""
        del params, step
        return extra

    def adopt(self, params, extra) -> Tree:
        """Return `extra` for parameters loaded from elsewhere: targets follow them."""
        del params
        return extra

    def given(self) -> dict:
        """Return {key: numpy arrays} of `extra` that are read from files, not drawn.

        They take the places that `init` makes for them when a run begins; from then on
        they are part of its checkpoints.
        """
        return {}

    def phase(self, step: int) -> Hashable:
        """Return the static part of step `step`: each distinct value is compiled."""
        del step
        return ()

    def freeze_layers(self) -> tuple:
        """Return what `freeze.schedule` freezes; see `freezeout.FreezeOut.layers`."""
        return ()

    def enter(self, params, extra, before, phase) -> tuple[Tree, Tree]:
        """Return (params, extra) of the first step of a phase, after those `before`."""
        del before, phase
        return params, extra

    grows = False  # Whether its encoder may grow: see `methods.growing`.

    def shallow(self, depth: int) -> "Method":
        """Return the method with the first blocks of its encoder only."""
        return dataclasses.replace(self, model=self.model.clone(depth=depth))

    # What a method may add to freezing: see `Storing`.

    def boundary(self, live, phase) -> int:
        """Return after how many frozen blocks tokens may be kept: none."""
        del live, phase
        return 0

    unstored = "the tokens of its blocks are no row of their own"  # Why none are kept.

    def store_faults(self) -> Iterator[str]:
        """Yield why `freeze.store` cannot be used with these sections."""
        yield f"freeze.store.views: this method keeps no tokens: {self.unstored}; set 0"

    @property
    def divisible(self) -> bool:
        """Return whether a step may see its batch in parts (`accumulate`)."""
        return self.embeds or not self.couples_batch

    def check(self) -> Iterator[str]:
        """Yield one line per impossible combination of the sections."""
        return iter(())

    def check_size(self, size: sizes.Size) -> Iterator[str]:
        """Yield one line per reason why `evals.image_size` cannot be `size`."""
        for fault in self.model.check_image(size):
            yield f"evals.image_size={size}: {fault}"

    # What a method may add to evaluation.

    @property
    def reads(self) -> dict:
        """Return options of a data set, as `modalities`, that the method asks for."""
        return {}

    def sample(self, images: dict, *, raw: bool = False) -> dict:
        """Return what `features` takes of a user's {sensor: array}.

        Raises:
            UsageError: the method takes pictures, or a sensor does not fit.
        """
        del images, raw
        raise errors.UsageError("this method takes images [B, H, W, C], not a dict")

    def sample_shapes(self, size: tuple[int, int], channels: int):
        """Return shapes of what `features` takes, of one sample."""
        return jax.ShapeDtypeStruct((1, *size, channels), np.uint8)

    def evaluation_transform(self, size: int) -> Callable:
        """Return the transform of evaluation images.

        It may hand on further columns of the source's examples.
        """
        return views.Evaluate(size)

    def class_logits(self, params, extra, image) -> dict:
        """Return {by which weights and views: logits [B, K]} of [B, H, W, C].

        One entry, of the weights and views that a run's headline is of, such as
        "ema_tta"; "parameters" are those of `params`, without further views.

        Raises:
            UsageError: the method names no classes.
        """
        raise errors.UsageError(
            "this method names no classes; fine-tune it first (configs/finetune_*.py), "
            "and give that run"
        )

    scored = False  # Whether it has test scores of its own, by the next two.

    def outputs(self, params, extra, batch) -> dict:
        """Return {name: [B, ...]} of one batch of the test split; pure, jitted once.

        "label" and "index" are added, rows of padding are taken away.
        """
        del params, extra, batch
        return {}

    def scores(self, rows: dict) -> dict:
        """Return {name: float} of all rows {name: numpy [M, ...]}, by rising index.

        They are metrics "test/<name>", online and at the end, and may choose the best
        checkpoint. Arrays (a confusion matrix) go to WORKDIR/scores.npz.
        """
        del rows
        return {}

    def final_scores(self, rows: Callable) -> dict:
        """Return {name: float or array} of what is measured once, at the end.

        `rows(function, *arguments, split="test", source=None)` returns {name: [M, ...]}
        of function(params, extra, *arguments, batch), jitted once, over the final
        images of the "test" or "bank" split, or all of another source.
        """
        del rows
        return {}

    def written(self, scores: dict) -> str:
        """Return the scores {name: float} of the test split as text."""
        return "  ".join(accuracy.told(scores))

    # What a method may add to the pictures.

    def pictures(self, params, extra, batch, image) -> dict:
        """Return fields of `pictures.drawing.Material`."""
        del params, extra, batch, image
        return {}

    def attention(self, params, image) -> dict:
        """Return where the backbone `model` looks in images uint8 [B, H, W, C].

        These are the fields "attention" and "grid" of `pictures.drawing.Material`.
        """
        attention, grid = jax.device_get(_attention(params, image, method=self))
        return {"attention": attention, "grid": tuple(int(n) for n in grid)}

    def drawn(self, step: int) -> float:
        """Return the probability that a test batch is drawn after `step` updates."""
        del step
        return 0.0

    def snapshot(self, params, extra, batch, path) -> None:
        """Write a picture of one evaluation batch (numpy) into a file."""
        del params, extra, batch, path


class Storing(Method):
    """A method whose tokens behind frozen blocks may be kept (`freeze.store`).

    It takes `phase.boundary` blocks for granted in `loss`: batch["tokens"] [B, T, D]
    has their output if it is there, else `frozen_tokens` makes it. Such a batch has
    "view_seed" uint32 [B, 2], the keys of what the device draws for a row: that must
    not depend on the step.
    """

    @abc.abstractmethod
    def boundary(self, live, phase) -> int:
        """Return after how many blocks, frozen and all before them, tokens may be kept.

        Args:
            live: names of the parameters that train.
            phase: as `loss` has it, but for its boundary.
        """

    @abc.abstractmethod
    def frozen_tokens(self, params, batch, phase, first: int, last: int) -> jax.Array:
        """Return the tokens [B, T, D] after `last` blocks, each row by itself.

        From batch["tokens"] after `first` blocks, or where that is 0 from the view.
        """

    @abc.abstractmethod
    def store_faults(self) -> Iterator[str]:
        """Yield why tokens cannot be kept with these sections."""

    def model_store_faults(self) -> Iterator[str]:
        """Yield why the tokens of this backbone cannot be kept."""
        found = getattr(self.model, "store_faults", None)
        if found is None:
            yield "freeze.store.views: works with model.name=vit or hvit; set 0"
        else:
            yield from (f"freeze.store.views: {why}; set 0" for why in found())


class Masked(Storing):
    """A method whose ViT sees some patches of one crop, batch["global"] [B, 1, ...].

    It has the sections `model` and `masking`, the property `grid` = (h, w), and its
    ViT's parameters are under "encoder".
    """

    @abc.abstractmethod
    def visible(self, phase) -> int:
        """Return how many patches are seen in a phase."""

    def masks(self, batch, rng, phase) -> random_masking.Masks:
        """Return the masks of a batch: of its views if it names them, else by `rng`."""
        visible, keys = self.visible(phase), batch.get("view_seed")
        if keys is not None:
            return self.masking.draw_each(keys, self.grid, visible)
        return self.masking.draw(rng, len(batch["global"]), self.grid, visible)

    def frozen_tokens(self, params, batch, phase, first, last):
        """Return the visible tokens [B, 1 + K, D] after `last` blocks."""
        net = {"params": params["encoder"]}
        if first:
            given = batch["tokens"], first, last
            return self.model.apply(net, *given, method="between")
        image = patches.normalise(batch["global"][:, 0], self.run.mean, self.run.std)
        keep = self.masks(batch, None, phase).keep
        return self.model.apply(net, image, 0, last, keep, method="between")

    def boundary(self, live, phase) -> int:
        """Return how many blocks train no more, nor what is before them."""
        del phase
        return self.model.frozen_blocks(live, "encoder/")

    def store_faults(self) -> Iterator[str]:
        """Yield why tokens cannot be kept."""
        yield from self.model_store_faults()

    def seen(self, params, batch, phase) -> jax.Array | None:
        """Return the visible tokens after `phase.boundary` blocks; None without."""
        if not phase.boundary:
            return None
        if "tokens" in batch:
            return batch["tokens"].astype(self.model.dtype)
        return self.frozen_tokens(params, batch, phase, 0, phase.boundary)


class Embedding(Method):
    """A method whose loss is `compare` of the rows that `embed` makes of each sample.

    Where the loss mixes samples (`couples_batch`), the trainer embeds a batch in parts
    and compares the whole: loss and gradient are those of the batch in one piece.
    """

    embeds = True

    @abc.abstractmethod
    def embed(self, params, extra, batch, rng, *, step=0, phase=None) -> Tree:
        """Return rows [B, ...] of a (micro-)batch, by what mixes no samples.

        `rng` is the (micro-)batch's own; what is drawn by it is the same each time.
        """

    @abc.abstractmethod
    def compare(self, params, extra, rows, rng, *, step=0, phase=None):
        """Return (loss [], (extra, metrics)) of the rows of the global batch.

        `rng` is the step's: what all rows share is drawn by it.
        """

    def loss(self, params, extra, batch, rng, *, step=0, phase=None):
        """Return (loss [], (extra, metrics)) of the global batch."""
        own = dict(step=step, phase=phase)
        rows = self.embed(params, extra, batch, rng, **own)
        return self.compare(params, extra, rows, rng, **own)


@functools.partial(jax.jit, static_argnames="method")
def _attention(params, image, *, method):
    x = patches.normalise(image, method.run.mean, method.run.std)
    options = dict(method="attention_maps", mutable=["intermediates"])
    return method.model.apply({"params": params}, x, **options)[0]
