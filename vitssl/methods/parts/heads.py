"""The head that finds parts: prototypes, modulation of part features, class scores.

Axes as in `methods.parts.maps`; C classes.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from vitssl.methods.parts import maps as partmaps
from vitssl.models import layers

Modulation = Literal[
    "layer_norm",
    "original",
    "parallel_mlp",
    "parallel_mlp_no_act",
    "parallel_mlp_no_bias",
    "parallel_mlp_no_act_no_bias",
    "none",
]
Classifier = Literal["linear", "independent_mlp"]


class Found(NamedTuple):
    """What the head says of a batch of images."""

    features: jax.Array  # [B, K+1, D] of the parts, before modulation.
    modulated: jax.Array  # [B, K+1, D]
    maps: jax.Array  # [B, h, w, K+1]
    hard: jax.Array  # [B, h, w, 2] (foreground, background), see `maps.masks`.
    soft: jax.Array  # The same, soft.
    scores: jax.Array  # [B, K, C] class scores of every part.
    dot: jax.Array  # [B, h, w, K+1] products of tokens and prototypes.
    logits: jax.Array  # [B, h, w, K+1] minus squared distances.

    @property
    def class_logits(self):
        """Mean over the parts [B, C]; a dropped part counts as 0."""
        return self.scores.mean(1)


class Projection(nn.Module):
    """Linear layer without bias; weights normal(0.02)."""

    features: int

    @nn.compact
    def __call__(self, x):  # [..., C] -> [..., features]
        shape = (x.shape[-1], self.features)
        return x @ self.param("kernel", layers.normal, shape)


class JointNorm(nn.Module):
    """One LayerNorm over parts and channels together, with a gain for each entry.

    Source: arXiv:2407.04538 (modulation), torch.nn.LayerNorm([D, K+1]).
    """

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x):  # [B, K+1, D] -> [B, K+1, D]
        scale = self.param("scale", nn.initializers.ones, x.shape[1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[1:])
        x = x - x.mean((1, 2), keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean((1, 2), keepdims=True) + self.eps)
        return x * scale + bias


class PartGain(nn.Module):
    """One learned factor per part and channel."""

    @nn.compact
    def __call__(self, x):  # [B, K+1, D] -> [B, K+1, D]
        return x * self.param("gain", nn.initializers.ones, x.shape[1:])


class PerPart(nn.Module):
    """LayerNorm, then a linear layer, of its own for every part."""

    features: int
    use_bias: bool = True
    activation: bool = True  # GELU after the linear layers.

    @nn.compact
    def __call__(self, x):  # [B, K, D] -> [B, K, features]
        rows = []
        for k in range(x.shape[1]):
            y = layers.LayerNorm(1e-5, name=f"norm_{k}")(x[:, k])
            kind = layers.Dense if self.use_bias else Projection
            rows.append(kind(self.features, name=f"fc_{k}")(y))
        y = jnp.stack(rows, axis=1)
        return layers.gelu(y) if self.activation else y


class PartHead(nn.Module):
    """Find K parts and a background in a grid of tokens, and classify the parts.

    Attributes:
        parts: K.
        classes: C.
        temperature: of the softmax over parts.
        modulation: what happens to part features before they are classified.
        classifier: one layer shared by the parts, or one for each.
        part_dropout: probability with which `Draws.keep_features` was drawn; the
            parts that stay are scaled up by it.

    Source: ananthu-aniraj/ifam models/individual_landmark_vit_2_stage_mod.py.
    """

    parts: int
    classes: int
    temperature: float = 1.0
    modulation: Modulation = "layer_norm"
    classifier: Classifier = "linear"
    part_dropout: float = 0.0

    @nn.compact
    def __call__(
        self, z, draws=partmaps.QUIET, thresholds=None, on_distance=False
    ) -> Found:
        """Find parts in tokens [B, h, w, D].

        Args:
            thresholds: [K] or None, see `maps.threshold`, as for on_distance.
        """
        d = z.shape[-1]
        shape = (self.parts + 1, d)
        prototypes = self.param("prototypes", _uniform(d**-0.5), shape)
        dot, logits = partmaps.similarities(z, prototypes)
        used = logits
        if thresholds is not None:
            used = partmaps.threshold(dot, logits, thresholds, on_distance=on_distance)
        maps = partmaps.assign(used, draws.maps, self.temperature)
        masked = partmaps.assign(used, draws.mask, self.temperature)
        hard, soft = partmaps.masks(masked, draws.keep_mask)
        features = partmaps.pool(maps, z)
        modulated = self._modulate(features)
        scores = self._classify(modulated[:, :-1], draws.keep_features)
        return Found(features, modulated, maps, hard, soft, scores, dot, logits)

    def _modulate(self, x):  # [B, K+1, D] -> [B, K+1, D]
        kind, name = self.modulation, "modulation"
        if kind == "none":
            return x
        if kind == "layer_norm":
            return JointNorm(name=name)(x)
        if kind == "original":
            return PartGain(name=name)(x)
        bias, activation = "no_bias" not in kind, "no_act" not in kind
        return PerPart(x.shape[-1], bias, activation, name=name)(x)

    def _classify(self, x, keep):  # [B, K, D], bool [B, K] -> [B, K, C]
        if keep is not None:
            x = x * (keep[..., None] / (1.0 - self.part_dropout))
        if self.classifier == "linear":
            return Projection(self.classes, name="classifier")(x)
        return PerPart(self.classes, False, False, name="classifier")(x)


def _uniform(bound):
    """Uniform in +-bound: torch's default of a convolution with this fan-in."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
