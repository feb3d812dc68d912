"""From tokens of large patches, which are cheap to attend over, to tokens of small.

An encoder processes patches of side p; features come out for patches of side q, which
divides p, r = p / q per side. Everything here runs after the last norm.
"""

from collections.abc import Iterator
from typing import Literal

import einops
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vitssl.data import modalities
from vitssl.data.states import ONLINE
from vitssl.models import layers, patches, xavier
from vitssl.ops import resize

Mode = Literal["bilinear", "nearest", "pixel_shuffle", "skip"]
Anchor = Literal["corner", "center"]  # Where in a cell its position is.
LEARNED = ("pixel_shuffle", "skip")  # The modes with parameters.


def factor(p: int, q: int) -> int:
    """Return r = p / q; ValueError where q does not divide p."""
    for line in faults(p, q):
        raise ValueError(line)
    return p // q


def faults(p: int, q: int) -> Iterator[str]:
    """Yield what is wrong with processing at p and putting out at q."""
    if p < 1 or q < 1:
        yield f"patches p={p} and q={q}: must be at least 1"
    elif q > p:
        yield f"output patch q={q}: must not be larger than the processing patch p={p}"
    elif p % q:
        fits = [n for n in range(1, p + 1) if p % n == 0]
        yield (
            f"output patch q={q}: must divide the processing patch p={p}: one of "
            f"{', '.join(map(str, fits))}"
        )


def upsample(z, mask, r, how="bilinear"):  # -> [B, h r, w r, T, S, D]
    """Give every fine place the features of the coarse tokens around it.

    Tokens that are not ONLINE are no data: they take no part in the interpolation, and
    the weights of the others are renormalised to 1.

    Args:
        z: [B, h, w, T, S, D] tokens; returned as they are if r = 1.
        mask: [B, h, w, T, S] states; None = all ONLINE. Elsewhere the result is 0.
        r: fine tokens per coarse one, per side.
        how: "bilinear" between centres, or "nearest".
    """
    if r == 1:
        return z
    seen = None if mask is None else (mask == ONLINE)[..., None]
    if seen is not None:
        z = jnp.where(seen, z, 0)
    if how == "nearest":
        return resize.nearest(z, r)
    y = _between(z, r)
    if seen is None:
        return y.astype(z.dtype)
    # At least 1/4 where the parent is ONLINE, so nothing is divided by little.
    weight = _between(seen.astype(jnp.float32), r)
    fine = resize.nearest(seen, r)
    return jnp.where(fine, y / jnp.where(fine, weight, 1), 0).astype(z.dtype)


def upsample_at(z, mask, index, r, how="bilinear"):
    """Return some rows of `upsample`, without making the others: [B, K, D].

    `index` is int32 [B, K], places on the fine grid (h r, w r, T, S), flattened.
    """
    h, w, t, s = z.shape[1:5]
    row, column, *rest = jnp.unravel_index(index, (h * r, w * r, t, s))
    batch = jnp.arange(len(z))[:, None]
    parent = (batch, row // r, column // r, *rest)
    here = True if mask is None else (mask[parent] == ONLINE)[..., None]
    if how == "nearest" or r == 1:
        return jnp.where(here, z[parent], 0)
    total, weight = 0.0, 0.0
    for y, wy in _neighbours(row, r, h):
        for x, wx in _neighbours(column, r, w):
            at, share = (batch, y, x, *rest), (wy * wx)[..., None]
            if mask is not None:
                share = share * (mask[at] == ONLINE)[..., None]
            total += share * jnp.where(share > 0, z[at].astype(jnp.float32), 0)
            weight += share
    return jnp.where(here, total / jnp.where(here, weight, 1), 0).astype(z.dtype)


def _neighbours(fine, r, count):
    """Return ((coarse place, weight), ...) of the two around each fine place."""
    at = (fine + 0.5) / r - 0.5
    low = jnp.floor(at)
    far = at - low
    low = low.astype(jnp.int32)
    # Beyond the border the last one is repeated.
    return tuple(
        (jnp.clip(k, 0, count - 1), weight)
        for k, weight in ((low, 1 - far), (low + 1, far))
    )


def _between(x, r):
    """Interpolate [B, h, w, T, S, D] bilinearly, in float32."""
    flat = einops.rearrange(x.astype(jnp.float32), "b h w t s d -> b h w (t s d)")
    y = resize.bilinear(flat, r)
    t, s = x.shape[3:5]
    return einops.rearrange(y, "b h w (t s d) -> b h w t s d", t=t, s=s)


def upsample_mask(mask, r):  # [B, h, w, T, S] -> [B, h r, w r, T, S]
    """Return the states of the fine tokens, exact."""
    return mask if r == 1 else resize.nearest(mask, r)


def clean(x):
    """Return `x` with 0 where a value is missing."""
    return jnp.where(x == modalities.MISSING, 0.0, x)


class PixelShuffle(nn.Module):
    """A linear layer from a token to its r x r children; starts as copying.

    Source: Shi et al. 2016, arXiv:1609.05158, on tokens.
    """

    factor: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, z, index=None):  # [B, h, w, T, S, D] -> [B, h r, w r, T, S, D]
        """Return the children; with `index`, as in `upsample_at`, some: [B, K, D]."""
        r, d, child = self.factor, z.shape[-1], None
        if index is not None:
            grid = (z.shape[1] * r, z.shape[2] * r, *z.shape[3:5])
            row, column, *rest = jnp.unravel_index(index, grid)
            child = (row % r * r + column % r)[..., None, None]
            z = z[(jnp.arange(len(z))[:, None], row // r, column // r, *rest)]

        def copies(key, shape):
            return jnp.tile(jnp.eye(d), (1, r * r))

        kernel = self.param("kernel", copies, (d, r * r * d))
        bias = self.param("bias", nn.initializers.zeros, (r * r * d,))
        y = layers.linear(z, kernel, bias, self.dtype)
        if child is not None:
            y = einops.rearrange(y, "b k (n d) -> b k n d", d=d)
            return jnp.take_along_axis(y, child, axis=2)[:, :, 0]
        pattern = "b h w t s (a c d) -> b (h a) (w c) t s d"
        return einops.rearrange(y, pattern, a=r, c=r)


class Skip(nn.Module):
    """What lies inside a token: its pixels, patch by patch of side q.

    y = z + embed(pixels), then y + MLP(norm(y)); every place by itself, so that nothing
    comes from pixels of other tokens. The only upsampler that adds information.
    """

    modalities: tuple[modalities.Modality, ...]  # Whose pixels are read.
    patch: int  # q
    dtype: str = "float32"

    @nn.compact
    def __call__(self, fine, fields, index=None):
        """Return {name: [B, h r, w r, T, S, D]} with detail.

        Args:
            fine: {name: [B, h r, w r, T, S, D]} interpolated tokens, or some [B, K, D].
            fields: {name: [B, H, W, T, C]} pixels.
            index: {name: [B, K]} which they are, see `upsample_at`; None = all.
        """
        d = next(iter(fine.values())).shape[-1]
        norm = xavier.norm(self.dtype, "norm")
        mlp = xavier.MLP(2 * d, self.dtype, name="mlp")
        found = {}
        for m in self.modalities:
            x = clean(fields[m.name])
            at = None if index is None else index[m.name]
            y = self._everywhere(m, x, d) if at is None else self._at(m, x, at, d)
            y = fine[m.name] + y
            found[m.name] = y + mlp(norm(y))
        return found

    def _layer(self, m, g, d):
        return xavier.Linear(d, self.dtype, name=f"{m.name}_{g}")

    def _everywhere(self, m, x, d):
        """Return the embedded pixels of every fine place: [B, h r, w r, T, S, D]."""
        x = einops.rearrange(x, "b h w t c -> b t h w c")
        side, parts = self.patch * m.factor, []
        h, w = patches.grid(x, side)
        for g, bands in enumerate(m.channels):
            pixels = patches.patchify(x[..., np.array(bands)], side)
            parts.append(self._layer(m, g, d)(pixels))  # [B, T, h w, D]
        y = jnp.stack(parts, axis=-2)
        return einops.rearrange(y, "b t (h w) s d -> b h w t s d", h=h, w=w)

    def _at(self, m, x, index, d):
        """Return the embedded pixels of some fine places: [B, K, D]."""
        side = self.patch * m.factor
        grid = (x.shape[1] // side, x.shape[2] // side, x.shape[3], len(m.channels))
        row, column, time, group = jnp.unravel_index(index, grid)
        step = jnp.arange(side)
        y = (row[..., None] * side + step)[..., :, None]  # [B, K, side, 1]
        z = (column[..., None] * side + step)[..., None, :]
        batch = jnp.arange(len(x))[:, None, None, None]
        block = x[batch, y, z, time[..., None, None]]  # [B, K, side, side, C]
        found = 0.0
        for g, bands in enumerate(m.channels):
            pixels = block[..., np.array(bands)]
            pixels = einops.rearrange(pixels, "b k p q c -> b k (p q c)")
            embedded = self._layer(m, g, d)(pixels)
            found = found + jnp.where((group == g)[..., None], embedded, 0)
        return found


class Upsampler(nn.Module):
    """Upsamples the tokens of all modalities that have places.

    Attributes:
        p, q: sides of the coarse and the fine patches, in pixels of the field.
        mode: "bilinear" and "nearest" have no parameters; "pixel_shuffle" has a linear
            layer to the children, "skip" also reads the pixels, see `Skip`.
    """

    modalities: tuple[modalities.Modality, ...]
    p: int
    q: int
    mode: Mode = "bilinear"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, coarse, mask, fields, index=None):
        """Upsample.

        Args:
            coarse: {name: [B, h, w, T, S, D], or without places}.
            mask: {name: states of these}.
            fields: the batch.
            index: {name: [B, K]}: which fine tokens, see `upsample_at`, of modalities
                with places; the others are not made. None = all.

        Returns:
            With `index` {name: [B, K, D]}; otherwise (tokens, mask) on the grid of q,
            0 where not ONLINE; exactly the given ones where p = q, and where a modality
            has no places.

        Raises:
            ValueError: q does not divide p.
        """
        r = factor(self.p, self.q)
        if r == 1 and index is None:
            return coarse, mask
        kinds = tuple(
            m for m in self.modalities if m.space and (index is None or m.name in index)
        )
        at = {m.name: None for m in kinds} if index is None else index
        if self.mode == "pixel_shuffle" and r > 1:
            shuffle = PixelShuffle(r, self.dtype, name="shuffle")
            fine = {k: shuffle(coarse[k], i) for k, i in at.items()}
        else:
            how = "nearest" if self.mode == "nearest" else "bilinear"
            fine = {
                k: upsample(coarse[k], mask[k], r, how)
                if i is None
                else upsample_at(coarse[k], mask[k], i, r, how)
                for k, i in at.items()
            }
        if self.mode == "skip" and r > 1:
            fine = Skip(kinds, self.q, self.dtype, name="skip")(fine, fields, index)
        if index is not None:
            return fine
        states = mask | {k: upsample_mask(mask[k], r) for k in fine}
        fine = {
            k: jnp.where((states[k] == ONLINE)[..., None], v, 0)
            for k, v in fine.items()
        }
        return coarse | fine, states
