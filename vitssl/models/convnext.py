"""ConvNeXt whose last two stages make one grid of tokens.

Parameter names follow timm. Sources: Liu et al. 2022, arXiv:2201.03545; strides
replaced by dilation as in timm; stages joined as in ananthu-aniraj/pdiscoformer
models/individual_landmark_convnext.py.
"""

from collections.abc import Iterator

import jax.numpy as jnp
from flax import linen as nn

from vitssl import ranges, sizes
from vitssl.models import layers, resnet


class Block(nn.Module):
    """Depthwise 7x7 convolution, LayerNorm, MLP, gain if not 0; added to the input."""

    dilation: int
    layerscale: float

    @nn.compact
    def __call__(self, x):  # [B, h, w, D] -> [B, h, w, D]
        d = x.shape[-1]
        y = resnet.conv(
            d, 7, 1, self.dilation, name="conv_dw", use_bias=True, groups=d
        )(x)
        y = layers.MLP(4 * d, name="mlp")(layers.LayerNorm(1e-6, name="norm")(y))
        if self.layerscale:
            init = nn.initializers.constant(self.layerscale)
            y = y * self.param("gamma", init, (d,))
        return x + y


class ConvNeXt(nn.Module):
    """ConvNeXt as a backbone for part discovery; one token per pixel of stage 3.

    Attributes:
        depths: blocks of the four stages, (3, 3, 9, 3) in ConvNeXt-T.
        widths: channels of the stages.
        layerscale: initial gain of the residual branches.
        output_stride: 32, 16 or 8; later strides become dilation.
    """

    depths: resnet.Four = (3, 3, 9, 3)
    widths: resnet.Four = (96, 192, 384, 768)
    layerscale: ranges.NotNegative = 1e-6
    output_stride: resnet.Stride = 32

    poolings = ("mean",)

    @property
    def width(self):
        """Channels of a token."""
        return self.widths[-1] + self.widths[-2]

    @nn.compact
    def __call__(self, image, train=False):  # [B, H, W, C] -> [B, h, w, width]
        del train  # No batch statistics, nothing dropped.
        x = nn.Conv(self.widths[0], (4, 4), strides=4, padding="VALID", name="stem")(
            image
        )
        x = layers.LayerNorm(1e-6, name="stem_norm")(x)
        stages, reached, dilation = [], 4, 1
        for s, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            stride = 1 if s == 0 else 2
            if reached >= self.output_stride and stride > 1:
                dilation, stride = dilation * stride, 1
            reached *= stride
            first = 1 if dilation in (1, 2) else 2
            if x.shape[-1] != width or stride > 1 or first != dilation:
                x = self._downsample(x, s, stride, first, dilation)
            for i in range(depth):
                name = f"stage{s}_block{i}"
                x = Block(dilation, self.layerscale, name=name)(x)
            stages.append(x)
        return resnet.join(stages[-1], stages[-2])

    def _downsample(self, x, s, stride, first, dilation):
        """Return the input of stage s, normalised and projected."""
        x = layers.LayerNorm(1e-6, name=f"stage{s}_down_norm")(x)
        k = 2 if stride > 1 or first != dilation else 1
        return nn.Conv(
            self.widths[s],
            (k, k),
            strides=stride,
            kernel_dilation=first,
            padding="SAME" if dilation > 1 else "VALID",
            name=f"stage{s}_down_conv",
        )(x).astype(jnp.float32)

    def features(self, image, train=False) -> dict:
        """Return {"tokens": [B, N, width], "mean": [B, width]} of images."""
        return resnet.pooled(self(image, train))

    def check_channels(self, channels: int) -> Iterator[str]:
        """Yield nothing: images have any number of channels."""
        del channels
        return iter(())

    def check_image(self, size) -> Iterator[str]:
        """Yield why images of this size do not fit: the last stage has no pixel."""
        if min(sizes.pair(size)) < self.output_stride:
            yield f"at least {self.output_stride} pixels (model.output_stride)"

    def freeze_layers(self, prefix: str = "") -> tuple:
        """Return `FreezeOut.layers`: the stem 0, stage s of 0 to 3 layer s + 1."""
        stages = tuple((rf"{prefix}stage{s}_.*", s + 1) for s in range(4))
        return ((rf"{prefix}(stem|stem_norm)/.*", 0), *stages)
