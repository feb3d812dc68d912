"""The classifier on top of a backbone: normalise, drop, project."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Head:
    """Config section `head`.

    Attributes:
        pool: feature of an image: "gap", the mean of the patch tokens before any norm,
            then a LayerNorm of its own; "mean" and "cls", after the backbone's norm;
            "mean_norm", the mean after the backbone's norm, then one more (HViT).
        batchnorm: batch normalisation without gain and bias before the linear layer
            (the linear probe of MAE); its averages are not trained.
        init_std: of the linear layer's weights; its bias starts at 0.
        dropout: of what the linear layer gets.
        norm_eps: of the LayerNorm of its own.
    """

    pool: Literal["gap", "mean", "cls", "mean_norm"] = "gap"
    batchnorm: bool = False
    init_std: float = 2e-5
    dropout: float = 0.0
    norm_eps: float = EPS

    @property
    def feature(self) -> str:
        """What the head wants of a backbone: "gap", "mean" or "cls"."""
        return self.pool.removesuffix("_norm")

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        if self.init_std < 0:
            yield f"init_std={self.init_std}: 0 or more"
        if not 0 <= self.dropout < 1:
            yield f"dropout={self.dropout}: in [0, 1)"
        if not self.norm_eps > 0:
            yield f"norm_eps={self.norm_eps}: must be positive"

    def init(self, rng, width: int, classes: int):
        """Return (params, stats) for features [B, width]; stats is {} without BN."""
        kernel = self.init_std * jax.random.normal(rng, (width, classes))
        params = {"kernel": kernel, "bias": jnp.zeros(classes)}
        if self.pool in ("gap", "mean_norm"):
            params["norm"] = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
        stats = {}
        if self.batchnorm:
            stats = {"mean": jnp.zeros(width), "var": jnp.ones(width)}
        return params, stats

    def __call__(self, params, stats, x, *, train=False, rng=None):
        """Return (logits [B, K], stats after the batch, input of the linear layer).

        Args:
            params, stats: from `init`.
            x: features [B, D].
            train: use, and update, the statistics of the batch; drop.
            rng: for dropout.
        """
        x = x.astype(jnp.float32)
        if "norm" in params:
            norm = params["norm"]
            x = layer_norm(x, norm["scale"], norm["bias"], self.norm_eps)
        if self.batchnorm:
            x, stats = batch_norm(x, stats, train)
        features = x
        if train and self.dropout:
            keep = jax.random.bernoulli(rng, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0.0)
        return x @ params["kernel"] + params["bias"], stats, features


def layer_norm(x, scale, bias, eps=EPS):
    """Return the LayerNorm of the last axis, float32."""
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
    return x * scale + bias


def batch_norm(x, stats, train, *, momentum=0.1, eps=EPS):
    """Normalise the rows [B, D] without gain and bias, with PyTorch's conventions.

    The biased variance of the batch normalises, the unbiased one enters the average.

    Args:
        x: [B, D] float32, B of 2 or more in training.
        stats: {"mean", "var"} [D] running averages.
        train: use the statistics of the batch.

    Returns:
        normalised x, new stats.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167; facebookresearch/mae
    main_linprobe.py (affine=False, eps=1e-6).
    """
    mean, var = stats["mean"], stats["var"]
    if train:
        n = x.shape[0]
        mean, var = x.mean(0), x.var(0)
        new = {"mean": mean, "var": var * n / max(1, n - 1)}
        stats = jax.lax.stop_gradient(
            {k: stats[k] + momentum * (new[k] - stats[k]) for k in new}
        )
    return (x - mean) * jax.lax.rsqrt(var + eps), stats
