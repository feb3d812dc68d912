"""What starts Xavier-uniform: OlmoEarth's layers, with LayerNorms of 1e-5; MAE's nets.

`models.layers` has timm's.
"""

import dataclasses
from typing import Literal

import jax
from flax import linen as nn

from vitssl import tree
from vitssl.models import layers

EPS = 1e-5


class Linear(nn.Module):
    """Linear layer of the last axis; weights Xavier-uniform, bias 0."""

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):  # [..., C] -> [..., features]
        init = nn.initializers.xavier_uniform()
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return layers.linear(x, kernel, bias, self.dtype)


class MLP(nn.Module):
    """Two linear layers around the exact GELU."""

    hidden: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):  # [..., D] -> [..., D]
        y = Linear(self.hidden, self.dtype, name="fc1")(x)
        return Linear(x.shape[-1], self.dtype, name="fc2")(layers.gelu(y))


def redraw(rng, params, keep=()):
    """Return parameters of a ViT or a decoder with the initial values of MAE.

    Linear layers start Xavier-uniform (the packed query-key-value matrix as one), the
    patch embedding too, as a [D, p p C] matrix; class and mask tokens normal(0.02).

    Args:
        keep: beginnings of the names of layers that keep what they have.

    Source: facebookresearch/mae models_mae.py:initialize_weights; LocalMIM's, whose
    heads keep PyTorch's, in utkutpcgl/ViTFreeze ViT/models_mim.py.
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
        elif parts[-1] == "kernel" and not parts[0].startswith(tuple(keep)):
            leaves[name] = draw(key, leaf.shape)
    return tree.nest(leaves)


@dataclasses.dataclass(frozen=True)
class Start:
    """Config section `start`: what an encoder starts as.

    Attributes:
        encoder: normal: as timm's ViT. xavier: as MAE's, see `redraw`; in a narrow
            network its blocks then say something from the first step on.
    """

    encoder: Literal["normal", "xavier"] = "normal"

    def __call__(self, rng, params):
        """Return the initial parameters of an encoder whose normal ones are given."""
        return redraw(rng, params) if self.encoder == "xavier" else params


def norm(dtype, name=None):
    """Return a LayerNorm with this module's epsilon."""
    return layers.LayerNorm(EPS, dtype, name=name)
