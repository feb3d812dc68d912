"""Augmentation of whole batches on the device: mixup, CutMix and random erasing.

Sources: Zhang et al. 2018, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899; the
batch mode of timm.data.Mixup.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import ranges
from vitssl.methods.classify import objective

ATTEMPTS = 10  # At a box to erase.


def box(lam, centre, size):
    """Return the box (y0, y1, x0, x1), half open, that CutMix pastes.

    Its sides are sqrt(1 - lam) of those of size = (H, W), truncated to pixels; it lies
    around centre = (y, x) and is clipped to the image.
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


@dataclasses.dataclass(frozen=True)
class Mix:
    """Config section `mix`: a batch with itself reversed, one draw for all of it.

    To draw MixUp with probability p and, if it was not drawn, CutMix with q, as HViT
    does, is prob = p + q - p q and switch = q (1 - p) / prob.

    Attributes:
        mixup, cutmix: parameters of the Beta distributions; 0.0 is off.
        prob: probability that a batch is mixed.
        switch: probability of CutMix where both are on.
    """

    mixup: ranges.NotNegative = 0.0
    cutmix: ranges.NotNegative = 0.0
    prob: ranges.Probability = 1.0
    switch: ranges.Probability = 0.5

    @property
    def on(self) -> bool:
        """Whether batches are mixed at all."""
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def __call__(self, rng, image):
        """Mix images [B, H, W, C], B even, at random.

        Returns:
            images, and the share [] of every image that is its own; of a pasted box as
            it came to lie, not as it was drawn.
        """
        keys = jax.random.split(rng, 6)
        both = self.mixup > 0 and self.cutmix > 0
        chance = self.switch if both else float(self.cutmix > 0)
        cut = jax.random.bernoulli(keys[0], chance)
        apart = self.mixup or self.cutmix
        lam_mix = jax.random.beta(keys[1], apart, apart)
        alpha = self.cutmix or self.mixup
        lam_cut = jax.random.beta(keys[2], alpha, alpha)
        h, w = image.shape[1:3]
        y, x = (jax.random.randint(keys[i], (), 0, n) for i, n in ((3, h), (4, w)))
        pasted, share = cutmix(image, box(lam_cut, (y, x), (h, w)))
        mixed = jnp.where(cut, pasted, mixup(image, lam_mix))
        lam = jnp.where(cut, share, lam_mix)
        on = jax.random.bernoulli(keys[5], self.prob)
        return jnp.where(on, mixed, image), jnp.where(on, lam, 1.0)


def erase(rng, image, *, prob, area=(0.02, 1 / 3), aspect=0.3):
    """Fill a random box with N(0, 1) per pixel and channel.

    Of ten draws of area and aspect the first whose box is smaller than the image is
    used; if none is, the image stays.

    Args:
        prob: probability that an image [B, H, W, C] loses a box.
        area: smallest and largest share of the image.
        aspect: smallest height / width; the largest is its inverse, log-uniform.

    Source: Zhong et al. 2017, arXiv:1708.04896; timm.data.RandomErasing, mode "pixel".
    """
    b, h, w, _ = image.shape
    keys = jax.random.split(rng, 6)
    shape = (b, ATTEMPTS)
    size = jax.random.uniform(keys[0], shape, minval=area[0], maxval=area[1]) * h * w
    bound = -float(np.log(aspect))
    ratio = jnp.exp(jax.random.uniform(keys[1], shape, minval=-bound, maxval=bound))
    rows = jnp.round(jnp.sqrt(size * ratio)).astype(jnp.int32)  # [B, 10]
    columns = jnp.round(jnp.sqrt(size / ratio)).astype(jnp.int32)
    fits = (rows < h) & (columns < w)
    first = jnp.argmax(fits, axis=1)[:, None]
    rows = jnp.take_along_axis(rows, first, 1)  # [B, 1]
    columns = jnp.take_along_axis(columns, first, 1)
    top = _below(keys[2], h - rows + 1)
    left = _below(keys[3], w - columns + 1)
    y, x = jnp.arange(h)[None], jnp.arange(w)[None]
    in_rows = (y >= top) & (y < top + rows)  # [B, H]
    in_columns = (x >= left) & (x < left + columns)  # [B, W]
    on = fits.any(1) & jax.random.bernoulli(keys[4], prob, (b,))
    inside = in_rows[:, :, None] & in_columns[:, None] & on[:, None, None]  # [B, H, W]
    noise = jax.random.normal(keys[5], image.shape, image.dtype)
    return jnp.where(inside[..., None], noise, image)


def _below(key, bound):
    """Return uniform integers in [0, bound) of the shape of `bound`."""
    u = jax.random.uniform(key, bound.shape)
    return jnp.minimum((u * bound).astype(jnp.int32), bound - 1)
