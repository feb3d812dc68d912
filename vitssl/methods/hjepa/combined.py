"""Which features a regulariser (VICReg, SIGReg) sees, and with what weight.

`pairs` chooses them, `vicreg_of` and `sigreg_of` turn them into a term to add to the
prediction loss. The original (jonwiggins/H-JEPA src/losses/combined.py) has the
placements "context", "levels" and "last_level", all of them on two halves of the
batch; "views" takes two crops of the same images instead.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import einops
import jax.numpy as jnp

from vitssl import errors
from vitssl.losses import sigreg, vicreg

PLACEMENTS = ("views", "context", "levels", "last_level")


class Pair(NamedTuple):
    """Two views to regularise.

    Attributes:
        a, b: [B, D] or [B, N, D]; b is None where there is one view only.
        valid_a, valid_b: [B] or [B, N] bool, rows that count; None counts all.
        level: whose weight and settings apply (0 for features of the encoder).
    """

    a: Any
    b: Any = None
    valid_a: Any = None
    valid_b: Any = None
    level: int = 0


def pool(tokens, valid=None):
    """Mean over the valid tokens of each image: [B, N, D], [B, N] -> [B, D].

    An image without a valid token gives zeros.
    """
    tokens = tokens.astype(jnp.float32)
    if valid is None:
        return tokens.mean(1)
    keep = valid.astype(jnp.float32)[..., None]  # [B, N, 1]
    total = jnp.where(keep > 0, keep * tokens, 0.0).sum(1)  # [B, D]
    return total / jnp.where(keep.any(1), keep.sum(1), 1.0)


def pairs(
    placement,
    *,
    views=(),
    context=None,
    predictions=(),
    targets=(),
    valids=None,
    on_targets=False,
):
    """List the pairs that a regulariser sees.

    Args:
        placement: "views": the one or two given `views`; "context": halves of the
            batch of `context`; "levels": every level of `predictions`, each in
            halves; "last_level": the coarsest of them.
        views: one or two [B, D], pooled tokens of two crops of the same images.
        context: [B, N, D] all tokens of the context encoder.
        predictions, targets: one [B, N_k, D] per level.
        valids: one [B, N_k] bool per level, tokens that count; None counts all.
        on_targets: pair (target, prediction) of a level instead of two halves, as
            is always done for a batch of one.

    Returns:
        list of `Pair`.

    Raises:
        UsageError: unknown placement.
        ValueError: what the placement needs is not given.
    """
    if placement not in PLACEMENTS:
        raise errors.UsageError(
            f"placement={placement!r}: one of {', '.join(PLACEMENTS)}"
        )
    if placement == "views":
        if len(views) not in (1, 2):
            raise ValueError(f"pairs: placement views needs 1 or 2, got {len(views)}")
        return [Pair(*views)]
    if placement == "context":
        if context is None:
            raise ValueError("pairs: placement context needs `context`")
        return [Pair(*vicreg.halves(context))]
    if not len(predictions):
        raise ValueError(f"pairs: placement {placement} needs `predictions`")
    levels = range(len(predictions))
    valids = (None,) * len(predictions) if valids is None else valids
    out = []
    for k in levels if placement == "levels" else levels[-1:]:
        if on_targets or len(predictions[k]) < 2:
            out.append(Pair(targets[k], predictions[k], valids[k], valids[k], k))
        else:
            out.append(Pair(*vicreg.halves(predictions[k], valids[k]), k))
    return out


def vicreg_of(chosen, *, weights=0.1, settings=None):
    """VICReg of every pair, weighted by its level and summed.

    A pair of one view has no invariance term.

    Args:
        chosen: list of `Pair`.
        weights: a number, or one per level.
        settings: keyword arguments of `vicreg.vicreg`, or one such mapping per
            level ("hierarchical").

    Returns:
        term: [] to add to the prediction loss.
        parts: "vicreg", "vicreg_invariance", "vicreg_variance", "vicreg_covariance"
            [] before weighting; with several pairs each name ends in "_h{level}".
    """
    term, parts = jnp.zeros(()), {}
    for pair in chosen:
        own = _of_level(settings or {}, pair.level)
        loss, found = _vicreg_of_pair(pair, **own)
        term += _of_level(weights, pair.level) * loss
        end = f"_h{pair.level}" if len(chosen) > 1 else ""
        parts[f"vicreg{end}"] = loss
        for name in ("invariance", "variance", "covariance"):
            parts[f"vicreg_{name}{end}"] = found[name]
    return term, parts


def sigreg_of(chosen, key=None, *, weight=1.0, **options):
    """SIGReg, averaged over the views of each pair and summed over pairs.

    Only the regulariser: no invariance term, whatever the pairs are.

    Args:
        chosen: list of `Pair`.
        key: of the random directions, which all views share.
        weight: multiplies the term.
        **options: of `sigreg.sigreg`.

    Returns:
        term: [] to add to the prediction loss.
        parts: "sigreg" [] before weighting.
    """
    total = jnp.zeros(())
    for pair in chosen:
        own = sigreg.sigreg(pair.a, key, valid=pair.valid_a, **options)
        if pair.b is not None:
            other = sigreg.sigreg(pair.b, key, valid=pair.valid_b, **options)
            own = (own + other) / 2
        total += own
    return weight * total, {"sigreg": total}


def hybrid(
    za,
    zb=None,
    key=None,
    valid_a=None,
    valid_b=None,
    *,
    vicreg_weight=1.0,
    sigreg_weight=1.0,
    inner_sigreg_weight=25.0,
    weights=vicreg.WEIGHTS,
    vicreg_settings=None,
    **options,
):
    """VICReg and two-view SIGReg of the same pair, weighted and summed.

    Both contain the invariance term.

    Args:
        za, zb, valid_a, valid_b: see `vicreg.vicreg`.
        key: of the random directions.
        vicreg_weight, sigreg_weight: of the two totals.
        inner_sigreg_weight: of the regulariser beside the invariance inside the
            SIGReg total. The original uses `sigreg_weight` there a second time.
        weights: (invariance, variance, covariance); the first serves both totals.
        vicreg_settings: further keyword arguments of `vicreg.vicreg`.
        **options: of `sigreg.two_views`.

    Returns:
        loss: [].
        parts: "vicreg", "sigreg" [] totals before weighting; "invariance",
            "variance", "covariance", "regulariser" their terms.
    """
    first, terms = vicreg.vicreg(
        za, zb, valid_a, valid_b, weights=weights, **(vicreg_settings or {})
    )
    second, more = sigreg.two_views(
        za,
        zb,
        key,
        valid_a,
        valid_b,
        weights=(weights[0], inner_sigreg_weight),
        **options,
    )
    parts = {k: terms[k] for k in ("invariance", "variance", "covariance")}
    parts |= {"vicreg": first, "sigreg": second, "regulariser": more["sigreg"]}
    return vicreg_weight * first + sigreg_weight * second, parts


def _vicreg_of_pair(pair, *, weights=vicreg.WEIGHTS, flatten=True, **options):
    """Loss and parts of one pair; without a second view the invariance is 0."""
    if pair.b is not None:
        return vicreg.vicreg(*pair[:4], weights=weights, flatten=flatten, **options)
    a = pair.a if flatten else einops.rearrange(pair.a, "b ... -> b (...)")
    variance, covariance = vicreg.variance_covariance(a, pair.valid_a, **options)
    loss = weights[1] * variance + weights[2] * covariance
    parts = dict(invariance=jnp.zeros(()), variance=variance, covariance=covariance)
    return loss, parts


def _of_level(values, level):
    """Entry `level` of a sequence; anything else holds for all levels."""
    return values[level] if isinstance(values, Sequence) else values
