"""The decoder of MAE, which LocalMIM attaches, small, to several encoder blocks.

Everything after the transformer block acts on single patches (transposed convolutions
of kernel = stride do not overlap), so the head works on lists of tokens and may leave
out the visible ones, whose prediction no loss looks at.
"""

import dataclasses
from collections.abc import Iterator

import einops
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vitssl import ranges
from vitssl.models import layers, patches, posemb, stack


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Config section `decoder`: its transformer.

    Attributes:
        width: channels of its tokens.
        depth: blocks.
        heads: attention heads of every block.
        mlp_ratio: hidden width of an MLP over `width`.
    """

    width: ranges.Count = 256
    depth: ranges.Count = 1
    heads: ranges.Count = 8
    mlp_ratio: float = 4.0

    def check(self) -> Iterator[str]:
        """Yield what does not fit together."""
        if self.width % self.heads:
            yield f"heads={self.heads}: must divide width={self.width}"
        if self.width % 4:
            yield f"width={self.width}: its position table needs a multiple of 4"


def _uniform(fan):
    """PyTorch's default of a convolution: uniform in +-1 / sqrt(fan)."""

    def init(key, shape, dtype=jnp.float32):
        bound = fan**-0.5
        return nn.initializers.uniform(2 * bound)(key, shape, dtype) - bound

    return init


class Upsample(nn.Module):
    """Every token becomes 2 x 2 tokens: a transposed convolution, kernel = stride = 2.

    Kernel [in, 2, 2, out], with PyTorch's initial values (whose fan is 4 out).
    """

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):  # [B, M, s, s, c] -> [B, M, 2 s, 2 s, features]
        init = _uniform(4 * self.features)
        kernel = self.param("kernel", init, (x.shape[-1], 2, 2, self.features))
        bias = self.param("bias", init, (self.features,))
        flat = einops.rearrange(kernel, "i p q o -> i (p q o)")
        y = layers.linear(x, flat, jnp.tile(bias, 4), self.dtype)
        return einops.rearrange(y, "b m h w (p q o) -> b m (h p) (w q) o", p=2, q=2)


class Predict(nn.Module):
    """The last layer: a 1 x 1 convolution, with PyTorch's initial values."""

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):  # [..., c] -> [..., features]
        init = _uniform(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,))
        return layers.linear(x, kernel, bias, self.dtype)


class StageDecoder(nn.Module):
    """Predict targets on a grid of `scale` times the patch grid, from visible tokens.

    Attributes:
        scale: cells per patch side: 1, 2, 4, 8 (the tokens are split up by transposed
            convolutions) or 0.5, 0.25 (averaged).
        out: channels of a target cell.
        scan: compile the blocks once, see `stack`.

    Source: Wang et al. 2023, arXiv:2303.05251, section 3.2; Haoqing-Wang/LocalMIM
    ViT/models_mim.py:MAE_Decoder.
    """

    spec: Decoder
    scale: float
    out: int
    norm_eps: float = 1e-6
    scan: bool = False
    dtype: str = "float32"
    attention: layers.Implementation = "auto"

    @nn.compact
    def __call__(self, x, restore, grid, only=None):
        """Fill in the hidden tokens and predict.

        Args:
            x: [B, 1 + K, C] class token and visible patches, in the order of masks.
            restore: [B, N] place of every patch in the list (visible, then hidden).
            grid: (h, w), N = h w.
            only: [B, M] patches to predict; None = all. Not with a scale below 1.

        Returns:
            [B, M or N, s, s, out] for scale s >= 1, the cells of every patch;
            [B, (h s) (w s), 1, 1, out] below.
        """
        width = self.spec.width
        token = self.param("mask_token", layers.normal, (1, 1, width))
        x = layers.dense(width, self.dtype, "embed")(x)
        cls, seen = x[:, :1], x[:, 1:]
        hidden = restore.shape[1] - seen.shape[1]
        filler = jnp.broadcast_to(token, (len(x), hidden, width)).astype(x.dtype)
        y = patches.take(jnp.concatenate([seen, filler], axis=1), restore)
        y = y + posemb.sincos(grid, width).astype(x.dtype)
        y = jnp.concatenate([cls, y], axis=1)  # [B, 1 + N, d]
        blocks = [
            layers.block(
                False,
                heads=self.spec.heads,
                hidden=int(width * self.spec.mlp_ratio),
                eps=self.norm_eps,
                dtype=self.dtype,
                attention=self.attention,
                name=f"block_{i}",
            )
            for i in range(self.spec.depth)
        ]
        y = stack.run(blocks, y, None, None, False, scan=self.scan)[-1]
        y = layers.LayerNorm(self.norm_eps, self.dtype, name="norm")(y)[:, 1:]
        return self._head(y, grid, only)

    def _head(self, y, grid, only):  # [B, N, d] -> as `__call__` returns
        if self.scale < 1:
            k = round(1 / self.scale)
            y = einops.reduce(
                y, "b (h p w q) d -> b (h w) d", "mean", h=grid[0] // k, p=k, q=k
            )
        elif only is not None:
            y = patches.take(y, only)
        y = y[:, :, None, None]  # [B, M, 1, 1, d]
        count = max(0, round(np.log2(self.scale)))
        for i in range(count):
            if i:
                name = f"up_norm_{i - 1}"
                y = layers.LayerNorm(self.norm_eps, self.dtype, name=name)(y)
                y = layers.gelu(y)
            features = self.spec.width // 2 ** (i + 1)
            y = Upsample(features, self.dtype, name=f"up_{i}")(y)
        return Predict(self.out, self.dtype, name="pred")(y)
