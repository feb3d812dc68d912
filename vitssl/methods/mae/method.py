"""MAE: encode the patches that are left, and draw the hidden ones from them.

With `objective.hidden=token` SimMIM: the encoder gets a token in place of every hidden
patch, and one linear layer draws.

Sources: He et al. 2021, arXiv:2111.06377; Xie et al. 2021, arXiv:2111.09886;
facebookresearch/mae models_mae.py; microsoft/SimMIM models/simmim.py.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import einops
import jax
import jax.numpy as jnp

from vitssl import sizes
from vitssl.data import views
from vitssl.methods import base
from vitssl.models import layers, patches, vit, xavier
from vitssl.models.decoder import Decoder, Predict, StageDecoder
from vitssl.ops import random_masking


@dataclasses.dataclass(frozen=True)
class Objective:
    """Config section `objective`.

    Attributes:
        hidden: what hidden patches are to the encoder. "drop": nothing, and the decoder
            fills them in (MAE). "token": a trained token (SimMIM).
        loss: of a pixel, "mse" or, in SimMIM, "l1".
        normalise: pixels of a patch have mean 0 and variance 1 (norm_pix_loss).
    """

    hidden: Literal["drop", "token"] = "drop"
    loss: Literal["mse", "l1"] = "mse"
    normalise: bool = True

    def __call__(self, predicted, target):  # [B, M, p p C] -> []
        """Return the mean over the pixels of hidden patches."""
        error = predicted.astype(jnp.float32) - target
        return (jnp.square if self.loss == "mse" else jnp.abs)(error).mean()


@dataclasses.dataclass(frozen=True)
class MAE(base.Masked):
    """The method; fields are the sections of its config.

    Parameters: "encoder", "decoder"; with mask tokens "mask_token" too, and the decoder
    is one linear layer. Extra: none.
    """

    run: base.Run
    model: vit.ViT
    augment: views.SingleCrop
    decoder: Decoder = Decoder(width=512, depth=8, heads=16)
    masking: random_masking.Masking = random_masking.Masking()
    objective: Objective = Objective()

    grows = True

    @staticmethod
    def training_size(c) -> int:
        """Return the side of training images of a config."""
        return c.augment.size

    def transform(self) -> views.SingleCrop:
        """Return the training transform."""
        return self.augment

    @property
    def grid(self) -> tuple[int, int]:
        """Patch grid of the training crops."""
        side = self.augment.size // self.model.patch
        return side, side

    @property
    def _drops(self) -> bool:
        return self.objective.hidden == "drop"

    @property
    def _decoder(self):
        """The module of the decoder."""
        net, out = self.model, self.model.patch**2 * self.run.channels
        if not self._drops:
            return Predict(out, net.dtype)
        names = "norm_eps", "scan", "dtype", "attention"
        own = {name: getattr(net, name) for name in names}
        return StageDecoder(self.decoder, 1.0, out, **own)

    def phase(self, step: int) -> int:
        """Return how many patches are visible; each number is compiled once."""
        epoch = step / max(1, self.run.steps_per_epoch)
        return self.masking.visible(self.grid[0] * self.grid[1], epoch)

    def init(self, rng, batch):
        """Return (params, {}) of fresh networks."""
        keys = jax.random.split(rng, 4)
        image = jnp.zeros((1, *batch["global"].shape[2:]))
        encoder = self.model.init(keys[0], image)["params"]
        row = jnp.zeros((1, 2, self.model.width))
        if not self._drops:
            return {
                "encoder": encoder,
                "decoder": self._decoder.init(keys[1], row)["params"],
                "mask_token": layers.normal(keys[2], (self.model.width,)),
            }, {}
        restore = jnp.arange(self.grid[0] * self.grid[1])[None]
        found = self._decoder.init(keys[1], row, restore, self.grid)["params"]
        made = xavier.redraw(keys[3], found)
        made["pred"] = made["pred"] | {"bias": jnp.zeros_like(made["pred"]["bias"])}
        return {"encoder": xavier.redraw(keys[2], encoder), "decoder": made}, {}

    def loss(self, params, extra, batch, rng, *, step=0, phase):
        """Return (loss [], (extra, metrics)) of the global batch."""
        del step
        draw, drop = jax.random.split(rng)
        image = patches.normalise(batch["global"][:, 0], self.run.mean, self.run.std)
        masks = self.masks(batch, draw, phase)
        seen = self.seen(params, batch, phase), phase.boundary
        predicted = self.predicted(params, image, masks, masks.hidden, drop, seen)
        target = patches.take(self.target(image), masks.hidden)
        return self.objective(predicted, target), (extra, {})

    def target(self, image):  # [B, H, W, C] -> [B, N, p p C]
        """Return what is to be predicted of normalised images."""
        x = patches.cells(image, self.model.patch, self.objective.normalise)
        return einops.rearrange(x, "b h w c -> b (h w) c")

    def predicted(self, params, image, masks, only=None, drop=None, seen=(None, 0)):
        """Return the pixels [B, M or N, p p C] of patches `only` [B, M], or of all.

        `seen` are the visible tokens [B, 1 + K, D] after so many blocks, or None.
        """
        options = {} if drop is None else dict(train=True, rngs={"drop_path": drop})
        net, own = {"params": params["encoder"]}, {"params": params["decoder"]}
        if self._drops:
            if seen[0] is None:
                x, _ = self.model.apply(net, image, keep=masks.keep, **options)
            else:
                x, _ = self.model.apply(net, *seen, method="onwards", **options)
            found = self._decoder.apply(own, x, masks.restore, self.grid, only)
            return found[:, :, 0, 0]
        hidden, token = masks.mask > 0, params["mask_token"]
        x, _ = self.model.apply(net, image, hide=hidden, fill=token, **options)
        x = x[:, self.model.prefix :]
        return self._decoder.apply(own, x if only is None else patches.take(x, only))

    def features(self, params, extra, image):
        """Return the features of whole images [B, H, W, C].

        "tokens" [B, N, D], "mean" and "pooled" [B, D] their mean, "cls" [B, D] and
        "gap": see `vit.ViT.pooled`.
        """
        x = patches.normalise(image, self.run.mean, self.run.std)
        found = self.model.apply({"params": params["encoder"]}, x, method="features")
        return found | {"pooled": found["mean"]}

    def pictures(self, params, extra, batch, image) -> dict:
        """Return fields of `pictures.drawing.Material`: hidden patches, filled in."""
        crops = batch["global"][:, 0]
        hidden, both = jax.device_get(_drawn(params, crops, method=self))
        return {"reconstruction": (crops, hidden, {"pixels": {"pixels": both}})}

    def visible(self, phase) -> int:
        """Return how many patches are seen in a phase."""
        return phase.method

    def store_faults(self) -> Iterator[str]:
        """Yield why tokens cannot be kept."""
        yield from super().store_faults()
        if not self._drops:
            yield (
                "freeze.store.views: objective.hidden=token puts a token that trains "
                "before the first block; set 0, or objective.hidden=drop"
            )

    def freeze_layers(self) -> tuple:
        """Return `FreezeOut.layers`: the encoder's; the decoder never freezes."""
        return self.model.freeze_layers("encoder/")

    def check(self) -> Iterator[str]:
        """Yield one line per impossible combination of the sections."""
        size = self.augment.size
        if faults := list(sizes.faults(size, self.model.patch)):
            yield f"augment.size={size}: {faults[0]}"
            return
        if self._drops and self.model.prefix != 1:
            yield (
                "model: the decoder attends to one class token, so model.cls=True and "
                "model.registers=0 (or objective.hidden=token)"
            )
        yield from self.masking.faults(self.grid)


@functools.partial(jax.jit, static_argnames="method")
def _drawn(params, crops, *, method):
    """Return (hidden bool [B, h, w], (predicted, target) pixels [B, H, W, C])."""
    run, patch = method.run, method.model.patch
    image = patches.normalise(crops, run.mean, run.std)
    visible = method.phase(max(0, run.total_steps - 1))
    masks = method.masking.draw(jax.random.key(0), len(image), method.grid, visible)

    def whole(x):
        x = einops.rearrange(x, "b (h w) c -> b h w c", h=method.grid[0])
        x = patches.paint(x, image, patch, method.objective.normalise)
        return x * jnp.asarray(run.std) + jnp.asarray(run.mean)

    predicted = method.predicted(params, image, masks).astype(jnp.float32)
    hidden = einops.rearrange(masks.mask > 0, "b (h w) -> b h w", h=method.grid[0])
    return hidden, (whole(predicted), whole(method.target(image)))
