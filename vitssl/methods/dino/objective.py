"""What DINO compares: targets of the teacher, cross-entropies of the student."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import einops
import jax
import jax.numpy as jnp

from vitssl import ranges
from vitssl.losses import assignment, contrastive, regression
from vitssl.optim import schedules


@dataclasses.dataclass(frozen=True)
class Objective:
    """Config section `objective`.

    Attributes:
        compares: what of a crop is sorted: its class token, or the mean of its patch
            tokens, which small networks learn from sooner.
        temperature: of the student's scores.
        teacher_temperature: of the teacher's; it comes there from
            `first_temperature`, in a line over `warmup_epochs`.
        centring: how the teacher is kept from one answer to everything. "ema": a
            running mean of its scores is taken away. "sinkhorn": three rounds of
            Sinkhorn-Knopp share the outputs out evenly in the batch (SwAV, DINOv2).
        centre: momentum of that running mean.
        koleo: weight of KoLeo, which spreads what is sorted of every global crop over
            the sphere (DINOv2: 0.1).
        patch: weight of iBOT's loss: hidden patches of the global crops shall be
            sorted as the teacher, who sees them, sorts them (iBOT, DINOv2: 1.0).
        masked: share of the global crops that has hidden patches.
        ratio: least and largest share of their patches that is hidden.
        shared: patches have the class token's head; False gives them their own.

    Sources: arXiv:2104.14294 (DINO); arXiv:2304.07193 (DINOv2); Zhou et al. 2021,
    arXiv:2111.07832 (iBOT), which hides blocks, where these are single patches.
    """

    compares: Literal["cls", "mean"] = "cls"
    temperature: ranges.Positive = 0.1
    teacher_temperature: ranges.Positive = 0.04
    first_temperature: ranges.Positive = 0.04
    warmup_epochs: ranges.NotNegative = 0.0
    centring: Literal["ema", "sinkhorn"] = "ema"
    centre: ranges.Probability = 0.9
    koleo: ranges.NotNegative = 0.0
    patch: ranges.NotNegative = 0.0
    masked: ranges.Share = 0.5
    ratio: tuple[ranges.Share, ranges.Share] = (0.1, 0.5)
    shared: bool = True

    @property
    def couples_batch(self) -> bool:
        """Whether the loss mixes samples."""
        return self.koleo > 0 or self.centring == "sinkhorn"

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is sorted."""
        return ("view", "patch") if self.patch else ("view",)

    def check(self) -> Iterator[str]:
        """Yield a range that is upside down."""
        yield from ranges.in_order(self, "ratio")

    def heat(self, step, steps_per_epoch):
        """Return the temperature [] of the teacher at a step."""
        return schedules.constant(
            step,
            base=self.teacher_temperature,
            start=self.first_temperature,
            warmup_steps=round(self.warmup_epochs * steps_per_epoch),
        )

    def hide(self, rng, crops, patches: int):
        """Return which patches are hidden: bool [*crops, N]."""
        noise, share, chosen = jax.random.split(rng, 3)
        low, high = self.ratio
        share = jax.random.uniform(share, crops, minval=low, maxval=high)
        share = share * jax.random.bernoulli(chosen, self.masked, crops)
        order = jnp.argsort(jax.random.uniform(noise, (*crops, patches)))
        return jnp.argsort(order) < jnp.floor(share * patches)[..., None]

    def most(self, patches: int) -> int:
        """Return the largest number of patches that is hidden in a crop, or 1."""
        return max(1, int(self.ratio[1] * patches))

    def target(self, scores, centre, heat, valid=None):
        """Return the teacher's probabilities, those of every row on their own.

        Args:
            scores: [..., K].
            centre: [K], not used by "sinkhorn".
            valid: [...] bool, the rows that count; None = all.
        """
        if self.centring == "sinkhorn":
            return assignment.sinkhorn(scores, heat, valid)
        return jax.nn.softmax((scores - centre) / heat)

    def views(self, target, scores):
        """Return the cross-entropy [] of all pairs of different crops, in nats.

        Args:
            target: probabilities [B, G, K] of the global crops.
            scores: [B, V, K] of all crops, the global ones first.

        Source: arXiv:2104.14294, Eq. 3.
        """
        return assignment.views(target, scores, self.temperature)

    def patches(self, target, scores, valid):
        """Return the cross-entropy [] of hidden patches, in nats.

        The mean over the patches of a crop, then over all crops: one with nothing
        hidden counts 0.

        Args:
            target, scores: [B, G, S, K].
            valid: bool [B, G, S].

        Source: arXiv:2111.07832, Eq. 2.
        """
        log_q = jax.nn.log_softmax(scores / self.temperature)
        each = -(target * log_q).sum(-1) * valid
        return (each.sum(-1) / jnp.maximum(valid.sum(-1), 1)).mean()

    def spread(self, cls):  # [B, G, D] -> []
        """Return KoLeo of the class tokens, the sum over the global crops."""
        return jax.vmap(contrastive.koleo, 1)(cls).sum()


def mean(scores, valid=None):  # [..., K], [...] -> [K]
    """Return the mean of the rows that count."""
    flat = einops.rearrange(scores, "... k -> k (...)")
    if valid is None:
        return flat.mean(-1)
    rows = einops.rearrange(valid, "... -> (...)")
    return jax.vmap(regression.masked_mean, (0, None))(flat, rows)
