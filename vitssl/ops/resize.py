"""Resizing images and maps of tokens, as matrices where the weights are wanted.

`image` and `bilinear` are torch's interpolate with antialias=True: half-pixel
coordinates, a filter widened when shrinking, weights renormalised at the border.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vitssl.ops import accelerator


def cubic(x):
    """Keys' kernel with a = -0.5 at distances x >= 0, any shape.

    Source: Keys 1981, Eq. 15.
    """
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@functools.cache
def matrix(old: int, new: int, kernel=cubic) -> np.ndarray:
    """Return the weights that resize one axis: [new, old] float64, rows sum to 1."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    distance = np.abs(at[:, None] - np.arange(old)) / max(old / new, 1.0)
    weight = kernel(distance)
    weight = weight / weight.sum(1, keepdims=True)
    weight.setflags(write=False)
    return weight


def image(x, height: int, width: int):
    """Resize [..., H, W, C] to [..., height, width, C], bicubic, float32 inside.

    x itself where the size is right.
    """
    if x.shape[-3:-1] == (height, width):
        return x
    shape = (*x.shape[:-3], height, width, x.shape[-1])
    fine = accelerator.precision()
    y = jax.image.resize(x.astype(jnp.float32), shape, "cubic", True, fine)
    return y.astype(x.dtype)


@functools.cache
def windows(old: int, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what each of `count` blocks of a resized axis is made of.

    The axis goes from `old` to count * size samples (bicubic); block i is samples
    i size .. (i + 1) size - 1.

    Returns:
        start: [count] int32 first sample of the source that block i reads.
        weight: [count, size, U] float32 on the U samples from there.
    """
    full = matrix(old, count * size).reshape(count, size, old)
    used = np.abs(full).max(1) > 0  # [count, old]
    first = used.argmax(1)
    last = old - 1 - used[:, ::-1].argmax(1)
    span = int((last - first).max()) + 1
    start = np.minimum(first, old - span)
    at = start[:, None] + np.arange(span)  # [count, U]
    weight = np.take_along_axis(full, at[:, None], axis=2)
    return start.astype(np.int32), weight.astype(np.float32)


@functools.cache
def pseudo_inverse(old: int, new: int) -> np.ndarray:
    """Return the matrix [new^2, old^2] float32 that carries a kernel to another size.

    With R [new^2, old^2] the resizing of a patch, a kernel w over a patch x becomes
    pinv(R)^T w, so that its product with the resized patch is the old one as nearly as
    can be; exactly so when enlarging.

    Source: Beyer et al. 2022, arXiv:2212.08013 (FlexiViT), Eq. 4.
    """
    side = matrix(old, new)
    return np.linalg.pinv(np.kron(side, side)).T.astype(np.float32)


def kernel(weights, new: int):
    """Resize the kernel of a patch embedding [P, P, C, D] to [new, new, C, D]."""
    old = weights.shape[0]
    if old == new:
        return weights
    flat = weights.reshape(old * old, -1).astype(jnp.float32)
    moved = jnp.matmul(
        pseudo_inverse(old, new), flat, precision=accelerator.precision()
    )
    return moved.reshape(new, new, *weights.shape[2:]).astype(weights.dtype)


def bilinear(x, factor: int):
    """Enlarge [..., h, w, D] to [..., h r, w r, D] for r = factor; linear between."""
    h, w, d = x.shape[-3:]
    shape = (*x.shape[:-3], h * factor, w * factor, d)
    return jax.image.resize(x, shape, "linear")


def nearest(x, factor: int, axes=(1, 2)):
    """Repeat every entry of two axes `factor` times; exact for any dtype."""
    for axis in axes:
        x = jnp.repeat(x, factor, axis=axis)
    return x
