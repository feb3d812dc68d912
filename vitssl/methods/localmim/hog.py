"""Histograms of oriented gradients, the targets of LocalMIM.

Hard binning of unsigned orientation, one histogram per colour channel and cell; no
window, no block normalisation. In float32 whatever the model computes in: at half
precision pixels change bins.
"""

import einops
import jax.numpy as jnp


def gradients(image):
    """Return Sobel derivatives of every channel, borders reflected.

    They are symmetric differences, so that they are exactly 0 where reflection makes
    them so: those pixels lie on the edge of a bin, and rounding must not decide.

    Args:
        image: [B, H, W, C] float.

    Returns:
        gx, gy [B, H, W, C] float32: left minus right, top minus bottom.
    """
    pad = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = jnp.pad(image.astype(jnp.float32), pad, mode="reflect")
    rows = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]  # [B, H, W + 2, C]
    columns = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]  # [B, H + 2, W, C]
    return rows[:, :, :-2] - rows[:, :, 2:], columns[:, :-2] - columns[:, 2:]


def bins(gx, gy, nbins):
    """Return the bin of unsigned orientation of each derivative, int32 in [0, nbins).

    floor(atan2(gx, gy) / pi * nbins) mod nbins: x first, bins of 180 / nbins degrees.
    """
    phase = jnp.arctan2(gx, gy) / jnp.pi * nbins
    return jnp.floor(phase).astype(jnp.int32) % nbins


def histograms(image, cell, nbins, bias=None):
    """Return the gradient magnitude per cell, channel and bin, averaged over pixels.

    Args:
        image: [B, H, W, C] float, as the network sees it (normalised).
        cell: side of a cell in pixels; divides H and W.
        nbins: bins over 180 degrees.
        bias: [2], added to gx and gy (the `hog_bias` of LocalMIM's ViT-L recipe), or
            None.

    Returns:
        [B, H / cell, W / cell, C, nbins] float32, before normalisation.
    """
    gx, gy = gradients(image)
    if bias is not None:
        gx, gy = gx + bias[0], gy + bias[1]
    # A zero gradient counts nothing; the sum keeps sqrt's derivative out of it.
    magnitude = jnp.sqrt(gx * gx + gy * gy)
    member = bins(gx, gy, nbins)[..., None] == jnp.arange(nbins)
    votes = jnp.where(member, magnitude[..., None], 0.0)  # [B, H, W, C, nbins]
    return einops.reduce(
        votes, "b (h p) (w q) c n -> b h w c n", "mean", p=cell, q=cell
    )


def normalise(histogram):
    """Return [B, h, w, C, nbins] with every cell and channel at length one, flat.

    Returns:
        [B, h, w, C nbins]; empty cells stay 0.
    """
    length = jnp.linalg.norm(histogram, axis=-1, keepdims=True)
    unit = histogram / jnp.maximum(length, 1e-12)
    return einops.rearrange(unit, "b h w c n -> b h w (c n)")


def targets(image, cells, nbins, biases=None):
    """Return normalised histograms for cells of several sizes.

    Without biases the image is read once: coarse cells are averages of the finest.

    Args:
        image: [B, H, W, C] float.
        cells: sizes in pixels.
        nbins: bins over 180 degrees.
        biases: [len(cells), 2] or None, see `histograms`.

    Returns:
        One [B, H / cell, W / cell, C nbins] per entry of `cells`.

    Source: Dalal & Triggs 2005 as simplified in Haoqing-Wang/LocalMIM@314a6e5
    ViT/models_mim.py:HOGLayer; Wei et al. 2021, arXiv:2112.09133 (MaskFeat).
    """
    if biases is not None:
        found = (
            histograms(image, c, nbins, b) for c, b in zip(cells, biases, strict=True)
        )
        return [normalise(x) for x in found]
    finest = min(cells)
    base = histograms(image, finest, nbins)
    made = {}
    for cell in sorted(set(cells)):
        if cell % finest:
            made[cell] = normalise(histograms(image, cell, nbins))
            continue
        k = cell // finest
        pooled = einops.reduce(base, "b (h p) (w q) c n -> b h w c n", "mean", p=k, q=k)
        made[cell] = normalise(pooled)
    return [made[cell] for cell in cells]
