"""Classifiers to compare part discovery with: one ViT, one way to pool its tokens.

Source: ananthu-aniraj/ifam models/vit_baseline_ep.py, models/late_mask_vit.py.
"""

from collections.abc import Iterator
from typing import Literal

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn

from vitssl.methods.parts import heads as partheads
from vitssl.models import layers, vit

Pooling = Literal["cls", "gap", "gap_cls", "ep", "aim", "late_mask"]


class EfficientProbing(nn.Module):
    """Learned queries attend to raw tokens; each owns a slice of the value channels.

    Source: Psomas et al. 2025, arXiv:2506.10178.
    """

    queries: int = 32

    @nn.compact
    def __call__(self, tokens):  # [B, N, D] -> [B, D]
        d = tokens.shape[-1]
        if d % self.queries:
            raise ValueError(f"queries={self.queries} does not divide the width {d}")
        query = self.param("query", layers.normal, (1, self.queries, d))
        value = partheads.Projection(d, name="v")(tokens)
        value = einops.rearrange(value, "b n (q c) -> b n q c", q=self.queries)
        logits = jnp.einsum("qd,bnd->bqn", query[0] * d**-0.5, tokens)
        out = jnp.einsum("bqn,bnqc->bqc", jax.nn.softmax(logits, axis=-1), value)
        return einops.rearrange(out, "b q c -> b (q c)")


class AttentionPool(nn.Module):
    """One learned query over batch-normalised tokens, multi-head.

    Source: El-Nouby et al. 2024 (AIM), arXiv:2401.08541, appendix.
    """

    heads: int = 12

    @nn.compact
    def __call__(self, tokens, train=False):  # [B, N, D] -> [B, D]
        d = tokens.shape[-1]
        if d % self.heads:
            raise ValueError(f"heads={self.heads} does not divide the width {d}")
        x = nn.BatchNorm(
            use_running_average=not train,
            use_scale=False,
            use_bias=False,
            momentum=0.9,
            epsilon=1e-6,
            name="bn",
        )(tokens)
        query = self.param("query", layers.normal, (1, 1, d))
        q, k, v = (
            einops.rearrange(y, "b n (h c) -> b n h c", h=self.heads)
            for y in (
                query,
                partheads.Projection(d, name="k")(x),
                partheads.Projection(d, name="v")(x),
            )
        )
        logits = jnp.einsum("qhc,bkhc->bhqk", q[0], k) * (d // self.heads) ** -0.5
        out = jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(logits, axis=-1), v)
        return einops.rearrange(out, "b q h c -> b q (h c)").mean(1)


class Baseline(nn.Module):
    """A ViT, a way to pool its tokens and a linear classifier.

    Attributes:
        backbone: the ViT.
        classes: C.
        pooling: "cls" the class token; "gap" the mean patch; "gap_cls" both joined;
            "ep" `EfficientProbing`; "aim" `AttentionPool`; "late_mask" the mean over
            all patches after those outside a given mask became 0.
    """

    backbone: vit.ViT
    classes: int
    pooling: Pooling = "cls"

    @nn.compact
    def __call__(self, image, mask=None, *, train=False):
        """Return the logits [B, C] of images [B, H, W, Ch].

        Args:
            image: see above, normalised.
            mask: [B, h, w] for "late_mask".
            train: drop paths, batch statistics.
        """
        tokens, _ = self.backbone(image, train=train)
        tokens = tokens.astype(jnp.float32)
        pooled = self._pool(tokens, mask, train)
        if self.pooling == "aim":
            return partheads.Projection(self.classes, name="head")(pooled)
        return layers.Dense(self.classes, name="head")(pooled)

    def _pool(self, tokens, mask, train):
        """Return [B, D] (twice that for "gap_cls") of all tokens [B, P + N, D]."""
        cls, spatial = tokens[:, 0], tokens[:, self.backbone.prefix :]
        if self.pooling == "cls":
            return cls
        if self.pooling == "late_mask":
            if mask is None:
                raise ValueError("pooling=late_mask: needs a mask")
            mask = einops.rearrange(mask, "b h w -> b (h w) 1")
            return (spatial * mask).mean(1)
        if self.pooling == "ep":
            return EfficientProbing(name="pool")(spatial)
        if self.pooling == "aim":
            return AttentionPool(name="pool")(spatial, train)
        gap = spatial.mean(1)
        return gap if self.pooling == "gap" else jnp.concatenate([cls, gap], axis=-1)

    def check(self) -> Iterator[str]:
        """Yield what does not fit the backbone."""
        many = {"ep": 32, "aim": 12}.get(self.pooling, 1)
        if self.backbone.width % many:
            yield f"pooling={self.pooling}: {many} must divide the backbone's width"
