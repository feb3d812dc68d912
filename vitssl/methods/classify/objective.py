"""Losses of classification; all in float32, averaged over the batch."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vitssl import ranges
from vitssl.optim import schedules


def soft_targets(label, classes, smoothing=0.0):
    """Return the smoothed one-hot targets [B, K] of labels [B].

    The true class has 1 - s + s / K, the others s / K.

    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    off = smoothing / classes
    return jax.nn.one_hot(label, classes) * (1 - smoothing) + off


def cross_entropy(logits, target, weight=None):
    """Return the mean of -sum_k t_k log p_k over the batch: [].

    With a weight [K] of every class the mean is weighted by those of the targets
    [B, K], whose rows sum to one, as PyTorch does.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    if weight is None:
        return -(target * log_p).sum(-1).mean()
    rows = target * weight
    return -(rows * log_p).sum() / rows.sum()


def consistency(logits, others):
    """Return the mean over the batch of KL(softmax(logits) || softmax(other)): [].

    Args:
        logits: [B, K] of all streams together.
        others: [S, B, K] of each by itself; the sum of their divergences.

    Source: w2sg-arnav/HierarchialViT enable_consistency_loss_heads (its heads, for
    which it has no loss).
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    log_q = jax.nn.log_softmax(jnp.asarray(others, jnp.float32), axis=-1)
    each = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)  # [S, B]
    return each.mean(-1).sum()


def class_weights(counts):
    """Return the weight N / (K n_c) of every class, 1 for a class without images.

    Source: w2sg-arnav/HierarchialViT hvit/data/dataset.py (scikit-learn's "balanced").
    """
    counts = np.asarray(counts, np.float32)
    full = counts.sum() / (len(counts) * np.maximum(counts, 1))
    return np.where(counts > 0, full, 1.0).astype(np.float32)


def labelled(logits, label, *, smoothing=0.0, weight=None):
    """Return the cross-entropy of labels, smoothed and weighted as PyTorch does: [].

    With weights [K], the class terms of the smoothing have their own, and the sum over
    the batch is divided by the sum of those of the labels [B].
    """
    if weight is None:
        return cross_entropy(logits, soft_targets(label, logits.shape[-1], smoothing))
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    weight = jnp.asarray(weight, jnp.float32)
    target = soft_targets(label, logits.shape[-1], smoothing)
    return -(target * weight * log_p).sum() / weight[label].sum()


def binary(logits, labels, *, smoothing=0.0):
    """Return the cross-entropy of a sigmoid for every label, summed over labels: [].

    Args:
        logits: [B, K].
        labels: 0 and 1 in [B, K]: an image may have several, or none.
        smoothing: s makes 1 - s / 2 of 1, and s / 2 of 0.
    """
    target = labels * (1 - smoothing) + 0.5 * smoothing
    each = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), target)
    return each.sum(-1).mean()


def focal(logits, label, *, gamma=2.0, alpha=1.0, reduction="mean"):
    """Return mean alpha (1 - p)^gamma (-log p), p of the true class: [], or [B].

    Args:
        gamma: how much less what is known already weighs.
        alpha: factor, a number or one for every class [K].
        reduction: "mean", "sum" or "none".

    Source: Lin et al. 2017, arXiv:1708.02002, Eq. 5.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    log_p = jnp.take_along_axis(log_p, label[:, None], 1)[:, 0]  # [B]
    alpha = jnp.asarray(alpha, jnp.float32)
    alpha = alpha[label] if alpha.ndim else alpha
    # expm1 keeps 1 - p, and its gradient, where p is nearly one.
    each = -alpha * (-jnp.expm1(log_p)) ** gamma * log_p
    return {"mean": each.mean, "sum": each.sum, "none": lambda: each}[reduction]()


def mixed(loss, label, other, lam):
    """Return lam L(label) + (1 - lam) L(other): of what was mixed into the images."""
    return lam * loss(label) + (1 - lam) * loss(other)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Config section `objective`.

    Attributes:
        loss: "cross_entropy", "focal", or "combined": ce_weight times the first plus
            focal_weight times the second; "binary": images have several labels, or
            none, each of which has a sigmoid of its own.
        smoothing: of the labels, in the cross-entropy.
        balanced: weight classes by N / (K count), as scikit-learn does, in the
            cross-entropy.
        class_weights: those weights as numbers, one for every class; () is by count.
        focal_gamma: exponent of the focal loss.
        focal_alpha: its factor: (), one number, or one for every class.
        ce_weight, focal_weight: of "combined".
        ema: decay of an average of the parameters that is scored beside them; 0.0 is
            off.
        consistency: weight of a term that makes each stream of an HViT, by a linear
            layer on its own mean token, name what both name together; 0.0 is off.
        ema_warmup: let that decay grow from 2/11, see `schedules.averaging_counted`:
            0.9999 alone remembers the initial weights for 10,000 steps.
    """

    loss: Literal["cross_entropy", "focal", "combined", "binary"] = "cross_entropy"
    smoothing: ranges.BelowOne = 0.0
    balanced: bool = False
    class_weights: tuple[float, ...] = ()
    focal_gamma: ranges.NotNegative = 2.0
    focal_alpha: tuple[ranges.NotNegative, ...] = ()
    ce_weight: ranges.NotNegative = 0.5
    focal_weight: ranges.NotNegative = 0.5
    consistency: ranges.NotNegative = 0.0
    ema: ranges.BelowOne = 0.0
    ema_warmup: bool = False

    def __call__(self, logits, label, weight):
        """Return the loss [] of logits [B, K] and labels [B], or [B, K] of "binary".

        `weight` [K] is that of the classes, or None.
        """
        if self.loss == "binary":
            return binary(logits, label, smoothing=self.smoothing)
        plain = focused = 0.0
        if self.loss != "focal":
            plain = labelled(logits, label, smoothing=self.smoothing, weight=weight)
        if self.loss != "cross_entropy":
            a = self.focal_alpha
            alpha = a[0] if len(a) == 1 else jnp.asarray(a or 1.0)
            focused = focal(logits, label, gamma=self.focal_gamma, alpha=alpha)
        if self.loss == "combined":
            return self.ce_weight * plain + self.focal_weight * focused
        return plain + focused

    def weights(self, counts):
        """Return the weight of every class [K], or None; see `class_weights`."""
        if self.class_weights:
            return np.asarray(self.class_weights, np.float32)
        return class_weights(counts) if self.balanced else None

    def decay(self, step):
        """Return the decay of the average after update `step` (0-based)."""
        if not self.ema_warmup:
            return self.ema
        return schedules.averaging_counted(step + 1, decay=self.ema)

    def faults(self, classes: int) -> Iterator[str]:
        """Yield what does not fit the number of classes, if that is known."""
        a, w = len(self.focal_alpha), len(self.class_weights)
        if classes and a > 1 and a != classes:
            yield f"focal_alpha has {a} numbers for {classes} classes"
        if classes and w and w != classes:
            yield f"class_weights has {w} numbers for {classes} classes"

    def check(self) -> Iterator[str]:
        """Yield what cannot be combined."""
        if self.loss == "focal" and (self.balanced or self.smoothing):
            yield (
                "loss=focal: has neither smoothing nor class weights; set smoothing=0 "
                "and balanced=False, or loss=combined"
            )
        if self.loss == "binary" and (self.balanced or self.class_weights):
            yield (
                "loss=binary: has no class weights; set balanced=False and "
                "class_weights=()"
            )
        if self.class_weights and self.balanced:
            yield "balanced=True: the weights are given by class_weights already"
        if self.ema_warmup and not self.ema:
            yield "ema_warmup=True: needs ema, the decay it grows to"
