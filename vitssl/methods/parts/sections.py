"""The config sections of `methods.parts`: parts, objective, baseline."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax.numpy as jnp

from vitssl.methods.parts import affine, baselines, heads, networks, objective
from vitssl.methods.parts import maps as partmaps

Kind = Literal["two_stage", "single_stage", "baseline", "given_mask"]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Config section `parts`: what finds the parts and what looks at them.

    Attributes:
        kind: "two_stage" (iFAM), "single_stage" (PDiscoFormer, PDiscoNet), "baseline"
            (the same ViT with all patches, see `pooling`), "given_mask" (a ViT that
            sees the patches of the data set's own masks).
        count: K, number of parts; the background comes on top.
        masks: what the second stage may see, see `networks.MaskedClassifier`.
            "hard" is the published model: its loss trains nothing in the first stage.
        gumbel: noise in the soft maps; the masks have it in training always.
        temperature: of the softmax over parts.
        dropout: probability that the first classifier does not see a part.
        mask_dropout: probability that a part cannot be foreground in a training mask.
        modulation, classifier: see `partheads.PartHead`.
        modulated_orthogonality: the orthogonality loss sees part features after their
            modulation (False: PDiscoFormer without modulation_orth).
        drop_path_stage_2: as the model's drop_path, in the second stage.
        eval_noise: evaluate with Gumbel noise as the original does: its accuracy is
            random and its maps and masks disagree.
        rooms: see `MaskedClassifier`; used in evaluation. Training uses one room.
        removed: ids of parts to take away in evaluation.
        removal: of soft masks then, see `partmaps.without_parts`.
        thresholds: K numbers, the confidence below which a part may not claim a patch
            in evaluation (`methods.parts.scores.thresholds`); () = none.
        threshold_on_distance: see `partmaps.threshold`.
        pooling: of kind "baseline", see `baselines.Baseline`.
    """

    count: int
    kind: Kind = "two_stage"
    masks: networks.Masking = "hard"
    gumbel: bool = True
    temperature: float = 1.0
    dropout: float = 0.3
    mask_dropout: float = 0.3
    modulation: heads.Modulation = "layer_norm"
    classifier: heads.Classifier = "linear"
    modulated_orthogonality: bool = True
    drop_path_stage_2: float = 0.0
    eval_noise: bool = False
    rooms: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    removed: tuple[int, ...] = ()
    removal: partmaps.Removal = "zero"
    thresholds: tuple[float, ...] = ()
    threshold_on_distance: bool = False
    pooling: baselines.Pooling = "cls"

    @property
    def finds_parts(self) -> bool:
        """Whether there is a first stage."""
        return self.kind in ("two_stage", "single_stage")

    def head(self, classes: int) -> heads.PartHead:
        """Return the head of the first stage."""
        return heads.PartHead(
            parts=self.count,
            classes=classes,
            temperature=self.temperature,
            modulation=self.modulation,
            classifier=self.classifier,
            part_dropout=self.dropout,
        )

    def check(self) -> Iterator[str]:
        """Yield what is out of range or cannot be combined."""
        if self.count < 1:
            yield f"count={self.count}: at least 1 part (the background comes on top)"
        if not self.temperature > 0.0:
            yield f"temperature={self.temperature}: must be above 0"
        for key in ("dropout", "mask_dropout", "drop_path_stage_2"):
            if not 0.0 <= getattr(self, key) < 1.0:
                yield f"{key}={getattr(self, key)}: a probability in [0, 1)"
        fine = self.rooms and self.rooms[-1] == 1.0 and min(self.rooms) > 0
        if not fine or list(self.rooms) != sorted(set(self.rooms)):
            yield f"rooms={self.rooms}: rising fractions, the last of them 1.0"
        if wrong := [k for k in self.removed if not 0 <= k < self.count]:
            yield f"removed={self.removed}: {wrong}: parts are 0 to {self.count - 1}"
        if self.thresholds and len(self.thresholds) != self.count:
            have = len(self.thresholds)
            yield f"thresholds has {have} numbers for count={self.count} parts"


@dataclasses.dataclass(frozen=True)
class Objective:
    """Config section `objective`: weights of the losses of `methods.parts.objective`.

    Attributes:
        stage_2, stage_1: classification by either stage.
        total_variation, concentration, presence, background, entropy, orthogonality,
            equivariance: on maps and part features.
        presence_type, presence_beta, presence_group: see `objective.presence`. A
            group of 16 is what one device held in the published runs; 0 is the batch.
        background_type: see `methods.parts.objective.background_presence`.
        orthogonality_axis: "channels" reproduces the released trainer.
        smoothing: of the labels.
    """

    stage_2: float = 1.0
    stage_1: float = 1.0
    total_variation: float = 1.0
    concentration: float = 0.0
    presence: float = 1.0
    presence_type: objective.Presence = "original"
    presence_beta: float = 0.1
    presence_group: int = 16
    background: float = 2.0
    background_type: objective.Background = "enforced_presence"
    entropy: float = 1.0
    orthogonality: float = 1.0
    orthogonality_axis: Literal["parts", "channels"] = "parts"
    equivariance: float = 1.0
    smoothing: float = 0.0

    def of_maps(self, found: heads.Found, features) -> dict:
        """Return the weighted losses of one pass; those of weight 0 are left out.

        Args:
            found: see `partheads.Found`.
            features: [B, K+1, D] for the orthogonality.

        Returns:
            {"loss_tv", "loss_conc", "loss_presence", "loss_enforced_presence",
            "loss_pixel_wise_entropy", "loss_orth"}, float32 [].
        """
        maps = found.maps
        group = min(self.presence_group, len(maps))
        terms = {
            "tv": (self.total_variation, objective.total_variation, {}),
            "conc": (self.concentration, objective.concentration, {}),
            "presence": (
                self.presence,
                objective.presence,
                dict(kind=self.presence_type, beta=self.presence_beta, group=group),
            ),
            "enforced_presence": (
                self.background,
                objective.background_presence,
                dict(kind=self.background_type),
            ),
            "pixel_wise_entropy": (self.entropy, objective.pixel_entropy, {}),
        }
        values = {
            f"loss_{name}": weight * loss(maps, **options)
            for name, (weight, loss, options) in terms.items()
            if weight
        }
        if self.orthogonality:
            value = objective.orthogonality(features, self.orthogonality_axis)
            values["loss_orth"] = self.orthogonality * value
        return values

    def of_classes(self, labels, *, second=None, first=None) -> dict:
        """Return the weighted classification losses of the stages there are."""
        found = {}
        if second is not None and self.stage_2:
            value = objective.cross_entropy(second, labels, smoothing=self.smoothing)
            found["loss_classification"] = self.stage_2 * value
        if first is not None and self.stage_1:
            value = objective.cross_entropy(first, labels, smoothing=self.smoothing)
            found["loss_classification_stage_1"] = self.stage_1 * value
        return found

    def of_warp(self, maps, warped, warp: affine.Warp, size: int) -> dict:
        """Return the weighted equivariance of maps and the maps of warped images."""
        back = affine.undo(warped, warp, size)
        value = objective.equivariance(maps, back)
        return {"loss_equiv": jnp.float32(self.equivariance) * value}

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float | int) and value < 0:
                yield f"{field.name}={value}: must not be negative"
        if not 0.0 <= self.smoothing < 1.0:
            yield f"smoothing={self.smoothing}: in [0, 1)"


@dataclasses.dataclass(frozen=True)
class Average:
    """Config section `average`: an EMA of the weights, which is then evaluated.

    Attributes:
        decay: 0 = off; 0.9999 is timm's default.
        warmup: let the decay grow from 0, see `schedules.averaging`.
    """

    decay: float = 0.0
    warmup: bool = True

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        if not 0.0 <= self.decay < 1.0:
            yield f"decay={self.decay}: in [0, 1)"
