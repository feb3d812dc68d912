"""H-JEPA with multi-crop: predict the features of hidden patches, at several levels.

A context encoder sees part of every crop, a predictor fills in the features of the
hidden part as an averaged copy of the encoder produces them from the whole crop, and
the two are compared at H granularities. Several crops of an image take part: see
`data.masks.Masks.strategy` for who predicts whom.

Sources: jonwiggins/H-JEPA@eb995a0 (the system); I-JEPA, Assran et al. 2023,
arXiv:2301.08243 (the method it extends); DINOv2, arXiv:2304.07193 (crops).
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import einops
import jax
import jax.numpy as jnp

from vitssl import methods, schedules, tree
from vitssl.data import crops, masks
from vitssl.evals import quality
from vitssl.methods import hjepa_losses, hjepa_slots, hjepa_step
from vitssl.models import levels, predictor, vit
from vitssl.ops import patches

GLOBAL, LOCAL = predictor.GLOBAL, predictor.LOCAL


@dataclasses.dataclass(frozen=True)
class HJEPA:
    """The method; fields are the sections of its config.

    Parameters: {"encoder", "predictor", "levels"}. Extra: "target" and "momentum", the
    EMA of the encoder and the momentum last used; "target_levels" (levels.target=ema);
    "stats" (batch normalisation); "vicreg" (adaptive weights).
    """

    run: methods.Run
    model: vit.ViT
    predictor: Predictor
    levels: Levels
    multicrop: crops.MultiCrop
    masking: Masking
    objective: hjepa_losses.Objective
    ema: Ema

    # Modules.

    @property
    def encoder(self) -> vit.ViT:
        """The context encoder; the target encoder is the same module."""
        return self.model.clone(dtype=self.run.dtype)

    @property
    def predictor_module(self) -> predictor.Predictor:
        """The predictor, with the parameters this config uses."""
        strategy, most = self.masking.strategy, self._most_locals
        return predictor.Predictor(
            **dataclasses.asdict(self.predictor),
            roles=strategy != "global_only" and most > 0,
            pooled=self.uses_views and most > 0,
            dtype=self.run.dtype,
            attention=self.model.attention,
        )

    @property
    def levels_module(self) -> levels.Levels:
        """The projections and the feature pyramid."""
        return levels.Levels(
            width=self.model.width,
            levels=self.masking.num_hierarchies,
            norm=self.levels.norm,
            pooling=self.levels.pooling,
            fpn=self.levels.fpn,
            fpn_width=self.levels.fpn_width,
            dtype=self.run.dtype,
        )

    def networks(self, params, extra, *, rng=None, train) -> hjepa_step.Networks:
        """Return the modules with these parameters put in."""
        return hjepa_step.Networks(
            encoder=self.encoder,
            predictor=self.predictor_module,
            levels=self.levels_module,
            params=params,
            target=extra["target"] if self.ema.target_encoder else params["encoder"],
            target_levels=extra.get("target_levels", params["levels"]),
            stats=extra.get("stats", {}),
            detach=self.ema.target_encoder,
            train=train,
            rng=rng,
        )

    # Crops.

    @property
    def uses_views(self) -> bool:
        """Whether pooled targets are predicted from local crops."""
        only = self.masking.strategy == "global_only"
        return only and self.objective.view_weight > 0

    @property
    def uses_locals(self) -> bool:
        """Whether local crops take part at all."""
        return self.uses_views or self.masking.strategy != "global_only"

    @property
    def _most_locals(self) -> int:
        c = self.multicrop
        return c.max_local_crops if c.adaptive else c.num_local_crops

    def transform(self) -> crops.MultiCropTransform:
        """Return the training transform; it makes no crops that are not used."""
        made = self.multicrop
        if not self.uses_locals:
            made = dataclasses.replace(made, num_local_crops=0, adaptive=False)
        return crops.MultiCropTransform(
            made, self.masking.blocks_only, self.model.patch
        )

    def phase(self, step: int) -> int:
        """Return the number of local crops of a step; each number is compiled once."""
        if not self.uses_locals:
            return 0
        return self.multicrop.locals_at(step // max(1, self.run.steps_per_epoch))

    @property
    def couples_batch(self) -> bool:
        """Whether the loss mixes samples, so that a batch may not be split."""
        return self.objective.couples_batch or self.levels.norm == "batchnorm"

    # The contract.

    def init(self, rng, batch):
        """Return (params, extra) of fresh networks; the target is an exact copy."""
        keys = jax.random.split(rng, 4)
        image = jnp.zeros((1, *batch["global"].shape[2:]))
        row = jnp.zeros((1, 2 ** (self.masking.num_hierarchies - 1), self.model.width))
        members = levels.everything(1, (1, row.shape[1]))
        guess = predictor.Predictor.init(self.predictor_module, keys[1], row, row)
        found = self.levels_module.init(keys[2], row, members)
        if self.levels.fpn or self.masking.num_hierarchies:
            params = {
                "encoder": self.encoder.init(keys[0], image)["params"],
                "predictor": predictor.xavier(keys[3], guess["params"]),
                "levels": found["params"],
            }
        extra = {}
        if self.ema.target_encoder:
            extra["target"] = tree.copy(params["encoder"])
            extra["momentum"] = jnp.float32(self.ema.start)
        if self.levels.target == "ema":
            extra["target_levels"] = tree.copy(params["levels"])
        if self.levels.norm == "batchnorm":
            extra["stats"] = found["batch_stats"]
        if self.objective.vicreg_adaptive:
            extra["vicreg"] = jnp.asarray(self.objective.vicreg[0], jnp.float32)
        return params, extra

    def loss(self, params, extra, batch, rng, *, phase=None):
        """Return (loss [], (extra, metrics)); see the module and `hjepa_step`."""
        del phase  # The number of local crops shows in the batch.
        drop, draw = jax.random.split(rng)
        net = self.networks(params, extra, rng=drop, train=True)
        terms = self.terms(net, batch)
        o = self.objective
        key = jax.random.key(0) if o.fixed_slices else draw
        total = o.crop_loss(terms.near, jax.random.fold_in(key, 0))
        parts = {}
        if terms.far is not None:
            local = o.crop_loss(terms.far, jax.random.fold_in(key, 1))
            total = total + o.local_weight * local
            parts["loss_local"] = local
        if terms.view is not None:
            total = total + o.view_weight * terms.view
            parts["loss_view"] = terms.view
        term, more, state = o.regularise(
            terms.context, terms.near, jax.random.fold_in(key, 2), extra.get("vicreg")
        )
        extra = dict(extra)
        if net.stats:
            extra["stats"] = net.stats
        if state is not None:
            extra["vicreg"] = state
        metrics = self._metrics(batch, terms, extra) | parts | more
        return total + term, (extra, metrics)

    def after(self, params, extra, step):
        """Return `extra` after update `step`: the targets follow the new parameters."""
        if not self.ema.target_encoder:
            return extra
        m = schedules.momentum(
            step,
            start=self.ema.start,
            end=self.ema.end,
            warmup_steps=self.ema.warmup_steps,
            total_steps=self.run.total_steps,
        )
        moved = {"target": tree.ema(extra["target"], params["encoder"], m)}
        if self.levels.target == "ema":
            followed = extra["target_levels"], params["levels"]
            moved["target_levels"] = tree.ema(*followed, m)
        return extra | moved | {"momentum": jnp.float32(m)}
