"""A ViT in numpy and float64, written from its papers, for checks of whole steps.

Parameters are {name: array} of `tree.flat`, names relative to `at`.
"""

import numpy as np
from scipy import special

from vitssl import tree


def leaves(params) -> dict:
    """Return {name: float64 array} of nested parameters."""
    return {k: np.asarray(v, np.float64) for k, v in tree.flat(params).items()}


def linear(p, at, x):
    return x @ p[f"{at}/kernel"] + p.get(f"{at}/bias", 0.0)


def gelu(x):
    return 0.5 * x * (1 + special.erf(x / np.sqrt(2)))


def standard(x, eps=1e-6):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)


def norm(p, at, x, eps=1e-6):
    return standard(x, eps) * p[f"{at}/scale"] + p[f"{at}/bias"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def block(p, at, x, heads, eps=1e-6):  # [B, T, D] -> [B, T, D]
    b, t, d = x.shape
    y = norm(p, f"{at}/norm1", x, eps)
    q, k, v = np.split(linear(p, f"{at}/attn/qkv", y), 3, -1)
    q, k, v = (y.reshape(b, t, heads, -1).swapaxes(1, 2) for y in (q, k, v))
    found = softmax(q @ k.swapaxes(2, 3) / np.sqrt(d // heads)) @ v
    found = found.swapaxes(1, 2).reshape(b, t, d)
    x = x + linear(p, f"{at}/attn/proj", found)
    y = gelu(linear(p, f"{at}/mlp/fc1", norm(p, f"{at}/norm2", x, eps)))
    return x + linear(p, f"{at}/mlp/fc2", y)


def sincos(side, width):  # -> [side side, width]
    """Half of the channels are of the column, half of the row: sines, then cosines.

    As facebookresearch/mae util/pos_embed.py has it.
    """
    row, column = np.divmod(np.arange(side * side), side)
    rate = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    angles = (column[:, None] * rate, row[:, None] * rate)
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], -1)


def cells(image, patch):  # [B, S, S, C] -> [B, N, p p C]
    b, side, _, c = image.shape
    n = side // patch
    x = image.reshape(b, n, patch, n, patch, c).swapaxes(2, 3)
    return x.reshape(b, n * n, patch * patch * c)


def vit(p, at, image, *, patch, heads, keep=None, hidden=None, token=None):
    """Return (class token [B, D], patch tokens [B, N or K, D]) with sincos positions.

    The first is None where there is no class token.

    Args:
        keep: [B, K] patches that there are.
        hidden: [B, N] patches that `token` [D] stands for.
    """
    kernel = p[f"{at}/patch_embed/kernel"]
    x = cells(image, patch) @ kernel.reshape(-1, kernel.shape[-1])
    x = x + p[f"{at}/patch_embed/bias"]
    if hidden is not None:
        x = np.where(hidden[..., None], token, x)
    x = x + sincos(image.shape[1] // patch, x.shape[-1])
    if keep is not None:
        x = np.take_along_axis(x, keep[..., None], 1)
    has_cls = f"{at}/cls" in p
    if has_cls:
        cls = np.broadcast_to(p[f"{at}/cls"], (len(x), 1, x.shape[-1]))
        x = np.concatenate([cls, x], 1)
    x = norm(p, f"{at}/norm", blocks(p, at, x, heads))
    return (x[:, 0], x[:, 1:]) if has_cls else (None, x)


def blocks(p, at, x, heads, eps=1e-6):  # [B, T, D] -> [B, T, D]
    i = 0
    while f"{at}/block_{i}/norm1/scale" in p:
        x = block(p, f"{at}/block_{i}", x, heads, eps)
        i += 1
    return x


def slope(function, p, towards, size=1e-5):
    """Return the derivative of function({name: array}) in a direction {name: array}."""
    up, down = (
        function({k: v + s * towards[k] for k, v in p.items()}) for s in (size, -size)
    )
    return (up - down) / (2 * size)
