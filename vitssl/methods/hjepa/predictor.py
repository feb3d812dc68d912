"""From the tokens an encoder saw to the features of the patches it did not see."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vitssl import ranges
from vitssl.models import layers, patches, stack

Positions = Literal["encoder", "sincos"]
GLOBAL, LOCAL = 0, 1  # Roles of extra context: rows of the role vectors.


@dataclasses.dataclass(frozen=True)
class Spec:
    """Config section `predictor`: what of a `Predictor` is chosen.

    Attributes:
        depth: number of blocks.
        heads: attention heads, a divisor of the width.
        width: of the blocks; 0 = that of the encoder. Another width puts a linear
            layer in front (the last layer maps back), as in I-JEPA.
        mlp_ratio: hidden width of the MLP over width.
        drop_path: of the last block; grows linearly from 0 in the first.
        positions: encoder: queries have the encoder's position embeddings, context
            tokens have theirs already. sincos: a fixed table of this width is added to
            both (I-JEPA).
        remat: as in the encoder.
    """

    depth: ranges.Count
    heads: ranges.Count
    width: ranges.OrNone = 0
    mlp_ratio: ranges.Positive = 4.0
    drop_path: ranges.BelowOne = 0.0
    positions: Positions = "encoder"
    remat: bool = False


class Extra(NamedTuple):
    """Context from another crop than the one that is predicted."""

    tokens: jax.Array  # [B, E, D]
    role: int  # GLOBAL or LOCAL, the kind of crop they come from.
    valid: jax.Array | None = None  # [B, E] bool; None = all.


def thin(mask, most):  # [..., N] bool, [...] or scalar int -> [..., N] bool
    """Keep at most `most` members of each set, evenly spread over its order.

    Member r of V (counted from 1) stays where floor(r most / V) steps up. Cutting off
    the last members instead would always blind the same side of the image.
    """
    total = mask.sum(-1, keepdims=True)
    most = jnp.minimum(jnp.asarray(most)[..., None], total)
    rank = jnp.cumsum(mask, -1)
    total = jnp.maximum(total, 1)
    return mask & (rank * most // total > (rank - 1) * most // total)


class Predictor(nn.Module):
    """A transformer over [queries; context; extra context; padding].

    A query is a learned mask token plus the encoder's position embedding of a patch,
    or, without a position, plus a learned vector. Context tokens carry their position
    already (but see `Spec.positions`); extra context gets one learned vector per role.
    Nothing but attention relates the rows, so their order is free: queries come first,
    which makes the predictions a static slice, and the valid rows a prefix, which is
    all a fused attention kernel understands of padding.

    Attributes:
        roles: extra context is used, so that its vectors exist.
        pooled: the query without a position is used, so that its vector exists.
        others: see `Spec`; scan, dtype and attention are as in the ViT.

    Source: jonwiggins/H-JEPA src/models/predictor.py (full width, LayerNorm epsilon
    1e-5, positions of the encoder); facebookresearch/ijepa (a table of its own); roles
    are vitssl's.
    """

    depth: int
    heads: int
    width: int = 0
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    positions: Positions = "encoder"
    remat: bool = False
    roles: bool = False
    pooled: bool = False
    scan: bool = False
    dtype: str = "float32"
    attention: layers.Implementation = "auto"

    @nn.compact
    def __call__(
        self,
        context,
        query=None,
        *,
        place=None,
        context_count=None,
        query_count=None,
        extra: Sequence[Extra] = (),
        slots=0,
        train=False,
    ):
        """Return the features [B, M, D] at the queries; rows of padding mean nothing.

        Args:
            context: [B, K, D] tokens of the crop itself, without class token.
            query: [B, M, D] position embeddings of the patches to predict (with
                positions=sincos of the predictor's width, as `place`); None for
                one query without a position (M = 1).
            place: those of the context, [B or 1, K, D], which positions=sincos adds.
            context_count, query_count: [B] int32, how many leading rows are meant;
                None = all.
            extra: more context, see `Extra`.
            slots: rows of the packed sequence, at least M; 0 = all that are given.
                Context beyond it is thinned out evenly, queries never.
            train: drop paths, from the stream "drop_path".

        Raises:
            ValueError: fewer slots than queries, or something is used that the fields
                declare absent.
        """
        d = context.shape[-1]
        if extra and not self.roles:
            raise ValueError("Predictor: roles=False takes no extra context")
        if self.roles:
            roles = self.param("roles", layers.normal, (2, d))
        width = self.width or d
        if own := self.positions == "sincos":
            context = layers.dense(width, self.dtype, "embed")(context)
            context = context + layers.spread(place, context)
        inner = width if own else d
        query = self._queries(query, len(context), inner)  # [B, M, D]
        m = query.shape[1]
        parts = [query, context]
        parts += [e.tokens + layers.spread(roles[e.role], e.tokens) for e in extra]
        x = jnp.concatenate([p.astype(self.dtype) for p in parts], axis=1)
        valid = _valid(query, query_count, context, context_count, extra)
        slots = min(slots, x.shape[1]) or x.shape[1]
        if slots < m:
            raise ValueError(f"Predictor: slots={slots} do not hold {m} queries")
        x, length = pack(x, valid, slots, m)  # [B, slots, D]
        if width != inner:
            x = layers.dense(width, self.dtype, "embed")(x)
        rates = np.linspace(0.0, self.drop_path, self.depth)
        blocks = [
            layers.block(
                self.remat,
                heads=self.heads,
                hidden=int(width * self.mlp_ratio),
                drop_path=float(rate),
                eps=1e-5,
                dtype=self.dtype,
                attention=self.attention,
                name=f"block_{i}",
            )
            for i, rate in enumerate(rates)
        ]
        args = length, None, train
        x = stack.run(blocks, x, *args, train=train, scan=self.scan)[-1]
        x = layers.LayerNorm(1e-5, self.dtype, name="norm")(x[:, :m])
        return layers.dense(d, self.dtype, "head")(x)

    def _queries(self, position, batch, d):  # -> [B, M, D]
        token = self.param("mask_token", layers.normal, (1, 1, d))
        free = None
        if self.pooled:
            free = self.param("pooled_query", layers.normal, (1, 1, d))
        if position is not None:
            return token + position
        if free is None:
            raise ValueError("Predictor: pooled=False has no query without a position")
        return jnp.broadcast_to(token + free, (batch, 1, d))


def _valid(query, query_count, context, context_count, extra):
    """Return which rows of [query; context; extra] are meant [B, T]; None = all."""
    pairs = [(query, query_count), (context, context_count)]
    if all(c is None for _, c in pairs) and all(e.valid is None for e in extra):
        return None
    pairs = [(x, c if c is None else patches.valid(c, x.shape[1])) for x, c in pairs]
    pairs += [(e.tokens, e.valid) for e in extra]
    rows = [jnp.ones(x.shape[:2], bool) if v is None else v for x, v in pairs]
    return jnp.concatenate(rows, axis=1)


def pack(x, valid, slots, first):  # [B, T, D], [B, T] bool or None
    """Move the valid rows of a batch of sequences to the front.

    Args:
        slots: rows to keep, at most T.
        first: so many leading rows are never thinned out where there are more valid
            rows than slots.

    Returns:
        (rows [B, slots, D], length [B] int32 of the valid prefix, or None for all).
    """
    if valid is None and slots == x.shape[1]:
        return x, None
    if valid is None:
        valid = jnp.ones(x.shape[:2], bool)
    if slots < x.shape[1]:
        room = slots - valid[:, :first].sum(-1)  # [B]
        rest = thin(valid[:, first:], room)
        valid = jnp.concatenate([valid[:, :first], rest], axis=1)
    keep, length = patches.pack(valid, slots)
    return patches.take(x, keep), length


def xavier(rng, params):
    """Return predictor parameters with Xavier-uniform query-key-value matrices.

    PyTorch's MultiheadAttention, which the original predictor is made of, starts so,
    with [D, 3 D] taken as one matrix; a ViT's blocks start at normal(0.02).
    """
    draw = nn.initializers.xavier_uniform()
    params = dict(params)
    for i, name in enumerate(sorted(k for k in params if k.startswith("block_"))):
        block = dict(params[name])
        attn = dict(block["attn"])
        shape = attn["qkv"]["kernel"].shape
        kernel = draw(jax.random.fold_in(rng, i), shape)
        block["attn"] = attn | {"qkv": attn["qkv"] | {"kernel": kernel}}
        params[name] = block
    return params
