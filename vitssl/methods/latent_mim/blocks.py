"""Transformer blocks with separate query, key and value maps, for self and cross use.

Source: allenai/olmoearth_pretrain nn/attention.py (Block).
"""

import einops
import jax.numpy as jnp
from flax import linen as nn

from vitssl.models import layers
from vitssl.models.xavier import MLP, Linear, norm


class Attention(nn.Module):
    """Multi-head attention of one sequence to itself or to another."""

    heads: int  # A divisor of the width.
    qk_norm: bool = False  # LayerNorm of every head's queries and keys.
    dtype: str = "float32"
    attention: layers.Implementation = "auto"

    @nn.compact
    def __call__(self, x, context=None, length=None):  # [B, Q, D] -> [B, Q, D]
        """Mix tokens.

        Args:
            context: [B, K, D] where keys and values come from; None = x.
            length: [B] int32, how many leading keys are meant; None = all.

        Raises:
            ValueError: heads does not divide the width.
        """
        d = x.shape[-1]
        if d % self.heads:
            raise ValueError(f"heads={self.heads} does not divide the width {d}")
        context = x if context is None else context

        def split(name, y):
            y = Linear(d, self.dtype, name=name)(y)
            return einops.rearrange(y, "b n (h c) -> b n h c", h=self.heads)

        q, k, v = split("q", x), split("k", context), split("v", context)
        if self.qk_norm:
            q, k = norm(self.dtype, "q_norm")(q), norm(self.dtype, "k_norm")(k)
        if length is not None:
            length = jnp.maximum(length, 1)  # A fused kernel may divide by none.
        y = layers.attend(q, k, v, length, self.attention)  # [B, Q, heads, c]
        y = einops.rearrange(y, "b n h c -> b n (h c)")
        return Linear(d, self.dtype, name="proj")(y)


class Block(nn.Module):
    """Pre-norm block: x + attn(norm(x), context), then x + mlp(norm(x)).

    The context is taken as it is: only x is normalised.

    Attributes:
        heads, qk_norm, dtype, attention: see `Attention`.
        hidden: width inside the MLP.
        drop_path: probability that a sample skips a branch.
    """

    heads: int
    hidden: int
    drop_path: float = 0.0
    qk_norm: bool = False
    dtype: str = "float32"
    attention: layers.Implementation = "auto"

    @nn.compact
    def __call__(self, x, context=None, length=None, train=False, *, gain=None):
        """Return [B, Q, D]; gain [2, B, 1, 1] as of `layers.Block`."""
        gain = (None, None) if gain is None else gain
        drop = layers.DropPath(self.drop_path, name="drop")
        attn = Attention(
            self.heads, self.qk_norm, self.dtype, self.attention, name="attn"
        )
        y = attn(norm(self.dtype, "norm1")(x), context, length)
        x = x + drop(y, train, gain[0])
        y = MLP(self.hidden, self.dtype, name="mlp")(norm(self.dtype, "norm2")(x))
        return x + drop(y, train, gain[1])


# `train` is position 4 counted from the module itself; it must be static.
RematBlock = nn.remat(Block, static_argnums=(4,))
