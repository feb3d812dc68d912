"""Where a token is: tables resampled to a grid, and rotary angles."""

from typing import Literal

import einops
import jax
import jax.numpy as jnp
import numpy as np

Resampling = Literal["antialias", "plain"]


def resample(table, old, new, resampling="antialias"):
    """Resample a position table [..., h w, D] from one patch grid (h, w) to another.

    Args:
        table: itself where the grids agree; its dtype is the result's.
        old, new: grids (h, w).
        resampling: "antialias": bicubic with a = -0.5, widened when shrinking, weights
            renormalised at the border, as in timm; "plain": bicubic with a = -0.75 and
            repeated border, as torch interpolates and DINOv2 and its Hugging Face
            port do.
    """
    if tuple(old) == tuple(new):
        return table
    x = einops.rearrange(table, "... (h w) d -> ... h w d", h=old[0], w=old[1])
    if resampling == "plain":
        rows, columns = (cubic_matrix(a, b) for a, b in zip(old, new, strict=True))
        x = jnp.einsum("ah,bw,...hwd->...abd", rows, columns, x)
    else:
        shape = (*x.shape[:-3], *new, x.shape[-1])
        x = jax.image.resize(x, shape, "cubic", antialias=True)
    return einops.rearrange(x, "... h w d -> ... (h w) d").astype(table.dtype)


def cubic_matrix(old, new, step=None):
    """Weights [new, old] of bicubic interpolation with a = -0.75 along one axis.

    Sample i of `new` lies at (i + 1/2) step - 1/2 of `old`, where step is old / new
    unless given; taps beyond the border repeat its value. Rows sum to 1.

    Source: Keys 1981, Eq. 4, with the constant of torch.nn.functional.interpolate.
    """
    a = -0.75
    at = (np.arange(new) + 0.5) * (step or old / new) - 0.5
    base = np.floor(at).astype(int)
    matrix = np.zeros((new, old), np.float64)
    for tap in range(-1, 3):
        t = np.abs(at - base - tap)
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = a * (((t - 5) * t + 8) * t - 4)
        index = np.clip(base + tap, 0, old - 1)
        np.add.at(matrix, (np.arange(new), index), np.where(t <= 1, near, far))
    return matrix.astype(np.float32)


Spacing = tuple[float, float]  # Patch i lies at i * spacing[0] + spacing[1].


def _places(grid, spacing):
    """Return the places of a grid's rows [h] and of its columns [w]."""
    return [np.arange(n) * spacing[0] + spacing[1] for n in grid]


def _table(rows, columns, row_first):  # numpy [h, c], [w, c] -> [h w, 2 c] float32
    """Join what is known of the rows and of the columns of a grid, inside the step.

    As one table it would be a literal of the program, of several megabytes, wherever
    it is used.
    """
    halves = [
        einops.repeat(jnp.asarray(rows, jnp.float32), "h c -> (h w) c", w=len(columns)),
        einops.repeat(jnp.asarray(columns, jnp.float32), "w c -> (h w) c", h=len(rows)),
    ]
    return jnp.concatenate(halves if row_first else halves[::-1], axis=-1)


def sincos(grid, width, spacing: Spacing = (1.0, 0.0)):
    """Return the fixed table of sines and cosines of a grid.

    With w_i = 10000^(-i / (D / 4)), the patch at row y and column x has
    [sin(x w), cos(x w), sin(y w), cos(y w)]: the column comes first.

    Returns:
        [h w, D] float32, its sines and cosines computed in float64.

    Raises:
        ValueError: 4 does not divide the width D.

    Source: facebookresearch/mae util/pos_embed.py (MoCo v3).
    """
    if width % 4:
        raise ValueError(f"sincos: width={width} must be divisible by 4")
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    angles = [np.outer(place, omega) for place in _places(grid, spacing)]
    codes = [np.concatenate([np.sin(a), np.cos(a)], axis=-1) for a in angles]
    return _table(*codes, row_first=False)


def rope_angles(grid, head_dim, theta, unit=False, spacing: Spacing = (1.0, 0.0)):
    """Angles by which rotary embedding turns the channel pairs of each patch.

    With m = head_dim / 4 frequencies w_i = theta^(-2 i / (head_dim / 2)), a patch at
    row y and column x (integers from 0, any grid) has the angles
    [y w_0 .. y w_{m-1}, x w_0 .. x w_{m-1}].

    Args:
        grid: (h, w).
        head_dim: channels per head.
        theta: base of the frequencies.
        unit: rows and columns are patch centres scaled to [-1, 1], and frequencies
            count full turns, as in DINOv3 (arXiv:2508.10104): an image of any size
            covers the same angles.
        spacing: see `Spacing`; of no meaning for `unit`.

    Returns:
        [h w, head_dim / 2] float32.

    Raises:
        ValueError: 4 does not divide head_dim.

    Source: Su et al. 2021, arXiv:2104.09864, Eq. 15, per image axis as in H-JEPA
    (VisionRoPE2D).
    """
    if head_dim % 4:
        raise ValueError(f"rope: head_dim={head_dim} must be divisible by 4")
    h, w = grid
    omega = theta ** (-2.0 * np.arange(head_dim // 4) / (head_dim // 2))
    y, x = _places(grid, spacing)
    if unit:
        y, x = _places(grid, (1.0, 0.0))
        y, x = 2 * (y + 0.5) / h - 1, 2 * (x + 0.5) / w - 1
        omega = 2 * np.pi * omega
    return _table(np.outer(y, omega), np.outer(x, omega), row_first=True)


def rotation(angles):
    """Return (cos, sin) of angles [..., T, c], each repeated per pair: [..., T, 2c]."""
    angles = jnp.repeat(angles, 2, axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, cos, sin):
    """Turn the channel pairs (2j, 2j + 1): (a, b) -> (a cos - b sin, a sin + b cos).

    Args:
        x: [B, T, heads, head_dim]; the arithmetic is done in float32.
        cos, sin: [1 or B, T, head_dim] from `rotation`.
    """
    pairs = einops.rearrange(x.astype(jnp.float32), "... (c t) -> ... c t", t=2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1)
    turned = einops.rearrange(turned, "... c t -> ... (c t)")  # (-b, a) per pair.
    y = x * cos[:, :, None] + turned * sin[:, :, None]
    return y.astype(x.dtype)
