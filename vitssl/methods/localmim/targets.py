"""What the stages of LocalMIM predict: histograms of oriented gradients, or others.

Hard binning of unsigned orientation, one histogram per colour channel and cell; no
window, no block normalisation. In float32 whatever the model computes in: at half
precision pixels change bins.
"""

import dataclasses
import math
from typing import Annotated

import einops
import jax
import jax.numpy as jnp

from vitssl import ranges
from vitssl.ops import accelerator


@dataclasses.dataclass(frozen=True)
class Targets:
    """Config section `target`.

    Attributes:
        nbins: orientations of HOG over 180 degrees (9, or 18 for LocalMIM's ViT-L).
        hog_bias: add a fixed random offset to the derivatives, its own for each stage,
            drawn from the run's seed (LocalMIM's ViT-L recipe, see the README of its
            authors); kept in the checkpoint.
        normalise_pixels: pixel targets of a cell have mean 0 and variance 1.
    """

    nbins: Annotated[int, ranges.Range(2)] = 9
    hog_bias: bool = False
    normalise_pixels: bool = True


def gradients(image):  # [B, H, W, C] -> gx, gy [B, H, W, C] float32
    """Return Sobel derivatives, borders reflected: left - right, top - bottom.

    They are symmetric differences, so that they are exactly 0 where reflection makes
    them so: those pixels lie on the edge of a bin, and rounding must not decide.
    """
    pad = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = jnp.pad(image.astype(jnp.float32), pad, mode="reflect")
    rows = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]  # [B, H, W + 2, C]
    columns = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]  # [B, H + 2, W, C]
    return rows[:, :, :-2] - rows[:, :, 2:], columns[:, :-2] - columns[:, 2:]


def bins(gx, gy, nbins):
    """Return the bin of unsigned orientation of each derivative, int32 in [0, nbins).

    floor(atan2(gx, gy) / pi * nbins) mod nbins: x first, bins of 180 / nbins degrees.
    Counted as the edges that the direction has passed, which takes no arc tangent.
    """
    back = (gx < 0) | ((gx == 0) & (gy < 0))
    x, y = jnp.where(back, -gx, gx), jnp.where(back, -gy, gy)  # Angle in [0, pi).
    angles = [math.pi * k / nbins for k in range(1, nbins)]
    passed = sum((x * math.cos(a) >= y * math.sin(a)).astype(jnp.int32) for a in angles)
    # What float32 cannot tell from pi is pi, which is 0; so is no gradient at all.
    return jnp.where((gy <= 0) & (jnp.abs(gx) <= -3.2e-8 * gy), 0, passed)


def histograms(image, cell, nbins, bias=None):  # -> [B, H / cell, W / cell, C, nbins]
    """Return the gradient magnitude per cell, channel and bin, averaged over pixels.

    Args:
        image: [B, H, W, C] float, as the network sees it (normalised).
        cell: side of a cell in pixels; divides H and W.
        bias: [2], added to gx and gy, or None; see `Targets.hog_bias`.
    """
    gx, gy = gradients(image)
    if bias is not None:
        gx, gy = gx + bias[0], gy + bias[1]
    # A zero gradient counts nothing; the sum keeps sqrt's derivative out of it.
    magnitude, member = jnp.sqrt(gx * gx + gy * gy), bins(gx, gy, nbins)
    if accelerator.on_cpu():

        def of_bin(k):
            votes = jnp.where(member == k, magnitude, 0.0)
            rows = einops.reduce(votes, "b (h p) w c -> b h w c", "sum", p=cell)
            return einops.reduce(rows, "b h (w q) c -> b h w c", "sum", q=cell)

        # XLA for a CPU would find the bins anew in each sum, unless they are a loop's:
        # a seventh of the time.
        each = jax.lax.map(of_bin, jnp.arange(nbins))
        return einops.rearrange(each, "n b h w c -> b h w c n") / cell**2
    votes = jnp.where(member[..., None] == jnp.arange(nbins), magnitude[..., None], 0.0)
    return einops.reduce(
        votes, "b (h p) (w q) c n -> b h w c n", "mean", p=cell, q=cell
    )


def _unit(histogram):  # [B, h, w, C, nbins] -> [B, h, w, C nbins]
    """Bring every cell and channel to length one; empty cells stay 0."""
    length = jnp.linalg.norm(histogram, axis=-1, keepdims=True)
    unit = histogram / jnp.maximum(length, 1e-12)
    return einops.rearrange(unit, "b h w c n -> b h w (c n)")


def hog(image, cells, nbins, biases=None):
    """Return normalised histograms [B, H / cell, W / cell, C nbins] for each cell.

    Without biases the image is read once: coarse cells are averages of the finest.

    Args:
        image, cells: see `histograms`.
        biases: one per cell, or None.

    Source: Dalal & Triggs 2005 as simplified in Haoqing-Wang/LocalMIM@314a6e5
    ViT/models_mim.py:HOGLayer; Wei et al. 2021, arXiv:2112.09133 (MaskFeat).
    """
    if biases is not None:
        pairs = zip(cells, biases, strict=True)
        return [_unit(histograms(image, c, nbins, b)) for c, b in pairs]
    finest = min(cells)
    base = histograms(image, finest, nbins)
    made = {}
    for cell in sorted(set(cells)):
        if cell % finest:
            made[cell] = _unit(histograms(image, cell, nbins))
            continue
        k = cell // finest
        pooled = einops.reduce(base, "b (h p) (w q) c n -> b h w c n", "mean", p=k, q=k)
        made[cell] = _unit(pooled)
    return [made[cell] for cell in cells]


def standardise(x, eps=1e-6):  # [..., D] -> [..., D] float32
    """Return vectors with mean 0 and variance 1."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


def per_patch(target, scale):  # [B, h s, w s, C] -> [B, h w, s, s, C]
    """Return targets by patch; below scale 1 by cell: [B, (h s) (w s), 1, 1, C]."""
    s = max(1, round(scale))
    return einops.rearrange(target, "b (h p) (w q) c -> b (h w) p q c", p=s, q=s)
