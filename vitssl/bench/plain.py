"""A plain ViT classifier as a method: what there is to time of a backbone alone."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import optax

from vitssl import errors
from vitssl.bench import case, flops
from vitssl.methods import base
from vitssl.models import patches, vit
from vitssl.run import devices

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
class Plain(case.Bare):
    """Supervised training without anything else."""

    run: base.Run
    model: vit.ViT

    @property
    def _network(self):
        return Network(self.model, self.run.classes)

    def init(self, rng, batch):
        """Return (params, {})."""
        image = jnp.zeros((1, *batch["image"].shape[1:]))
        return self._network.init(rng, image)["params"], {}

    def loss(self, params, extra, batch, rng, *, step=0, phase=None):
        """Return the mean cross-entropy of the class token's logits."""
        image = patches.normalise(batch["image"], self.run.mean, self.run.std)
        logits = self._network.apply(
            {"params": params}, image, train=True, rngs={"drop_path": rng}
        )
        label = batch["label"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
        return loss, (extra, {})


def named(name: str, image: int, **changes) -> vit.ViT:
    """Return the ViT of a name such as "b16" or "ti16" for square images.

    Raises:
        UsageError: there is none of that name, or its patches do not fit the image.
    """
    size = name.rstrip("0123456789")
    patch = int(name[len(size) :] or 0)
    if size not in SIZES or not patch:
        raise errors.UsageError(
            f"--vit={name}: want one of {', '.join(SIZES)} and the patch, such as b16"
        )
    if image < 1 or image % patch:
        raise errors.UsageError(f"--image={image}: not made of patches of {patch}")
    width, depth, heads = SIZES[size]
    own = dict(width=width, depth=depth, heads=heads, patch=patch)
    return vit.ViT(image_size=image, **own | changes)


def case_of(name: str, batch: dict, *, dtype: str, seed=0, mesh=None, **changes):
    """Return the step of the ViT of a name on a batch, or on the shapes of one."""
    rows, image = batch["image"].shape[:2]
    facts = base.Run(100, 10, rows, 1000, 3, (0.5,) * 3, (0.5,) * 3, dtype)
    net = named(name, image, dtype=dtype, **changes)
    method, tokens = Plain(facts, net), (image // net.patch) ** 2
    forward = flops.vit(
        tokens + net.prefix,
        tokens,
        width=net.width,
        depth=net.depth,
        patch=net.patch,
        channels=3,
    )
    return case.Case(
        f"vit {name} {image}",
        method,
        case.adamw(method, batch),
        batch,
        dtype,
        seed=seed,
        analytic=3 * forward,
        mesh=mesh or devices.Mesh(),
    )
