"""SimCLR: two views of an image shall be alike, and unlike all other images.

Negatives are those of the global batch, however many devices share it and in however
many parts they embed it.

Sources: Chen et al. 2020, arXiv:2002.05709; w2sg-arnav/HierarchialViT
hvit/training/pretrainer.py (HViT as the backbone).
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import einops
import jax
import jax.numpy as jnp

from vitssl import ranges, sizes
from vitssl.data import resolution as resolutions
from vitssl.data import views
from vitssl.losses import contrastive
from vitssl.methods import base
from vitssl.methods.simclr import views as augments
from vitssl.models import head, hvit, patches, vit
from vitssl.ops import jitter


@dataclasses.dataclass(frozen=True)
class Projector:
    """Config section `projector`: linear, ReLU, linear; thrown away after training.

    Attributes:
        width: of the projections.
        hidden: width in between; 0 = that of the features.
        batchnorm: batch normalisation with gain and bias before the ReLU; its averages
            are not trained.

    Source: Chen et al. 2020 (SimCLR), arXiv:2002.05709, section 2.1;
    w2sg-arnav/HierarchialViT scripts/pretrain.py (none) and
    phase3_pretraining/models/projection_head.py (4096, 256, with batchnorm).
    """

    width: ranges.Count = 128
    hidden: ranges.OrNone = 0
    batchnorm: bool = False

    def init(self, rng, features: int):
        """Return (params, stats) for features [B, features]; stats is {} without BN.

        Weights and biases are uniform in +-1 / sqrt(fan in), PyTorch's default.
        """
        hidden = self.hidden or features
        keys = jax.random.split(rng)
        params = {
            "fc1": _linear(keys[0], features, hidden),
            "fc2": _linear(keys[1], hidden, self.width),
        }
        if not self.batchnorm:
            return params, {}
        params["norm"] = {"scale": jnp.ones(hidden), "bias": jnp.zeros(hidden)}
        return params, {"mean": jnp.zeros(hidden), "var": jnp.ones(hidden)}

    def __call__(self, params, stats, x, *, train=False):
        """Return (projections [B, width] float32, stats after the batch) of [B, D].

        In training the statistics of the batch are used, and enter `stats`.
        """
        x = _apply(params["fc1"], x.astype(jnp.float32))
        if self.batchnorm:
            x, stats = head.batch_norm(x, stats, train, eps=1e-5)
            x = x * params["norm"]["scale"] + params["norm"]["bias"]
        return _apply(params["fc2"], jax.nn.relu(x)), stats


@dataclasses.dataclass(frozen=True)
class Objective:
    """Config section `objective`.

    Attributes:
        loss: "nt_xent": SimCLR's, with 2 B - 2 negatives per anchor; "infonce": across
            the views alone, with B - 1 (what the released HViT computes).
        temperature: divides the similarities; 0.07 in the HViT guide, 0.1 in its runs,
            0.5 in its supplement and in SimCLR.
        pool: the feature that is projected, one of the backbone's poolings.
    """

    loss: Literal["nt_xent", "infonce"] = "nt_xent"
    temperature: ranges.Positive = 0.07
    pool: Literal["mean", "gap", "cls"] = "mean"

    def __call__(self, a, b):
        """Return (loss [], metrics) of the projections [B, P] of both views."""
        function = getattr(contrastive, self.loss)
        return function(a, b, temperature=self.temperature, eps=1e-12)


@dataclasses.dataclass(frozen=True)
class SimCLR(base.Embedding, base.Storing):
    """The method; fields are the sections of its config.

    Parameters: "encoder", "projector". Extra: "stats" (projector.batchnorm).
    """

    run: base.Run
    model: vit.ViT | hvit.HViT
    augment: augments.Views
    projector: Projector = Projector()
    objective: Objective = Objective()
    resolution: resolutions.Resolution = resolutions.Resolution()
    couples_batch = True
    grows = True
    rectangles = True

    @staticmethod
    def training_size(c) -> sizes.Size:
        """Return the size of training images of a config."""
        return c.augment.size

    @property
    def _sides(self) -> resolutions.Sides:
        return self.resolution.sides(self.augment.size, self.model.square, self.run)

    def transform(self):
        """Return the training transform."""
        return resolutions.sized(self.augment, self._sides)

    def evaluation_transform(self, size: sizes.Size) -> views.Warp:
        """Return the transform of evaluation images."""
        return views.Warp(size)

    def phase(self, step: int) -> sizes.Size:
        """Return the size of a step's images; each is compiled once."""
        return self._sides(step)

    def init(self, rng, batch):
        """Return (params, extra) of fresh networks."""
        keys = jax.random.split(rng)
        image = jnp.zeros((1, *batch["global"].shape[2:]))
        encoder = self.model.init(keys[0], image)["params"]
        feature = jax.eval_shape(lambda: self._pooled({"encoder": encoder}, image))
        projector, stats = self.projector.init(keys[1], feature.shape[-1])
        extra = {"stats": stats} if stats else {}
        return {"encoder": encoder, "projector": projector}, extra

    def _pooled(self, params, image, rng=None):
        """Return the features [B, D] of normalised images; in training with a key."""
        rngs = {}
        if rng is not None:
            keys = jax.random.split(rng)
            rngs = dict(zip(("drop_path", "dropout"), keys, strict=True))
        return self.model.apply(
            {"params": params["encoder"]},
            image,
            how=self.objective.pool,
            train=rng is not None,
            rngs=rngs,
            method="pooled",
        )

    def embed(self, params, extra, batch, rng, *, step=0, phase=None):
        """Return the features [B, 2, D] of both views of every image."""
        del extra, step
        if phase is not None and phase.boundary:
            x = self._pooled_from(params, batch, rng, phase)
        else:
            paint = None
            if self.augment.colour == "device":
                rng, paint = jax.random.split(rng)
            x = self._pooled(params, self._painted(batch, paint), rng)
        return einops.rearrange(x, "(b v) d -> b v d", v=2)

    def _painted(self, batch, key):  # -> [B 2, H, W, C]
        """Return normalised views, coloured by `key` or by the keys of their rows."""
        image = batch["global"]  # [B, 2, H, W, C]
        if self.augment.colour == "device":
            recipe = self.augment.recipe(image.shape[2:4])
            paint = functools.partial(jitter.augment, **recipe)
            if "view_seed" in batch:
                paint, key = jax.vmap(paint), batch["view_seed"]
            image = paint(key, image)
        image = patches.normalise(image, self.run.mean, self.run.std)
        return einops.rearrange(image, "b v h w c -> (b v) h w c")  # Keeps its device.

    def _pooled_from(self, params, batch, rng, phase):  # -> [B 2, D]
        """Return the features of views whose first blocks are frozen, or kept."""
        first, x = phase.boundary, batch.get("tokens")
        if x is None:
            x = self.frozen_tokens(params, batch, phase, 0, first)
        x = einops.rearrange(x, "b (v t) d -> (b v) t d", v=2)
        net, given = {"params": params["encoder"]}, (x, first, self.objective.pool)
        keys = dict(zip(("drop_path", "dropout"), jax.random.split(rng), strict=True))
        own = dict(train=True, size=phase.method, rngs=keys)
        return self.model.apply(net, *given, method="pooled_from", **own)

    def frozen_tokens(self, params, batch, phase, first, last):
        """Return the tokens [B, 2 T, D] of both views after `last` blocks."""
        if first:
            x = einops.rearrange(batch["tokens"], "b (v t) d -> (b v) t d", v=2)
        else:
            x = self._painted(batch, None)
        net, own = {"params": params["encoder"]}, dict(size=phase.method)
        x = self.model.apply(net, x, first, last, method="between", **own)
        return einops.rearrange(x, "(b v) t d -> b (v t) d", v=2)

    def boundary(self, live, phase) -> int:
        """Return how many blocks train no more, nor what is before them."""
        del phase
        return self.model.frozen_blocks(live, "encoder/")

    def store_faults(self) -> Iterator[str]:
        """Yield why tokens cannot be kept."""
        yield from self.model_store_faults()
        if not self.resolution.fixed:
            yield (
                "freeze.store.views: views have one size; set it to 0, or resolution "
                "to one"
            )

    def compare(self, params, extra, rows, rng, *, step=0, phase=None):
        """Return (loss [], (extra, metrics)) of the features of the global batch.

        The projector is here: its statistics are of the batch, whole.
        """
        del rng, step, phase
        x = einops.rearrange(rows, "b v d -> v b d")
        # Each view is a batch of its own to the normalisation, one after the other.
        stats, z = extra.get("stats", {}), []
        for view in x:
            one, stats = self.projector(params["projector"], stats, view, train=True)
            z.append(one)
        value, metrics = self.objective(*z)
        if stats:
            extra = extra | {"stats": stats}
        metrics = {f"contrast/{k}": v for k, v in metrics.items()}
        return value, (extra, metrics | {"feature_std": x.std((0, 1)).mean()})

    def features(self, params, extra, image):
        """Return {"pooled", "tokens", "mean", ...} of the encoder, not projected."""
        del extra
        x = patches.normalise(image, self.run.mean, self.run.std)
        found = self.model.apply({"params": params["encoder"]}, x, method="features")
        return found | {"pooled": found[self.objective.pool]}

    def pictures(self, params, extra, batch, image) -> dict:
        """Return fields of `pictures.drawing.Material`."""
        del extra, batch
        return self.attention(params["encoder"], image)

    def freeze_layers(self) -> tuple:
        """Return `FreezeOut.layers`: the encoder's; the projector never freezes."""
        return self.model.freeze_layers("encoder/")

    def check(self) -> Iterator[str]:
        """Yield one line per impossible combination of the sections."""
        size = self.augment.size
        for fault in self.model.check_image(size):
            yield f"augment.size={size}: {fault}"
        for fault in self.model.check_channels(self.run.channels):
            yield f"data.channels={fault}"
        yield from self.resolution.faults(size, self.model.square)
        if self.objective.pool not in self.model.poolings:
            known = ", ".join(self.model.poolings)
            yield f"objective.pool={self.objective.pool}: this model has {known}"
        if self.run.batch_size < 2:
            yield f"batch_size={self.run.batch_size}: 2 or more, for negatives"


def _linear(rng, inputs, outputs):
    keys, bound = jax.random.split(rng), inputs**-0.5
    shapes = {"kernel": (inputs, outputs), "bias": (outputs,)}
    return {
        name: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def _apply(params, x):
    return x @ params["kernel"] + params["bias"]
