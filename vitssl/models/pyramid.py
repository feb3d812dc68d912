"""One stream of the hierarchical transformer: stages joined by patch merging."""

import itertools
import re
from collections.abc import Iterator
from typing import Literal

import einops
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn

from vitssl import ranges, sizes
from vitssl.models import layers, posemb, stack, vit


class PatchMerging(nn.Module):
    """Join each 2 x 2 group of tokens into one of twice the width.

    An odd grid gets a row or column of zeros at its end first. The order within a
    group is column by column: (0, 0), (1, 0), (0, 1), (1, 1) as (row, column). The
    LayerNorm comes before the linear layer.

    Source: Liu et al. 2021 (Swin), arXiv:2103.14030, section 3.1.
    """

    eps: float
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, grid):
        """[B, h w, D], (h, w) -> [B, h' w', 2 D], (h', w'): halves, rounded up."""
        h, w = grid
        x = einops.rearrange(x, "b (h w) d -> b h w d", h=h)
        x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
        x = einops.rearrange(x, "b (h r) (w c) d -> b (h w) (c r d)", r=2, c=2)
        x = layers.LayerNorm(self.eps, self.dtype, name="norm")(x)
        half = layers.dense(x.shape[-1] // 2, self.dtype, "reduction", use_bias=False)
        return half(x), (-(-h // 2), -(-w // 2))


class Pyramid(nn.Module):
    """Stages of global self-attention, each at half the grid and twice the width.

    Images of any size with at least one patch: the position table is resampled, odd
    grids are padded (`PatchMerging`), pixels at the right and bottom that fill no
    patch are left out.

    Attributes:
        width: channels of a token in the first stage.
        depths, heads: blocks, and attention heads, of every stage.
        qkv_bias: whether queries, keys and values have a bias.
        patch: side of a patch in pixels.
        image_size: side, or (height, width), in pixels, of the image the position
            table is for.
        image_width: its width, if image_size is but the height; 0 = as image_size says.
        mlp_ratio: hidden width of an MLP over its stage's width.
        dropout: after the positions, and in and after attention and MLP.
        map_dropout: of attention maps.
        drop_path: of the last block; grows linearly from 0 in the first of all.
        norm_eps: of every LayerNorm.
        remat: recompute every block in the backward pass instead of storing it.
        scan: compile the blocks of a stage once, see `stack`.
        dtype: of the computation; parameters are float32 always.
        attention: implementation, see `layers.attend`.
    """

    width: ranges.Count
    depths: tuple[ranges.Count, ...]
    heads: tuple[ranges.Count, ...]
    patch: ranges.Count
    image_size: sizes.Size
    image_width: ranges.OrNone = 0
    mlp_ratio: ranges.Positive = 4.0
    qkv_bias: bool = True
    dropout: ranges.BelowOne = 0.0
    map_dropout: ranges.BelowOne = 0.0
    drop_path: ranges.BelowOne = 0.0
    norm_eps: ranges.Positive = 1e-5
    remat: bool = False
    scan: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: layers.Implementation = "auto"

    @property
    def depth(self) -> int:
        """Number of blocks of all stages."""
        return sum(self.depths)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of a token in every stage."""
        return tuple(self.width * 2**s for s in range(len(self.depths)))

    @property
    def table_size(self) -> tuple[int, int]:
        """Size (height, width), in pixels, of the image the position table is for."""
        height, width = sizes.pair(self.image_size)
        return height, self.image_width or width

    @property
    def table_grid(self) -> tuple[int, int]:
        """Grid (h, w) of the position table."""
        height, width = self.table_size
        return height // self.patch, width // self.patch

    @property
    def rates(self) -> np.ndarray:
        """Drop path of every block, all stages in one line [depth]."""
        return np.linspace(0.0, self.drop_path, self.depth)

    def setup(self):
        """Declare the parameters; blocks are numbered through all stages."""
        h, w = self.table_grid
        self.pos_embed = self.param("pos_embed", layers.normal, (1, h * w, self.width))
        self.patch_embed = vit.PatchEmbed(self.width, self.patch, self.dtype, "he")
        self.patch_norm = layers.LayerNorm(self.norm_eps, self.dtype)
        self.block = [
            layers.block(
                self.remat,
                heads=self.heads[s],
                hidden=int(self.widths[s] * self.mlp_ratio),
                drop_path=float(rate),
                eps=self.norm_eps,
                dtype=self.dtype,
                attention=self.attention,
                qkv_bias=self.qkv_bias,
                dropout=self.dropout,
                map_dropout=self.map_dropout,
            )
            for s, rate in zip(self.stage_of_blocks, self.rates, strict=True)
        ]
        self.merge = [PatchMerging(self.norm_eps, self.dtype) for _ in self.depths[1:]]
        self.norm = layers.LayerNorm(self.norm_eps, self.dtype)
        self.drop = nn.Dropout(self.dropout)

    @property
    def stage_of_blocks(self) -> tuple[int, ...]:
        """Stage of every block."""
        return tuple(s for s, n in enumerate(self.depths) for _ in range(n))

    def position_table(self, grid):
        """Return the positions of the patches of `grid` = (h, w): [1, h w, D].

        Bicubic with a = -0.75, half-pixel centres and no antialiasing.
        """
        return posemb.resample(self.pos_embed, self.table_grid, grid, "plain")

    def encode(self, image, train=False, mask=None, fill=None):
        """Return (tokens [B, N, D], stages) of images [B, H, W, C], normalised.

        Args:
            image: at least one patch.
            train: dropout and drop path, from the streams "dropout" and "drop_path".
            mask: [B, h w] bool, patches of the first stage whose content `fill` [D]
                replaces, before positions are added; None = none.

        Returns:
            tokens: of the last stage, after the last LayerNorm.
            stages: {"maps": of every stage the output of its last block [B, h, w, D_s],
                "merged": what patch merging makes of all but the last [B, N, 2 D_s],
                "grids": (h, w) of every stage}.

        Raises:
            ValueError: the image is smaller than a patch.
        """
        x, grid = self.embed(image)  # [B, N, D]
        if mask is not None:
            x = jnp.where(mask[..., None], layers.spread(fill, x), x)
        x = x + layers.spread(self.position_table(grid), x)
        x = self.drop(x, deterministic=not train)
        stages = {"maps": [], "merged": [], "grids": []}
        blocks = iter(self.block)
        for s, depth in enumerate(self.depths):
            own = list(itertools.islice(blocks, depth))
            args = None, None, train
            x = stack.run(own, x, *args, train=train, scan=self.scan)[-1]
            stages["grids"].append(grid)
            maps = einops.rearrange(x, "b (h w) d -> b h w d", h=grid[0])
            stages["maps"].append(maps)
            if s + 1 < len(self.depths):
                x, grid = self.merge[s](x, grid)
                stages["merged"].append(x)
        return self.norm(x), stages

    def between(self, x, first, last, keep=None, size=None):
        """Return the tokens [B, N, D] after `last` blocks, nothing dropped.

        Args:
            x: those after `first` blocks, before they are merged; where this is 0,
                images [B, H, W, C].
            keep: None: all patches exist.
            size: (height, width) in pixels of the images.
        """
        del keep
        if not first:
            x, grid = self.embed(x)
            x = x + layers.spread(self.position_table(grid), x)
        return self._through(x.astype(self.dtype), first, last, size)

    def _through(self, x, first, last, size, train=False):
        """Return the tokens after blocks first .. last - 1, as `between` has them."""
        stages = self.stage_of_blocks
        grid = tuple(side // self.patch for side in sizes.pair(size))
        for _ in range(stages[max(0, first - 1)]):
            grid = tuple(-(-side // 2) for side in grid)
        for i in range(first, last):
            if i and stages[i] > stages[i - 1]:
                x, grid = self.merge[stages[i - 1]](x, grid)
            x = self.block[i](x, None, None, train)
        return x

    def frozen_blocks(self, live, prefix: str = "") -> int:
        """Return how many blocks, from the first on, a store may stand for.

        See `vit.ViT.frozen_blocks`; patch merging comes before the block after it.
        """
        first = self.depth
        found = re.compile(rf"{prefix}(?:(block|merge)_(\d+)/|norm/|(.))")
        for match in filter(None, map(found.match, live)):
            if match[1] == "block":
                first = min(first, int(match[2]))
            elif match[1]:
                first = min(first, sum(self.depths[: int(match[2]) + 1]))
            elif match[3]:
                first = 0
        return first

    def embed(self, image):
        """Return (tokens [B, h w, D] without positions, (h, w)) of [B, H, W, C]."""
        height, width = image.shape[1:3]
        h, w = height // self.patch, width // self.patch
        if not h or not w:
            raise ValueError(
                f"HViT: an image of {height}x{width} px holds no patch of {self.patch}"
            )
        if height % self.patch or width % self.patch:
            logging.log_first_n(
                logging.WARNING,
                "HViT: patch=%d does not divide images of %dx%d px; the rest at the "
                "right and bottom is left out",
                1,
                self.patch,
                height,
                width,
            )
        image = image[:, : h * self.patch, : w * self.patch]
        return self.patch_norm(self.patch_embed(image)), (h, w)

    def check(self) -> Iterator[str]:
        """Yield one line per impossible combination of the fields."""
        if self.image_width and not isinstance(self.image_size, int):
            yield f"image_width={self.image_width}: image_size has a width already"
        if not self.depths:
            yield "depths=(): one number of blocks per stage"
        if len(self.heads) != len(self.depths):
            yield f"heads={self.heads}: one number per stage of depths={self.depths}"
        for s, (d, n) in enumerate(zip(self.widths, self.heads, strict=False)):
            if d % n:
                yield (
                    f"heads={self.heads}: {n} does not divide the width {d} of "
                    f"stage {s} (width={self.width})"
                )
        if min(self.table_grid) < 1:
            yield f"image_size={self.image_size}: at least one patch={self.patch}"
