"""The parts of a transformer block, shared by encoders and predictors.

Parameters are float32. Matrix products run in `dtype`; the softmax, the statistics
of LayerNorm and the rotary embedding in float32.
"""

from collections.abc import Callable
from typing import Literal

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn

from vitssl import errors
from vitssl.models import posemb
from vitssl.ops import accelerator, across, cpu, pointwise, tpu

Implementation = Literal["auto", "xla", "cudnn"]

# PyTorch's trunc_normal_(std=0.02) cuts at +-2, not at two standard deviations, so
# it is a plain normal for every purpose.
normal = nn.initializers.normal(0.02)


def uniform_fan_in(fan_in):
    """PyTorch's default, also of a bias: uniform in +-1 / sqrt(fan_in)."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return nn.initializers.uniform(2 * bound)(key, shape, dtype) - bound

    return init


class Dense(nn.Module):
    """Linear layer of the last axis; weights normal(0.02), bias 0, as in timm's ViT."""

    features: int
    dtype: str = "float32"
    use_bias: bool = True
    init_by: Callable = normal

    @nn.compact
    def __call__(self, x):  # [..., C] -> [..., features]
        kernel = self.param("kernel", self.init_by, (x.shape[-1], self.features))
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return linear(x, kernel, bias, self.dtype)


def dense(features, dtype, name, use_bias=True, init_by=normal):
    """Return a named `Dense`."""
    return Dense(features, dtype, use_bias, init_by, name=name)


def linear(x, kernel, bias, dtype):
    """Return x kernel + bias: [..., C], [C, D], [D] or None -> [..., D] in `dtype`.

    Leading axes are merged: of a product over several axes XLA transposes the
    activations to get the gradient of the weights, of a plain matrix product not.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    form = _affine if rows.dtype == jnp.float32 else _affine_of_halves
    return form(rows, kernel, bias).reshape(*x.shape[:-1], kernel.shape[-1])


def _affine(x, kernel, bias):  # [N, C], [C, D], [D] or None -> [N, D]
    y = x @ across.whole(kernel.astype(x.dtype))
    return y if bias is None else y + bias.astype(x.dtype)


@jax.custom_vjp
def _affine_of_halves(x, kernel, bias):
    """Return `_affine`; the gradients of the weights are summed in the weights' dtype.

    Differentiation would round them to that of x first, and then add them up over the
    devices.
    """
    return _affine(x, kernel, bias)


def _affine_vjp(saved, g):
    x, kernel, bias = saved
    of_kernel = jnp.matmul(x.T, g, preferred_element_type=kernel.dtype)
    of_bias = None if bias is None else g.sum(0, dtype=bias.dtype)
    kernel = across.whole(kernel.astype(x.dtype))
    return g @ kernel.T, of_kernel, of_bias


_affine_of_halves.defvjp(lambda *args: (_affine(*args), args), _affine_vjp)


def spread(param, x):
    """Return a parameter in the shape and dtype of x, to which it is then added.

    Rounded before, its gradient would be summed over the batch, and over the devices,
    in that dtype.
    """
    return jnp.broadcast_to(param, x.shape).astype(x.dtype)


gelu, layer_norm = pointwise.gelu, pointwise.layer_norm


class LayerNorm(nn.Module):
    """`layer_norm` with parameters; output in `dtype`.

    Source: Ba et al. 2016, arXiv:1607.06450.
    """

    eps: float
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):  # [..., D] -> [..., D]
        d = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (d,))
        bias = self.param("bias", nn.initializers.zeros, (d,))
        return layer_norm(x, scale, bias, self.eps).astype(self.dtype)


def softmax_attention(q, k, v, length=None, drop=None):
    """Attention with its map: the explicit form, for looking at and for checking.

    Args:
        q, k, v: [B, T, heads, c]; there may be another number of keys than queries.
        length: [B] int32, how many leading keys are valid; None = all.
        drop: dropout of the map before it weighs the values; None = none.

    Returns:
        Output [B, T, heads, c], map [B, heads, T, T] float32.
    """
    scale = q.shape[-1] ** -0.5
    logits = jnp.einsum("bqhc,bkhc->bhqk", q, k, preferred_element_type=jnp.float32)
    logits = logits * scale
    if length is not None:
        seen = jnp.arange(k.shape[1]) < length[:, None]  # [B, T]
        # Finite, not -inf: a row with every key hidden must not become nan.
        logits = jnp.where(seen[:, None, None], logits, -1e30)
    probs = jax.nn.softmax(logits, axis=-1)  # [B, heads, T, T]
    kept = probs if drop is None else drop(probs)
    y = jnp.einsum("bhqk,bkhc->bqhc", kept.astype(v.dtype), v)
    return y, probs


def attend(q, k, v, length=None, implementation="auto"):
    """Multi-head softmax attention over a prefix of the keys.

    Args:
        q, k, v: [B, T, heads, c], which the output is too, in the dtype of q; rows of
            padded queries are finite and meaningless.
        length: [B] int32, how many leading keys are valid; None = all. A prefix
            length is all cuDNN's fused kernel understands of padding.
        implementation: "auto": cuDNN's kernel where the device has it for this dtype
            and number of channels (`_cudnn_takes`), on TPUs a kernel of jax where it is
            worth it (`tpu.takes`), else XLA's. "cudnn", "xla": that.

    Raises:
        UsageError: "cudnn" where there is none.
    """
    takes = _cudnn_takes(q)
    if implementation == "cudnn" and not takes:
        raise errors.UsageError(
            f"model.attention=cudnn: it needs an NVIDIA GPU from Ampere on, half "
            f"precision and at most 128 channels per head (256 from Hopper on), not "
            f"{q.dtype} and {q.shape[-1]}; auto takes it where it can"
        )
    if takes and implementation != "xla":
        return _cudnn(q, k, v, length)
    if implementation == "auto" and accelerator.on_cpu():
        return cpu.attention(q, k, v, length)
    if implementation == "auto" and tpu.takes(q, k):
        return tpu.attention(q, k, v, length)
    return jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=length, implementation="xla"
    )


def _cudnn_takes(q) -> bool:
    """Return whether cuDNN has a kernel for such queries, forward and backward."""
    found = accelerator.capability()
    most = 256 if found >= accelerator.HOPPER else 128
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and found >= accelerator.AMPERE and q.shape[-1] <= most


def _cudnn(q, k, v, length):
    """Return `attend` by cuDNN's kernel, rows and channels padded to what it takes.

    jax refuses odd numbers of queries or keys in training, and channels that 8 does not
    divide. A key of padding lies behind the length, a query of padding is cut off, a
    channel of zeros changes no product. What surrounds attention, and with it the
    number of tokens anyone sees, is not concerned.
    """
    rows, keys, channels = q.shape[1], k.shape[1], q.shape[3]
    if length is None and keys % 2:
        length = jnp.full(len(k), keys, jnp.int32)

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, -channels % 8)))

    y = jax.nn.dot_product_attention(
        *across.rows(*map(padded, (q, k, v))),
        scale=channels**-0.5,
        key_value_seq_lengths=length,
        implementation="cudnn",
    )
    (y,) = across.rows(y)
    return y[:, :rows, :, :channels]


def weighted_attention(q, k, v, weight):
    """Attention to keys that count more or less: a_ij = m_j e^s_ij / sum_j m_j e^s_ij.

    A key of weight 0 takes no part, bit for bit: nothing of it reaches the output,
    whatever it holds. Adding log m_j to the scores is the same number, but has no
    gradient at 0; this form has one, which is what straight-through masks need.

    Args:
        q, k, v: [B, T, heads, c].
        weight: [B, T] not negative, at least one of each row above 0.

    Returns:
        Output [B, T, heads, c] in the dtype of v, map [B, heads, T, T] float32.

    Source: ananthu-aniraj/ifam layers/transformer_layers.py (boolean and additive
    masks), rewritten as one multiplication.
    """
    weight = weight.astype(jnp.float32)[:, None, None]  # [B, 1, 1, T]
    logits = jnp.einsum("bqhc,bkhc->bhqk", q, k, preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    # Only keys that count may set the scale, or a hidden one would change roundings.
    top = jnp.where(weight > 0, logits, -jnp.inf).max(-1, keepdims=True)
    # A hidden key may lie far above the others; bounded, its term stays finite.
    e = weight * jnp.exp(jnp.minimum(logits - jax.lax.stop_gradient(top), 60.0))
    probs = e / e.sum(-1, keepdims=True)  # [B, heads, T, T]
    y = jnp.einsum("bhqk,bkhc->bqhc", probs.astype(v.dtype), v)
    return y, probs


class Attention(nn.Module):
    """Multi-head self-attention with one packed query-key-value product.

    Attention to other tokens, or with other products, is a subclass that calls `mix`.
    With a mutable collection "intermediates" the softmax is computed explicitly and
    sown as "attention" [B, heads, T, T].

    Attributes:
        heads: a divisor of the width.
        qk_norm: LayerNorm of every head's queries and keys.
        eps: of those LayerNorms.
        dtype: of the matrix products.
        attention: see `attend`.
        qkv_bias: whether queries, keys and values have a bias.
        dropout: of the output.
        map_dropout: of the attention map, which is then computed explicitly.
        init_by: initial values of the weights; the packed product is one matrix.
    """

    heads: int
    qk_norm: bool = False
    eps: float = 1e-6
    dtype: str = "float32"
    attention: Implementation = "auto"
    qkv_bias: bool = True
    dropout: float = 0.0
    map_dropout: float = 0.0
    init_by: Callable = normal

    @nn.compact
    def __call__(self, x, length=None, rope=None, weight=None, train=False):
        """Mix the tokens x [B, T, D] -> [B, T, D]; for the rest see `mix`."""
        qkv = dense(3 * x.shape[-1], self.dtype, "qkv", self.qkv_bias, self.init_by)(x)
        # Splitting, whose gradient is one concatenation, not indexing.
        return self.mix(*jnp.split(qkv, 3, axis=-1), length, rope, weight, train)

    def mix(self, q, k, v, length=None, rope=None, weight=None, train=False):
        """Attend and project the result: [B, T, D], twice [B, S, D] -> [B, T, D].

        Args:
            q, k, v: queries, and the keys and values they look at.
            length: [B] int32 valid leading keys, or None.
            rope: (cos, sin) [1 or B, T, D / heads] of `posemb.rotation`, or None.
            weight: [B, S] how much every key counts, see `weighted_attention`; None =
                all alike. Not together with length, nor with map_dropout.
            train: drop, from the stream "dropout".

        Raises:
            ValueError: heads does not divide the width.
        """
        d = q.shape[-1]
        if d % self.heads:
            raise ValueError(f"heads={self.heads} does not divide the width {d}")
        q, k, v = (
            einops.rearrange(x, "b n (h c) -> b n h c", h=self.heads) for x in (q, k, v)
        )
        if self.qk_norm:
            q = LayerNorm(self.eps, self.dtype, name="q_norm")(q)
            k = LayerNorm(self.eps, self.dtype, name="k_norm")(k)
        if rope is not None:
            q, k = posemb.rotate(q, *rope), posemb.rotate(k, *rope)
        y = self._attend(q, k, v, length, weight, train)  # [B, T, heads, c]
        y = einops.rearrange(y, "b n h c -> b n (h c)")
        y = dense(d, self.dtype, "proj", init_by=self.init_by)(y)
        return nn.Dropout(self.dropout, deterministic=not train)(y)

    def _attend(self, q, k, v, length, weight, train):
        """Return the attended values [B, T, heads, c]; sow the map where it exists."""
        drop = train and self.map_dropout > 0.0
        if weight is not None:
            y, probs = weighted_attention(q, k, v, weight)
        elif drop or self.is_mutable_collection("intermediates"):
            cut = nn.Dropout(self.map_dropout, deterministic=not drop)
            y, probs = softmax_attention(q, k, v, length, cut)
        else:
            return attend(q, k, v, length, self.attention)
        self.sow("intermediates", "attention", probs)
        return y


class MLP(nn.Module):
    """Two linear layers around the exact (erf) GELU, dropout after GELU and output."""

    hidden: int
    dtype: str = "float32"
    dropout: float = 0.0
    init_by: Callable = normal

    @nn.compact
    def __call__(self, x, train=False):  # [..., D] -> [..., D]
        y = dense(self.hidden, self.dtype, "fc1", init_by=self.init_by)(x)
        y = gelu(y)
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        y = dense(x.shape[-1], self.dtype, "fc2", init_by=self.init_by)(y)
        return nn.Dropout(self.dropout, deterministic=not train)(y)


def path_gain(key, batch, axes, rate):
    """Draw what `DropPath` scales samples by [B, 1, ...]."""
    return gain_of(1.0 - jax.random.uniform(key, (batch,) + (1,) * (axes - 1)), rate)


def gain_of(draw, rate):
    """Return 0 where a draw is below the rate, 1 / (1 - rate) elsewhere."""
    return (draw >= rate) / (1.0 - rate)


class DropPath(nn.Module):
    """Drop a residual branch for whole samples, and scale up the ones that stay.

    Source: Huang et al. 2016, arXiv:1603.09382; drawn from the stream "drop_path".
    """

    rate: float

    @nn.compact
    def __call__(self, x, train, gain=None):  # [B, ...] -> [B, ...]
        """Scale the branch x by `gain` [B, 1, ...], which None draws."""
        if gain is None:
            if not train or self.rate == 0.0:
                return x
            gain = path_gain(self.make_rng("drop_path"), len(x), x.ndim, self.rate)
        return x * gain.astype(x.dtype)


class Block(nn.Module):
    """Pre-norm transformer block: x + g1 attn(norm(x)), then x + g2 mlp(norm(x)).

    Attributes:
        hidden: width inside the MLP.
        drop_path: probability that a sample skips a branch.
        layerscale: initial value of the per-channel gains g1, g2; 0 = no gains.
        eps: of every LayerNorm.
        heads, qk_norm, dtype, attention, qkv_bias, map_dropout: see `Attention`.
        dropout: of the outputs of both branches and inside the MLP.
    """

    heads: int
    hidden: int
    drop_path: float = 0.0
    layerscale: float = 0.0
    qk_norm: bool = False
    eps: float = 1e-6
    dtype: str = "float32"
    attention: Implementation = "auto"
    qkv_bias: bool = True
    dropout: float = 0.0
    map_dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x, length=None, rope=None, train=False, weight=None, *, gain=None
    ):
        """Return the block's output [B, T, D]; arguments as in `Attention`.

        gain: [2, B, 1, 1] of the two branches, see `DropPath`; None = drawn here.
        """
        gain = (None, None) if gain is None else gain
        drop = DropPath(self.drop_path, name="drop")
        attn = Attention(
            heads=self.heads,
            qk_norm=self.qk_norm,
            eps=self.eps,
            dtype=self.dtype,
            attention=self.attention,
            qkv_bias=self.qkv_bias,
            dropout=self.dropout,
            map_dropout=self.map_dropout,
            name="attn",
        )
        mlp = MLP(self.hidden, self.dtype, self.dropout, name="mlp")
        y = LayerNorm(self.eps, self.dtype, name="norm1")(x)
        y = attn(y, length, rope, weight, train)
        x = x + drop(self._gain("ls1", y), train, gain[0])
        y = mlp(LayerNorm(self.eps, self.dtype, name="norm2")(x), train)
        return x + drop(self._gain("ls2", y), train, gain[1])

    def _gain(self, name, y):
        if self.layerscale == 0.0:
            return y
        init = nn.initializers.constant(self.layerscale)
        return y * spread(self.param(name, init, (y.shape[-1],)), y)


# `train` is position 4 counted from the module itself; it must be static.
RematBlock = nn.remat(Block, static_argnums=(4,))


def block(remat, **fields):
    """Return a Block, rematerialised in the backward pass if `remat`; call it with
    positional arguments and give it a name, which is then the same either way.
    """
    return (RematBlock if remat else Block)(**fields)


def sown_maps(blocks):
    """Return the attention maps [B, layers, heads, T, T] that blocks have just sown."""
    maps = [b.variables["intermediates"]["attn"]["attention"][0] for b in blocks]
    return jnp.stack(maps, axis=1)
