"""Distillation: a student learns to have the features of a frozen teacher, no labels.

Both see the same crop, whatever its size ("patient and consistent", Beyer et al. 2021,
arXiv:2106.05237). One linear layer for each kind of feature maps the student's to the
teacher's width, and is thrown away afterwards.

The teacher is read once, when a run begins; from then on its weights stand in the
checkpoints, so that a run goes on with the teacher it began with, and `teacher.from`
tells no more than its architecture.

Sources: Hinton et al. 2015, arXiv:1503.02531; features instead of classes: Heo et al.
2019, arXiv:1904.01866; of foundation models: Oquab et al. 2023, arXiv:2304.07193,
section 5; Ranzinger et al. 2024, arXiv:2312.06709 (cosine, pooled and patches).
"""

import dataclasses
import functools
from collections.abc import Iterator

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from vitssl.convert import backbone
from vitssl.data import crops
from vitssl.methods import base
from vitssl.methods.distill import objective as criteria
from vitssl.methods.distill import teacher as teachers
from vitssl.models import convnext, hvit, patches, resnet, vit
from vitssl.ops import jitter


@dataclasses.dataclass(frozen=True)
class Distill(base.Method):
    """The method; fields are the sections of its config.

    Parameters: "encoder", the student, and "heads", {kind of feature: linear layer}.
    Extra: "teacher", the variables of the teacher; "stats" {"encoder"}, batch
    statistics of a student that has some.
    """

    run: base.Run
    model: vit.ViT | hvit.HViT | resnet.ResNet | convnext.ConvNeXt
    multicrop: crops.MultiCrop
    teacher: teachers.Teacher = teachers.Teacher()
    objective: criteria.Objective = criteria.Objective()
    unstored = "crops have two sizes, and the teacher sees them whole in every step"

    @staticmethod
    def training_size(c) -> int:
        """Return the side of training images of a config."""
        return c.multicrop.global_crop_size

    @property
    def couples_batch(self) -> bool:
        """Whether the loss mixes samples: batch normalisation does."""
        return isinstance(self.model, resnet.ResNet)

    def transform(self) -> crops.MultiCrop:
        """Return the training transform."""
        return self.multicrop

    def phase(self, step: int) -> int:
        """Return the number of local crops of a step; each number is compiled once."""
        return self.multicrop.locals_at(step // max(1, self.run.steps_per_epoch))

    @functools.cached_property
    def _teacher(self) -> teachers.Network:
        if self.teacher.from_ == teachers.UNTRAINED:
            own = (self.run.mean, self.run.std, self.objective.pool)
            return teachers.Network(backbone.Encode(self.model, *own))
        found = self.teacher.open(self.run)
        return teachers.Network.of(found, self.teacher.pool, self.run.dtype)

    def init(self, rng, batch):
        """Return (params, extra): a fresh student; the teacher's place, see `given`."""
        student, drawn, *heads = jax.random.split(rng, 4)
        pixels = jnp.zeros((1, *batch["global"].shape[2:]), jnp.uint8)
        image, of = pixels.astype(jnp.float32), self._teacher
        made = dict(self.model.init(student, image))
        if of.like is None:
            teacher = self.model.init(drawn, image)
        else:
            teacher = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), of.like)
        seen = jax.eval_shape(lambda: self._student(made, image)[0])
        goal = jax.eval_shape(lambda: of(teacher, pixels))
        params = {"encoder": made.pop("params"), "heads": {}}
        for kind, key in zip(self.objective.weights, heads, strict=False):
            head = nn.Dense(goal[kind].shape[-1])
            row = jnp.zeros((1, seen[kind].shape[-1]))
            params["heads"][kind] = head.init(key, row)["params"]
        extra = {"teacher": dict(teacher)}
        if made:
            extra["stats"] = {"encoder": made["batch_stats"]}
        return params, extra

    def given(self) -> dict:
        """Return the teacher's variables, as numpy arrays."""
        if self._teacher.like is None:
            return {}
        return {"teacher": self.teacher.open(self.run).variables()}

    def _variables(self, params, extra) -> dict:
        """Return what the student is applied with."""
        stats = extra.get("stats", {})
        stats = {"batch_stats": stats["encoder"]} if stats else {}
        return {"params": params["encoder"]} | stats

    def _student(self, variables, image, rng=None):
        """Return ({"pooled", "tokens"}, statistics) of normalised images."""
        options = dict(method="features", train=rng is not None)
        if rng is not None:
            keys = jax.random.split(rng)
            options["rngs"] = dict(zip(("drop_path", "dropout"), keys, strict=True))
        found, moved = self.model.apply(
            variables, image, mutable=["batch_stats"], **options
        )
        pooled = found[self.objective.pool].astype(jnp.float32)
        return {"pooled": pooled, "tokens": found["tokens"]}, moved.get("batch_stats")

    def loss(self, params, extra, batch, rng, *, step=0, phase=()):
        """Return (loss [], (extra, metrics)) of the global batch.

        Every crop counts the same.
        """
        del step, phase  # The number of local crops shows in the batch.
        paint, *drop = jax.random.split(rng, 3)
        if self.multicrop.colour == "device":
            batch = jitter.augment_batch(paint, batch, self.multicrop.recipe)
        kinds = [kind for kind in ("global", "local") if kind in batch]
        whole = sum(batch[kind].shape[1] for kind in kinds)
        losses, spread = dict.fromkeys(self.objective.weights, 0.0), 0.0
        for kind, key in zip(kinds, drop, strict=False):
            share = batch[kind].shape[1] / whole
            image = einops.rearrange(batch[kind], "b v h w c -> (b v) h w c")
            found, extra = self._compared(params, extra, image, key)
            for name, (left, right) in found.items():
                losses[name] += share * self.objective(left, right)
            spread += share * found["pooled"][0].std(0).mean()
        total = sum(w * losses[k] for k, w in self.objective.weights.items())
        metrics = {f"distill/{name}": value for name, value in losses.items()}
        return total, (extra, metrics | {"feature_std": spread})

    def _compared(self, params, extra, image, rng):
        """Return {kind: (student's, teacher's features [B, ..., D])} and `extra`."""
        goal = self._teacher(jax.lax.stop_gradient(extra["teacher"]), image)
        x = patches.normalise(image, self.run.mean, self.run.std)
        seen, stats = self._student(self._variables(params, extra), x, rng)
        if stats:
            extra = extra | {"stats": {"encoder": stats}}
        count = seen["tokens"].shape[1]
        goal = goal | {"tokens": criteria.resampled(goal["tokens"], count)}
        found = {}
        for kind, head in params["heads"].items():
            layer = nn.Dense(goal[kind].shape[-1])
            found[kind] = layer.apply({"params": head}, seen[kind]), goal[kind]
        return found, extra

    def features(self, params, extra, image):
        """Return {"pooled", "tokens", "mean", ...} of the student, not projected."""
        x = patches.normalise(image, self.run.mean, self.run.std)
        net = self._variables(params, extra)
        found = self.model.apply(net, x, method="features")
        return found | {"pooled": found[self.objective.pool]}

    def pictures(self, params, extra, batch, image) -> dict:
        """Return fields of `pictures.drawing.Material`."""
        del extra, batch
        if not hasattr(self.model, "attention_maps"):
            return {}
        return self.attention(params["encoder"], image)

    def freeze_layers(self) -> tuple:
        """Return `FreezeOut.layers`: the student's; the heads never freeze."""
        return self.model.freeze_layers("encoder/")

    def check(self) -> Iterator[str]:
        """Yield one line per impossible combination of the sections."""
        yield from self.multicrop.faults(self.model)
        for fault in self.model.check_channels(self.run.channels):
            yield f"data.channels={fault}"
        if self.objective.pool not in self.model.poolings:
            known = ", ".join(self.model.poolings)
            yield f"objective.pool={self.objective.pool}: this model has {known}"
