"""A small method with everything a real one has, for tests of the trainer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from vitssl import tree
from vitssl.methods import base
from vitssl.models import patches, vit
from vitssl.optim import optimizer as optim


@dataclasses.dataclass(frozen=True)
class Ema:
    """Section `ema`."""

    decay: float


class Classifier(nn.Module):
    """A plain ViT and a linear head."""

    model: vit.ViT
    classes: int

    @nn.compact
    def __call__(self, image, train=False):
        tokens, _ = self.model(image, train=train)
        return nn.Dense(self.classes, name="head")(tokens.mean(1))


@dataclasses.dataclass(frozen=True)
class Toy(base.Method):
    """Classification with an EMA copy of the parameters."""

    run: base.Run
    model: vit.ViT
    ema: Ema

    @property
    def net(self):
        return Classifier(self.model, 10)

    @staticmethod
    def training_size(c):
        return 16

    def transform(self):
        return keep

    def init(self, rng, batch):
        image = jnp.zeros((1, *batch["image"].shape[1:]))
        params = self.net.init(rng, image)["params"]
        return params, {"ema": tree.copy(params)}

    def loss(self, params, extra, batch, rng, *, step=0, phase):
        image = patches.normalise(batch["image"], self.run.mean, self.run.std)
        logits = self.net.apply(
            {"params": params}, image, train=True, rngs={"drop_path": rng}
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        # A test makes a step non-finite by a negative label.
        loss = jnp.where(batch["label"] < 0, jnp.nan, loss).mean()
        return loss, (extra, {"logit_std": logits.std()})

    def after(self, params, extra, step):
        return {"ema": tree.ema(extra["ema"], params, self.ema.decay)}

    def adopt(self, params, extra):
        return {"ema": tree.copy(params)}

    def phase(self, step):
        return ()

    def features(self, params, extra, image):
        image = patches.normalise(image, self.run.mean, self.run.std)
        tokens, _ = self.model.apply({"params": params["model"]}, image)
        return {"pooled": tokens[:, 1:].mean(1), "tokens": tokens[:, 1:]}

    def check(self):
        return ()


def keep(example, rng):
    """A transform that changes nothing."""
    return {k: example[k] for k in ("image", "label", "index")}


def make(drop_path=0.0, depth=3, width=32, **model):
    """Return a toy method for 16 px images of one channel."""
    net = vit.ViT(
        width=width,
        depth=depth,
        heads=2,
        patch=4,
        image_size=16,
        drop_path=drop_path,
        **model,
    )
    run = base.Run(
        total_steps=20,
        steps_per_epoch=5,
        batch_size=8,
        classes=10,
        channels=1,
        mean=(0.5,),
        std=(0.5,),
    )
    return Toy(run, net, Ema(0.9))


def batch(seed=0, size=8):
    """Return a batch of random images."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, 16, 16, 1)).astype(np.uint8),
        "label": rng.integers(0, 10, size).astype(np.int32),
        "index": np.arange(size, dtype=np.int32),
    }


def optimizer(method, **changes):
    """Return AdamW for a toy method."""
    values = dict(
        name="adamw",
        lr=1e-3,
        schedule="cosine",
        warmup_epochs=1.0,
        min_lr=1e-5,
        start_lr=1e-4,
        wd=0.05,
        clip_norm=1.0,
    )
    spec = optim.Optim(**{**values, **changes})
    params, _ = jax.eval_shape(method.init, jax.random.key(0), batch())
    return optim.make(
        spec,
        params,
        total_steps=method.run.total_steps,
        steps_per_epoch=method.run.steps_per_epoch,
        batch_size=method.run.batch_size,
    )
