"""Telling the target of a token from those of other tokens (latent masked modelling).

Source: allenai/olmoearth_pretrain train/loss.py; Wei et al. 2024 (LatentMIM),
arXiv:2407.15837.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from vitssl import errors
from vitssl.losses import regression

# Hides a logit. Finite: a row with every entry hidden must not become nan.
_HIDDEN = -1e30


class Pair(NamedTuple):
    """Predictions and targets of the tokens of one modality.

    Attributes:
        prediction, target: [B, N, D].
        valid: [B, N] bool, tokens that count, as anchors and as negatives.
    """

    prediction: jax.Array
    target: jax.Array
    valid: jax.Array


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
        kind: a key of `KINDS`: "modality_patch_discrimination" compares the tokens of
            one sample and modality, means over tokens, then over samples that have
            any, and sums over modalities; "all" takes negatives from all samples.
        tau: temperature.
        weights: {modality: factor} of kinds that sum over modalities; 1 if absent.
        standardise: predictions are standardised over all valid tokens first.
        same_target: negatives whose targets have a larger cosine than this are left
            out; a sample where a token has no negative left does not count. None = all
            negatives stay.
        same_target_in: modalities where that is done; None = all.

    Returns:
        loss: [] float32.
        parts: {modality: [] before its weight}, or {"all": []}.

    Raises:
        UsageError: unknown kind, tau not above 0.
    """
    if kind not in KINDS:
        raise errors.UsageError(f"loss type={kind!r}: one of {', '.join(KINDS)}")
    if not isinstance(tau, jax.Array) and tau <= 0:
        raise errors.UsageError(f"tau={tau}: must be above 0")
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
    # Full float32 products: a GPU's default keeps 10 bits, the temperature loses 3.
    logits = jnp.einsum("bnd,bmd->bnm", p, t, precision="highest") / tau
    candidate = valid[:, None]
    anchor = valid
    if same_target is not None:
        same = jnp.einsum("bnd,bmd->bnm", t, t, precision="highest") > same_target
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

    Args:
        each, valid: per token; one row [1, B N] if the batch was flattened.
        mean: see `_Kind`.
        batch: number of samples B.
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


def adjusted(pairs: Mapping[str, Pair], *, tau=0.1, mu=0.7, sigma=1.0):
    """Patch discrimination whose negatives count by how hard they are.

    The logit of a negative is multiplied by a Gaussian of its cosine around mu, divided
    by its mean over the negatives of the anchor; no gradient flows through it.

    Args:
        pairs: {modality: Pair}, taken together, one sample at a time.
        tau: temperature.
        mu, sigma: of the Gaussian.

    Returns:
        [] float32.

    Source: as the module (AdjustedPatchDiscriminationLoss).
    """
    p, t, valid = _clean(join(pairs.values()))
    p, t = regression.unit(p, 1e-12), regression.unit(t, 1e-12)
    cosine = jnp.einsum("bnd,bmd->bnm", p, t, precision="highest")
    own = jnp.eye(p.shape[1], dtype=bool)
    negative = valid[:, None] & ~own
    weight = jnp.exp(-jnp.square(cosine - mu) / (2 * sigma**2))
    weight = jnp.where(negative, weight, 0)
    count = jnp.maximum(negative.sum(-1, keepdims=True), 1)
    mean = weight.sum(-1, keepdims=True) / count
    weight = jax.lax.stop_gradient(weight / jnp.maximum(mean, 1e-12))
    logits = cosine / tau * jnp.where(own, 1.0, weight)
    logits = jnp.where(valid[:, None], logits, _HIDDEN)
    positive = jnp.diagonal(logits, axis1=1, axis2=2)
    each = 2 * tau * (jax.nn.logsumexp(logits, -1) - positive)
    return _average(each, valid, "sample", len(valid))


def distance(pairs: Mapping[str, Pair], kind: str):
    """Mean distance of predictions from targets over all valid tokens together: [].

    Args:
        pairs: {modality: Pair}.
        kind: "l1", "l2" (both over every number of D), or "cosine": minus the cosine.

    Raises:
        UsageError: unknown kind.
    """
    p, t, valid = _clean(join(pairs.values()))
    if kind == "cosine":
        each = -(regression.unit(p, 1e-12) * regression.unit(t, 1e-12)).sum(-1)
    elif kind in ("l1", "l2"):
        d = p - t
        each = (jnp.abs(d) if kind == "l1" else d * d).mean(-1)
    else:
        raise errors.UsageError(f"loss type={kind!r}: one of l1, l2, cosine")
    return regression.masked_mean(each, valid)


def pixels(pairs: Mapping[str, Pair], *, kind="mse", beta=1.0):
    """Mean penalty of reconstructed values over all that are valid: [].

    Args:
        pairs: {modality: Pair} of values [B, N, C], valid [B, N, C] band by band.
        kind, beta: see `regression.distance`; also "l1".

    Source: as the module (MAELoss).
    """
    total, count = 0.0, 0
    for p, t, valid in pairs.values():
        d = jnp.where(valid, p.astype(jnp.float32) - t.astype(jnp.float32), 0)
        each = jnp.abs(d) if kind == "l1" else regression.distance(d, kind, beta=beta)
        total, count = total + each.sum(), count + valid.sum()
    return total / jnp.maximum(count, 1)
