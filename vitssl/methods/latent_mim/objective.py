"""Telling the target of a token from those of other tokens (latent masked modelling).

Source: allenai/olmoearth_pretrain train/loss.py; Wei et al. 2024 (LatentMIM),
arXiv:2407.15837.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from vitssl import ranges
from vitssl.data import modalities
from vitssl.losses import contrastive, regression
from vitssl.ops import accelerator

# Hides a logit. Finite: a row with every entry hidden must not become nan.
_HIDDEN = -1e30


class Pair(NamedTuple):
    """Predictions and targets of the tokens of one modality."""

    prediction: jax.Array  # [B, N, D]
    target: jax.Array  # [B, N, D]
    valid: jax.Array  # [B, N] bool: tokens that count, as anchors and as negatives.


class _Kind(NamedTuple):
    """What a kind compares, and how it averages.

    Attributes:
        apart: each modality by itself, and the sum over them; otherwise all in one.
        across: negatives come from the whole batch, not from the same sample alone.
        mean: over the tokens of a sample, then over the "sample"s that have any, or
            over the whole "batch".
    """

    apart: bool
    across: bool
    mean: Literal["sample", "batch"]


KINDS = {
    "modality_patch_discrimination": _Kind(True, False, "sample"),
    "modality_all_discrimination": _Kind(True, True, "batch"),
    "patch_discrimination": _Kind(False, False, "sample"),
    "patch_discrimination_batch": _Kind(False, False, "batch"),
    "all_discrimination": _Kind(False, True, "batch"),
}


Kind = Literal[tuple(KINDS)]


@dataclasses.dataclass(frozen=True)
class Objective:
    """Config section `objective`.

    Attributes:
        type: what a prediction's own target is told apart from, see `KINDS`.
        tau, weight: its temperature and factor.
        modality_weights: ((modality, factor), ...); 1 where not named.
        pred2unit: standardise predictions over the batch first.
        same_target_threshold: negatives whose targets have a larger cosine are left
            out; 0 = none are.
        same_target_modalities: where; () = everywhere.
        contrast_weight, contrast_tau: of InfoNCE between the vectors of two views.
        koleo_weight: of KoLeo on those vectors.
        per_microbatch: what compares samples does so within a micro-batch, as the
            original does; False: over the whole batch, in however many parts it is
            embedded.
    """

    type: Kind = "modality_patch_discrimination"
    tau: ranges.Positive = 0.1
    weight: ranges.NotNegative = 1.0
    modality_weights: tuple[tuple[str, float], ...] = ()
    pred2unit: bool = False
    same_target_threshold: ranges.Probability = 0.0
    same_target_modalities: tuple[str, ...] = modalities.MAPS
    contrast_weight: ranges.NotNegative = 0.1
    contrast_tau: ranges.Positive = 0.1
    koleo_weight: ranges.NotNegative = 0.0
    per_microbatch: bool = True

    @property
    def couples_batch(self) -> bool:
        """Whether samples of the whole batch are compared."""
        across = KINDS[self.type].across or self.pred2unit
        compares = across or self.contrast_weight > 0 or self.koleo_weight > 0
        return compares and not self.per_microbatch

    def of_tokens(self, pairs):
        """Return (loss [], {modality: []}) of {modality: Pair}."""
        threshold = self.same_target_threshold
        total, parts = patch_discrimination(
            pairs,
            kind=self.type,
            tau=self.tau,
            weights=dict(self.modality_weights),
            standardise=self.pred2unit,
            same_target=threshold or None,
            same_target_in=self.same_target_modalities or None,
        )
        return self.weight * total, parts

    def of_views(self, pooled):
        """Return {name: weighted loss []} of the vectors [B, D] of each view."""
        found = {}
        if self.contrast_weight and len(pooled) == 2:
            found["contrast"] = self.contrast_weight * contrastive.infonce_one_way(
                *pooled, temperature=self.contrast_tau
            )
        if self.koleo_weight:
            each = [contrastive.koleo(x) for x in pooled]
            found["koleo"] = self.koleo_weight * sum(each) / len(each)
        return found


def patch_discrimination(
    pairs: Mapping[str, Pair],
    *,
    kind="modality_patch_discrimination",
    tau=0.1,
    weights: Mapping[str, float] | None = None,
    standardise=False,
    same_target: float | None = None,
    same_target_in: tuple[str, ...] | None = None,
):
    """Cross-entropy of every prediction's own target among the candidates.

    Logits are cosines over tau, the cross-entropy is multiplied by 2 tau. No gradient
    flows into targets.

    Args:
        pairs: {modality: Pair}.
        kind: "modality_patch_discrimination" compares the tokens of one sample and
            modality, means over tokens, then over samples that have any, and sums over
            modalities; "all" takes negatives from all samples.
        weights: {modality: factor} of kinds that sum over modalities; 1 if absent.
        standardise: predictions are standardised over all valid tokens first.
        same_target: negatives whose targets have a larger cosine than this are left
            out; a sample where a token has no negative left does not count. None = all
            negatives stay.
        same_target_in: modalities where that is done; None = all.

    Returns:
        (loss [] float32, {modality: [] before its weight} or {"all": []}).
    """
    how = KINDS[kind]
    if not how.apart:
        pairs = {"all": join(pairs.values())}
    parts = {}
    for name, pair in pairs.items():
        drop = same_target_in is None or name in same_target_in
        parts[name] = _one(pair, how, tau, standardise, same_target if drop else None)
    weights = weights or {}
    return sum(weights.get(k, 1.0) * v for k, v in parts.items()), parts


def join(pairs) -> Pair:
    """Return the tokens of several modalities as one `Pair`."""
    return Pair(*(jnp.concatenate(x, axis=1) for x in zip(*pairs, strict=True)))


def _one(pair, how, tau, standardise, same_target):
    p, t, valid = _clean(pair)
    if standardise:
        p = _standardise(p, valid)
    if how.across:
        p, t, valid = (x.reshape(1, -1, *x.shape[2:]) for x in (p, t, valid))
    p, t = regression.unit(p, 1e-12), regression.unit(t, 1e-12)
    fine = accelerator.precision()
    logits = jnp.einsum("bnd,bmd->bnm", p, t, precision=fine) / tau
    candidate = valid[:, None]
    anchor = valid
    if same_target is not None:
        same = jnp.einsum("bnd,bmd->bnm", t, t, precision=fine) > same_target
        own = jnp.eye(p.shape[1], dtype=bool)
        candidate = candidate & (own | ~same)
        alone = valid & ((candidate & ~own).sum(-1) == 0)
        anchor = valid & ~alone.any(-1, keepdims=True)
    logits = jnp.where(candidate, logits, _HIDDEN)
    positive = jnp.diagonal(logits, axis1=1, axis2=2)  # [B, N]
    each = 2 * tau * (jax.nn.logsumexp(logits, -1) - positive)
    return _average(each, anchor, how.mean, len(pair.valid))


def _average(each, valid, mean, batch):
    """Return the mean [] of losses [B, N] where valid [B, N]; 0 of none.

    Both are one row [1, B N] if the batch was flattened.
    """
    each = jnp.where(valid, each, 0.0)
    if len(each) != batch:  # Back to one row per sample.
        each, valid = each.reshape(batch, -1), valid.reshape(batch, -1)
    count = valid.sum(1)
    sample = each.sum(1) / jnp.maximum(count, 1)
    total = (count > 0).sum() if mean == "sample" else batch
    return sample.sum() / jnp.maximum(total, 1)


def _clean(pair):
    """Return float32 arrays, 0 where not valid; nothing flows into targets."""
    keep = pair.valid[..., None]
    target = jax.lax.stop_gradient(pair.target.astype(jnp.float32))
    prediction = pair.prediction.astype(jnp.float32)
    # Cleared before any arithmetic: 0 * nan would be nan, in the gradient too.
    return jnp.where(keep, prediction, 0), jnp.where(keep, target, 0), pair.valid


def _standardise(x, valid):
    """Return (x - mean) / (unbiased std + 1e-4) over the valid rows of a batch."""
    keep, count = valid[..., None], jnp.maximum(valid.sum(), 2)
    mean = jnp.where(keep, x, 0).sum((0, 1)) / count
    square = jnp.where(keep, jnp.square(x - mean), 0).sum((0, 1)) / (count - 1)
    return jnp.where(keep, (x - mean) / (jnp.sqrt(square) + 1e-4), 0)
