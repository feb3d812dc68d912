"""Position tables resampled by the rule of the code that trained them.

Our ViT resamples while it runs as timm does, or as torch interpolates. An import with
another image size applies the family's own rule once and stores the result, so that
the numbers are the original's whatever that rule was.
"""

from collections.abc import Iterable
from typing import Literal

import einops
import numpy as np
import numpy.typing as npt

from vitssl import errors
from vitssl.models import posemb

# antialias: timm. plain: MAE, I-JEPA, LocalMIM, transformers. offset: DINO and DINOv2,
# whose scale factor is computed for a grid 0.1 wider. corners: big_vision, linear.
Rule = Literal["antialias", "plain", "offset", "corners"]


def resample(table: npt.ArrayLike, prefix: int, new: int, rule: Rule) -> np.ndarray:
    """Return a position table for a square grid of another size.

    Args:
        table: [1, P + n n, D]: P rows of tokens that are no patches, then the grid.
        prefix: P.
        new: side of the new grid.
        rule: how.

    Returns:
        [1, P + new new, D] float32.

    Raises:
        CheckpointError: the table has no square grid.
    """
    table = np.asarray(table, np.float32)
    head, body = table[:, :prefix], table[:, prefix:]
    old = side(body.shape[1])
    if old == new:
        return table
    if rule == "antialias":
        body = np.asarray(posemb.resample(body, (old, old), (new, new)))
    else:
        m = _matrix(old, new, rule)
        x = einops.rearrange(body, "b (h w) d -> b h w d", h=old)
        x = np.einsum("ah,cw,bhwd->bacd", m, m, x)
        body = einops.rearrange(x, "b h w d -> b (h w) d")
    return np.concatenate([head, body], axis=1).astype(np.float32)


def _matrix(old, new, rule):
    """Return the weights [new, old] of one axis."""
    if rule == "plain":
        return posemb.cubic_matrix(old, new)
    if rule == "offset":
        return posemb.cubic_matrix(old, new, old / (new + 0.1))
    at = np.arange(new) * ((old - 1) / max(1, new - 1))
    base = np.minimum(at.astype(int), max(0, old - 2))
    matrix = np.zeros((new, old), np.float32)
    np.add.at(matrix, (np.arange(new), base), 1 - (at - base))
    np.add.at(matrix, (np.arange(new), np.minimum(base + 1, old - 1)), at - base)
    return matrix


def side(count: int) -> int:
    """Return the side of a square grid of `count` patches.

    Raises:
        CheckpointError: it is not square.
    """
    n = round(count**0.5)
    if n * n != count:
        raise errors.CheckpointError(
            f"a position table of {count} patches is no square grid"
        )
    return n


def prefix(rows: int, candidates: Iterable[int]) -> int:
    """Return how many of `rows` belong to no patch: the first that leaves a square.

    Raises:
        CheckpointError: none of the candidates does.
    """
    for count in candidates:
        n = round(max(0, rows - count) ** 0.5)
        if n and n * n == rows - count:
            return count
    raise errors.CheckpointError(
        f"a position table of {rows} rows is no square grid after {candidates} tokens"
    )
