"""Losses on part maps, on part features and of classification, and their weights.

Axes: B images, (h, w) grid, K parts, D width, C classes. Maps [B, h, w, K+1] are
softmaxes over the last axis, whose last channel is the background.

Source of all: ananthu-aniraj/ifam@bc8eeae losses/; most go back to PDiscoNet, van der
Klis et al. 2023, arXiv:2309.03173, and PDiscoFormer, arXiv:2407.04538, section 3.
"""

import dataclasses
from typing import Literal

import einops
import jax
import jax.numpy as jnp

from vitssl import ranges
from vitssl.methods.parts import affine, heads
from vitssl.methods.parts import maps as partmaps

Presence = Literal["original", "soft_constraint", "tanh", "soft_tanh"]
Background = Literal["enforced_presence", "log", "linear", "mse"]
Axis = Literal["parts", "channels"]

_EPS = float(jnp.finfo(jnp.float32).eps)


def cross_entropy(logits, labels, *, smoothing=0.0):  # [B, C], int [B] -> []
    """Mean over the batch of (1 - s) nll + s mean_c(-log p_c), s the smoothing."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    nll = -jnp.take_along_axis(logp, labels[:, None], axis=-1)[:, 0]
    return ((1.0 - smoothing) * nll - smoothing * logp.mean(-1)).mean()


def total_variation(maps):
    """Sum of |differences| of neighbours, over B h w: smooth maps.

    All channels count, the background too; the divisor leaves them out.
    """
    down = jnp.abs(maps[:, 1:] - maps[:, :-1]).sum()
    right = jnp.abs(maps[:, :, 1:] - maps[:, :, :-1]).sum()
    b, h, w, _ = maps.shape
    return (down + right) / (b * h * w)


def concentration(maps):
    """Spread of each part about its centre: mean of A ((r - h)^2 / w^2 + ...).

    With (r_k, c_k) the centre of mass of A_k, whose denominator has no gradient:
    mean over b, k < K, h, w of A [((r_k - y) / w)^2 + ((c_k - x) / h)^2]. Rows are
    divided by the width, as the original does; equal on square maps.
    """
    parts = maps[..., :-1]
    h, w = parts.shape[1:3]
    y = jnp.arange(h, dtype=parts.dtype)[:, None, None]  # [h, 1, 1]
    x = jnp.arange(w, dtype=parts.dtype)[:, None]  # [w, 1]
    # A map may be 0 everywhere; h / eps must not leave float32.
    centres = partmaps.centroids(parts, eps=1e-30)
    rows, columns = (c[:, None, None] for c in centres)  # [B, 1, 1, K]
    spread = jnp.square((rows - y) / w) + jnp.square((columns - x) / h)
    return (parts * spread).mean()


def _smooth(maps):
    """3 x 3 means without padding: [B, h, w, K] -> [B, h-2, w-2, K]."""
    h, w = maps.shape[1:3]
    if min(h, w) < 3:
        raise ValueError(f"presence losses need maps of 3x3 or more, not {h}x{w}")
    rows = maps[:, :-2] + maps[:, 1:-1] + maps[:, 2:]
    return (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9.0


def _largest(x):
    """Largest entry of each row of [..., N]; the gradient goes to the first of them.

    Not `max`: its gradient compares every entry with the maximum, and where XLA
    computes an entry once more, rounded otherwise, none is equal and all are 0 / 0.
    """
    at = jax.lax.stop_gradient(x).argmax(-1, keepdims=True)
    return jnp.take_along_axis(x, at, axis=-1)[..., 0]


def presence(maps, kind: Presence = "original", *, beta=0.1, group=0):
    """Every part should be somewhere in some image of the batch.

    a_bk is the largest 3 x 3 mean of map k in image b, u_k its maximum over the batch.

        original         1 - mean_k u_k
        soft_constraint  mean_k (1 - u_k) sg((1 - beta) u_k + beta)
        tanh             mean_k -log t_k,  t_k = tanh(sum_b a_bk)
        soft_tanh        mean_k (1 - t_k)

    Args:
        maps: the background is left out.
        group: images over which the maximum is taken; the loss is then the mean over
            groups. 0 = the whole batch, a weaker loss the larger the batch; the
            published runs had 16 images on each device.
    """
    a = _smooth(maps[..., :-1])
    a = _largest(einops.rearrange(a, "b h w k -> b k (h w)"))  # [B, K]
    a = einops.rearrange(a, "(n g) k -> n g k", g=group or len(maps))
    if kind in ("tanh", "soft_tanh"):
        t = jnp.tanh(a.sum(1))  # [groups, K]
        return (1.0 - t if kind == "soft_tanh" else _surprise(t)).mean()
    u = _largest(a.swapaxes(1, 2))  # [groups, K]
    if kind == "original":
        return (1.0 - u).mean()
    pull = jax.lax.stop_gradient((1.0 - beta) * u + beta)
    return ((1.0 - u) * pull).mean()


def background_presence(maps, kind: Background = "enforced_presence"):
    """Every image should have a background, near its border.

        enforced_presence  mean_b -log max(q_b r), q the 3 x 3 means of the background,
                           r = (x^2 + y^2) / 2 with x, y in [-1, 1] over q
        log, linear, mse   mean_b of -log p, 1 - p, (1 - p)^2 with p the background's
                           mean over the grid

    Logarithms are cut off at -100.
    """
    if kind == "enforced_presence":
        q = _smooth(maps[..., -1:])[..., 0]  # [B, h-2, w-2]
        y, x = (jnp.square(jnp.linspace(-1.0, 1.0, n)) for n in q.shape[1:])
        r = y[:, None] + x[None]
        p = _largest(einops.rearrange(q * (r / r.max()), "b h w -> b (h w)"))
    else:
        p = maps[..., -1].mean((1, 2))
    if kind == "linear":
        return (1.0 - p).mean()
    if kind == "mse":
        return jnp.square(1.0 - p).mean()
    return _surprise(p).mean()


def _surprise(p):
    """Return -log p, cut off at 100.

    The gradient is -1 / p down to 1e-37, below which it would leave float32; there it
    is 0, as the gradient of a softmax is that made such a p.
    """
    some = p > 1e-37
    steep = -jnp.log(jnp.where(some, p, 1.0))
    flat = jnp.where(p > 0, -jnp.log(jnp.where(p > 0, p, 1.0)), 100.0)
    return jnp.where(some, steep, jax.lax.stop_gradient(jnp.minimum(flat, 100.0)))


def pixel_entropy(maps):
    """Entropy of every patch's assignment, mean over b, h, w: decided maps.

    Probabilities are renormalised; the logarithm's argument is kept in
    [eps, 1 - eps], eps that of float32.
    """
    p = maps / maps.sum(-1, keepdims=True)
    return -(p * jnp.log(jnp.clip(p, _EPS, 1.0 - _EPS))).sum(-1).mean()


def orthogonality(features, axis: Axis = "parts"):  # [B, K+1, D] -> []
    """Mean of (F^T F - I)^2 over b and both indices, F of unit columns.

    Args:
        axis: "parts": vectors of length D, a (K+1) x (K+1) Gram matrix; "channels":
            what the released two-stage trainer computes, vectors over the K+1 parts
            and a D x D Gram matrix, which cannot reach 0.
    """
    if axis == "channels":
        features = features.swapaxes(1, 2)
    square = jnp.square(features).sum(-1, keepdims=True)
    unit = features * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
    gram = jnp.einsum("bkd,bld->bkl", unit, unit)
    return jnp.square(gram - jnp.eye(gram.shape[-1])).mean()


def equivariance(maps, returned):
    """1 - mean over b, k < K of cos(A_k, A'_k), each map one vector.

    A' are the maps of warped images, brought back by `affine.undo`.
    """
    a, b = (
        x[..., :-1].reshape(len(x), -1, x.shape[-1] - 1) for x in (maps, returned)
    )  # [B, h w, K]
    dot = (a * b).sum(1)  # [B, K]
    # The squared lengths are clamped, as torch does, each on its own: their product
    # would leave float32 for maps of zeros, and take the gradient with it.
    for x in (a, b):
        dot = dot * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(1), 1e-16))
    return 1.0 - dot.mean()


@dataclasses.dataclass(frozen=True)
class Objective:
    """Config section `objective`: the weights of the losses.

    Attributes:
        stage_2, stage_1: classification by either stage.
        total_variation, concentration, presence: on maps: smooth, in one place, there.
        background, entropy: on maps: something is no part, and every pixel one.
        orthogonality: on part features: parts are unlike each other.
        equivariance: on maps: they turn and move with the image.
        presence_type, presence_beta, presence_group: see `presence`. A group of 16 is
            what one device held in the published runs; 0 is the batch.
        background_type: see `background_presence`.
        orthogonality_axis: "channels" reproduces the released trainer.
        smoothing: of the labels.
    """

    stage_2: ranges.NotNegative = 1.0
    stage_1: ranges.NotNegative = 1.0
    total_variation: ranges.NotNegative = 1.0
    concentration: ranges.NotNegative = 0.0
    presence: ranges.NotNegative = 1.0
    presence_type: Presence = "original"
    presence_beta: ranges.NotNegative = 0.1
    presence_group: ranges.OrNone = 16
    background: ranges.NotNegative = 2.0
    background_type: Background = "enforced_presence"
    entropy: ranges.NotNegative = 1.0
    orthogonality: ranges.NotNegative = 1.0
    orthogonality_axis: Axis = "parts"
    equivariance: ranges.NotNegative = 1.0
    smoothing: ranges.BelowOne = 0.0

    def of_maps(self, found: heads.Found, features) -> dict:
        """Return the weighted losses of one pass; those of weight 0 are left out.

        Args:
            features: [B, K+1, D] for the orthogonality.
        """
        maps, values = found.maps, {}
        if self.total_variation:
            values["tv"] = self.total_variation * total_variation(maps)
        if self.concentration:
            values["conc"] = self.concentration * concentration(maps)
        if self.presence:
            group = min(self.presence_group, len(maps))
            value = presence(
                maps, self.presence_type, beta=self.presence_beta, group=group
            )
            values["presence"] = self.presence * value
        if self.background:
            value = background_presence(maps, self.background_type)
            values["enforced_presence"] = self.background * value
        if self.entropy:
            values["pixel_wise_entropy"] = self.entropy * pixel_entropy(maps)
        if self.orthogonality:
            value = orthogonality(features, self.orthogonality_axis)
            values["orth"] = self.orthogonality * value
        return {f"loss_{name}": value for name, value in values.items()}

    def of_classes(self, labels, *, second=None, first=None) -> dict:
        """Return the weighted classification losses of the stages there are."""
        found = {}
        if second is not None and self.stage_2:
            value = cross_entropy(second, labels, smoothing=self.smoothing)
            found["loss_classification"] = self.stage_2 * value
        if first is not None and self.stage_1:
            value = cross_entropy(first, labels, smoothing=self.smoothing)
            found["loss_classification_stage_1"] = self.stage_1 * value
        return found

    def of_warp(self, maps, warped, warp: affine.Warp, size: int) -> dict:
        """Return the weighted equivariance of maps and the maps of warped images."""
        value = equivariance(maps, affine.undo(warped, warp, size))
        return {"loss_equiv": self.equivariance * value}
