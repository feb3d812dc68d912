"""DINO: an image's crops shall be sorted as an averaged copy sorts its large ones.

A head sorts class tokens, or means of patch tokens, into K outputs that mean nothing
beforehand. The teacher, an average of the student, sees the global crops; its scores
are centred and sharpened, and every crop of the student shall have them. As options
KoLeo, Sinkhorn-Knopp and the loss on hidden patches, which make it iBOT or DINOv2.

Sources: Caron et al. 2021, arXiv:2104.14294; facebookresearch/dino main_dino.py.
"""

import dataclasses
from collections.abc import Iterator

import einops
import jax
import jax.numpy as jnp

from vitssl import ranges, tree
from vitssl.data import crops
from vitssl.losses import assignment
from vitssl.methods import base
from vitssl.methods.dino import objective as criteria
from vitssl.models import patches, prototypes, vit, xavier
from vitssl.ops import jitter
from vitssl.optim import schedules


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Config section `teacher`: the momentum of the average, half a cosine.

    Attributes:
        start, end: at the first and after the last step.
    """

    start: ranges.Probability = 0.996
    end: ranges.Probability = 1.0


@dataclasses.dataclass(frozen=True)
class DINO(base.Embedding):
    """The method; fields are the sections of its config.

    Parameters: "encoder", "head", with objective.patch "mask_token", what hidden
    patches are instead, and "patch_head" unless shared. Extra: "teacher", a copy of
    them; without Sinkhorn "centre" and "mean", {kind: [K]}: what the centre will be
    moved by, summed over the micro-batches, so that they change nothing.
    """

    run: base.Run
    model: vit.ViT
    multicrop: crops.MultiCrop
    head: prototypes.Head = prototypes.Head()
    teacher: Teacher = Teacher()
    objective: criteria.Objective = criteria.Objective()
    start: xavier.Start = xavier.Start()
    unstored = (
        "its teacher, an average that goes on changing when layers "
        "freeze, sees every global crop, and crops have two sizes"
    )

    @staticmethod
    def training_size(c) -> int:
        """Return the side of training images of a config."""
        return c.multicrop.global_crop_size

    @property
    def couples_batch(self) -> bool:
        """Whether the loss mixes samples."""
        return self.objective.couples_batch

    def transform(self) -> crops.MultiCrop:
        """Return the training transform."""
        return self.multicrop

    def phase(self, step: int) -> int:
        """Return the number of local crops of a step; each number is compiled once."""
        return self.multicrop.locals_at(step // max(1, self.run.steps_per_epoch))

    def init(self, rng, batch):
        """Return (params, extra) of fresh networks; the teacher is an exact copy."""
        keys, width = jax.random.split(rng, 3), self.model.width
        image, row = jnp.zeros((1, *batch["global"].shape[2:])), jnp.zeros((1, width))
        encoder = self.model.init(keys[0], image)["params"]
        params = {
            "encoder": self.start(jax.random.fold_in(rng, len(keys)), encoder),
            "head": self.head.init(keys[1], row)["params"],
        }
        if self.objective.patch:
            params["mask_token"] = jnp.zeros(width)
            if not self.objective.shared:
                params["patch_head"] = self.head.init(keys[2], row)["params"]
        extra = {}
        if self.objective.centring == "ema":
            for name in ("centre", "mean"):
                nothing = jnp.zeros(self.head.outputs)
                extra[name] = dict.fromkeys(self.objective.kinds, nothing)
        return params, self.adopt(params, extra)

    def adopt(self, params, extra):
        """Return `extra` with a teacher that starts as a copy of loaded parameters."""
        return extra | {"teacher": tree.copy(params)}

    def _encode(self, params, image, hidden=None, **options):
        """Return ([B, V, D], [B, V, N, D]): what is sorted, and patch tokens of crops.

        Args:
            image: [B, V, H, W, C], normalised.
            hidden: bool [B, V, N], or None.
        """
        b = len(image)
        image = einops.rearrange(image, "b v h w c -> (b v) h w c")  # Keeps its device.
        if hidden is not None:
            options["hide"] = einops.rearrange(hidden, "b v n -> (b v) n")
            options["fill"] = params["mask_token"]
        net = {"params": params["encoder"]}
        tokens, _ = self.model.apply(net, image, **options)
        tokens = einops.rearrange(tokens, "(b v) n d -> b v n d", b=b)
        spatial = tokens[:, :, self.model.prefix :]
        if self.objective.compares == "mean":
            return spatial.astype(jnp.float32).mean(2), spatial
        return tokens[:, :, 0], spatial

    def _sort(self, params, x, kind="view"):  # [..., D] -> [..., K]
        own = params.get(f"{kind}_head", params["head"])
        return self.head.apply({"params": own}, x)

    def embed(self, params, extra, batch, rng, *, step=0, phase=None) -> dict:
        """Return the features that are compared of each image.

        {"view": of all crops (student [B, V, D], teacher [B, G, D]), and with the loss
        on hidden patches "patch": ([B, G, S, D] of both, which count [B, G, S])}.
        """
        del step, phase  # The number of local crops shows in the batch.
        o = self.objective
        paint, draw, *drop = jax.random.split(rng, 4)
        if self.multicrop.colour == "device":
            batch = jitter.augment_batch(paint, batch, self.multicrop.recipe)
        crops = {
            kind: patches.normalise(batch[kind], self.run.mean, self.run.std)
            for kind in ("global", "local")
            if kind in batch
        }
        options = [dict(train=True, rngs={"drop_path": key}) for key in drop]
        hidden = None
        if o.patch:
            n = patches.patchify(crops["global"], self.model.patch).shape[-2]
            hidden = o.hide(draw, crops["global"].shape[:2], n)
        views, tokens = self._encode(params, crops["global"], hidden, **options[0])
        if "local" in crops:
            small, _ = self._encode(params, crops["local"], **options[1])
            views = jnp.concatenate([views, small], 1)  # [B, V, D]
        teacher = jax.lax.stop_gradient(extra["teacher"])
        right, seen = self._encode(teacher, crops["global"])
        rows = {"view": (views, right)}
        if o.patch:
            where, count = patches.pack(hidden, o.most(n))  # [B, G, S]
            both = (patches.take(x, where) for x in (tokens, seen))
            rows["patch"] = (*both, patches.valid(count, where.shape[-1]))
        return rows

    def compare(self, params, extra, rows, rng, *, step=0, phase=None):
        """Return (loss [], (extra, metrics)) of the rows of `embed`."""
        del rng, phase
        losses, extra, metrics = self._losses(params, extra, rows, step)
        o = self.objective
        total = losses["view"] + o.patch * losses.get("patch", 0.0)
        if o.koleo:
            views, right = rows["view"]
            losses["koleo"] = o.spread(views[:, : right.shape[1]])
            total = total + o.koleo * losses["koleo"]
        return total, (extra, metrics | {f"loss_{k}": v for k, v in losses.items()})

    def _losses(self, params, extra, rows, step):
        """Return ({kind: loss []}, extra, metrics) of the rows of `embed`."""
        o, losses, means = self.objective, {}, {}
        heat = o.heat(step, self.run.steps_per_epoch)
        teacher = jax.lax.stop_gradient(extra["teacher"])
        # A loss over the batch sees all of it at once.
        parts = 1 if self.couples_batch else self.run.accumulate
        for kind, (x, y, *valid) in rows.items():
            valid = valid[0] if valid else None
            scores = self._sort(params, x, kind)
            right = self._sort(teacher, y, kind)
            centre = extra["centre"][kind] if "centre" in extra else None
            target = jax.lax.stop_gradient(o.target(right, centre, heat, valid))
            if kind == "view":
                losses[kind] = o.views(target, scores)
                metrics = assignment.entropies(target)
            else:
                losses[kind] = o.patches(target, scores, valid)
            means[kind] = criteria.mean(right, valid) / parts
        if "mean" in extra:
            moved = jax.tree.map(jnp.add, extra["mean"], means)
            extra = extra | {"mean": jax.lax.stop_gradient(moved)}
        return losses, extra, metrics

    def after(self, params, extra, step):
        """Return `extra` after update `step`: teacher and centre follow."""
        t, total = self.teacher, self.run.total_steps
        m = schedules.cosine(step, base=t.start, final=t.end, total_steps=total)
        moved = {"teacher": tree.ema(extra["teacher"], params, m)}
        if "centre" in extra:
            own = self.objective.centre
            moved["centre"] = tree.ema(extra["centre"], extra["mean"], own)
            moved["mean"] = jax.tree.map(jnp.zeros_like, extra["mean"])
        return moved

    def features(self, params, extra, image):
        """Return the teacher's features of images [B, H, W, C].

        "cls" [B, D] is the class token, "mean" that of the patches, "pooled" the one
        that is sorted, "tokens" [B, N, D], all after the last norm; "gap": see
        `vit.ViT.pooled`.
        """
        x = patches.normalise(image, self.run.mean, self.run.std)
        net = {"params": extra["teacher"]["encoder"]}
        found = self.model.apply(net, x, method="features")
        return found | {"pooled": found[self.objective.compares]}

    def pictures(self, params, extra, batch, image) -> dict:
        """Return fields of `pictures.drawing.Material`: where the teacher looks."""
        return self.attention(extra["teacher"]["encoder"], image)

    def freeze_layers(self) -> tuple:
        """Return `FreezeOut.layers`: the encoder's; the head never freezes."""
        return self.model.freeze_layers("encoder/")

    def check(self) -> Iterator[str]:
        """Yield one line per impossible combination of the sections."""
        yield from self.multicrop.faults(self.model)
        if self.multicrop.num_global_crops + self.multicrop.locals_at(0) < 2:
            yield "multicrop.num_global_crops=1: needs a second crop to compare"
        if not self.model.cls and self.objective.compares == "cls":
            yield (
                "model.cls=False: DINO sorts class tokens; set objective.compares=mean"
            )
        if self.couples_batch and self.run.batch_size < 2:
            yield (
                f"batch_size={self.run.batch_size}: 2 or more for objective.koleo and "
                "objective.centring=sinkhorn"
            )
