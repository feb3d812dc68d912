"""Networks; `MODELS` names the backbones a config may ask for.

To add one: write `models/x.py` and its line here.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import jax

from vitssl import sizes
from vitssl.models import convnext, hvit, resnet, vit


@runtime_checkable
class Backbone(Protocol):
    """What a method asks of a backbone, whichever it is: a linen module with these.

    Part discovery and distillation also take networks that have no more than `width`,
    `poolings`, `features`, `check_image`, `check_channels`, `freeze_layers` and a call
    image [B, H, W, C] -> [B, h, w, width].
    """

    width: int  # Channels of a token, of the first stage where there are several.
    depth: int  # Blocks.
    patch: int
    image_size: sizes.Size  # Of the images that positions are stored for.
    remat: bool
    dtype: str
    prefix: int  # Tokens before the patches.
    cls: bool  # Whether the first token is a class token.
    square: int  # Side, in pixels, of the square that one token stands for.
    poolings: tuple[str, ...]  # What `pooled` knows.

    def pooled(self, image, how: str, train: bool = False) -> jax.Array:
        """Return one vector per image: [B, H, W, C] -> [B, D] float32."""

    def features(self, image, train: bool = False) -> dict[str, jax.Array]:
        """Return {"tokens": [B, N, D] of the patches, and [B, D] of each pooling}."""

    def attention_maps(self, image) -> tuple[jax.Array, tuple[int, int]]:
        """Return ([B, layers, heads, T, T], grid (h, w) of the patches).

        Apply with the mutable collection "intermediates", where they come from.
        """

    def freeze_layers(self, prefix: str = "") -> tuple:
        """Return `FreezeOut.layers` of the parameters under a prefix."""

    def check_image(self, size: sizes.Size) -> Iterator[str]:
        """Yield why images of this size, in pixels, do not fit, if they do not."""

    def check_channels(self, channels: int) -> Iterator[str]:
        """Yield why images of so many channels do not fit, if they do not."""

    def check(self) -> Iterator[str]:
        """Yield one line per impossible combination of the fields."""


MODELS = {
    "vit": vit.ViT,
    "hvit": hvit.HViT,
    "resnet": resnet.ResNet,
    "convnext": convnext.ConvNeXt,
}
