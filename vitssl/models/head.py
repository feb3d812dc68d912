"""The classifier on top of a backbone: normalise, drop, project."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from vitssl import ranges
from vitssl.models import layers

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
    init_std: ranges.NotNegative = 2e-5
    dropout: ranges.BelowOne = 0.0
    norm_eps: ranges.Positive = EPS

    @property
    def feature(self) -> str:
        """What the head wants of a backbone: "gap", "mean" or "cls"."""
        return self.pool.removesuffix("_norm")

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
            train: use, and update, the statistics of the batch; drop, by `rng`.
        """
        x = x.astype(jnp.float32)
        if "norm" in params:
            norm = params["norm"]
            x = layers.layer_norm(x, norm["scale"], norm["bias"], self.norm_eps)
        if self.batchnorm:
            x, stats = batch_norm(x, stats, train)
        features = x
        if train and self.dropout:
            keep = jax.random.bernoulli(rng, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0.0)
        return x @ params["kernel"] + params["bias"], stats, features


def batch_norm(x, stats, train, *, momentum=0.1, eps=EPS):
    """Return (normalised rows [B, D], new stats), by PyTorch's conventions.

    Without gain and bias. In training the biased variance of the batch, of 2 or more,
    normalises and the unbiased one enters the running averages {"mean", "var"} [D].

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
