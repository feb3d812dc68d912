"""The initial values of LocalMIM's parameters."""

import jax
from flax import linen as nn

from vitssl import tree
from vitssl.models import layers


def xavier(rng, params):
    """Return parameters with LocalMIM's initial values.

    Linear layers start Xavier-uniform (the packed query-key-value matrix as one), the
    patch embedding too, as a [D, p p C] matrix; class and mask tokens normal(0.02).
    The decoders' heads (up_*, pred) keep what they have.

    Source: utkutpcgl/ViTFreeze ViT/models_mim.py:initialize_weights.
    """
    draw = nn.initializers.xavier_uniform()
    leaves = tree.flat(params)
    for i, (name, leaf) in enumerate(sorted(leaves.items())):
        key, parts = jax.random.fold_in(rng, i), name.split("/")
        if parts[-1] == "cls":
            leaves[name] = layers.normal(key, leaf.shape)
        elif parts[0] == "patch_embed" and parts[-1] == "kernel":
            flat = draw(key, (leaf[..., 0].size, leaf.shape[-1]))
            leaves[name] = flat.reshape(leaf.shape)
        elif parts[-1] == "kernel" and not parts[0].startswith(("up_", "pred")):
            leaves[name] = draw(key, leaf.shape)
    return tree.nest(leaves)
