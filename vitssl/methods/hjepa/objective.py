"""Config section `objective` of H-JEPA: distances, regularisers, weights."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import einops
import jax
import jax.numpy as jnp

from vitssl.losses import contrastive, sigreg, vicreg
from vitssl.methods.hjepa import combined, forward
from vitssl.methods.hjepa.forward import Context, Result

PLAIN = ("mse", "smoothl1", "huber", "hjepa", "jepa")
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
        view_weight: of predicting pooled global targets from each local crop alone
            (global_only); 0.0 leaves the local crops out altogether.
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
    weights: tuple[float, ...]
    distance: Literal["mse", "smoothl1", "huber"] = "smoothl1"
    huber_delta: float = 1.0
    local_weight: float = 1.0
    view_weight: float = 0.25
    views: Literal["crops", "batch_halves", "levels", "last_level"] = "crops"
    vicreg_weight: tuple[float, ...] = (0.1,)
    vicreg: tuple[tuple[float, float, float], ...] = (vicreg.WEIGHTS,)
    vicreg_eps: float = 1e-4
    covariance: Literal["paper", "mean"] = "paper"
    vicreg_on_targets: bool = False
    vicreg_adaptive: bool = False
    sigreg_weight: float = 1.0
    sigreg: Literal["lejepa", "char_function", "reference_points"] = "lejepa"
    slices: int = 1024
    fixed_slices: bool = False
    contrastive_weight: float = 0.1
    temperature: float = 0.1

    def check(self) -> Iterator[str]:
        """Yield what is out of range or cannot be combined."""
        for key in ("weights", "vicreg_weight"):
            values = getattr(self, key)
            if not values or min(values) < 0 or (key == "weights" and not any(values)):
                yield f"{key}={values}: one number per level, none negative"
        for key in ("view_weight", "local_weight", "vicreg_weight", "sigreg_weight"):
            value = getattr(self, key)
            if not isinstance(value, tuple) and value < 0:
                yield f"{key}={value}: must not be negative"
        for key in ("huber_delta", "temperature", "slices", "vicreg_eps"):
            if getattr(self, key) <= 0:
                yield f"{key}={getattr(self, key)}: must be above 0"
        if self.vicreg_adaptive and self.type != "combined":
            yield f"vicreg_adaptive=True: needs type=combined, not {self.type}"
        if self.type == "hierarchical_combined" and self.views == "batch_halves":
            yield "views=batch_halves: hierarchical_combined has crops or levels"

    @property
    def kind(self):
        """The distance between predictions and targets."""
        return self.type if self.type in ("mse", "smoothl1", "huber") else self.distance

    @property
    def couples_batch(self):
        """Whether the loss is more than a mean over tokens to predict."""
        return self.type not in PLAIN

    @property
    def sees_sigreg(self):
        """Whether SIGReg keeps the encoder from collapsing."""
        return self.type in (*SIGREG, "sigreg", "hybrid")

    def options(self):
        """Return the keyword arguments of `regression.level_loss`."""
        return dict(
            kind=self.kind, normalize=self.normalize, delta=self.huber_delta, beta=1.0
        )

    def level_weights(self, levels) -> tuple[float, ...]:
        """Return one weight per level."""
        return self.weights * levels if len(self.weights) == 1 else self.weights

    def crop_loss(self, result: Result, key):
        """Return the weighted loss [] of the crops of one kind."""
        w = self.level_weights(result.losses.shape[1])
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
        settings = self._vicreg_settings()
        along = dict(kind=self.sigreg, slices=self.slices)
        if self.type == "vicreg":
            return vicreg.vicreg(
                a, b, valid, valid, weights=self.vicreg[0], **settings
            )[0]
        if self.type == "sigreg":
            return sigreg.two_views(a, b, key, valid, valid, **along)[0]
        return combined.hybrid(
            a,
            b,
            key,
            valid,
            valid,
            vicreg_weight=self.vicreg_weight[0],
            sigreg_weight=self.sigreg_weight,
            weights=self.vicreg[0],
            vicreg_settings=settings,
            **along,
        )[0]

    def _vicreg_settings(self):
        return dict(eps=self.vicreg_eps, covariance=self.covariance)

    def regularise(self, context: Context, result: Result, key, state):
        """Return what is added to the prediction loss.

        Args:
            context: of the global crops.
            result: of the global crops.
            key: of random directions.
            state: [3] adaptive VICReg weights, or None.

        Returns:
            (term [], metrics, state).
        """
        if self.type in VICREG:
            return self._vicreg(context, result, state)
        if self.type in SIGREG:
            term, parts = combined.sigreg_of(
                self._pairs(context, result),
                key,
                weight=self.sigreg_weight,
                kind=self.sigreg,
                slices=self.slices,
            )
            return term, parts, state
        if self.type in CONTRASTIVE:
            cls = context.cls[:, :, 0]  # [B, G, D]
            term, parts = contrastive.cjepa(
                0.0,
                cls[:, 0],
                cls[:, 1],
                contrastive_weight=self.contrastive_weight,
                temperature=self.temperature,
            )
            return term, parts, state
        return jnp.zeros(()), {}, state

    def _vicreg(self, context, result, state):
        own = self.vicreg
        settings = [{"weights": w} | self._vicreg_settings() for w in own]
        if state is not None:
            settings[0]["weights"] = state
        many = result.losses.shape[1]
        weights = self.vicreg_weight
        term, parts = combined.vicreg_of(
            self._pairs(context, result),
            weights=weights * many if len(weights) == 1 else weights,
            settings=settings * many if len(settings) == 1 else settings,
        )
        if state is not None:
            terms = {k.removeprefix("vicreg_"): v for k, v in parts.items()}
            state = vicreg.adapt(state, terms, eps=self.vicreg_eps)
        return term, parts, state

    def _pairs(self, context: Context, result: Result):
        """Return the features to regularise, as `combined.Pair`s."""
        levels = list(result.levels.values())
        if self.views == "crops" and self.type != "hierarchical_combined":
            pooled = context.pooled  # [B, G, D]
            return combined.pairs("views", views=_first_two(pooled))
        if self.views == "crops":
            pool = jax.vmap(combined.pool, 1, 1)
            pooled = [pool(x.prediction, x.valid) for x in levels]
            return [
                combined.Pair(*_first_two(x))._replace(level=k)
                for k, x in enumerate(pooled)
            ]
        if self.views == "batch_halves":
            tokens = context.tokens[:, 0, 0]  # [B, N, D]
            if context.cls is not None:
                tokens = jnp.concatenate([context.cls[:, 0, 0][:, None], tokens], 1)
            return combined.pairs("context", context=tokens)
        first = jax.tree.map(lambda x: x[:, 0], levels)
        return combined.pairs(
            self.views,
            predictions=[x.prediction for x in first],
            targets=[x.target for x in first],
            valids=[x.valid for x in first],
            on_targets=self.vicreg_on_targets,
        )


def _first_two(x):
    """[B, G, D] -> (crop 0, crop 1), or (crop 0,) where there is one."""
    return tuple(x[:, i] for i in range(min(2, x.shape[1])))
