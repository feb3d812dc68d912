"""A plain ViT classifier as a method: what there is to time of a backbone alone."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vitssl.methods import base
from vitssl.models import patches, vit

SIZES = {"ti": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}


class Network(nn.Module):
    """A ViT and a linear head on its class token."""

    model: vit.ViT
    classes: int

    @nn.compact
    def __call__(self, image, train=False):  # [B, H, W, C] -> [B, classes]
        tokens, _ = self.model(image, train=train)
        return nn.Dense(self.classes, name="head")(tokens[:, 0].astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Plain:
    """Supervised training without anything else; see `base.Method`."""

    run: base.Run
    model: vit.ViT
    couples_batch = False

    @property
    def _network(self):
        return Network(self.model, self.run.classes)

    def init(self, rng, batch):
        """Return (params, {})."""
        image = jnp.zeros((1, *batch["image"].shape[1:]))
        return self._network.init(rng, image)["params"], {}

    def loss(self, params, extra, batch, rng, *, phase):
        """Return the mean cross-entropy of the class token's logits."""
        image = patches.normalise(batch["image"], self.run.mean, self.run.std)
        logits = self._network.apply(
            {"params": params}, image, train=True, rngs={"drop_path": rng}
        )
        label = batch["label"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
        return loss, (extra, {})

    def after(self, params, extra, step):
        """Return `extra`; there is nothing to update."""
        return extra

    def adopt(self, params, extra):
        """Return `extra`; it does not depend on the parameters."""
        return extra

    def phase(self, step):
        """Return (): every step is alike."""
        return ()


def shapes(batch_size: int, image: int, channels: int = 3):
    """Return the shapes of a batch of uint8 images and labels."""
    return {
        "image": jax.ShapeDtypeStruct((batch_size, image, image, channels), "uint8"),
        "label": jax.ShapeDtypeStruct((batch_size,), "int32"),
    }


def named(name: str, image: int, **changes) -> vit.ViT:
    """Return the ViT of a name such as "b16" or "ti16" for square images."""
    size = name.rstrip("0123456789")
    width, depth, heads = SIZES[size]
    patch = int(name[len(size) :])
    return vit.ViT(
        width=width,
        depth=depth,
        heads=heads,
        patch=patch,
        image_size=image,
        **changes,
    )
