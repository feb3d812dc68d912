"""Residual networks whose last two stages make one grid of tokens.

Parameter names follow timm; statistics live in "batch_stats".
Sources: He et al. 2015, arXiv:1512.03385; strides replaced by dilation as in timm;
two stages joined as in PDiscoNet, van der Klis et al. 2023, arXiv:2309.03173.
"""

from collections.abc import Iterator
from typing import Literal

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn

from vitssl import ranges

Four = tuple[ranges.Count, ranges.Count, ranges.Count, ranges.Count]
Stride = Literal[8, 16, 32]
_he = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(features, kernel, stride=1, dilation=1, *, name, use_bias=False, groups=1):
    """Return a convolution padded symmetrically, as torch pads."""
    pad = dilation * (kernel - 1) // 2
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        kernel_dilation=dilation,
        padding=((pad, pad), (pad, pad)),
        use_bias=use_bias,
        feature_group_count=groups,
        kernel_init=_he,
        name=name,
    )


def batch_norm(train, name):
    """Return a batch normalisation with torch's constants."""
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name
    )


def join(last, previous):
    """Enlarge the last stage to the grid of the one before, and join the channels.

    [B, h', w', C'], [B, h, w, C] -> [B, h, w, C' + C]; bilinear between pixel centres.
    """
    shape = (*previous.shape[:3], last.shape[-1])
    if shape != last.shape:
        last = jax.image.resize(last, shape, "linear", antialias=False)
    return jnp.concatenate([last, previous], axis=-1)


def pooled(x) -> dict:  # [B, h, w, D]
    """Return {"tokens": [B, h w, D], "mean": [B, D]} of a grid."""
    tokens = einops.rearrange(x, "b h w d -> b (h w) d").astype(jnp.float32)
    return {"tokens": tokens, "mean": tokens.mean(1)}


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 with 4 times the width.

    Attributes:
        stride: of the first 3x3 convolution.
        first_dilation, dilation: of the first and the second 3x3 convolution
            ("basic"), or first_dilation of the only one ("bottleneck").
        shortcut: the skip connection needs a convolution.
    """

    width: int
    stride: int
    first_dilation: int
    dilation: int
    shortcut: bool
    kind: str

    @nn.compact
    def __call__(self, x, train=False):  # [B, H, W, C] -> [B, h, w, out]
        basic = self.kind == "basic"
        out = self.width if basic else 4 * self.width
        first, one = self.first_dilation, (self.width, 1)
        plan = [(self.width, 3, self.stride, first), (out, 3, 1, self.dilation)]
        if not basic:
            plan = [(*one, 1, 1), (self.width, 3, self.stride, first), (out, 1, 1, 1)]
        y = x
        for i, (features, kernel, stride, dilation) in enumerate(plan, 1):
            y = conv(features, kernel, stride, dilation, name=f"conv{i}")(y)
            y = batch_norm(train, f"bn{i}")(y)
            y = nn.relu(y) if i < len(plan) else y
        if self.shortcut:
            x = conv(out, 1, self.stride, name="down_conv")(x)
            x = batch_norm(train, "down_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet as a backbone for part discovery; one token per pixel of stage 3.

    Attributes:
        depths: blocks of the four stages, (3, 4, 6, 3) in ResNet-50.
        widths: channels inside the blocks of the stages.
        kind: of the blocks: two convolutions, or three of which the middle is narrow.
        stem: channels of the first convolution.
        output_stride: 32, 16 or 8; later strides become dilation.
    """

    depths: Four = (3, 4, 6, 3)
    widths: Four = (64, 128, 256, 512)
    stem: ranges.Count = 64
    kind: Literal["basic", "bottleneck"] = "bottleneck"
    output_stride: Stride = 32

    poolings = ("mean",)

    @property
    def width(self):
        """Channels of a token."""
        factor = 1 if self.kind == "basic" else 4
        return factor * (self.widths[-1] + self.widths[-2])

    @nn.compact
    def __call__(self, image, train=False):  # [B, H, W, C] -> [B, h, w, width]
        x = conv(self.stem, 7, 2, name="conv1")(image)
        x = nn.relu(batch_norm(train, "bn1")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        stages, reached, dilation, before = [], 4, 1, 1
        for s, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            stride = 1 if s == 0 else 2
            if reached >= self.output_stride and stride > 1:
                dilation, stride = dilation * stride, 1
            reached *= stride
            out = width if self.kind == "basic" else 4 * width
            for i in range(depth):
                x = Block(
                    width,
                    stride if i == 0 else 1,
                    before,
                    dilation,
                    i == 0 and (stride != 1 or x.shape[-1] != out),
                    self.kind,
                    name=f"layer{s + 1}_{i}",
                )(x, train)
                before = dilation
            stages.append(x)
        return join(stages[-1], stages[-2])

    def features(self, image, train=False) -> dict:
        """Return {"tokens": [B, N, width], "mean": [B, width]} of images."""
        return pooled(self(image, train))

    def check_channels(self, channels: int) -> Iterator[str]:
        """Yield nothing: images have any number of channels."""
        del channels
        return iter(())

    def check_image(self, size) -> Iterator[str]:
        """Yield nothing: a convolutional network takes images of any size."""
        del size
        return iter(())

    def freeze_layers(self, prefix: str = "") -> tuple:
        """Return `FreezeOut.layers`: the stem 0, stage s of 1 to 4 layer s."""
        stages = tuple((rf"{prefix}layer{s}_.*", s) for s in range(1, 5))
        return ((rf"{prefix}(conv1|bn1)/.*", 0), *stages)
