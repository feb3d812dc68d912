"""Random weights in the layouts of published checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import tree
from vitssl.convert import backbone, exporter
from vitssl.models import vit

MODEL = dict(width=32, depth=2, heads=2, patch=8, image_size=32, mlp_ratio=2.0)


def network(seed=0, classes=0, channels=3, pool="cls", **fields) -> backbone.Backbone:
    """Return a ViT whose leaves are all different."""
    fields = MODEL | fields
    side = fields["image_size"]
    image = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    shapes = jax.eval_shape(vit.ViT(**fields).init, jax.random.key(0), image)
    shapes = {f"encoder/{k}": x for k, x in tree.flat(shapes["params"]).items()}
    if classes:
        shapes["head/kernel"] = jax.ShapeDtypeStruct((32, classes), jnp.float32)
        shapes["head/bias"] = jax.ShapeDtypeStruct((classes,), jnp.float32)
    rng = np.random.default_rng(seed)
    leaves = {
        name: (0.1 * rng.normal(size=x.shape)).astype(np.float32)
        for name, x in shapes.items()
    }
    about = backbone.About({"name": "vit", **fields}, (0.5,) * 3, (0.5,) * 3, pool)
    return backbone.Backbone(about, leaves)


def timm(found, **names) -> dict:
    """Return timm's state dict, with some keys renamed."""
    state = exporter.timm(found).arrays
    return {names.get(key, key): x for key, x in state.items()}


def prefixed(state, prefix) -> dict:
    """Return a state dict with a prefix before every key."""
    return {prefix + key: x for key, x in state.items()}


def tokens(found, image, **fields):
    """Return the tokens [B, P + N, D] of a network."""
    apply = jax.jit(found.module(**fields).apply)
    return np.asarray(apply({"params": found.encoder()}, image)[0])
