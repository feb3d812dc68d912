"""DINO: small crops shall be sorted as an averaged copy sorts the large ones.

Sources: Caron et al. 2021, arXiv:2104.14294; facebookresearch/dino main_dino.py.
"""

import dataclasses

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from vitssl import ranges, tree
from vitssl.data import multicrop
from vitssl.losses import regression
from vitssl.methods import base
from vitssl.models import layers, patches, vit
from vitssl.ops import jitter
from vitssl.optim import schedules


class Head(nn.Module):
    """Config section `head`: three layers, length one, K weight-normalised outputs."""

    outputs: ranges.Count = 65536
    hidden: ranges.Count = 2048
    bottleneck: ranges.Count = 256

    @nn.compact
    def __call__(self, x):  # [..., D] -> [..., K] float32
        for i in range(2):
            x = layers.gelu(layers.dense(self.hidden, x.dtype, f"fc{i}")(x))
        x = layers.dense(self.bottleneck, x.dtype, "fc2")(x)
        init = layers.uniform_fan_in(self.bottleneck)
        last = self.param("last", init, (self.bottleneck, self.outputs))
        return regression.unit(x, 1e-12) @ (last / jnp.linalg.norm(last, axis=0))


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Config section `teacher`: momenta of its average and centre, temperatures."""

    start: ranges.Probability = 0.996
    end: ranges.Probability = 1.0
    temperature: ranges.Positive = 0.04
    first_temperature: ranges.Positive = 0.04
    warmup_epochs: ranges.NotNegative = 0.0
    centre: ranges.Probability = 0.9
    student_temperature: ranges.Positive = 0.1


@dataclasses.dataclass(frozen=True)
class DINO(base.Method):
    """The method; fields are the sections of its config."""

    run: base.Run
    model: vit.ViT
    multicrop: multicrop.MultiCrop
    head: Head = Head()
    teacher: Teacher = Teacher()

    @staticmethod
    def training_size(c):
        return c.multicrop.global_crop_size

    def transform(self):
        return self.multicrop

    def phase(self, step):
        return self.multicrop.locals_at(step // max(1, self.run.steps_per_epoch))

    def init(self, rng, batch):
        keys = jax.random.split(rng)
        image = jnp.zeros((1, *batch["global"].shape[2:]))
        head = self.head.init(keys[1], jnp.zeros((1, self.model.width)))["params"]
        params = {"encoder": self.model.init(keys[0], image)["params"], "head": head}
        zeros = jnp.zeros(self.head.outputs)
        return params, self.adopt(params, {"centre": zeros, "mean": zeros})

    def adopt(self, params, extra):
        return extra | {"teacher": tree.copy(params)}

    def scores(self, params, crops, **how):  # uint8 [B, V, H, W, C] -> [B, V, K]
        x = patches.normalise(crops, self.run.mean, self.run.std)
        x = einops.rearrange(x, "b v h w c -> (b v) h w c")  # Keeps its device.
        net = {"params": params["encoder"]}
        x = self.model.apply(net, x, "cls", method="pooled", **how)
        x = self.head.apply({"params": params["head"]}, x)
        return einops.rearrange(x, "(b v) k -> b v k", b=len(crops))

    def loss(self, params, extra, batch, rng, *, step=0, phase=None):
        t, keys = self.teacher, jax.random.split(rng, 3)
        if self.multicrop.colour == "device":
            batch = jitter.augment_batch(keys[2], batch, self.multicrop.recipe)
        kinds = [kind for kind in ("global", "local") if kind in batch]
        own = [dict(train=True, rngs={"drop_path": key}) for key in keys]
        student = [self.scores(params, batch[k], **own[i]) for i, k in enumerate(kinds)]
        log_q = jax.nn.log_softmax(jnp.concatenate(student, 1) / t.student_temperature)
        goal = jax.lax.stop_gradient(self.scores(extra["teacher"], batch["global"]))
        heat = dict(base=t.temperature, start=t.first_temperature)
        heat["warmup_steps"] = round(t.warmup_epochs * self.run.steps_per_epoch)
        log_p = (goal - extra["centre"]) / schedules.constant(step, **heat)
        cross = -jnp.einsum("bgk,bvk->gv", jax.nn.softmax(log_p), log_q) / len(goal)
        value = cross.sum(where=~jnp.eye(*cross.shape, dtype=bool))
        mean = extra["mean"] + goal.mean((0, 1)) / self.run.accumulate
        return value / (cross.size - len(cross)), (extra | {"mean": mean}, {})

    def after(self, params, extra, step):
        t, total = self.teacher, self.run.total_steps
        m = schedules.cosine(step, base=t.start, final=t.end, total_steps=total)
        centre = t.centre * extra["centre"] + (1 - t.centre) * extra["mean"]
        teacher = tree.ema(extra["teacher"], params, m)
        return {"teacher": teacher, "centre": centre, "mean": jnp.zeros_like(centre)}

    def features(self, params, extra, image):
        x = patches.normalise(image, self.run.mean, self.run.std)
        net = {"params": extra["teacher"]["encoder"]}
        found = self.model.apply(net, x, method="features")
        return found | {"pooled": found["cls"]}

    def freeze_layers(self):
        return self.model.freeze_layers("encoder/")
