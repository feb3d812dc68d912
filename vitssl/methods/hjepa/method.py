"""H-JEPA with multi-crop: predict the features of hidden patches, at several levels.

A context encoder sees part of every crop, a predictor fills in the features of the
hidden part as an averaged copy of the encoder produces them from the whole crop, and
the two are compared at H granularities. Several crops of an image take part: see
`strategy` of `methods.hjepa.masks.Masking` for who predicts whom.

Sources: jonwiggins/H-JEPA@eb995a0 (the system); I-JEPA, Assran et al. 2023,
arXiv:2301.08243 (the method it extends); DINOv2, arXiv:2304.07193 (crops).
"""

import dataclasses
import math
from collections.abc import Iterator

import einops
import jax
import jax.numpy as jnp

from vitssl import ranges, tree
from vitssl.data import crops
from vitssl.evals import quality
from vitssl.methods import base
from vitssl.methods.hjepa import (
    apply,
    forward,
    invariance,
    levels,
    masks,
    objective,
    pictures,
    predictor,
    slots,
    views,
)
from vitssl.models import patches, prototypes, vit, xavier
from vitssl.ops import jitter
from vitssl.optim import schedules


@dataclasses.dataclass(frozen=True)
class Ema:
    """Config section `ema`: the target encoder.

    Attributes:
        start, end: momentum at the first and the last step, linear in between.
        warmup_steps: so long it stays at `start`.
        target_encoder: False: end-to-end training, targets come from the encoder
            itself, with gradients (needs SIGReg).
    """

    start: ranges.Probability
    end: ranges.Probability
    warmup_steps: ranges.OrNone = 0
    target_encoder: bool = True


@dataclasses.dataclass(frozen=True)
class HJEPA(base.Embedding):
    """The method; fields are the sections of its config.

    Parameters: {"encoder", "predictor", "levels", "projector"}; "levels" not with
    levels.norm=targets, "projector" only with view_target=lejepa or dino. Extra:
    "target" and "momentum", the EMA of the encoder and the momentum last used;
    "target_levels" (levels.target=ema); "stats" (batch normalisation); "vicreg"
    (adaptive weights).
    """

    run: base.Run
    model: vit.ViT
    predictor: predictor.Spec
    levels: levels.Spec
    multicrop: crops.MultiCrop
    masking: masks.Masking
    objective: objective.Objective
    ema: Ema
    start: xavier.Start = xavier.Start()
    unstored = (
        "its targets are whole views to an encoder that goes on "
        "changing when layers freeze, and that is most of what they cost"
    )

    @staticmethod
    def training_size(c) -> int:
        """Return the side of training images of a config."""
        return c.multicrop.global_crop_size

    @property
    def predictor_module(self) -> predictor.Predictor:
        """The predictor, with the parameters this config uses."""
        return predictor.Predictor(
            **dataclasses.asdict(self.predictor),
            roles=self.masking.strategy != "global_only" and self._most_locals > 0,
            pooled=self._predicts_views,
            scan=self.model.scan,
            dtype=self.model.dtype,
            attention=self.model.attention,
        )

    @property
    def levels_module(self) -> levels.Levels:
        """The projections and the feature pyramid."""
        spec = self.levels
        return levels.Levels(
            width=self.model.width,
            levels=self.masking.num_hierarchies,
            norm=spec.norm,
            pooling=spec.pooling,
            fpn=spec.fpn,
            fpn_width=spec.fpn_width,
            dtype=self.model.dtype,
        )

    def networks(self, params, extra, *, rng=None, train) -> apply.Networks:
        """Return the modules with these parameters put in."""
        return apply.Networks(
            encoder=self.model,
            predictor=self.predictor_module,
            levels=self.levels_module,
            params=params,
            target=extra["target"] if self.ema.target_encoder else params["encoder"],
            target_levels=extra.get("target_levels", params.get("levels", {})),
            stats=extra.get("stats", {}),
            detach=self.ema.target_encoder,
            train=train,
            rng=rng,
            projector=self.projector,
        )

    @property
    def projector(self):
        """The module by which LeJEPA and DINO compare crops."""
        hidden, outputs = self.objective.view_projector
        if self.objective.view_target == "dino":
            return prototypes.Head(outputs, hidden, self.model.width)
        return invariance.Projector(hidden, outputs)

    @property
    def uses_views(self) -> bool:
        """Whether crops are asked about each other."""
        only = self.masking.strategy == "global_only"
        return only and self.objective.view_weight > 0

    @property
    def _projects_views(self) -> bool:
        return self.uses_views and self.objective.view_target in invariance.ALIKE

    @property
    def _predicts_views(self) -> bool:
        among = self.multicrop.num_global_crops * (self.objective.view_pairs == "all")
        some = self._most_locals > 0 or among > 1
        return self.uses_views and some and not self._projects_views

    @property
    def uses_locals(self) -> bool:
        """Whether local crops take part at all."""
        return self.uses_views or self.masking.strategy != "global_only"

    @property
    def _most_locals(self) -> int:
        return self.multicrop.locals_at(10**9)

    def transform(self) -> views.MultiCropTransform:
        """Return the training transform; it makes no crops that are not used."""
        made = self.multicrop
        if not self.uses_locals:
            made = dataclasses.replace(made, num_local_crops=0, adaptive=False)
        return views.MultiCropTransform(made, self.masking, self.model.patch)

    def phase(self, step: int) -> int:
        """Return the number of local crops of a step; each number is compiled once."""
        if not self.uses_locals:
            return 0
        return self.multicrop.locals_at(step // max(1, self.run.steps_per_epoch))

    @property
    def couples_batch(self) -> bool:
        """Whether the loss mixes samples."""
        centred = self._predicts_views and self.objective.view_target == "centred"
        norm = self.levels.norm == "batchnorm"
        views = centred or self._projects_views
        return self.objective.couples_batch or norm or views

    def init(self, rng, batch):
        """Return (params, extra) of fresh networks; the target is an exact copy."""
        keys = jax.random.split(rng, 4)
        image = jnp.zeros((1, *batch["global"].shape[2:]))
        row = jnp.zeros((1, 2 ** (self.masking.num_hierarchies - 1), self.model.width))
        members = levels.everything(1, (1, row.shape[1]))
        table = row
        if self.predictor.positions == "sincos":
            width = self.predictor.width or self.model.width
            table = jnp.zeros((*row.shape[:2], width))
        guess = self.predictor_module.init(keys[1], row, table, place=table)["params"]
        found = self.levels_module.init(keys[2], row, members)
        encoder = self.model.init(keys[0], image)["params"]
        params = {
            "encoder": self.start(jax.random.fold_in(keys[0], 0), encoder),
            "predictor": predictor.xavier(keys[3], guess),
        }
        if "params" in found:
            params["levels"] = found["params"]
        if self._projects_views:
            row = jnp.zeros((1, 1, self.model.width))
            key = jax.random.fold_in(rng, len(keys))
            params["projector"] = self.projector.init(key, row)["params"]
        extra = self.adopt(params, {})
        if self.ema.target_encoder:
            extra["momentum"] = jnp.float32(self.ema.start)
        if self.levels.norm == "batchnorm":
            extra["stats"] = found["batch_stats"]
        if self.objective.vicreg_adaptive:
            extra["vicreg"] = jnp.asarray(self.objective.vicreg[0], jnp.float32)
        return params, extra

    def embed(self, params, extra, batch, rng, *, step=0, phase=None) -> forward.Rows:
        """Return what the networks make of each image; see `forward.forward`."""
        del step, phase  # The number of local crops shows in the batch.
        drop, _, paint = jax.random.split(rng, 3)
        if self.multicrop.colour == "device":
            batch = jitter.augment_batch(paint, batch, self.multicrop.recipe)
        return self.rows(self.networks(params, extra, rng=drop, train=True), batch)

    def compare(self, params, extra, rows, rng, *, step=0, phase=None):
        """Return (loss [], (extra, metrics)); see the module and `forward.measure`."""
        del phase
        net = self.networks(params, extra, train=True)
        o = self.objective
        key = jax.random.key(0) if o.fixed_slices else jax.random.split(rng, 3)[1]
        draw = jax.random.fold_in(key, 3)
        terms = forward.measure(net, rows, o.view, draw, **o.options())
        total = o.crop_loss(terms.near, jax.random.fold_in(key, 0))
        parts = {}
        if terms.far is not None:
            local = o.crop_loss(terms.far, jax.random.fold_in(key, 1))
            total = total + o.local_weight * local
            parts["loss_local"] = local
        if terms.view is not None:
            total = total + o.view_weight * terms.view
            parts |= terms.more | {"loss_view": terms.view}
        term, more, state = o.regularise(
            terms.context, terms.near, jax.random.fold_in(key, 2), extra.get("vicreg")
        )
        extra = dict(extra)
        if net.stats:
            extra["stats"] = net.stats
        if state is not None:
            extra["vicreg"] = state
        total = total + term
        if terms.view is not None:
            parts["view_share"] = o.view_weight * terms.view / total
        metrics = self._metrics(rows.near, terms, extra, step)
        return total, (extra, metrics | jax.lax.stop_gradient(parts | more))

    def terms(self, net, batch) -> forward.Terms:
        """Return what the loss of a batch is made of."""
        rows, o = self.rows(net, batch), self.objective
        return forward.measure(net, rows, o.view, jax.random.key(0), **o.options())

    def rows(self, net, batch) -> forward.Rows:
        """Return what the networks make of each image; see `forward.forward`."""
        near = self._masked(batch, "global", slice(None), predictor.GLOBAL)
        far = free = None
        if self.uses_locals and "local" in batch:
            count = batch["local"].shape[1]
            crossed = self.masking.strategy == "cross_crop_prediction"
            hidden = count // 2 if crossed else 0
            if hidden:
                far = self._masked(batch, "local", slice(hidden), predictor.LOCAL)
            if hidden < count:
                free = self._pixels(batch["local"][:, hidden:])
        view = self.objective.view if self.uses_views else None
        return forward.forward(net, near, far, free, self.masking, view)

    def _pixels(self, image):
        return patches.normalise(image, self.run.mean, self.run.std)

    def _masked(self, batch, kind, which, role) -> forward.Masked:
        """Return the crops `which` of a kind, with their masks."""
        image = batch[kind][:, which]
        wanted = batch[f"{kind}_targets"][:, which, : self.masking.asks]
        hidden = wanted if self.masking.together else wanted.any(2, keepdims=True)
        visible = ~hidden
        if self.masking.context == "block":
            passes = slice(self.masking.passes)
            visible &= batch[f"{kind}_context"][:, which, passes]
        room = slots.slots(self.masking, patches.grid(image, self.model.patch))
        return forward.Masked(self._pixels(image), visible, wanted, room, role)

    def _metrics(self, crops: forward.Crops, terms: forward.Terms, extra, step):
        """Return scalars to watch; none of them has a gradient."""
        near, found = terms.near, {}
        for k in range(self.masking.num_hierarchies):
            found[f"loss_h{k}"] = near.losses[:, k].mean()
            found[f"cosine_h{k}"] = near.cosine[:, k].mean()
        found |= self._explained(crops.targets, near)
        found["loss_unweighted"] = near.losses.mean()
        together = self.masking.together
        found["mask_ratio"] = (crops.wanted if together else crops.wanted.any(2)).mean()
        dropped = 1 - terms.targets.count.sum() / jnp.maximum(crops.wanted.sum(), 1)
        found["dropped_targets"] = dropped
        kept = terms.context.seen.sum() / jnp.maximum(crops.visible.sum(), 1)
        found["dropped_context"] = 1 - kept * (1 - near.crowded)
        pooled = {
            "online": terms.context.pooled[:, 0],
            "target": terms.targets.tokens[:, 0].astype(jnp.float32).mean(1),
        }

        def signs(pooled):
            return {
                f"{name}_{short}": measured[key]
                for name, x in pooled.items()
                for measured in [quality.collapse_metrics(x, rows=64)]
                for short, key in (("std", "std"), ("rank", "effective_rank"))
            }

        # The rank takes an eigendecomposition, for which a device stands still.
        found |= self.run.when_logged(step, signs, pooled)
        if "momentum" in extra:
            found["momentum"] = extra["momentum"]
        return jax.lax.stop_gradient(found)

    def _explained(self, targets: forward.Targets, near: forward.Result) -> dict:
        """Return `invariance.r2` of each level: all, and what is not the place."""
        found, normalize = {}, self.objective.normalize
        for k, level in near.levels.items():
            found[f"r2_h{k}"] = invariance.r2(*level, normalize)
            if k == 0:
                place = einops.rearrange(targets.where, "b c k m -> b c (k m)")
                place = place[..., : level.valid.shape[-1]]
            elif self.levels.pooling == "spatial":
                place = jnp.arange(level.valid.shape[-1])
                place = jnp.broadcast_to(place, level.valid.shape)
            else:
                continue  # Groups of a list have no place.
            some = math.prod(levels.cells(targets.grid, k))
            own = invariance.r2(*level, normalize, place, some)
            found[f"r2_content_h{k}"] = own
        return found

    def pictures(self, params, extra, batch, image):
        """Return fields of `pictures.drawing.Material`."""
        return pictures.arrays(self, params, extra, batch, image)

    def freeze_layers(self) -> tuple:
        """Return `FreezeOut.layers`: the encoder's; predictor and levels never."""
        return self.model.freeze_layers("encoder/")

    def adopt(self, params, extra):
        """Return `extra` with targets that start as copies of loaded parameters."""
        moved = {}
        if self.ema.target_encoder:
            moved["target"] = tree.copy(params["encoder"])
        if self.levels.target == "ema":
            moved["target_levels"] = tree.copy(params["levels"])
        return extra | moved

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

    def features(self, params, extra, image):
        """Return the features of whole images of any size the patch divides.

        They are those of the target encoder (of the encoder itself in end-to-end
        training): "tokens" [B, N, D] patch tokens, "pooled" [B, D] their mean, "cls"
        [B, D] if there is a class token, "last4" [B, 4 D] mean patch tokens of the last
        four blocks, and "level{k}" [B, D]: tokens projected to level k, pooled to its
        groups, then averaged (what the original evaluates, with k = 0).
        """
        net = self.networks(params, extra, train=False)
        x = self._pixels(image)
        tokens, out = net.encoder.apply({"params": net.target}, x)
        cls, tokens = apply.split(net.encoder, tokens)
        found = {"tokens": tokens, "pooled": tokens.astype(jnp.float32).mean(1)}
        if cls is not None:
            found["cls"] = cls
        last = [self._normed(net, y).mean(1) for y in out["blocks"][-4:]]
        found["last4"] = jnp.concatenate(last, axis=-1)
        members = levels.everything(x.shape[0], out["grid"])
        for k, (y, valid) in net.project(tokens, members, target=True).items():
            found[f"level{k}"] = forward.pool(y, valid)
        return found

    def _normed(self, net, y):
        """Return the patch tokens [B, N, D] of a block, through the last LayerNorm."""
        y = net.encoder.apply({"params": net.target}, y, method=lambda m, z: m.norm(z))
        return apply.split(net.encoder, y)[1].astype(jnp.float32)

    def check(self) -> Iterator[str]:
        """Yield one line per impossible combination of the sections."""
        yield from self._check_crops()
        yield from self._check_objective()
        width = self.predictor.width or self.model.width
        if width % self.predictor.heads:
            yield (
                f"predictor.heads={self.predictor.heads}: must divide the predictor's "
                f"width {width}"
            )
        if self.predictor.positions == "sincos":
            yield from self._check_table(width)
        if not self.ema.target_encoder:
            if not self.objective.sees_sigreg:
                yield (
                    "ema.target_encoder=False: nothing keeps the features from "
                    "collapsing; set objective.type=hjepa_sigreg"
                )
            if self.levels.target == "ema":
                yield "levels.target=ema: needs ema.target_encoder=True"
        if self.levels.norm == "batchnorm" and self.masking.accumulate_crops:
            yield (
                "masking.accumulate_crops=True: levels.norm=batchnorm needs all crops "
                "at once; use layernorm"
            )

    def _check_table(self, width):
        """Yield why the predictor cannot have a table of its own."""
        if width % 4:
            yield (
                f"predictor.positions=sincos: needs a width of a multiple of 4, not "
                f"{width}"
            )
        crossed = self.masking.strategy != "global_only"
        if crossed and self._most_locals:
            yield (
                "predictor.positions=sincos: takes no context of other crops; set "
                "multicrop.num_local_crops=0, or masking.strategy=global_only"
            )

    def _check_crops(self):
        """Yield what does not fit between crops, patches and masks."""
        made, patch = self.multicrop, max(1, self.model.patch)
        found = list(made.faults(self.model, local=self.uses_locals))
        yield from found
        kinds = ["global"] + ["local"] * (self.uses_locals and self._most_locals > 0)
        for kind in () if found else kinds:
            size = getattr(made, f"{kind}_crop_size")
            if (size // patch) ** 2 < 4:
                yield (
                    f"multicrop.{kind}_crop_size={size}: fewer than 2 x 2 patches of "
                    f"{patch} pixels"
                )

    def _check_objective(self):
        """Yield what the loss needs and does not have."""
        o, h = self.objective, self.masking.num_hierarchies
        for key in ("weights", "vicreg_weight", "vicreg"):
            count = len(getattr(o, key))
            if count not in (1, h):
                yield (
                    f"objective.{key} has {count} entries for masking.num_hierarchies="
                    f"{h}; give 1 or {h}"
                )
        crops = self.multicrop.num_global_crops + self._most_locals
        if self.uses_views and o.view_target == "dino" and crops < 2:
            yield (
                "objective.view_target=dino: needs a second crop to compare; set "
                "multicrop.num_local_crops, or objective.view_weight=0.0"
            )
        if o.type in objective.CONTRASTIVE:
            if self.multicrop.num_global_crops < 2:
                yield f"objective.type={o.type}: needs multicrop.num_global_crops=2"
            if not self.model.cls:
                yield f"objective.type={o.type}: needs the class token, model.cls=True"
        if o.type not in objective.VICREG + objective.SIGREG:
            return
        if o.type == "hierarchical_combined" and o.views == "crops":
            return
        if o.views == "batch_halves" and self.masking.mode != "zero":
            yield (
                "objective.views=batch_halves: pairs the tokens of two images one by "
                "one, so all must be there; set masking.mode=zero"
            )
        if o.views != "crops" and self.run.batch_size < 2:
            yield f"objective.views={o.views}: needs a batch of 2 or more"
