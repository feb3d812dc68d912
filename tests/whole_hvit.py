"""The hierarchical transformer with its heads: a whole model, as its authors built it.

The methods put their own heads on `hvit.HViT`; this is for weights of the original, for
what only it has, and for its other modes in one forward pass.
"""

import einops
import jax.numpy as jnp
from flax import linen as nn

from vitssl.models import hvit, layers


class Classifier(nn.Module):
    """LayerNorm and a linear layer, in float32; names as in `head.Head`."""

    classes: int
    eps: float

    @nn.compact
    def __call__(self, x):  # [B, D] -> [B, C]
        x = layers.LayerNorm(self.eps, name="norm")(x.astype(jnp.float32))
        shape = (x.shape[-1], self.classes)
        kernel = self.param("kernel", layers.normal, shape)
        bias = self.param("bias", nn.initializers.zeros, shape[1:])
        return x @ kernel + bias


class Projections(nn.Module):
    """Linear layers with the exact GELU between them, in float32.

    Attributes:
        widths: of every layer's output.
    """

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):  # [..., D] -> [..., widths[-1]]
        x = x.astype(jnp.float32)
        for i, width in enumerate(self.widths):
            x = nn.gelu(x, approximate=False) if i else x
            x = layers.Dense(width, name=f"fc{i + 1}")(x)
        return x


class HViTModel(nn.Module):
    """HViT with every head that is asked for.

    Attributes:
        backbone: both streams and what joins them.
        classes: C of the classifier; 0 = none.
        consistency: one more classifier on the mean token of each stream.
        projector: widths of the contrastive head on the joined mean token; () = none.
        mae: hidden width of the heads that predict pixels, one per stream; 0 = none.
        mae_hides: a mask hides patches of the last stage's size from the encoder, as a
            masked autoencoder must. False is the original: it encodes the whole image,
            which makes the task a copy, and knows one stage only.

    Source: w2sg-arnav/HierarchialViT hvit/models/hvt.py (forward_mode "classify",
    "get_embeddings", "contrastive", "mae"). Masked: He et al. 2021, arXiv:2111.06377.
    """

    backbone: hvit.HViT
    classes: int = 0
    consistency: bool = False
    projector: tuple[int, ...] = ()
    mae: int = 0
    mae_hides: bool = True

    @nn.compact
    def __call__(self, image, *, spectral=None, mask=None, train=False):
        """Return all that the backbone and the heads say of images.

        Args:
            image, spectral, train: see `hvit.HViT`.
            mask: [B, n] bool, n the number of last tokens, True = hidden; for `mae`.

        Returns:
            Those of the backbone, and of every head that exists: "logits",
            "logits_rgb", "logits_spectral" [B, C], "projection" [B, widths[-1]],
            "pixels" and "spectral_pixels" [B, n, C p p]: of every last token, hidden
            or not, the pixels of its p x p square in the order of `square_pixels`.

        Raises:
            ValueError: see `hvit.HViT`; also mae_hides=False with several stages, or a
                mask on images that squares do not fill.
        """
        blank, fill = None, self._mask_tokens() if self.mae else ()
        if mask is not None and fill:
            blank = self._spread(mask, image), fill
        out = self.backbone(image, spectral=spectral, train=train, blank=blank)
        streams = {"": "rgb"} | ({"spectral_": "spectral"} if "spectral" in out else {})
        eps = self.backbone.norm_eps
        if self.classes:
            out["logits"] = Classifier(self.classes, eps, name="head")(out["pooled"])
        if self.classes and self.consistency:
            for name in streams.values():
                aux = Projections((self.classes,), name=f"aux_{name}")
                out[f"logits_{name}"] = aux(out[f"{name}_pooled"])
        if self.projector:
            project = Projections(self.projector, name="projector")
            out["projection"] = project(out["pooled"])
        if self.mae:
            for prefix, name in streams.items():
                size = self._channels(name, image) * self.square**2
                head = Projections((self.mae, size), name=f"mae_{name}")
                out[f"{prefix}pixels"] = head(out[name])
        return out

    @property
    def square(self) -> int:
        """Side, in pixels, of the square that a token of the last stage stands for."""
        return self.backbone.square

    def _channels(self, name, image):
        """Return the channels of a stream's image."""
        if name == "spectral":
            return self.backbone.spectral_channels
        both = self.backbone.spectral_channels
        return self.backbone.rgb_channels if both else image.shape[-1]

    def _mask_tokens(self):
        """Return the token [D] of hidden patches of each stream: parameters, or ()."""
        net = self.backbone
        if not self.mae_hides:
            if len(net.depths) > 1:
                raise ValueError(
                    "HViT: mae_hides=False compares tokens of the last stage with "
                    "patches of the first: only for depths of one stage"
                )
            return ()
        widths = {"mask_token": net.width}
        if net.spectral_channels:
            widths["spectral_mask_token"] = net.spectral_width or net.width
        return tuple(
            self.param(name, layers.normal, (d,)) for name, d in widths.items()
        )

    def _spread(self, mask, image):
        """Return the mask [B, N] over patches of the first stage of [B, n]."""
        height, width = image.shape[1:3]
        side = self.square
        if height % side or width % side:
            raise ValueError(
                f"HViT: masks hide squares of {side} px, which do not fill an image of "
                f"{height}x{width}"
            )
        ratio = side // self.backbone.patch
        return einops.repeat(
            mask,
            "b (h w) -> b (h r w c)",
            h=height // side,
            r=ratio,
            c=ratio,
        )


def square_pixels(image, side):
    """Return the pixels of every square [B, n, C side side], channel by channel.

    The order in a square is (channel, row, column), unlike `models.patches.patchify`.
    """
    return einops.rearrange(image, "b (h p) (w q) c -> b (h w) (c p q)", p=side, q=side)
