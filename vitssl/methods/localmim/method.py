"""LocalMIM: masked image modelling with a target of its own scale at several blocks.

A ViT encodes the visible patches; small decoders read several of its blocks, early
ones reconstruct fine HOG targets of the hidden patches and late ones coarse. A stage
whose decoder is frozen (section `freeze`) has no decoder, target or loss any more.

Sources: Wang et al. 2023, arXiv:2303.05251 (LocalMIM); Topcuoglu & Akagündüz 2023,
arXiv:2312.02194 (with FreezeOut); utkutpcgl/ViTFreeze@30e80f9.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp

from vitssl import errors, sizes, tree
from vitssl.data import views
from vitssl.methods import base
from vitssl.methods.localmim import pictures, store, targets
from vitssl.methods.localmim.stages import Stages
from vitssl.methods.localmim.transitive import Transitive
from vitssl.models import layers, patches, vit, xavier
from vitssl.models.decoder import Decoder, StageDecoder
from vitssl.ops import random_masking
from vitssl.optim import freezeout


class Phase(NamedTuple):
    """The static part of a step: visible patches, and the block of every stage."""

    visible: int
    blocks: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LocalMIM(base.Masked):
    """The method; fields are the sections of its config.

    Parameters: "encoder" (its `norm` is that of the last stage), "norm_<k>" of the
    stages before, "decoder_<k>". Extra: "hog_bias".
    """

    run: base.Run
    model: vit.ViT
    augment: views.SingleCrop
    decoder: Decoder = Decoder()
    stages: Stages = Stages()
    masking: random_masking.Masking = random_masking.Masking()
    target: targets.Targets = targets.Targets()
    prefix: store.Prefix = store.Prefix()
    transitive: Transitive = Transitive()

    grows = True

    @staticmethod
    def training_size(c) -> int:
        """Return the side of training images of a config."""
        return c.augment.size

    # Modules.

    @property
    def grid(self) -> tuple[int, int]:
        """Patch grid of the training crops."""
        side = self.augment.size // self.model.patch
        return side, side

    def decoder_module(self, k: int) -> StageDecoder:
        """Return the decoder of stage k."""
        cell = self.model.patch / self.stages.scales[k]
        channels = {
            "hog": self.run.channels * self.target.nbins,
            "pixel": self.run.channels * round(cell) ** 2,
            "feature": self.model.width,
            "prefix": self.model.width,
        }[self.stages.target(k)]
        net = self.model
        names = "norm_eps", "scan", "dtype", "attention"
        own = {name: getattr(net, name) for name in names}
        return StageDecoder(self.decoder, self.stages.scales[k], channels, **own)

    @property
    def _norm(self):
        return layers.LayerNorm(self.model.norm_eps, self.model.dtype)

    def _stage_norm(self, params, k, x):  # [B, T, D] -> [B, T, D]
        last = k == self.stages.count - 1
        own = params["encoder"]["norm"] if last else params[f"norm_{k}"]
        return self._norm.apply({"params": own}, x)

    # The contract.

    def transform(self):
        """Return the training transform."""
        if self.prefix.store:
            return store.open(self.prefix.store).views(self.augment, self.view_key)
        return self.augment

    @property
    def view_key(self) -> str:
        """Return what the pixels of a stored view depend on, beside its numbers."""
        return repr((self.augment, tuple(self.run.mean), tuple(self.run.std)))

    def phase(self, step: int) -> Phase:
        """Return what is static at a step; it changes at the epochs of schedules."""
        epoch = step / max(1, self.run.steps_per_epoch)
        return Phase(
            self.masking.visible(self.grid[0] * self.grid[1], epoch),
            self.stages.blocks_at(epoch, self.model.depth),
        )

    def init(self, rng, batch):
        """Return (params, extra) of a fresh network."""
        keys = jax.random.split(rng, 3 + self.stages.count)
        image = jnp.zeros((1, *batch["global"].shape[2:]))
        encoder = self.model.init(keys[0], image)["params"]
        params = {"encoder": xavier.redraw(keys[1], encoder)}
        row = jnp.zeros((1, 2, self.model.width))
        restore = jnp.arange(self.grid[0] * self.grid[1])[None]
        for k in range(self.stages.count):
            if k < self.stages.count - 1:
                params[f"norm_{k}"] = self._norm.init(keys[2], row)["params"]
            module, key = self.decoder_module(k), keys[3 + k]
            found = module.init(key, row, restore, self.grid)["params"]
            own = jax.random.fold_in(key, 1)
            params[f"decoder_{k}"] = xavier.redraw(own, found, keep=("up_", "pred"))
        extra = {}
        if self.target.hog_bias:
            shape = (self.stages.count, 2)
            third = 1 / 3  # PyTorch's bound for a 3 x 3 convolution of one channel.
            extra["hog_bias"] = jax.random.uniform(keys[2], shape, float, -third, third)
        return params, extra

    def loss(self, params, extra, batch, rng, *, step=0, phase):
        """Return (loss [], (extra, metrics)); `phase.frozen` ends stages."""
        draw, drop = jax.random.split(rng)
        image = patches.normalise(batch["global"][:, 0], self.run.mean, self.run.std)
        masks = self.masks(batch, draw, phase)
        active = self.active(phase.frozen)
        tokens = self._prefix(params, image, batch, phase.frozen)
        inside = [k for k in active if phase.method.blocks[k] < self.prefix.boundary]
        if tokens is not None and inside:
            raise errors.UsageError(
                f"prefix.boundary={self.prefix.boundary}: stage {inside[0]} reads "
                f"block {phase.method.blocks[inside[0]]}, before the mask; freeze it "
                rf"too (optim.freeze: '(norm|decoder)_{inside[0]}/.*')"
            )
        seen = self.seen(params, batch, phase)
        if seen is None:
            outputs = self.encode(params, image, masks, drop, tokens)
        else:
            outputs = self._onwards(params, seen, phase.boundary, drop)
        each = self._stage_losses(
            params, extra, image, masks, active, phase.method.blocks, outputs, tokens
        )
        epoch = step / max(1, self.run.steps_per_epoch)
        weights = self.stages.loss_weights(active, epoch)
        total = sum(w * each[k] for w, k in zip(weights, active, strict=True))
        metrics = {f"loss_stage{k}": each[k] for k in active}
        if self.transitive.weight:
            depth, live = self.model.depth, {*tree.flat(params)} - phase.frozen
            apart = self.transitive(outputs, self.transitive.pairs(depth, live), depth)
            total = total + self.transitive.weight * apart
            metrics["transitive"] = apart
        metrics["mask_ratio"] = 1 - masks.visible / masks.order.shape[1]
        metrics["stages"] = float(len(active))
        return total, (extra, metrics)

    def _prefix(self, params, image, batch, frozen):
        """Return the whole images' tokens at the boundary, or None to mask patches."""
        boundary, pattern = self.prefix.boundary, self.prefix.pattern
        if not boundary:
            return None
        names = (name for name in tree.flat(params) if re.fullmatch(pattern, name))
        live = [name for name in names if name not in frozen]
        if not self.prefix.store:
            return None if live else self.run_prefix(params, image)
        if live:
            raise errors.UsageError(
                f"prefix.store: holds the output of {boundary} frozen blocks, but "
                f"{live[0]} trains; freeze it from the start "
                f"(optim.freeze=(('{pattern}', 0.0),))"
            )
        return batch["tokens"].astype(jnp.float32)

    def run_prefix(self, params, image):  # [B, H, W, C] -> [B, 1 + N, D]
        """Return the tokens of whole images at the boundary."""
        net = {"params": jax.lax.stop_gradient(params["encoder"])}
        x = self.model.apply(net, image, method="start")
        if self.prefix.boundary:
            run = (0, self.prefix.boundary)
            x = self.model.apply(net, x, *run, method="through")[-1]
        return jax.lax.stop_gradient(x)

    def active(self, frozen: frozenset[str]) -> tuple[int, ...]:
        """Return the stages whose decoder still trains."""
        gone = {name.partition("/")[0] for name in frozen}
        return tuple(k for k in range(self.stages.count) if f"decoder_{k}" not in gone)

    def stage_losses(
        self, params, extra, image, masks, active, blocks, drop=None, tokens=None
    ):
        """Return {stage: loss []} of the active stages, without their weights.

        Args:
            image: [B, H, W, C] normalised.
            blocks: block of every stage.
            drop: key of stochastic depth, or None.
            tokens: of the whole images at `prefix.boundary`, which are then masked;
                None masks the patches.
        """
        outputs = self.encode(params, image, masks, drop, tokens)
        given = params, extra, image, masks, active, blocks, outputs, tokens
        return self._stage_losses(*given)

    def _stage_losses(
        self, params, extra, image, masks, active, blocks, outputs, tokens
    ):
        goals = self.goals(params, extra, image, active, tokens)
        losses = {}
        for k in active:
            scale = self.stages.scales[k]
            only = masks.hidden if scale >= 1 else None
            predicted = self.predicted(params, outputs[blocks[k]], masks, k, only)
            goal = goals[k]  # [B, N, s, s, C]
            if only is not None:
                goal = jnp.take_along_axis(goal, only[:, :, None, None, None], axis=1)
            error = jnp.square(predicted.astype(jnp.float32) - goal).mean(-1)
            if only is not None:
                losses[k] = error.mean()  # Every cell of a hidden patch counts 1.
                continue
            weight = random_masking.cell_weights(masks.mask, self.grid, scale)
            losses[k] = (error[:, :, 0, 0] * weight).sum() / weight.sum()
        return losses

    def predicted(self, params, output, masks, k, only=None):  # [B, 1 + K, D]
        """Return what the decoder of stage k makes of a block's output."""
        latent = self._stage_norm(params, k, output)
        own = {"params": params[f"decoder_{k}"]}
        net = self.decoder_module(k)
        return net.apply(own, latent, masks.restore, self.grid, only)

    def encode(self, params, image, masks, drop=None, tokens=None) -> dict:
        """Return {block: its output [B, 1 + K, D]} for the visible tokens."""
        if tokens is None:
            net, options = {"params": params["encoder"]}, self._drops(drop)
            _, out = self.model.apply(net, image, keep=masks.keep, **options)
            return dict(enumerate(out["blocks"]))
        # Positions are in the tokens already: they are gathered, none is added.
        seen = patches.take(tokens[:, 1:], masks.keep)
        x = jnp.concatenate([tokens[:, :1], seen], axis=1)  # [B, 1 + K, D]
        return self._onwards(params, x, self.prefix.boundary, drop)

    def _drops(self, drop) -> dict:
        """Return the arguments of stochastic depth by a key, or by None."""
        if drop is None or not self.model.drop_path:
            return {"train": False}
        return {"train": True, "rngs": {"drop_path": drop}}

    def _onwards(self, params, x, first, drop) -> dict:  # [B, 1 + K, D]
        """Return {block: its output} of the blocks from `first` on."""
        net, given = {"params": params["encoder"]}, (x, first, self.model.depth)
        found = self.model.apply(net, *given, method="through", **self._drops(drop))
        return dict(enumerate(found, first))

    def goals(self, params, extra, image, active, tokens=None) -> dict:
        """Return {stage: target [B, N, s, s, C]}, without gradient."""
        kinds = {k: self.stages.target(k) for k in active}
        cells = {k: round(self.model.patch / self.stages.scales[k]) for k in active}
        found, of_hog = {}, [k for k in active if kinds[k] == "hog"]
        if of_hog:
            biases = extra.get("hog_bias")
            made = targets.hog(
                image,
                [cells[k] for k in of_hog],
                self.target.nbins,
                None if biases is None else [biases[k] for k in of_hog],
            )
            found |= dict(zip(of_hog, made, strict=True))
        for k in active:
            if kinds[k] == "pixel":
                normalise = self.target.normalise_pixels
                found[k] = patches.cells(image, cells[k], normalise)
            elif kinds[k] == "feature":
                net = {"params": jax.lax.stop_gradient(params["encoder"])}
                _, out = self.model.apply(net, image)
                found[k] = self._as_grid(out["blocks"][-1][:, self.model.prefix :])
            elif kinds[k] == "prefix":
                whole = self.run_prefix(params, image) if tokens is None else tokens
                found[k] = self._as_grid(whole[:, 1:])
        return {
            k: jax.lax.stop_gradient(targets.per_patch(v, self.stages.scales[k]))
            for k, v in found.items()
        }

    def _as_grid(self, x):  # [B, N, D] -> [B, h, w, D]
        """Return tokens, each with mean 0 and variance 1."""
        x = targets.standardise(x)
        return einops.rearrange(x, "b (h w) d -> b h w d", h=self.grid[0])

    def pictures(self, params, extra, batch, image) -> dict:
        """Return fields of `pictures.drawing.Material`."""
        del image
        return pictures.arrays(self, params, extra, batch)

    def visible(self, phase) -> int:
        """Return how many patches are seen in a phase."""
        return phase.method.visible

    def boundary(self, live, phase) -> int:
        """Return how many blocks are done: no stage that trains reads one of them."""
        read = [phase.method.blocks[k] for k in self.active(phase.frozen)]
        return min([super().boundary(live, phase), *read])

    def store_faults(self) -> Iterator[str]:
        """Yield why tokens cannot be kept."""
        yield from super().store_faults()
        if self.prefix.boundary:
            yield (
                f"prefix.boundary={self.prefix.boundary}: whole images behind frozen "
                "blocks are another task; with freeze.store.views set it to 0"
            )

    def shallow(self, depth: int) -> "LocalMIM":
        """Return the method with the first blocks only; later stages read the last."""
        stages = self.stages.up_to(depth, self.model.depth)
        return dataclasses.replace(super().shallow(depth), stages=stages)

    def freeze_layers(self) -> tuple:
        """Return `FreezeOut.layers` of this model: a stage goes with its block."""
        depth = self.model.depth
        return freezeout.vit_layers(depth, "encoder/", self.stages.layers(depth))

    def adopt(self, params, extra):
        """Return `extra` for loaded parameters; a store of features must be of them.

        Raises:
            CheckpointError: it holds the output of other weights.
        """
        if self.prefix.store:
            own = store.digest(params, self.prefix.pattern)
            store.open(self.prefix.store).check(own, self.prefix.boundary)
        return extra

    def features(self, params, extra, image):
        """Return the features of whole images [B, H, W, C].

        Returns:
            "tokens" [B, N, D] and "cls" [B, D] through the last stage's norm, "pooled"
            [B, D] the mean of the tokens, and "gap" [B, D]: the plain LayerNorm of the
            mean of the last block's patch tokens, what a fresh classifier head sees.
        """
        del extra
        x = patches.normalise(image, self.run.mean, self.run.std)
        tokens, out = self.model.apply({"params": params["encoder"]}, x)
        tokens = tokens.astype(jnp.float32)
        found = {"tokens": tokens[:, self.model.prefix :]}
        found["pooled"] = found["tokens"].mean(1)
        if self.model.cls:
            found["cls"] = tokens[:, 0]
        mean = out["blocks"][-1][:, self.model.prefix :].astype(jnp.float32).mean(1)
        found["gap"] = targets.standardise(mean, self.model.norm_eps)
        return found

    def check(self) -> Iterator[str]:
        """Yield one line per impossible combination of the sections."""
        depth, patch, size = self.model.depth, self.model.patch, self.augment.size
        if faults := list(sizes.faults(size, patch)):
            yield f"augment.size={size}: {faults[0]}"
            return
        if not self.model.cls:
            yield "model.cls=False: the decoders attend to the class token"
        if self.model.registers:
            yield f"model.registers={self.model.registers}: the decoders take none"
        if self.prefix.boundary >= depth:
            yield (
                f"prefix.boundary={self.prefix.boundary}: below model.depth={depth}, "
                "or nothing is left to train"
            )
        if self.prefix.boundary and self.model.rope:
            yield "prefix.boundary: works without model.rope"
        yield from self.stages.faults(depth, patch, self.grid[0])
        yield from self.transitive.faults(depth)
        for s in self.stages.scales:
            if self.decoder.width % max(1, round(s)):
                yield f"decoder.width={self.decoder.width}: must be a multiple of {s:g}"
        yield from self.masking.faults(self.grid)
