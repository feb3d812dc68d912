"""Layers that start Xavier-uniform, with LayerNorms of epsilon 1e-5, as OlmoEarth's.

`models.layers` has timm's.
"""

from flax import linen as nn

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


def norm(dtype, name=None):
    """Return a LayerNorm with this module's epsilon."""
    return layers.LayerNorm(EPS, dtype, name=name)
