"""Config section `objective` of H-JEPA: distances, regularisers, weights.

The original (jonwiggins/H-JEPA src/losses/combined.py) regularises tokens of the
context encoder or the predictions of levels, all of them on two halves of the batch;
`views=crops` takes two crops of the same images instead.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import einops
import jax
import jax.numpy as jnp

from vitssl import ranges
from vitssl.losses import contrastive, regression, sigreg, vicreg
from vitssl.methods.hjepa import forward, invariance
from vitssl.methods.hjepa.forward import Context, Result

PLAIN = (*regression.KINDS, "hjepa", "jepa")
VICREG = ("combined", "hierarchical_combined")
SIGREG = ("hjepa_sigreg", "sigreg_combined")
CONTRASTIVE = ("cjepa", "contrastive_jepa")
ALONE = ("vicreg", "sigreg", "hybrid")


@dataclasses.dataclass(frozen=True)
class Objective:
    """Config section `objective`.

    Attributes:
        type: mse, smoothl1, huber: distance of predicted and target features, summed
            over levels. hjepa, jepa: the same with `distance`. combined: plus VICReg;
            hierarchical_combined: plus VICReg of every level's predictions.
            hjepa_sigreg, sigreg_combined: plus SIGReg. cjepa, contrastive_jepa: plus
            NT-Xent of class tokens. vicreg, sigreg, hybrid (both): these instead of the
            distance, with predictions and targets of a level as the two views.
        normalize: put both sides on the unit sphere before the distance.
        weights: one per level, or one for all; finest first.
        distance: of the types that do not name one.
        huber_delta: where huber turns linear.
        local_weight: of local crops that have targets (cross_crop_prediction).
        view_weight: of what crops say of each other (global_only); 0.0 leaves the local
            crops out altogether. The metric `view_share` is its share of the loss.
        view_target: plain: the pooled target of a global crop is predicted from another
            crop alone. centred: the same, without what is common to all targets of the
            batch. lejepa: all crops shall have one projection, with a gradient into all
            of them, and SIGReg (LeJEPA); the global ones are what is visible of them.
            dino: those shall be sorted as the targets of the other global crops.
        view_pairs: whether local crops alone predict the global ones, or the global
            ones each other, too. lejepa and dino always compare all.
        view_sigreg: LeJEPA's lambda, share of SIGReg in its loss.
        view_projector: (hidden width, outputs) of LeJEPA's projector or DINO's head.
        view_temperatures: DINO's, of the scores of crops and of targets.
        views: what VICReg and SIGReg compare. crops: the mean visible token of global
            crops 0 and 1 (one crop: no invariance term). batch_halves: all context
            tokens, halves of the batch as views, as the original has it; levels and
            last_level: the same with predictions.
        vicreg_weight: one for all levels, or one per level (hierarchical_combined).
        vicreg: (invariance, variance, covariance), one triple or one per level.
        vicreg_eps: added to variances.
        covariance: "paper" divides by D, "mean" by D (D - 1) as the original.
        vicreg_on_targets: with levels and last_level, pair targets with predictions.
        vicreg_adaptive: move the triple towards small terms (`combined` only).
        sigreg_weight: of the regulariser; in `hybrid` of its total.
        sigreg: statistic; all but lejepa are blind to mean and scale.
        slices: number of random directions.
        fixed_slices: the same directions at every step.
        contrastive_weight, temperature: of NT-Xent.
    """

    type: Literal[PLAIN + VICREG + SIGREG + CONTRASTIVE + ALONE]
    normalize: bool
    weights: tuple[ranges.NotNegative, ...]
    distance: Literal[regression.KINDS] = "smoothl1"
    huber_delta: ranges.Positive = 1.0
    local_weight: ranges.NotNegative = 1.0
    view_weight: ranges.NotNegative = 0.25
    view_target: invariance.Target = "plain"
    view_pairs: invariance.Pairs = "local"
    view_sigreg: ranges.BelowOne = 0.05
    view_projector: tuple[ranges.Count, ranges.Count] = (256, 32)
    view_temperatures: tuple[ranges.Positive, ranges.Positive] = (0.1, 0.04)
    views: Literal["crops", "batch_halves", "levels", "last_level"] = "crops"
    vicreg_weight: tuple[ranges.NotNegative, ...] = (0.1,)
    vicreg: tuple[tuple[float, float, float], ...] = (vicreg.WEIGHTS,)
    vicreg_eps: ranges.Positive = 1e-4
    covariance: Literal["paper", "mean"] = "paper"
    vicreg_on_targets: bool = False
    vicreg_adaptive: bool = False
    sigreg_weight: ranges.NotNegative = 1.0
    sigreg: Literal["lejepa", "char_function", "reference_points"] = "lejepa"
    slices: ranges.Count = 1024
    fixed_slices: bool = False
    contrastive_weight: float = 0.1
    temperature: ranges.Positive = 0.1

    def check(self) -> Iterator[str]:
        """Yield what cannot be combined."""
        if not any(self.weights):
            yield f"weights={self.weights}: one number per level, not all of them 0"
        if self.vicreg_adaptive and self.type != "combined":
            yield f"vicreg_adaptive=True: needs type=combined, not {self.type}"
        if self.type == "hierarchical_combined" and self.views == "batch_halves":
            yield "views=batch_halves: hierarchical_combined has crops or levels"

    @property
    def couples_batch(self):
        """Whether the loss is more than a mean over tokens to predict."""
        return self.type not in PLAIN

    @property
    def sees_sigreg(self):
        """Whether SIGReg keeps the encoder from collapsing."""
        if self.view_target == "lejepa" and self.view_weight and self.view_sigreg:
            return True
        return self.type in (*SIGREG, "sigreg", "hybrid")

    @property
    def view(self) -> invariance.View:
        """The term between crops."""
        own = self.view_target, self.view_pairs, self.view_sigreg
        return invariance.View(*own, self.view_temperatures, self.slices)

    def options(self):
        """Return the keyword arguments of `regression.level_loss`."""
        kind = self.type if self.type in regression.KINDS else self.distance
        return dict(kind=kind, normalize=self.normalize, delta=self.huber_delta)

    def crop_loss(self, result: Result, key):
        """Return the weighted loss [] of the crops of one kind."""
        levels = result.losses.shape[1]
        w = self.weights * levels if len(self.weights) == 1 else self.weights
        if self.type not in ALONE:
            return (result.losses * jnp.asarray(w)).sum(1).mean()
        return sum(
            weight * self._alone(level, key)
            for weight, level in zip(w, result.levels.values(), strict=True)
        )

    def _alone(self, level: forward.Level, key):
        """VICReg, SIGReg or both, between the predictions and targets of a level."""
        a, b = (
            einops.rearrange(x, "b c n d -> b (c n) d")
            for x in (level.target, level.prediction)
        )
        valid = einops.rearrange(level.valid, "b c n -> b (c n)")
        settings = self._vicreg_settings(self.vicreg[0])
        along = dict(kind=self.sigreg, slices=self.slices)
        if self.type == "vicreg":
            return vicreg.vicreg(a, b, valid, valid, **settings)[0]
        if self.type == "sigreg":
            return sigreg.two_views(a, b, key, valid, valid, **along)[0]
        return hybrid(
            Pair(a, b, valid, valid),
            key,
            vicreg_weight=self.vicreg_weight[0],
            sigreg_weight=self.sigreg_weight,
            settings=settings,
            **along,
        )[0]

    def _vicreg_settings(self, weights):
        eps, covariance = self.vicreg_eps, self.covariance
        return dict(weights=weights, eps=eps, covariance=covariance)

    def regularise(self, context: Context, result: Result, key, state):
        """Return what is added to the prediction loss: (term [], metrics, state).

        Args:
            context, result: of the global crops.
            key: of random directions.
            state: [3] adaptive VICReg weights, or None.
        """
        if self.type in VICREG:
            return self._vicreg(context, result, state)
        if self.type in SIGREG:
            term, parts = sigreg_of(
                self._pairs(context, result),
                key,
                weight=self.sigreg_weight,
                kind=self.sigreg,
                slices=self.slices,
            )
            return term, parts, state
        if self.type in CONTRASTIVE:
            cls = context.cls[:, :, 0]  # [B, G, D]
            term, found = contrastive.nt_xent(
                cls[:, 0], cls[:, 1], temperature=self.temperature
            )
            parts = {f"contrastive_{name}": value for name, value in found.items()}
            parts["contrastive"] = term
            return self.contrastive_weight * term, parts, state
        return jnp.zeros(()), {}, state

    def _vicreg(self, context, result, state):
        triples = self.vicreg if state is None else (state,)
        term, parts = vicreg_of(
            self._pairs(context, result),
            weights=self.vicreg_weight,
            settings=[self._vicreg_settings(w) for w in triples],
        )
        if state is not None:
            terms = {k.removeprefix("vicreg_"): v for k, v in parts.items()}
            state = vicreg.adapt(state, terms, eps=self.vicreg_eps)
        return term, parts, state

    def _pairs(self, context: Context, result: Result) -> list["Pair"]:
        """Return the features to regularise."""
        levels = list(result.levels.values())
        if self.views == "crops":
            pooled = [context.pooled]  # [B, G, D]
            if self.type == "hierarchical_combined":
                pool = jax.vmap(forward.pool, 1, 1)
                pooled = [pool(x.prediction, x.valid) for x in levels]
            views = [[x[:, i] for i in range(min(2, x.shape[1]))] for x in pooled]
            return [Pair(*v)._replace(level=k) for k, v in enumerate(views)]
        if self.views == "batch_halves":
            tokens = context.tokens[:, 0, 0]  # [B, N, D]
            if context.cls is not None:
                tokens = jnp.concatenate([context.cls[:, 0, 0][:, None], tokens], 1)
            return [Pair(*vicreg.halves(tokens))]
        first = jax.tree.map(lambda x: x[:, 0], levels)
        pairs = pairs_of_levels(first, on_targets=self.vicreg_on_targets)
        return pairs if self.views == "levels" else pairs[-1:]


class Pair(NamedTuple):
    """Two views to regularise."""

    a: Any  # [B, D] or [B, N, D]
    b: Any = None  # None where there is one view only.
    valid_a: Any = None  # [B] or [B, N] bool, rows that count; None counts all.
    valid_b: Any = None
    level: int = 0  # Whose weight and settings apply (0 for features of the encoder).


def pairs_of_levels(levels, *, on_targets=False) -> list[Pair]:
    """Return a pair for every level: the two halves of its predictions.

    Args:
        levels: one `forward.Level` per level, of [B, N, D] and valid [B, N] or None.
        on_targets: pair (target, prediction) instead, as is always done for a batch
            of one.
    """
    out = []
    for k, (prediction, target, valid) in enumerate(levels):
        if on_targets or len(prediction) < 2:
            out.append(Pair(target, prediction, valid, valid, k))
        else:
            out.append(Pair(*vicreg.halves(prediction, valid), k))
    return out


def vicreg_of(
    pairs: Sequence[Pair],
    *,
    weights: Sequence[float] = (0.1,),
    settings: Sequence[Mapping] = ({},),
):
    """VICReg of every pair, weighted by its level and summed.

    A pair of one view has no invariance term.

    Args:
        pairs: what is regularised.
        weights: one for all levels, or one per level.
        settings: keyword arguments of `vicreg.vicreg`, for all levels or per level
            ("hierarchical").

    Returns:
        term: [] to add to the prediction loss.
        parts: "vicreg", "vicreg_invariance", "vicreg_variance", "vicreg_covariance"
            [] before weighting; with several pairs each name ends in "_h{level}".
    """
    term, parts = jnp.zeros(()), {}
    for pair in pairs:
        loss, found = _vicreg_of_pair(pair, **_of_level(settings, pair.level))
        term += _of_level(weights, pair.level) * loss
        end = f"_h{pair.level}" if len(pairs) > 1 else ""
        parts[f"vicreg{end}"] = loss
        for name in ("invariance", "variance", "covariance"):
            parts[f"vicreg_{name}{end}"] = found[name]
    return term, parts


def _vicreg_of_pair(pair, *, weights=vicreg.WEIGHTS, **options):
    """Loss and parts of one pair; without a second view the invariance is 0."""
    if pair.b is not None:
        return vicreg.vicreg(*pair[:4], weights=weights, **options)
    variance, covariance = vicreg.variance_covariance(pair.a, pair.valid_a, **options)
    loss = weights[1] * variance + weights[2] * covariance
    parts = dict(invariance=jnp.zeros(()), variance=variance, covariance=covariance)
    return loss, parts


def _of_level(values, level):
    return values[level] if len(values) > 1 else values[0]


def sigreg_of(pairs: Sequence[Pair], key=None, *, weight=1.0, **options):
    """SIGReg, averaged over the views of each pair and summed over pairs.

    Only the regulariser: no invariance term, whatever the pairs are.

    Args:
        pairs: what is regularised.
        key: of the random directions, which all views share.
        weight: of the term.
        **options: of `sigreg.sigreg`.

    Returns:
        (term [] to add to the prediction loss, {"sigreg": [] before weighting}).
    """
    total = jnp.zeros(())
    for pair in pairs:
        own = sigreg.sigreg(pair.a, key, valid=pair.valid_a, **options)
        if pair.b is not None:
            other = sigreg.sigreg(pair.b, key, valid=pair.valid_b, **options)
            own = (own + other) / 2
        total += own
    return weight * total, {"sigreg": total}


def hybrid(
    pair: Pair,
    key=None,
    *,
    vicreg_weight=1.0,
    sigreg_weight=1.0,
    inner_sigreg_weight=25.0,
    settings: Mapping,
    **options,
):
    """VICReg and two-view SIGReg of the same pair, weighted and summed.

    Both contain the invariance term, with the same weight.

    Args:
        pair: of two views.
        key: of the random directions.
        vicreg_weight, sigreg_weight: of the two totals.
        inner_sigreg_weight: of the regulariser beside the invariance inside the
            SIGReg total. The original uses `sigreg_weight` there a second time.
        settings: keyword arguments of `vicreg.vicreg`, with "weights".
        **options: of `sigreg.two_views`.

    Returns:
        loss: [].
        parts: "vicreg", "sigreg" [] totals before weighting; "invariance",
            "variance", "covariance", "regulariser" their terms.
    """
    za, zb, *valid = pair[:4]
    first, terms = vicreg.vicreg(za, zb, *valid, **settings)
    weights = settings["weights"][0], inner_sigreg_weight
    second, more = sigreg.two_views(za, zb, key, *valid, weights=weights, **options)
    parts = {k: terms[k] for k in ("invariance", "variance", "covariance")}
    parts |= {"vicreg": first, "sigreg": second, "regulariser": more["sigreg"]}
    return vicreg_weight * first + sigreg_weight * second, parts
