"""Random erasing on the device: a box of noise in some images of a batch."""

import jax
import jax.numpy as jnp
import numpy as np

ATTEMPTS = 10


def erase(rng, image, *, prob, area=(0.02, 1 / 3), aspect=0.3):
    """Fill a random box with N(0, 1) per pixel and channel.

    Of ten draws of area and aspect the first whose box is smaller than the image is
    used; if none is, the image stays.

    Args:
        rng: key.
        image: [B, H, W, C] normalised.
        prob: probability that an image loses a box.
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
