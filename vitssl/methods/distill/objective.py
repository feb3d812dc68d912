"""How far a student's features are from its teacher's."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from vitssl import ranges
from vitssl.losses import regression


@dataclasses.dataclass(frozen=True)
class Objective:
    """Config section `objective`.

    Attributes:
        type: "cosine": 1 - cosine of the angle between the two vectors. "mse": mean
            squared difference of their entries.
        pooled: weight of the feature of the image.
        patches: weight of those of the patches, the teacher's resampled to the grid of
            the student.
        pool: the student's feature of an image, one of its poolings.
        standardise: with "mse", each vector of the teacher has mean 0 and variance 1
            over its entries, so that no few large ones decide (as in arXiv:2202.03555).
    """

    type: Literal["cosine", "mse"] = "cosine"
    pooled: ranges.NotNegative = 1.0
    patches: ranges.NotNegative = 1.0
    pool: Literal["mean", "gap", "cls"] = "mean"
    standardise: bool = True

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the kinds of features that are compared at all."""
        found = {"pooled": self.pooled, "tokens": self.patches}
        return {kind: weight for kind, weight in found.items() if weight}

    def check(self) -> Iterator[str]:
        """Yield what cannot be combined."""
        if not self.weights:
            yield "pooled=0 and patches=0: nothing to learn; set one above 0"

    def __call__(self, prediction, target):  # [..., D], [..., D] -> []
        """Return the mean distance of vectors; no gradient flows into the target."""
        target = jax.lax.stop_gradient(target.astype(jnp.float32))
        if self.type == "mse":
            if self.standardise:
                mean, var = (
                    target.mean(-1, keepdims=True),
                    target.var(-1, keepdims=True),
                )
                target = (target - mean) * jax.lax.rsqrt(var + 1e-6)
            return jnp.square(prediction.astype(jnp.float32) - target).mean()
        both = regression.unit(prediction) * regression.unit(target)
        return (1.0 - both.sum(-1)).mean()


def resampled(tokens, count: int):  # [B, N, D] -> [B, count, D]
    """Return the tokens of a square grid on another square grid: bilinear, antialiased.

    Raises:
        ValueError: a count is no square.
    """
    b, n, d = tokens.shape
    old, new = round(n**0.5), round(count**0.5)
    if (old**2, new**2) != (n, count):
        raise ValueError(f"resampled: {n} and {count} tokens are no square grids")
    if old == new:
        return tokens
    image = tokens.reshape(b, old, old, d)
    return jax.image.resize(image, (b, new, new, d), "linear").reshape(b, count, d)
