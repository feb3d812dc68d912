"""The vision transformer every method can use as its backbone."""

import re
from collections.abc import Iterator
from typing import Literal

import einops
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vitssl import ranges, sizes
from vitssl.models import layers, patches, posemb, stack
from vitssl.ops import accelerator, tpu
from vitssl.optim import freezeout


class PatchEmbed(nn.Module):
    """A linear map of every patch: a convolution with stride = kernel size.

    The kernel is stored as a convolution's, [patch, patch, C, D], and applied as one
    matrix product to flattened patches, hidden ones left out; but see `tpu.embed`.

    Initial values are PyTorch's, or those of He et al. 2015, arXiv:1502.01852, by fan
    out, with bias 0.
    """

    width: int
    patch: int
    dtype: str = "float32"
    init_by: Literal["torch", "he"] = "torch"

    @nn.compact
    def __call__(self, image, keep=None):  # [B, H, W, C] -> [B, N or K, D]
        p, channels = self.patch, image.shape[-1]
        init = start = layers.uniform_fan_in(p * p * channels)
        if self.init_by == "he":
            init = nn.initializers.normal((2 / (self.width * p * p)) ** 0.5)
            start = nn.initializers.zeros
        kernel = self.param("kernel", init, (p, p, channels, self.width))
        bias = self.param("bias", start, (self.width,))
        if keep is None and accelerator.on_tpu():
            x = tpu.embed(image.astype(self.dtype), kernel)
            x = einops.rearrange(x, "b h w d -> b (h w) d")
            return x + layers.spread(bias, x)
        x = patches.patchify(image.astype(self.dtype), p)  # [B, N, p p C]
        if keep is not None:
            x = patches.take(x, keep)  # [B, K, p p C]
        kernel = einops.rearrange(kernel, "p q c d -> (p q c) d")
        return layers.linear(x, kernel, bias, self.dtype)


class ViT(nn.Module):
    """Vision transformer with learned positions, for images of any size.

    Attributes:
        width: channels of a token, a multiple of heads.
        depth: blocks.
        heads: attention heads of every block.
        patch: side of a patch in pixels.
        image_size: size in pixels of the image the position table is for: a side, or
            (height, width).
        mlp_ratio: hidden width of the MLP over width.
        drop_path: of the last block; grows linearly from 0 in the first.
        layerscale: initial gain of the residual branches; 0 = none.
        rope: turn queries and keys of patches by their grid position, on top of the
            position table.
        rope_theta: base of the rotary frequencies.
        rope_unit: rotary positions in [-1, 1], see `posemb.rope_angles`.
        cls: prepend a class token.
        positions: learned: a trained table that starts at random. sincos: the fixed
            table of `posemb.sincos`, no parameter. learned_sincos: trained from there.
            none: no position is added (see rope).
        class_position: the position table has a row for the class token too.
        registers: number of register tokens after the class token; they have no
            position.
        resampling: of the position table for other grids, see `posemb.resample`.
        spacing: of computed positions (sincos, rope), see `posemb.Spacing`.
        qk_norm: LayerNorm of queries and keys, per head.
        norm_eps: of every LayerNorm.
        remat: recompute every block in the backward pass instead of storing it.
        scan: compile the blocks once, as a loop; copies their parameters once a step,
            see `stack`.
        dtype: of the computation; parameters are float32 always.
        attention: implementation, see `layers.attend`.

    Source: Dosovitskiy et al. 2020, arXiv:2010.11929, with the options and the
    initial values of timm and of jonwiggins/H-JEPA src/models/encoder.py. Registers:
    Darcet et al. 2023, arXiv:2309.16588.
    """

    width: ranges.Count
    depth: ranges.Count
    heads: ranges.Count
    patch: ranges.Count
    image_size: sizes.Size
    mlp_ratio: ranges.Positive = 4.0
    drop_path: ranges.BelowOne = 0.0
    layerscale: ranges.NotNegative = 0.0
    rope: bool = False
    rope_theta: ranges.Positive = 10000.0
    rope_unit: bool = False
    cls: bool = True
    positions: Literal["learned", "sincos", "learned_sincos", "none"] = "learned"
    class_position: bool = True
    registers: ranges.OrNone = 0
    resampling: posemb.Resampling = "antialias"
    spacing: tuple[float, float] = (1.0, 0.0)
    qk_norm: bool = False
    norm_eps: ranges.Positive = 1e-6
    remat: bool = False
    scan: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: layers.Implementation = "auto"

    @property
    def prefix(self):
        """How many tokens precede the patches."""
        return int(self.cls) + self.registers

    @property
    def _trained(self):
        """Whether the position table is a parameter."""
        return self.positions in ("learned", "learned_sincos")

    @property
    def _first(self):
        """Row of the position table that belongs to the first patch."""
        return int(self.cls and self.class_position and self._trained)

    def setup(self):
        """Declare the parameters; names do not depend on `remat`."""
        rows, columns = self.table_grid
        tiny = nn.initializers.normal(1e-6)
        if self.cls:
            self.class_token = self.param("cls", tiny, (1, 1, self.width))
        if self.registers:
            shape = (1, self.registers, self.width)
            self.register_tokens = self.param("registers", tiny, shape)
        if self._trained:
            shape = (1, self._first + rows * columns, self.width)
            init = layers.normal if self.positions == "learned" else self._sincos
            self.pos_embed = self.param("pos_embed", init, shape)
        self.patch_embed = PatchEmbed(self.width, self.patch, self.dtype)
        rates = np.linspace(0.0, self.drop_path, self.depth)
        self.block = [
            layers.block(
                self.remat,
                heads=self.heads,
                hidden=int(self.width * self.mlp_ratio),
                drop_path=float(rate),
                layerscale=self.layerscale,
                qk_norm=self.qk_norm,
                eps=self.norm_eps,
                dtype=self.dtype,
                attention=self.attention,
            )
            for rate in rates
        ]
        self.norm = layers.LayerNorm(self.norm_eps, self.dtype)

    def _sincos(self, key, shape):
        """Return the fixed table as initial value; the class token's row is 0."""
        del key
        table = posemb.sincos(self.table_grid, self.width)[None]
        return jnp.pad(table, ((0, 0), (shape[1] - table.shape[1], 0), (0, 0)))

    def position_table(self, grid):
        """Return the table of the patches of `grid` = (h, w): [h w, D], 0 without."""
        if self.positions == "none":
            return jnp.zeros((grid[0] * grid[1], self.width))
        if self.positions == "sincos":
            return jnp.asarray(posemb.sincos(grid, self.width, self.spacing))
        table = self.pos_embed[0, self._first :]
        return posemb.resample(table, self.table_grid, grid, self.resampling)

    def __call__(
        self,
        image,
        *,
        keep=None,
        count=None,
        hide=None,
        fill=None,
        weight=None,
        train=False,
    ):
        """Encode images.

        Args:
            image: [B, H, W, C], normalised; the patch divides both sides.
            keep: [B, K] int32 raster indices of the patches that exist ("drop"
                masking, packed by `models.patches.pack`); None = all.
            count: [B] int32, how many leading entries of keep are meant; the others
                are padding that no token attends to. None = all.
            hide: [B, N] bool, patches whose token becomes 0 once it has its position
                ("zero" masking); they stay in the sequence.
            fill: [D], what patches of `hide` are instead, before they get their
                position (BEiT's, SimMIM's and iBOT's mask token); None = 0 after it.
            weight: [B, N] how much every patch counts as a key, in every block
                (`layers.weighted_attention`); the prefix counts 1. None = all alike.
            train: drop paths, from the stream "drop_path".

        Returns:
            (tokens [B, P + K or P + N, D], out): tokens after the last LayerNorm,
            class token first, then registers, then patches; rows of padding are
            meaningless. out["blocks"]: the `depth` outputs [B, ..., D] before that
            norm; out["grid"] = (h, w).

        Raises:
            ValueError: the patch does not divide the image, or keep and hide are
                both given, or count comes without keep, weight with keep, fill without
                hide.
        """
        if keep is not None and hide is not None:
            raise ValueError("ViT: give keep (drop) or hide (zero), not both")
        if count is not None and keep is None:
            raise ValueError("ViT: count says how much of keep is meant; give keep")
        if fill is not None and hide is None:
            raise ValueError("ViT: fill says what hidden patches are; give hide")
        if weight is not None:
            if keep is not None:
                raise ValueError("ViT: give keep (drop) or weight, not both")
            weight = jnp.pad(weight, ((0, 0), (self.prefix, 0)), constant_values=1.0)
        grid = patches.grid(image, self.patch)
        x, rope = self._embed(image, grid, keep, hide, fill)  # [B, P + K, D]
        length = None if count is None else (count + self.prefix).astype(jnp.int32)
        blocks = self._run(self.block, x, length, rope, train, weight)
        return self.norm(blocks[-1]), {"blocks": blocks, "grid": grid}

    def _run(self, blocks, x, length=None, rope=None, train=False, weight=None):
        args = length, rope, train, weight
        return stack.run(blocks, x, *args, train=train, scan=self.scan)

    def start(self, image, keep=None):
        """Return the sequence before the first block [B, P + N or P + K, D]."""
        return self._embed(image, patches.grid(image, self.patch), keep)[0]

    def between(self, x, first, last, keep=None, size=None):
        """Return the sequence [B, T, D] after `last` blocks, no path dropped.

        Args:
            x: that after `first` blocks; where this is 0, images [B, H, W, C].
            keep: [B, K] patches of an image that exist; None = all.
            size: of the images, which no block asks for here.
        """
        del size
        x = x.astype(self.dtype) if first else self.start(x, keep)
        return [x, *self.through(x, first, last)][-1]

    def through(self, x, first, last, train=False):
        """Return the outputs of blocks first .. last - 1 of a sequence [B, T, D].

        Without rotary positions, which belong to the whole grid.
        """
        return self._run(self.block[first:last], x, train=train)

    def onwards(self, x, first, train=False):
        """Return (tokens [B, T, D], out) of the sequence after `first` blocks.

        As of images; out["blocks"] begins with that sequence.
        """
        x = x.astype(self.dtype)
        blocks = [x, *self.through(x, first, self.depth, train)]
        return self.norm(blocks[-1]), {"blocks": blocks}

    def pooled_from(self, x, first, how="gap", train=False, size=None):
        """Return what `pooled` does, of the sequence [B, T, D] after `first` blocks."""
        del size
        return self._pool(*self.onwards(x, first, train), how)

    def frozen_blocks(self, live, prefix: str = "") -> int:
        """Return how many blocks, from the first on, a store may stand for.

        None if anything before them trains; see `store_faults` too.

        Args:
            live: names of the parameters that train.
            prefix: of the ViT's own.
        """
        first = self.depth
        found = re.compile(rf"{prefix}(?:block_(\d+)/|norm/|(.))")
        for match in filter(None, map(found.match, live)):
            if match[1] or match[2]:
                first = min(first, int(match[1] or 0))
        return first

    def store_faults(self) -> Iterator[str]:
        """Yield why no store can stand for the first blocks."""
        if self.rope:
            yield "model.rope turns tokens by the whole grid, which is not kept"

    def pooled(self, image, how="gap", train=False):
        """Return one vector per image: [B, D].

        "gap" is the mean of the last block's patch tokens, before any norm (a head
        normalises it, as MAE's fine-tuning does), "mean" that of the tokens after the
        last norm, "cls" the class token after it.
        """
        return self._pool(*self(image, train=train), how)

    def apart(self, image, how="gap", blocks=(), train=False):
        """Return ({}, {n: [B, D]}, [B, D]): early features, and `pooled`.

        After n of `blocks`: the class token (how="cls") or the patches' mean, no norm.
        """
        tokens, out = self(image, train=train)
        early = {n: out["blocks"][n - 1].astype(jnp.float32) for n in blocks}
        for n, x in early.items():
            early[n] = x[:, 0] if how == "cls" else x[:, self.prefix :].mean(1)
        return {}, early, self._pool(tokens, out, how)

    @property
    def exits(self) -> tuple[int, ...]:
        """After how many blocks `apart` has features."""
        return tuple(range(1, self.depth + 1))

    def _pool(self, tokens, out, how):
        if how == "cls":
            return tokens[:, 0].astype(jnp.float32)
        x = out["blocks"][-1] if how == "gap" else tokens
        return x[:, self.prefix :].astype(jnp.float32).mean(1)

    @property
    def poolings(self) -> tuple[str, ...]:
        """What `pooled` knows."""
        return ("gap", "mean", "cls") if self.cls else ("gap", "mean")

    def features(self, image, train=False):
        """Return {"tokens": [B, N, D] of the patches, and [B, D] of each pooling}."""
        tokens, out = self(image, train=train)
        found = {"tokens": tokens[:, self.prefix :].astype(jnp.float32)}
        return found | {how: self._pool(tokens, out, how) for how in self.poolings}

    def attention_maps(self, image):
        """Return (maps [B, depth, heads, T, T], grid (h, w)); see `models.Backbone`."""
        _, out = self(image)
        return layers.sown_maps(self.block), out["grid"]

    def freeze_layers(self, prefix: str = "") -> tuple:
        """Return `FreezeOut.layers`; see `freezeout.vit_layers`."""
        last = ((rf"{prefix}norm/.*", self.depth),)
        tokens = self.prefix > 0 or self._trained
        return freezeout.vit_layers(self.depth, prefix, last, tokens)

    def check_channels(self, channels: int) -> Iterator[str]:
        """Yield why images of so many channels do not fit: all do."""
        del channels
        yield from ()

    @property
    def square(self) -> int:
        """Side, in pixels, of the square that one token stands for."""
        return self.patch

    @property
    def table_grid(self) -> tuple[int, int]:
        """Grid (h, w) of the position table."""
        height, width = sizes.pair(self.image_size)
        return height // self.patch, width // self.patch

    def check_image(self, size: sizes.Size) -> Iterator[str]:
        """Yield why images of this size, in pixels, do not fit, if they do not."""
        yield from sizes.faults(size, self.patch)

    def _embed(self, image, grid, keep=None, hide=None, fill=None):
        """Return the sequence [B, P + K, D] and its rotation, if any."""
        x = self.patch_embed(image, keep)  # [B, K, D]
        if fill is not None:
            x = jnp.where(hide[..., None], layers.spread(fill, x), x)
        if self.positions != "none":
            pos = self.position_table(grid)[None]  # [1, N, D]
            if keep is not None:
                pos = patches.take(pos, keep)
            x = x + layers.spread(pos, x)
        if hide is not None and fill is None:
            x = jnp.where(hide[..., None], 0.0, x)
        prefix = []
        if self.cls:
            place = self.pos_embed[:, :1] if self._first else 0.0
            prefix.append(self.class_token + place)
        if self.registers:
            prefix.append(self.register_tokens)
        if prefix:
            shape = (x.shape[0], self.prefix, self.width)
            prefix = jnp.broadcast_to(jnp.concatenate(prefix, axis=1), shape)
            x = jnp.concatenate([prefix.astype(x.dtype), x], axis=1)
        return x, self._rotation(grid, keep) if self.rope else None

    def _rotation(self, grid, keep):
        """Return (cos, sin) [1 or B, P + K, D / heads]; the prefix is not turned."""
        head_dim = self.width // self.heads
        how = (self.rope_theta, self.rope_unit, self.spacing)
        angles = posemb.rope_angles(grid, head_dim, *how)[None]
        if keep is not None:
            angles = patches.take(jnp.asarray(angles), keep)
        return posemb.rotation(jnp.pad(angles, ((0, 0), (self.prefix, 0), (0, 0))))

    def check(self) -> Iterator[str]:
        """Yield one line per impossible combination of the fields."""
        if self.width % self.heads:
            yield (
                f"heads={self.heads}: must divide width={self.width}; "
                f"{_divisors(self.width, self.heads)}"
            )
        elif "sincos" in self.positions and self.width % 4:
            yield f"width={self.width}: {self.positions} positions need a multiple of 4"
        elif self.rope and self.width // self.heads % 4:
            yield (
                f"rope=True: needs width / heads divisible by 4, it is "
                f"{self.width // self.heads}"
            )
        if min(sizes.pair(self.image_size)) < 1:
            yield f"image_size={self.image_size}: 1 or more"
        for fault in sizes.faults(self.image_size, self.patch, "patch"):
            yield f"image_size={self.image_size}: {fault}"


def _divisors(width, heads):
    """Name the divisors of width next to heads."""
    fits = [n for n in range(1, width + 1) if width % n == 0]
    near = sorted(sorted(fits, key=lambda n: abs(n - heads))[:2])
    return "nearest that do: " + ", ".join(map(str, near))
