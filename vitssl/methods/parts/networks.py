"""Classifiers that first find parts and then look at nothing else.

`TwoStage` (iFAM): a first network finds K parts and a background; a second one, which
shares nothing with it, classifies from the patches of the parts alone. `PartNet`
(PDiscoFormer, PDiscoNet): the first network by itself.

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


class Outputs(NamedTuple):
    """What `TwoStage` says of a batch of images.

    Attributes:
        logits: [B, C] of the second stage: the prediction.
        found: `partheads.Found` of the first stage.
        mask: [B, h, w] weight with which every patch was seen by the second stage.
    """

    logits: jax.Array
    found: heads.Found
    mask: jax.Array


class PartNet(nn.Module):
    """A backbone and the head that finds parts in its tokens.

    Attributes:
        backbone: `vit.ViT`, or a convolutional network with `features`.
        head: see `partheads.PartHead`.
    """

    backbone: nn.Module
    head: heads.PartHead

    def __call__(self, image, draws=None, *, train=False, **options):
        """Find parts in images [B, H, W, Ch], normalised.

        Args:
            image: see above.
            draws: `partmaps.Draws`; None = no noise.
            train: drop paths, batch statistics.
            **options: of `PartHead`.

        Returns:
            `partheads.Found`.
        """
        z = self.tokens(image, train)
        return self.head(z, maps.Draws() if draws is None else draws, **options)

    def tokens(self, image, train=False):
        """Return the grid of tokens [B, h, w, D] of images."""
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
        """Classify images.

        Args:
            image: [B, H, W, Ch], normalised.
            mask: [B, h, w] weight of every patch, in [0, 1].
            masking: "hard": patches with mask 0 do not exist, the others count alike,
                and the mask gets no gradient, as published; "straight_through": the
                same values, with the gradient of a weight on the keys; "soft": keys
                count mask + 1e-10 (the original's bias log(mask + 1e-10)).
            train: drop paths.

        Returns:
            [B, C] float32.
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
    """Find parts, then classify from them alone; see the module.

    Attributes:
        stage_1: finds the parts.
        stage_2: classifies.
        masking: see `MaskedClassifier`.
    """

    stage_1: PartNet
    stage_2: MaskedClassifier
    masking: Masking = "hard"

    def __call__(
        self,
        image,
        draws=None,
        *,
        train=False,
        removed=(),
        removal: maps.Removal = "zero",
        **options,
    ) -> Outputs:
        """Classify images [B, H, W, Ch], normalised.

        Args:
            image: see above.
            draws: `partmaps.Draws`; None = no noise.
            train: drop paths.
            removed: ids of parts to take away first (evaluation).
            removal: see `partmaps.without_parts`.
            **options: of `PartHead`.
        """
        found = self.stage_1(image, draws, train=train, **options)
        hard, soft = found.hard[..., 0], found.soft[..., 0]
        if removed:
            hard, soft = maps.without_parts(found.maps, removed, removal)
        mask = soft if self.masking == "soft" else hard
        logits = self.stage_2(image, mask, masking=self.masking, train=train)
        return Outputs(logits, found, mask)

    def discover(self, image, draws=None, *, train=False):
        """Return `partheads.Found` of images: the first stage alone."""
        return self.stage_1(image, draws, train=train)

    def classify(self, image, mask):
        """Return the logits [B, C] of images under a given mask [B, h, w]."""
        return self.stage_2(image, mask, masking=self.masking)

    def embed(self, image):
        """Return (tokens [B, h, w, D] of stage 1, embedding [B, D] of stage 2)."""
        z = self.stage_1.tokens(image)
        found = self.stage_1.head(z, maps.Draws())
        mask = (found.soft if self.masking == "soft" else found.hard)[..., 0]
        return z, self.stage_2.embed(image, mask, masking=self.masking)
