"""The projection head of contrastive learning: thrown away after pre-training."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from vitssl.models import head

EPS = 1e-5  # Of the batch normalisation.


@dataclasses.dataclass(frozen=True)
class Projector:
    """Config section `projector`: linear, ReLU, linear.

    Attributes:
        width: of the projections.
        hidden: width in between; 0 = that of the features.
        batchnorm: batch normalisation with gain and bias before the ReLU; its averages
            are not trained.

    Source: Chen et al. 2020 (SimCLR), arXiv:2002.05709, section 2.1;
    w2sg-arnav/HierarchialViT scripts/pretrain.py (none) and
    phase3_pretraining/models/projection_head.py (4096, 256, with batchnorm).
    """

    width: int = 128
    hidden: int = 0
    batchnorm: bool = False

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        if self.width < 1:
            yield f"width={self.width}: 1 or more"
        if self.hidden < 0:
            yield f"hidden={self.hidden}: 0 (the width of the features) or more"

    def init(self, rng, features: int):
        """Return (params, stats) for features [B, features]; stats is {} without BN.

        Weights and biases are uniform in +-1 / sqrt(fan in), PyTorch's default.
        """
        hidden = self.hidden or features
        keys = jax.random.split(rng)
        params = {
            "fc1": _linear(keys[0], features, hidden),
            "fc2": _linear(keys[1], hidden, self.width),
        }
        if not self.batchnorm:
            return params, {}
        params["norm"] = {"scale": jnp.ones(hidden), "bias": jnp.zeros(hidden)}
        return params, {"mean": jnp.zeros(hidden), "var": jnp.ones(hidden)}

    def __call__(self, params, stats, x, *, train=False):
        """Return (projections [B, width] float32, stats after the batch).

        Args:
            params, stats: from `init`.
            x: features [B, D].
            train: use, and update, the statistics of the batch.
        """
        x = _apply(params["fc1"], x.astype(jnp.float32))
        if self.batchnorm:
            x, stats = head.batch_norm(x, stats, train, eps=EPS)
            x = x * params["norm"]["scale"] + params["norm"]["bias"]
        return _apply(params["fc2"], jax.nn.relu(x)), stats


def _linear(rng, inputs, outputs):
    keys, bound = jax.random.split(rng), inputs**-0.5
    shapes = {"kernel": (inputs, outputs), "bias": (outputs,)}
    return {
        name: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def _apply(params, x):
    return x @ params["kernel"] + params["bias"]
