"""The levels of H-JEPA: features of a set of patches at several granularities.

Level k describes 2^k x 2^k patches (spatial pooling) or 2^k patches in a row of the
list of members (sequence pooling). Sets are packed: a list of members in raster order,
then padding.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from vitssl import ranges
from vitssl.models import layers, patches

Pooling = Literal["spatial", "sequence"]
Norm = Literal["layernorm", "batchnorm", "none", "targets"]
Pyramid = Literal["", "add", "concat"]


@dataclasses.dataclass(frozen=True)
class Spec:
    """Config section `levels`; their number is `masking.num_hierarchies`.

    Attributes:
        pooling: spatial: means over 2^k x 2^k cells. sequence: over 2^k consecutive
            entries of the list of targets (the original).
        norm: of the projections. targets: there are none; targets are normalised
            without parameters, predictions are compared as they are (I-JEPA).
        fpn: "" for none; feature pyramid by "add" or "concat".
        fpn_width: of the pyramid; 0 = the encoder's width.
        target: shared: targets pass the layers that are being trained (the original).
            ema: they pass an averaged copy, like the encoder's.
    """

    pooling: Pooling
    norm: Norm = "layernorm"
    fpn: Pyramid = ""
    fpn_width: ranges.OrNone = 0
    target: Literal["shared", "ema"] = "shared"

    def check(self) -> Iterator[str]:
        """Yield what needs parameters and has none."""
        for key, wrong in (("fpn", self.fpn), ("target", self.target == "ema")):
            if self.norm == "targets" and wrong:
                value = getattr(self, key)
                yield f"{key}={value}: norm=targets has no parameters; drop one of them"


class Members(flax.struct.PyTreeNode):
    """A set of patches per row of a batch."""

    where: jax.Array  # [B, M] int32 raster indices, members first, in ascending order.
    count: jax.Array  # [B] int32 number of members.
    grid: tuple[int, int] = flax.struct.field(pytree_node=False)

    @property
    def valid(self):  # -> [B, M] bool
        """Which slots hold a member."""
        return patches.valid(self.count, self.where.shape[1])


def everything(batch, grid) -> Members:
    """Return the set of all patches of a grid, for `batch` rows."""
    n = grid[0] * grid[1]
    where = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (batch, n))
    return Members(where, jnp.full((batch,), n, jnp.int32), tuple(grid))


def cells(grid, level):
    """Return (rows, columns) of the cells of a level: 14 -> 14, 7, 4, 2."""
    return tuple(-(-side // 2**level) for side in grid)


def cell_of(where, grid, level):  # int [...] -> int [...]
    """Return the raster index of the cell of each patch."""
    y, x = where // grid[1], where % grid[1]
    return (y >> level) * cells(grid, level)[1] + (x >> level)


def pool(x, members: Members, level, pooling: Pooling):  # [B, M, D], row per member
    """Average token rows over the groups of a level; level 0 is the rows themselves.

    Args:
        pooling: "spatial": the members of each 2^k x 2^k cell; "sequence": every 2^k
            consecutive members, an incomplete last group is dropped.

    Returns:
        (means [B, n, D] float32, valid [B, n] bool): cells in raster order, valid
        with at least one member; or groups in order, valid if complete.
    """
    x = x.astype(jnp.float32)
    if level == 0:
        return x, members.valid
    if pooling == "sequence":
        size = 2**level
        n = x.shape[1] // size
        groups = x[:, : n * size].reshape(x.shape[0], n, size, x.shape[-1])
        return groups.mean(2), patches.valid(members.count // size, n)
    h, w = cells(members.grid, level)
    cell = cell_of(members.where, members.grid, level)
    own = jax.nn.one_hot(cell, h * w, axis=1) * members.valid[:, None]  # [B, n, M]
    size = own.sum(-1, keepdims=True)
    # A sum over at most 4^k rows: exact in float32, also where the default is less.
    x = jnp.einsum("bnm,bmd->bnd", own / jnp.maximum(size, 1.0), x, precision="highest")
    return x, size[..., 0] > 0


def unpool(x, members: Members, level, pooling: Pooling):  # [B, n', D] of level + 1
    """Bring the features of level `level + 1` to the groups of `level`.

    Args:
        pooling: "spatial": each cell takes its parent; "sequence": linear
            interpolation between group centres, clamped at the ends.

    Returns:
        (rows [B, n, D], [B, n] bool: False where there is no coarser group at all).
    """
    if pooling == "spatial":
        if level == 0:
            parent = cell_of(members.where, members.grid, 1)  # [B, M]
        else:
            h, w = cells(members.grid, level)
            parent = cell_of(jnp.arange(h * w), (h, w), 1)[None]
        return patches.take(x, parent), jnp.ones(parent.shape, bool)
    n = members.where.shape[1] >> level
    if not x.shape[1]:
        return jnp.zeros((x.shape[0], n, x.shape[-1]), x.dtype), jnp.zeros((1, n), bool)
    fine, coarse = members.count[:, None] >> level, members.count[:, None] >> level + 1
    at = (jnp.arange(n) + 0.5) * coarse / jnp.maximum(fine, 1) - 0.5  # [B, n]
    at = jnp.clip(at, 0.0, jnp.maximum(coarse - 1, 0))
    low = jnp.floor(at).astype(jnp.int32)
    high = jnp.minimum(low + 1, jnp.maximum(coarse - 1, 0))
    part = (at - low)[..., None].astype(x.dtype)
    y = patches.take(x, low) * (1 - part) + patches.take(x, high) * part
    return y, jnp.broadcast_to(coarse > 0, (x.shape[0], n))


class BatchNorm(nn.Module):
    """Batch normalisation over all valid rows, with PyTorch's conventions.

    The biased variance normalises, the unbiased one enters the running average, which
    moves by `momentum` towards the batch. The averages are in "batch_stats".

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167; BatchNorm1dForTokens of
    jonwiggins/H-JEPA src/models/hjepa.py.
    """

    eps: float = 1e-5
    momentum: float = 0.1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, valid=None, train=False):  # [..., D], [...] bool
        """Normalise rows; `valid` marks those that count."""
        d = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (d,))
        bias = self.param("bias", nn.initializers.zeros, (d,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (d,))
        var = self.variable("batch_stats", "var", jnp.ones, (d,))
        x = x.astype(jnp.float32)
        m, v = mean.value, var.value
        if train:
            weight = jnp.ones(x.shape[:-1]) if valid is None else valid
            weight = weight[..., None].astype(jnp.float32)
            axes = tuple(range(x.ndim - 1))
            n = jnp.maximum(weight.sum(), 1.0)
            m = (x * weight).sum(axes) / n
            v = (jnp.square(x - m) * weight).sum(axes) / n
            if not self.is_initializing():
                some = weight.sum() > 0  # An empty set says nothing.
                unbiased = v * n / jnp.maximum(n - 1.0, 1.0)
                for old, new in ((mean, m), (var, unbiased)):
                    moved = old.value + self.momentum * (new - old.value)
                    old.value = jnp.where(some, jax.lax.stop_gradient(moved), old.value)
        y = (x - m) * jax.lax.rsqrt(v + self.eps) * scale + bias
        return y.astype(self.dtype)


class Project(nn.Module):
    """A linear layer and its normalisation."""

    width: int
    norm: Norm = "layernorm"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, valid=None, train=False):  # [..., D'] -> [..., D]
        x = layers.dense(self.width, self.dtype, "dense")(x)
        if self.norm == "layernorm":
            return layers.LayerNorm(1e-5, self.dtype, name="norm")(x)
        if self.norm == "batchnorm":
            return BatchNorm(dtype=self.dtype, name="norm")(x, valid, train)
        return x


class Levels(nn.Module):
    """Project and pool a set of patch features to H levels.

    Without a feature pyramid, level k is the mean of h_k(x) over its groups. With one,
    the raw features are pooled first, every level gets a lateral layer, coarse levels
    are added to (or concatenated with and fused into) finer ones from the top down,
    and h_k comes last.

    Attributes:
        width: D of tokens and levels.
        levels: H.
        others: see `Spec`.

    Source: jonwiggins/H-JEPA src/models/hjepa.py (hierarchy projections, FPN); spatial
    pooling is vitssl's. Lin et al. 2017, arXiv:1612.03144.
    """

    width: int
    levels: int
    norm: Norm = "layernorm"
    pooling: Pooling = "spatial"
    fpn: Pyramid = ""
    fpn_width: int = 0
    dtype: str = "float32"

    def setup(self):
        """Declare projections and pyramid: level k is proj_k, lateral_k and so on."""
        h, f = range(self.levels), self.fpn_width or self.width

        def part(n, norm="layernorm"):
            return Project(n, norm, self.dtype)

        if self.norm != "targets":
            self.proj = [part(self.width, self.norm) for _ in h]
        if self.fpn:
            self.lateral = [part(f) for _ in h]
            self.top_down = [part(f) for _ in h[1:]]
        if self.fpn == "concat":
            self.fuse = [part(f) for _ in h[1:]]

    def __call__(
        self,
        x,
        members: Members,
        *,
        only: Sequence[int] | None = None,
        target=False,
        train=False,
    ):
        """Return {level: (features [B, n, D] float32, valid [B, n] bool)}.

        Args:
            x: [B, M, D] one row per member.
            members: which patches the rows belong to.
            only: levels wanted; None = all.
            target: the rows are targets, not predictions.
            train: batch statistics of the valid rows, and update the running ones
                (make "batch_stats" mutable).
        """
        only = range(self.levels) if only is None else only
        if self.fpn:
            pyramid = self._pyramid(x, members, min(only))
        out = {}
        for k in only:
            if self.fpn:
                y, valid = pyramid[k]
                out[k] = self.proj[k](y, valid, train).astype(jnp.float32), valid
            else:
                y = self._project(k, x, members.valid, target, train)
                out[k] = pool(y, members, k, self.pooling)
        return out

    def coarse(self, x, target=False, train=False):  # [..., D] -> [..., D]
        """Return the coarsest level of feature vectors that stand alone."""
        if self.fpn:
            x = self.lateral[-1](x)
        return self._project(-1, x, None, target, train).astype(jnp.float32)

    def _project(self, k, x, valid, target, train):
        if self.norm != "targets":
            return self.proj[k](x, valid, train)
        x = x.astype(jnp.float32)
        return jax.nn.standardize(x, epsilon=1e-5) if target else x

    def _pyramid(self, x, members, finest):
        """Return {level: (features [B, n, F], valid)} from the coarsest to `finest`."""
        out = {}
        for k in reversed(range(finest, self.levels)):
            y, valid = pool(x, members, k, self.pooling)
            y = self.lateral[k](y)
            if k < self.levels - 1:
                above, there = unpool(out[k + 1][0], members, k, self.pooling)
                above = jnp.where(there[..., None], self.top_down[k](above), 0.0)
                if self.fpn == "add":
                    y = y + above
                else:
                    y = jnp.concatenate([y, above], axis=-1)
                    y = nn.relu(self.fuse[k](y))
            out[k] = y, valid
        return out
