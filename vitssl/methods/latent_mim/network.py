"""Encoder and predictor of latent masked modelling of fields (OlmoEarth).

A batch is a flat dict, one entry per modality and one per mask:

    name            [B, H, W, T, C] (T = 1 without time), [B, T, C] or [B, C]
    name_mask       [B, H, W, T, S] int per pixel, or per token [B, h, w, T, S]
    timestamps      [B, T, 3] int: day 1-31, month 0-11, year

The encoder sees ONLINE tokens, packed into a static number of slots. The predictor
asks the packed result about any other tokens; what it answers about one does not
depend on which others it is asked about.

Source: allenai/olmoearth_pretrain nn/flexi_vit.py, arXiv:2511.13655.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from vitssl import ranges
from vitssl.data import modalities
from vitssl.data.states import ONLINE
from vitssl.methods.latent_mim import blocks, embed, encodings, tokens
from vitssl.models import layers, patches, stack, xavier
from vitssl.models.upsample import Anchor

SIZES = {  # name: width, heads, blocks of the encoder, blocks of the predictor
    "nano": (128, 8, 4, 4),
    "tiny": (192, 3, 12, 4),
    "base": (768, 12, 12, 4),
    "large": (1024, 16, 24, 4),
    "tiny_deep": (192, 3, 12, 12),
    "base_deep": (768, 12, 12, 12),
    "large_deep": (1024, 16, 24, 24),
}


class Encoded(NamedTuple):
    """What an encoder makes of a batch."""

    packed: tokens.Packed  # The tokens it saw, after the last norm.
    tokens: dict  # {name: [B, h, w, T, S, D]} in place, zero where not ONLINE.
    mask: dict  # {name: [B, h, w, T, S]} int32 states of the tokens.
    pooled: jax.Array  # [B, D] float32, the projected mean of what it saw.


class Aggregate(nn.Module):
    """One vector per sequence: the mean of its tokens and linear layers."""

    layers: int = 1  # With ReLU between them.
    first: bool = True  # The mean is taken before them; otherwise after.
    dtype: str = "float32"

    @nn.compact
    def __call__(self, packed):  # Packed [B, K, D] -> [B, D] float32
        x = tokens.mean(packed) if self.first else packed.tokens
        for i in range(self.layers):
            x = nn.relu(x) if i else x
            x = xavier.Linear(x.shape[-1], self.dtype, name=f"linear_{i}")(x)
        x = x if self.first else tokens.mean(packed._replace(tokens=x))
        return x.astype(jnp.float32)


def _encodings(module, width):
    """Return the encodings of an encoder or predictor."""
    own = (module.frequencies, module.anchor, module.channels, module.most_times)
    return encodings.CompositeEncodings(module.modalities, width, *own)


def _stack(module, width, drop_path=0.0):
    """Return the blocks of an encoder or predictor; assign them to `self.block`."""
    block = blocks.RematBlock if module.remat else blocks.Block
    hidden = int(width * module.mlp_ratio)
    own = (module.qk_norm, module.dtype, module.attention)
    return [block(module.heads, hidden, drop_path, *own) for _ in range(module.depth)]


class Encoder(nn.Module):
    """A transformer over the visible tokens of all modalities together.

    Attributes:
        modalities: what a field consists of; also the order of the sequence.
        base: patch side the kernels are for, in pixels of the field.
        registers: extra tokens at the front, dropped at the end.
        projections, aggregate_first: see `Aggregate`.
        patch_resize: see `embed.FlexiPatchEmbed`.
        frequencies, anchor, channels, most_times: see `encodings.CompositeEncodings`.
        remat: recompute every block in the backward pass instead of storing it.
        scan: compile the blocks once, see `models.stack`.
    """

    modalities: tuple[modalities.Modality, ...]
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    base: int = 8
    drop_path: float = 0.1
    registers: int = 0
    qk_norm: bool = False
    projections: int = 1
    aggregate_first: bool = True
    patch_resize: embed.Resize = "input"
    frequencies: encodings.Frequencies = "legacy"
    anchor: Anchor = "corner"
    channels: encodings.Channels = "learnable"
    most_times: int = modalities.TIMES
    remat: bool = False
    scan: bool = False
    dtype: str = "float32"
    attention: layers.Implementation = "auto"

    def setup(self):
        """Declare the parts; names do not depend on `remat`."""
        self.patch_embed = embed.PatchEmbeddings(
            self.modalities, self.width, self.base, self.patch_resize, self.dtype
        )
        self.encodings = _encodings(self, self.width)
        if self.registers:
            init = nn.initializers.xavier_uniform()
            self.register = self.param("registers", init, (self.registers, self.width))
        self.block = _stack(self, self.width, self.drop_path)
        self.norm = xavier.norm(self.dtype)
        self.aggregate = Aggregate(self.projections, self.aggregate_first, self.dtype)

    def __call__(
        self,
        fields,
        patch,
        *,
        slots=0,
        exits=None,
        resolution=encodings.GRID,
        train=False,
    ):  # -> Encoded
        """Encode a batch.

        Args:
            fields: the batch, see the module. Without any mask all tokens are seen.
            patch: side in pixels, static.
            slots: bound on the ONLINE tokens of a field, static; 0 = all tokens.
            exits: {name: depth}: tokens of that modality leave with what enters block
                `depth` (0: without encodings either) and the last norm; all at 0:
                without the norm too, as patch embeddings. None: all leave at the end.
            resolution: metres per pixel.
            train: drop paths, from the stream "drop_path".

        Raises:
            ValueError: a mask or a patch that does not fit the arrays.
        """
        mask = {m.name: embed.token_mask(fields, m, patch) for m in self.modalities}
        plain = self.patch_embed(fields, patch)
        shapes = tokens.shapes_of(plain)
        codes = self.encodings(shapes, fields["timestamps"], patch, resolution)
        raw = tokens.flatten(plain, self.modalities)
        x = raw + layers.spread(tokens.flatten(codes, self.modalities), raw)
        leave = None if exits is None else _sequence(exits, shapes, self.modalities)
        packed = tokens.Packed(x)
        if any(m.mask_key in fields for m in self.modalities):
            seen = tokens.flatten_mask(mask, self.modalities) == ONLINE
            packed = tokens.pack(x, seen, slots)
            if leave is not None:
                raw, leave = patches.take(raw, packed.keep), leave[packed.keep]
        if exits is None or any(exits.values()):
            packed = packed._replace(tokens=self._blocks(packed, raw, leave, train))
        else:
            packed = packed._replace(tokens=raw)
        whole = tokens.unpack(packed, x.shape[1])
        placed = tokens.split(whole, shapes, self.modalities)
        return Encoded(packed, placed, mask, self.aggregate(packed))

    def _blocks(self, packed, raw, leave, train):
        """Return the tokens [B, K, D] after the blocks and the norm."""
        x, count, r = packed.tokens, packed.count, self.registers
        left = raw
        if r:
            first = jnp.broadcast_to(self.register, (len(x), r, self.width))
            x = jnp.concatenate([first.astype(x.dtype), x], axis=1)
            count = None if count is None else count + r
        args = None, count, train
        outputs = stack.run(self.block, x, *args, train=train, scan=self.scan)
        if leave is None:
            return self.norm(outputs[-1][:, r:])
        for i, x in enumerate(outputs, 1):
            left = jnp.where((leave == i)[..., None], x[:, r:], left)
        return self.norm(left)


def _sequence(depths, shapes, modalities):
    """Return {name: depth} as one number per token of the sequence [N]."""
    parts = [jnp.full(shapes[m.name], depths[m.name]).ravel() for m in modalities]
    return jnp.concatenate(parts)


class Predictor(nn.Module):
    """Answers queries about tokens from the tokens an encoder saw.

    A query is one learned vector plus the encodings of a token. Its blocks attend to
    the context alone, never to other queries.

    Attributes are those of `Encoder`.
    """

    modalities: tuple[modalities.Modality, ...]  # Of queries and context.
    width: int  # Of the encoder's tokens and of the answers.
    inner: int  # Of the blocks.
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    frequencies: encodings.Frequencies = "legacy"
    anchor: Anchor = "corner"
    channels: encodings.Channels = "learnable"
    most_times: int = modalities.TIMES
    remat: bool = False
    scan: bool = False
    dtype: str = "float32"
    attention: layers.Implementation = "auto"

    def setup(self):
        """Declare the parts; names do not depend on `remat`."""
        zeros = nn.initializers.zeros
        self.mask_token = self.param("mask_token", zeros, (self.inner,))
        self.encodings = _encodings(self, self.inner)
        self.norm_in = xavier.norm(self.dtype)
        self.embed = xavier.Linear(self.inner, self.dtype)
        self.block = _stack(self, self.inner)
        self.norm = xavier.norm(self.dtype)
        self.head = xavier.Linear(self.width, self.dtype)

    def __call__(
        self, context, queries, timestamps, *, train=False, resolution=encodings.GRID
    ):
        """Predict tokens: {name: [B, Q, D]}.

        Args:
            context: what `context` returns.
            queries: {name: (index [B, Q] int32 or None, shape, patch)}: which tokens,
                flattened in the order of `shape` = (h, w, T, S), of which grid; None =
                all of them.
            train: not used; the blocks have no drop path.
            resolution: metres per pixel.
        """
        asked = {}
        for name, (index, shape, patch) in queries.items():
            place = (shape, timestamps, patch, resolution)
            if index is None:
                code = self.encodings({name: shape}, *place[1:])[name]
                code = code.reshape(len(code), -1, self.inner)
                code = jnp.broadcast_to(code, (len(timestamps), *code.shape[1:]))
            else:
                code = self.encodings.at(name, index, *place)
            asked[name] = code + self.mask_token  # [B, Q, inner]
        x = jnp.concatenate(list(asked.values()), axis=1).astype(self.dtype)
        args = context.tokens, context.count, train
        x = stack.run(self.block, x, *args, scan=self.scan)[-1]
        x, found, at = self.output(x), {}, 0
        for name, code in asked.items():
            found[name] = x[:, at : at + code.shape[1]]
            at += code.shape[1]
        return found

    def codes(self, shapes, timestamps, patch, resolution=encodings.GRID):
        """Return the encodings of a whole grid as a sequence: [B or 1, N, inner]."""
        found = self.encodings(shapes, timestamps, patch, resolution)
        return tokens.flatten(found, self.modalities)

    def context(self, packed, codes):  # Packed [B, K, D] -> Packed [B, K, inner]
        """Return what queries attend to, of the tokens an encoder saw.

        `codes` [B or 1, N, inner] encode the sequence that they are packed from.
        """
        if packed.keep is not None:
            codes = patches.take(codes, packed.keep)
        x = self.embed(self.norm_in(packed.tokens))
        return packed._replace(tokens=x + layers.spread(codes, x))

    def output(self, x):  # [..., inner] -> [..., D]
        """Return the answers: the last norm and layer."""
        return self.head(self.norm(x))


@dataclasses.dataclass(frozen=True)
class Network:
    """Config section `network`: encoder and predictor.

    Attributes:
        size: a published size, or "" for the four numbers after it.
        width, heads, depth, decoder_depth: of size ""; the width a multiple of 16.
        mlp_ratio: of the blocks.
        base_patch: side of the patch that the kernels are for.
        drop_path: of every block of the encoder.
        registers: extra tokens of the encoder.
        qk_norm: LayerNorm of queries and keys.
        patch_resize, frequencies, anchor, channels: see `embed` and
            `encodings`; "input", "legacy", "corner" are OlmoEarth's weights.
        projections, aggregate_first: linear layers of the vector that views are
            compared by, and whether tokens are averaged before them.
        remat: recompute the blocks in the backward pass.
        scan: compile equal blocks once, see `models.stack`.
        attention: see `models.layers`.
    """

    size: Literal[("", *SIZES)] = "nano"
    width: ranges.OrNone = 0
    heads: ranges.OrNone = 0
    depth: ranges.OrNone = 0
    decoder_depth: ranges.OrNone = 0
    mlp_ratio: ranges.Positive = 4.0
    base_patch: ranges.Count = 8
    drop_path: ranges.BelowOne = 0.1
    registers: ranges.OrNone = 0
    qk_norm: bool = False
    patch_resize: embed.Resize = "weights"
    frequencies: encodings.Frequencies = "standard"
    anchor: Anchor = "center"
    channels: encodings.Channels = "learnable"
    projections: ranges.OrNone = 1
    aggregate_first: bool = True
    remat: bool = False
    scan: bool = False
    attention: layers.Implementation = "auto"

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """Return (width, heads, depth, decoder depth)."""
        if self.size:
            return SIZES[self.size]
        return self.width, self.heads, self.depth, self.decoder_depth

    def build(self, kinds, dtype: str):
        """Return (encoder, predictor)."""
        width, heads, depth, short = self.numbers
        names = "mlp_ratio qk_norm frequencies anchor channels remat scan attention"
        both = {name: getattr(self, name) for name in names.split()} | dict(dtype=dtype)
        encoder = Encoder(
            kinds,
            width,
            depth,
            heads,
            base=self.base_patch,
            drop_path=self.drop_path,
            registers=self.registers,
            projections=self.projections,
            aggregate_first=self.aggregate_first,
            patch_resize=self.patch_resize,
            **both,
        )
        return encoder, Predictor(kinds, width, width, short, heads, **both)

    def check(self) -> Iterator[str]:
        """Yield what the numbers of size "" do not agree on."""
        width, heads, depth, short = self.numbers
        if min(width, heads, depth, short) < 1:
            yield "size='': set width, heads, depth and decoder_depth"
            return
        if width % 16:
            yield f"width={width}: a multiple of 16 (four encodings of pairs of pairs)"
        if width % heads:
            yield f"heads={heads} does not divide width={width}"
