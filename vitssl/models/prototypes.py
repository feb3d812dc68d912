"""The head that gives every output a score: how alike features are to its prototype.

Source: arXiv:2104.14294, appendix C.
"""

import flax.linen as nn
import jax.numpy as jnp

from vitssl import ranges
from vitssl.losses import regression
from vitssl.models import layers


class Head(nn.Module):
    """Config section `head`: three layers, then length one, then scores.

    The last layer's weights have length one, for each output.

    Attributes:
        outputs: K.
        hidden, bottleneck: widths before them.
        lengths: train the lengths of the last layer's weights, too, from 1
            (norm_last_layer=False of the original).
    """

    outputs: ranges.Count = 65536
    hidden: ranges.Count = 2048
    bottleneck: ranges.Count = 256
    lengths: bool = False

    @nn.compact
    def __call__(self, x):  # [..., D] -> [..., K] float32
        for i in range(2):
            x = layers.gelu(layers.dense(self.hidden, x.dtype, f"fc{i}")(x))
        x = regression.unit(layers.dense(self.bottleneck, x.dtype, "fc2")(x), 1e-12)
        init = layers.uniform_fan_in(self.bottleneck)
        last = self.param("last", init, (self.bottleneck, self.outputs))
        last = last / jnp.linalg.norm(last, axis=0)
        if self.lengths:
            last = last * self.param("lengths", nn.initializers.ones, self.outputs)
        return x @ last
