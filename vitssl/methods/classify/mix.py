"""Mixup and CutMix of a batch with itself reversed, on the device.

Sources: Zhang et al. 2018, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899; the
batch mode of timm.data.Mixup.
"""

import jax
import jax.numpy as jnp

from vitssl.methods.classify import objective


def box(lam, centre, size):
    """Return the box (y0, y1, x0, x1), half open, that CutMix pastes.

    Its sides are sqrt(1 - lam) of the image's, truncated to pixels, and it is clipped
    to the image.

    Args:
        lam: [] share of the image that stays.
        centre: (y, x) int [].
        size: (H, W).
    """
    edges = []
    for c, n in zip(centre, size, strict=True):
        half = (n * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
        edges += [jnp.clip(c - half, 0, n), jnp.clip(c + half, 0, n)]
    return tuple(edges)


def mixup(image, lam, other=None):
    """Return lam x + (1 - lam) other: [B, H, W, C]; other = x reversed if None."""
    other = image[::-1] if other is None else other
    return lam * image + (1 - lam) * other


def cutmix(image, edges, other=None):
    """Paste the box of other (see `mixup`); return (images, share that stayed)."""
    other = image[::-1] if other is None else other
    h, w = image.shape[1:3]
    y0, y1, x0, x1 = edges
    rows, columns = jnp.arange(h)[:, None], jnp.arange(w)[None]
    inside = (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)  # [H, W]
    mixed = jnp.where(inside[..., None], other, image)
    return mixed, 1 - (y1 - y0) * (x1 - x0) / (h * w)


def targets(label, classes, lam, smoothing):
    """Return lam t + (1 - lam) t reversed, of smoothed targets: [B, K]."""
    own = objective.soft_targets(label, classes, smoothing)
    return lam * own + (1 - lam) * own[::-1]


def mix(rng, image, *, mixup_alpha, cutmix_alpha, prob, switch):
    """Mix a batch with itself reversed, at random; one draw for all of it.

    Args:
        rng: key.
        image: [B, H, W, C] float, B even.
        mixup_alpha, cutmix_alpha: of the Beta distributions; 0 is off.
        prob: probability that the batch is mixed at all.
        switch: probability of CutMix where both are on.

    Returns:
        images [B, H, W, C], and the share [] of every image that is its own; of a
        pasted box as it came to lie, not as it was drawn.
    """
    keys = jax.random.split(rng, 6)
    both = mixup_alpha > 0 and cutmix_alpha > 0
    cut = jax.random.bernoulli(keys[0], switch if both else float(cutmix_alpha > 0))
    apart = mixup_alpha or cutmix_alpha
    lam_mix = jax.random.beta(keys[1], apart, apart)
    alpha = cutmix_alpha or mixup_alpha
    lam_cut = jax.random.beta(keys[2], alpha, alpha)
    h, w = image.shape[1:3]
    centre = (
        jax.random.randint(keys[3], (), 0, h),
        jax.random.randint(keys[4], (), 0, w),
    )
    pasted, share = cutmix(image, box(lam_cut, centre, (h, w)))
    mixed = jnp.where(cut, pasted, mixup(image, lam_mix))
    lam = jnp.where(cut, share, lam_mix)
    on = jax.random.bernoulli(keys[5], prob)
    return jnp.where(on, mixed, image), jnp.where(on, lam, 1.0)
