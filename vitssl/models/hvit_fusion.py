"""Two streams of tokens into one: cross-attention (DFCA)."""

import einops
import jax.numpy as jnp
from flax import linen as nn

from vitssl.models import layers


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence to another; queries, keys, values packed.

    With a mutable collection "intermediates" the softmax is sown as "attention"
    [B, heads, N, M].

    Attributes:
        heads: a divisor of the width.
        dropout: of the attention map.
        dtype: of the products.
        attention: implementation, see `layers.attend`.
    """

    heads: int
    dropout: float = 0.0
    dtype: str = "float32"
    attention: layers.Implementation = "auto"

    @nn.compact
    def __call__(self, x, y, train=False):
        """Return [B, N, D]: tokens x [B, N, D] look at tokens y [B, M, D].

        Raises:
            ValueError: heads does not divide the width.
        """
        d = x.shape[-1]
        if d % self.heads:
            raise ValueError(f"heads={self.heads} does not divide the width {d}")
        # As one matrix: Xavier's bound comes from its whole shape, as in PyTorch.
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (d, 3 * d))
        bias = self.param("bias", nn.initializers.zeros, (3 * d,))
        q = layers.linear(x, kernel[:, :d], bias[:d], self.dtype)
        k, v = jnp.split(
            layers.linear(y, kernel[:, d:], bias[d:], self.dtype), 2, axis=-1
        )
        q, k, v = (
            einops.rearrange(t, "b n (h c) -> b n h c", h=self.heads) for t in (q, k, v)
        )
        drop = train and self.dropout > 0.0
        if drop or self.is_mutable_collection("intermediates"):
            cut = nn.Dropout(self.dropout, deterministic=not drop)
            out, probs = layers.softmax_attention(q, k, v, None, cut)
            self.sow("intermediates", "attention", probs)
        else:
            out = layers.attend(q, k, v, None, self.attention)
        out = einops.rearrange(out, "b n h c -> b n (h c)")
        return layers.dense(d, self.dtype, "proj")(out)


class DFCA(nn.Module):
    """Tokens of one stream enriched by what they attend to in the other.

    x = norm1(rgb + attention(rgb, spectral + m)), then norm2(x + mlp(x)): norms come
    after. The "disease mask" m is one learned vector added to every key and value. As
    a summand common to all keys it adds the same number to all scores of a query, and
    the softmax takes no notice: it cannot direct attention at anything. All it does is
    to add the constant W_o W_v m to every token.

    Attributes:
        heads: of the attention.
        dropout: of the attention map, its output and in and after the MLP.
        disease_mask: whether there is m.
        eps: of the LayerNorms.
        dtype: of the products.
        attention: implementation, see `layers.attend`.

    Source: w2sg-arnav/HierarchialViT hvit/models/dfca.py.
    """

    heads: int
    dropout: float = 0.1
    disease_mask: bool = True
    eps: float = 1e-5
    dtype: str = "float32"
    attention: layers.Implementation = "auto"

    @nn.compact
    def __call__(self, rgb, spectral, train=False):
        """Return [B, N, D] of rgb [B, N, D] and spectral [B, M, D]."""
        d = rgb.shape[-1]
        if self.disease_mask:
            m = self.param("disease_mask", nn.initializers.zeros, (1, 1, d))
            spectral = spectral + m.astype(spectral.dtype)
        attend = CrossAttention(
            self.heads, self.dropout, self.dtype, self.attention, name="attn"
        )
        drop = nn.Dropout(self.dropout, deterministic=not train)
        x = rgb + drop(attend(rgb, spectral, train))
        x = layers.LayerNorm(self.eps, self.dtype, name="norm1")(x)
        mlp = layers.MLP(4 * d, self.dtype, self.dropout, name="mlp")
        return layers.LayerNorm(self.eps, self.dtype, name="norm2")(x + mlp(x, train))
