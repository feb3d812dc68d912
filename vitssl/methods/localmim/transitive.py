"""Transitive distillation: every block learns from the next one.

What the last block knows reaches the first by way of all between. It is a to-do of
utkutpcgl/ViTFreeze (README), which has no code for it: the form is ours.
"""

import dataclasses
from collections.abc import Collection, Iterator

import jax
import jax.numpy as jnp

from vitssl import ranges
from vitssl.methods.localmim import targets


@dataclasses.dataclass(frozen=True)
class Transitive:
    """Config section `transitive`.

    A block's output shall be the next block's: the mean square between them, each token
    (visible patches and class token) with mean 0 and variance 1, no gradient into the
    later. A block that has frozen learns nothing: its pair is left out, and the others
    weigh what they did.

    Attributes:
        weight: of the mean over the pairs; 0.0 is off.
        blocks: 0-based, those that learn; () is all but the last.
    """

    weight: ranges.NotNegative = 0.0
    blocks: tuple[ranges.OrNone, ...] = ()

    def learners(self, depth: int) -> tuple[int, ...]:
        """Return the blocks that learn, frozen or not."""
        return self.blocks or tuple(range(depth - 1))

    def pairs(self, depth: int, live: Collection[str]) -> tuple[int, ...]:
        """Return the blocks that learn, of those with a leaf among `live` names."""
        names = {k: f"encoder/block_{k}/" for k in self.learners(depth)}
        return tuple(
            k for k, own in names.items() if any(n.startswith(own) for n in live)
        )

    def __call__(self, outputs, pairs, depth: int):
        """Return the mean [] over all learners, those not in `pairs` counting 0.

        `outputs` is {block: [B, T, D]}.
        """
        total = jnp.zeros(())
        for k in pairs:
            a, b = (targets.standardise(outputs[n]) for n in (k, k + 1))
            total += jnp.square(a - jax.lax.stop_gradient(b)).mean()
        return total / len(self.learners(depth))

    def faults(self, depth: int) -> Iterator[str]:
        """Yield, with the whole key, what does not fit an encoder."""
        b = self.blocks
        if b and (len(set(b)) < len(b) or max(b) > depth - 2):
            yield (
                f"transitive.blocks={b}: different blocks below {depth - 1}, the last, "
                "which has none to learn from"
            )
        if self.weight and depth < 2:
            yield f"transitive.weight={self.weight}: needs model.depth of 2 or more"
