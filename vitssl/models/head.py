"""The classifier on top of a backbone: normalise, drop, project."""

import dataclasses
from collections.abc import Iterator
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
        blocks: a head after so many blocks each, rising, the last the whole backbone:
            (3, 6, 9, 12) of a ViT-B; () is that one alone. The loss is the mean over
            the heads. An early one sees the mean of the block's patch tokens (the class
            token with pool="cls") through a LayerNorm of its own.
        weights: of the heads, in the mean and in the average; () is all alike.
        predict: whose classes count: "last", the head of the whole backbone, or
            "average", the mean of all heads' probabilities.
    """

    pool: Literal["gap", "mean", "cls", "mean_norm"] = "gap"
    batchnorm: bool = False
    init_std: ranges.NotNegative = 2e-5
    dropout: ranges.BelowOne = 0.0
    norm_eps: ranges.Positive = EPS
    blocks: tuple[ranges.Count, ...] = ()
    weights: tuple[ranges.Positive, ...] = ()
    predict: Literal["last", "average"] = "last"

    def check(self) -> Iterator[str]:
        """Yield what cannot be combined."""
        n, b = len(self.weights), len(self.blocks)
        if n and n != b:
            yield f"weights has {n} entries for the {b} of blocks={self.blocks}"
        if self.predict == "average" and not b:
            yield "predict=average: needs blocks, the heads to average"

    @property
    def early(self) -> tuple[int, ...]:
        """The blocks of all heads but the last."""
        return self.blocks[:-1]

    @property
    def feature(self) -> str:
        """What the head wants of a backbone: "gap", "mean" or "cls"."""
        return self.pool.removesuffix("_norm")

    def init(self, rng, width: int, classes: int, early: dict[int, int] | None = None):
        """Return (params, stats) for features [B, width]; stats is {} without BN.

        `early` is {block: width} of the early heads, which are under "block_<n>".
        """
        own_norm = self.pool in ("gap", "mean_norm")
        params, stats = self._one(rng, width, classes, own_norm)
        for n, size in (early or {}).items():
            key = jax.random.fold_in(jax.random.fold_in(rng, 0), n)
            params[f"block_{n}"], found = self._one(key, size, classes, True)
            stats |= {f"block_{n}": found} if found else {}
        return params, stats

    def _one(self, rng, width, classes, own_norm):
        kernel = self.init_std * jax.random.normal(rng, (width, classes))
        params = {"kernel": kernel, "bias": jnp.zeros(classes)}
        if own_norm:
            params["norm"] = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
        stats = {}
        if self.batchnorm:
            stats = {"mean": jnp.zeros(width), "var": jnp.ones(width)}
        return params, stats

    def each(self, params, stats, x, early, *, train=False, rng=None):
        """Return ([logits [B, K] of every head, the last one last], stats).

        Args:
            params, stats: from `init`.
            x: features [B, D] of the whole backbone.
            early: {block: features [B, D]} of the early heads.
            train, rng: see `__call__`.
        """
        found, moved = [], {}
        for n, seen in early.items():
            own = f"block_{n}"
            key = None if rng is None else jax.random.fold_in(rng, n)
            given = params[own], stats.get(own, {}), seen
            logits, moved[own], _ = self(*given, train=train, rng=key)
            found.append(logits)
        logits, last, _ = self(params, stats, x, train=train, rng=rng)
        return [*found, logits], (last | moved if stats else {})

    def mean(self, losses):
        """Return the weighted mean [] of one loss per head."""
        shares = self._shares(len(losses))
        return sum(w * x for w, x in zip(shares, losses, strict=True))

    def predicted(self, each):
        """Return the logits [B, K] that name the classes, of those of every head."""
        if self.predict == "last":
            return each[-1]
        log_p = [jax.nn.log_softmax(x.astype(jnp.float32)) for x in each]
        weight = jnp.asarray(self._shares(len(each)))[:, None, None]
        return jax.nn.logsumexp(jnp.stack(log_p), 0, weight)

    def _shares(self, count):
        weights = self.weights or (1.0,) * count
        return [w / sum(weights) for w in weights]

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
