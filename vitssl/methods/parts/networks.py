"""Classifiers that find parts and look at nothing else, and those that find none.

`PartNet` (PDiscoFormer, PDiscoNet): a first network finds K parts and a background.
`TwoStage` (iFAM): a second one, which shares nothing with it, classifies from the
patches of the parts alone. `Baseline`: one ViT to compare with.

All have the same parameter names: stage_1/{backbone, head} finds parts, stage_2/
{backbone, fc_norm, head, pool} classifies, so that the same optimizer rules, weight
tables and `init` patterns serve all.

Sources: Aniraj et al. 2025, arXiv:2506.08915; Aniraj et al. 2024, arXiv:2407.04538;
code ananthu-aniraj/ifam@bc8eeae, ananthu-aniraj/pdiscoformer@f039c15.
"""

from typing import Literal, NamedTuple

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn

from vitssl.methods.parts import heads, maps
from vitssl.models import layers, patches, vit

Masking = Literal["hard", "straight_through", "soft"]
Pooling = Literal["cls", "gap", "gap_cls", "ep", "aim", "late_mask"]
SLICES = {"ep": 32, "aim": 12}  # Into which a pooling cuts the width.


class Outputs(NamedTuple):
    """What a network says of a batch of images."""

    logits: jax.Array  # [B, C], the prediction.
    found: heads.Found | None  # By the first stage, if there is one.
    mask: jax.Array | None  # [B, h, w] weight of every patch in the second stage.


class PartNet(nn.Module):
    """A backbone and the head that finds parts in its tokens.

    Attributes:
        backbone: `vit.ViT`, or a convolutional network.
        head: finds the parts.
    """

    backbone: nn.Module
    head: heads.PartHead

    def __call__(
        self, image, draws=maps.QUIET, *, train=False, **options
    ) -> heads.Found:
        """Find parts in normalised images [B, H, W, Ch]; options are those of the head.

        Args:
            train: drop paths, batch statistics.
        """
        return self.head(self.tokens(image, train), draws, **options)

    def tokens(self, image, train=False):  # [B, H, W, Ch] -> [B, h, w, D]
        """Return the grid of tokens of images."""
        if not isinstance(self.backbone, vit.ViT):
            return self.backbone(image, train=train)
        tokens, out = self.backbone(image, train=train)
        h, w = out["grid"]
        tokens = tokens[:, self.backbone.prefix :]
        return einops.rearrange(tokens, "b (h w) d -> b h w d", h=h, w=w)


class MaskedClassifier(nn.Module):
    """A ViT that classifies from its class token and sees the masked-in patches only.

    A masked-out patch is neither key nor value in any block, so leaving it out of the
    sequence changes no other token. Hard masks therefore drop patches before the
    embedding: their pixels enter nothing.

    Attributes:
        backbone: the ViT; it needs a class token.
        classes: C.
        norm: LayerNorm (eps 1e-5) between class token and classifier.
        rooms: fractions of the patches, ascending, the last 1.0. A batch is computed
            in the smallest room that holds its fullest mask, chosen on the device, so
            pruning is exact and shapes are static. (1.0,) compiles one room.

    Source: ananthu-aniraj/ifam models/attn_mask_vit_2_stage.py.
    """

    backbone: vit.ViT
    classes: int
    norm: bool = True
    rooms: tuple[float, ...] = (1.0,)

    def setup(self):
        """Declare the classifier."""
        if self.norm:
            self.fc_norm = layers.LayerNorm(1e-5)
        self.head = heads.Projection(self.classes)

    def __call__(self, image, mask, *, masking: Masking = "hard", train=False):
        """Return float32 logits [B, C] of normalised images [B, H, W, Ch].

        Args:
            mask: [B, h, w] weight of every patch, in [0, 1].
            masking: "hard": patches with mask 0 do not exist, the others count alike,
                and the mask gets no gradient, as published; "straight_through": the
                same values, with the gradient of a weight on the keys; "soft": keys
                count mask + 1e-10 (the original's bias log(mask + 1e-10)).
            train: drop paths.
        """
        return self.head(self.embed(image, mask, masking=masking, train=train))

    def embed(self, image, mask, *, masking: Masking = "hard", train=False):
        """Return what is classified, [B, D] float32; arguments as in a call."""
        mask = einops.rearrange(mask, "b h w -> b (h w)")
        if masking == "hard":
            tokens = self._pruned(image, mask != 0.0, train)
        elif masking == "straight_through":
            tokens = self.backbone(image, weight=mask, train=train)[0]
        else:
            tokens = self.backbone(image, weight=mask + 1e-10, train=train)[0]
        cls = tokens[:, 0].astype(jnp.float32)
        return self.fc_norm(cls) if self.norm else cls

    def _pruned(self, image, seen, train):
        """Return the class token [B, 1, D] beside the seen [B, N] patches."""
        n = seen.shape[-1]
        rooms = sorted({max(1, min(n, round(f * n))) for f in self.rooms})
        if self.is_initializing() or len(rooms) == 1:
            return self._in_room(rooms[-1], train)(self, image, seen)
        most = seen.sum(-1).max()
        which = jnp.searchsorted(jnp.asarray(rooms), most, side="left")
        branches = [self._in_room(r, train) for r in rooms]
        return nn.switch(which, branches, self, image, seen)

    @staticmethod
    def _in_room(slots, train):
        """Return the computation of the class token [B, 1, D] in so many slots."""

        def run(self, image, seen):
            keep, count = patches.pack(seen, slots)
            tokens, _ = self.backbone(image, keep=keep, count=count, train=train)
            return tokens[:, :1]

        return run


class TwoStage(nn.Module):
    """Find parts, then classify from them alone; see the module."""

    stage_1: PartNet
    stage_2: MaskedClassifier
    masking: Masking = "hard"

    def __call__(
        self,
        image,
        draws=maps.QUIET,
        *,
        train=False,
        removed=(),
        removal: maps.Removal = "zero",
        **options,
    ) -> Outputs:
        """Classify normalised images [B, H, W, Ch]; options are those of `PartHead`.

        Args:
            train: drop paths.
            removed: ids of parts to take away first (evaluation).
            removal: see `maps.without_parts`.
        """
        found = self.stage_1(image, draws, train=train, **options)
        hard, soft = found.hard[..., 0], found.soft[..., 0]
        if removed:
            hard, soft = maps.without_parts(found.maps, removed, removal)
        mask = soft if self.masking == "soft" else hard
        logits = self.stage_2(image, mask, masking=self.masking, train=train)
        return Outputs(logits, found, mask)

    def embed(self, image, *, train=False):
        """Return (tokens [B, h, w, D] and maps of stage 1, embedding of stage 2)."""
        z = self.stage_1.tokens(image, train)
        found = self.stage_1.head(z)
        mask = (found.soft if self.masking == "soft" else found.hard)[..., 0]
        pooled = self.stage_2.embed(image, mask, masking=self.masking, train=train)
        return z, pooled, found.maps


class OneStage(nn.Module):
    """Part discovery alone: its mean part scores are the prediction."""

    stage_1: PartNet

    def __call__(self, image, draws=maps.QUIET, *, train=False, **options) -> Outputs:
        """See `TwoStage`."""
        found = self.stage_1(image, draws, train=train, **options)
        return Outputs(found.class_logits, found, found.hard[..., 0])

    def embed(self, image, *, train=False):
        """Return (tokens [B, h, w, D], their mean [B, D], maps [B, h, w, K+1])."""
        z = self.stage_1.tokens(image, train)
        return z, z.astype(jnp.float32).mean((1, 2)), self.stage_1.head(z).maps


def discover(net, image, draws=maps.QUIET, *, train=False) -> heads.Found:
    """Return what the first stage of a network alone says of images."""
    return net.stage_1(image, draws, train=train)


class NoParts(nn.Module):
    """A classifier that finds no parts, on all patches or on those of a given mask."""

    stage_2: nn.Module

    def __call__(self, image, mask=None, *, train=False) -> Outputs:
        """Classify normalised images [B, H, W, Ch]; mask [B, h, w] where needed."""
        args = () if mask is None else (mask,)
        return Outputs(self.stage_2(image, *args, train=train), None, mask)

    def embed(self, image, *, train=False):
        """Return (patch tokens [B, N, D], class token [B, D], None: no maps)."""
        tokens, _ = self.stage_2.backbone(image, train=train)
        prefix = self.stage_2.backbone.prefix
        return tokens[:, prefix:], tokens[:, 0].astype(jnp.float32), None


class EfficientProbing(nn.Module):
    """Learned queries attend to raw tokens; each owns a slice of the value channels.

    Source: Psomas et al. 2025, arXiv:2506.10178.
    """

    queries: int = SLICES["ep"]

    @nn.compact
    def __call__(self, tokens):  # [B, N, D] -> [B, D]
        d = tokens.shape[-1]
        query = self.param("query", layers.normal, (1, self.queries, d))
        value = heads.Projection(d, name="v")(tokens)
        value = einops.rearrange(value, "b n (q c) -> b n q c", q=self.queries)
        logits = jnp.einsum("qd,bnd->bqn", query[0] * d**-0.5, tokens)
        out = jnp.einsum("bqn,bnqc->bqc", jax.nn.softmax(logits, axis=-1), value)
        return einops.rearrange(out, "b q c -> b (q c)")


class AttentionPool(nn.Module):
    """One learned query over batch-normalised tokens, multi-head.

    Source: El-Nouby et al. 2024 (AIM), arXiv:2401.08541, appendix.
    """

    heads: int = SLICES["aim"]

    @nn.compact
    def __call__(self, tokens, train=False):  # [B, N, D] -> [B, D]
        b, _, d = tokens.shape
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
                jnp.broadcast_to(query, (b, 1, d)),
                heads.Projection(d, name="k")(x),
                heads.Projection(d, name="v")(x),
            )
        )
        out, _ = layers.softmax_attention(q, k, v)
        return einops.rearrange(out, "b 1 h c -> b (h c)")


class Baseline(nn.Module):
    """A ViT, a way to pool its tokens and a linear classifier.

    Attributes:
        backbone: the ViT.
        classes: C.
        pooling: "cls" the class token; "gap" the mean patch; "gap_cls" both joined;
            "ep" `EfficientProbing`; "aim" `AttentionPool`; "late_mask" the mean over
            all patches after those outside a given mask became 0.

    Source: ananthu-aniraj/ifam models/vit_baseline_ep.py, models/late_mask_vit.py.
    """

    backbone: vit.ViT
    classes: int
    pooling: Pooling = "cls"

    @nn.compact
    def __call__(self, image, mask=None, *, train=False):
        """Return the logits [B, C] of normalised images [B, H, W, Ch].

        Args:
            mask: [B, h, w] for "late_mask".
            train: drop paths, batch statistics.
        """
        tokens, _ = self.backbone(image, train=train)
        pooled = self._pool(tokens.astype(jnp.float32), mask, train)
        linear = heads.Projection if self.pooling == "aim" else layers.Dense
        return linear(self.classes, name="head")(pooled)

    def _pool(self, tokens, mask, train):
        """Return [B, D] (twice that for "gap_cls") of all tokens [B, P + N, D]."""
        cls, spatial = tokens[:, 0], tokens[:, self.backbone.prefix :]
        if self.pooling == "cls":
            return cls
        if self.pooling == "late_mask":
            return (spatial * einops.rearrange(mask, "b h w -> b (h w) 1")).mean(1)
        if self.pooling == "ep":
            return EfficientProbing(name="pool")(spatial)
        if self.pooling == "aim":
            return AttentionPool(name="pool")(spatial, train)
        gap = spatial.mean(1)
        return gap if self.pooling == "gap" else jnp.concatenate([cls, gap], axis=-1)
