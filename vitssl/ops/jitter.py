"""Colour augmentation on the accelerator: `vitssl.data.colour` in jax.

The same operations, factors and probabilities as on the host; the random numbers are
others. Images are [..., H, W, C], uint8 outside and float32 in grey levels (0 to 255)
inside, where nothing is rounded between operations. Every image has its own draws.
Saturation, hue and grayscale leave images without three channels alone.
"""

import jax
import jax.numpy as jnp
import numpy as np

LUMA = (0.299, 0.587, 0.114)
SPREAD = (0.4, 0.4, 0.2, 0.1)  # Brightness, contrast, saturation, hue at strength 1.
BLUR_SIGMA = (0.1, 2.0)
BLUR_KERNEL = 9


def augment(
    key,
    image,
    *,
    strength,
    prob,
    grayscale_prob,
    blur_prob,
    solarize_prob,
    spread=SPREAD,
    blur_sigma=BLUR_SIGMA,
    blur_kernel=BLUR_KERNEL,
):
    """Jitter, then turn grey, blur and solarise, each with its own probability.

    Args:
        key: random key.
        image: uint8 or uint16 [..., H, W, C], as the result; the first three of more
            channels are colours, the others stay as they are.
        strength: of the jitter: numbers, or arrays that broadcast against the leading
            axes (say [G] for images [B, G, H, W, C]); so are the probabilities. An
            operation that is 0 everywhere costs nothing.
        prob: probability of the jitter as a whole.
        grayscale_prob, blur_prob, solarize_prob: of the other three.
        spread: of brightness, contrast, saturation and hue at strength 1.
        blur_sigma: least and largest, in pixels.
        blur_kernel: odd width in pixels.
    """
    planes, image = image[..., 3:], image[..., :3]
    deep = image.dtype == jnp.uint16
    lead, level = image.shape[:-3], 257.0 if deep else 1.0  # 65535 / 255.
    chances = (prob, grayscale_prob, blur_prob, solarize_prob)
    keys = jax.random.split(key, 4)
    u = jax.random.uniform(keys[0], (len(chances), *lead))
    happens = [(v < p)[..., None, None, None] for v, p in zip(u, chances, strict=True)]
    x = image.astype(jnp.float32) / level
    if np.any(np.multiply(strength, prob)):
        factors, order = draw_jitter(keys[1], np.broadcast_to(strength, lead), spread)
        x = jnp.where(happens[0], jitter(x, factors, order), x)
    if np.any(grayscale_prob):
        x = jnp.where(happens[1], grayscale(x), x)
    if np.any(blur_prob):
        low, high = blur_sigma
        sigma = jax.random.uniform(keys[2], lead, minval=low, maxval=high)
        x = jnp.where(happens[2], blur(x, sigma, blur_kernel), x)
    if np.any(solarize_prob):
        x = jnp.where(happens[3], solarize(x), x)
    x = jnp.rint(x * level).astype(jnp.uint16 if deep else jnp.uint8)
    return jnp.concatenate([x, planes], -1) if planes.shape[-1] else x


def augment_crops(key, crops, recipes):
    """Augment crops [B, G, H, W, C] by G dicts of keywords of `augment`."""
    settings = {k: np.array([r[k] for r in recipes], np.float32) for k in recipes[0]}
    return augment(key, crops, **settings)


def augment_batch(key, batch, recipe):
    """Return a multi-crop batch with the colours that the host has left alone.

    Args:
        key: random key.
        batch: {"global": uint8 [B, G, H, W, C], "local": [B, L, h, w, C], ...}.
        recipe: (kind, index of a crop) -> keywords of `augment`.
    """
    batch = dict(batch)
    for i, kind in enumerate(k for k in ("global", "local") if k in batch):
        recipes = [recipe(kind, c) for c in range(batch[kind].shape[1])]
        own = jax.random.fold_in(key, i)
        batch[kind] = augment_crops(own, batch[kind], recipes)
    return batch


def draw_jitter(key, strength, spread=SPREAD):
    """Draw the factors and the order of the jitter of images of strength [...].

    Returns:
        factors: float32 [..., 4] brightness, contrast, saturation, turn of the hue.
        order: int32 [..., 4] a permutation of 0..3, the operation that comes first
            first.
    """
    first, second = jax.random.split(key)
    shift = jnp.asarray(strength, jnp.float32)[..., None] * jnp.array(spread)
    centre = jnp.array([1.0, 1.0, 1.0, 0.0])
    low, high = centre - shift, centre + shift
    low = jnp.where(centre > 0, jnp.maximum(low, 0.0), low)
    u = jax.random.uniform(first, shift.shape)
    order = jnp.argsort(jax.random.uniform(second, shift.shape), axis=-1)
    return low + u * (high - low), order


def jitter(image, factors, order):
    """Apply the four operations to float images; order and factors: `draw_jitter`."""
    for place in range(len(OPERATIONS)):
        now = order[..., place, None, None, None]
        results = [
            operation(image, factors[..., i]) for i, operation in enumerate(OPERATIONS)
        ]
        image = jnp.select([now == i for i in range(len(results))], results)
    return image


def brightness(image, factor):
    """Multiply float images [..., H, W, C] by `factor` [...]."""
    return _clip(image * _spread(factor))


def contrast(image, factor):
    """Move every value away from (or to) the mean grey of its image."""
    gray = _luma(image) if image.shape[-1] == 3 else image
    mean = gray.mean((-3, -2, -1), keepdims=True)
    return _clip(mean + _spread(factor) * (image - mean))


def saturation(image, factor):
    """Move every pixel away from (or to) its own grey."""
    if image.shape[-1] != 3:
        return image
    gray = _luma(image)
    return _clip(gray + _spread(factor) * (image - gray))


def hue(image, turn):
    """Turn the hue of float images [..., H, W, C] by a share [...] of the circle."""
    if image.shape[-1] != 3:
        return image
    r, g, b = (image[..., i] for i in range(3))
    most, least = image.max(-1), image.min(-1)
    chroma = most - least
    safe = jnp.where(chroma > 0, chroma, 1.0)
    sixth = jnp.select(
        [most == r, most == g],
        [(g - b) / safe, 2.0 + (b - r) / safe],
        4.0 + (r - g) / safe,
    )
    sixth = sixth + 6.0 * turn[..., None, None]
    # Channel n falls from the maximum by the chroma times a trapezoid of the hue.
    k = (jnp.array([5.0, 3.0, 1.0]) + sixth[..., None]) % 6.0
    fall = jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)
    return most[..., None] - chroma[..., None] * fall


def grayscale(image):
    """Replace every channel by the luma (ITU-R 601)."""
    if image.shape[-1] != 3:
        return image
    return jnp.broadcast_to(_luma(image), image.shape)


def blur(image, sigma, size=BLUR_KERNEL):
    """Blur with a Gaussian of sigma [...] on `size` pixels; the border reflects."""
    half = size // 2
    offset = jnp.arange(-half, half + 1)
    weight = jnp.exp(-0.5 * (offset / sigma[..., None]) ** 2)  # [..., size]
    weight = weight / weight.sum(-1, keepdims=True)
    thin = min(image.shape[-3:-1]) <= half  # As on the host.
    for axis in (-3, -2):
        pads = [(0, 0)] * image.ndim
        pads[axis] = (half, half)
        padded = jnp.pad(image, pads, mode="edge" if thin else "reflect")
        n = image.shape[axis]
        image = sum(
            _spread(weight[..., i])
            * jax.lax.slice_in_dim(padded, i, i + n, axis=image.ndim + axis)
            for i in range(size)
        )
    return image


def solarize(image):
    """Invert every value from 128 up."""
    return jnp.where(image < 127.5, image, 255.0 - image)


OPERATIONS = (brightness, contrast, saturation, hue)


def _luma(image):
    return (image * jnp.array(LUMA)).sum(-1, keepdims=True)


def _clip(image):
    return jnp.clip(image, 0.0, 255.0)


def _spread(per_image):
    return jnp.asarray(per_image)[..., None, None, None]
