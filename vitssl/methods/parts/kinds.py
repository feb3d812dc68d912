"""What finds the parts and what looks at them: the section `parts` and its network."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax

from vitssl import ranges
from vitssl.methods.parts import heads, maps, networks

Kind = Literal["two_stage", "single_stage", "baseline", "given_mask"]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Config section `parts`.

    Attributes:
        kind: "two_stage" (iFAM), "single_stage" (PDiscoFormer, PDiscoNet), "baseline"
            (the same ViT with all patches, see `pooling`), "given_mask" (a ViT that
            sees the patches of the data set's own masks).
        count: K, number of parts; the background comes on top.
        masks: what the second stage may see, see `networks.MaskedClassifier`.
            "hard" is the published model: its loss trains nothing in the first stage.
        gumbel: noise in the soft maps; in training the masks have it always, as in
            the original.
        temperature: of the softmax over parts.
        dropout: probability that the first classifier does not see a part.
        mask_dropout: probability that a part cannot be foreground in a training mask.
        modulation, classifier: see `heads.PartHead`.
        modulated_orthogonality: the orthogonality loss sees part features after their
            modulation (False: PDiscoFormer without modulation_orth).
        drop_path_stage_2: as the model's drop_path, in the second stage.
        eval_noise: evaluate with Gumbel noise as the original does: its accuracy is
            random and its maps and masks disagree.
        rooms: see `MaskedClassifier`; used in evaluation. Training uses one room.
        removed: ids of parts to take away in evaluation.
        removal: of soft masks then, see `maps.without_parts`.
        thresholds: K numbers, the confidence below which a part may not claim a patch
            in evaluation (see `measures.Measures`); () = none.
        threshold_on_distance: see `maps.threshold`.
        pooling: of kind "baseline", see `networks.Baseline`.
    """

    count: ranges.Count
    kind: Kind = "two_stage"
    masks: networks.Masking = "hard"
    gumbel: bool = True
    temperature: ranges.Positive = 1.0
    dropout: ranges.BelowOne = 0.3
    mask_dropout: ranges.BelowOne = 0.3
    modulation: heads.Modulation = "layer_norm"
    classifier: heads.Classifier = "linear"
    modulated_orthogonality: bool = True
    drop_path_stage_2: ranges.BelowOne = 0.0
    eval_noise: bool = False
    rooms: tuple[ranges.Share, ...] = (0.25, 0.5, 0.75, 1.0)
    removed: tuple[int, ...] = ()
    removal: maps.Removal = "zero"
    thresholds: tuple[float, ...] = ()
    threshold_on_distance: bool = False
    pooling: networks.Pooling = "cls"

    @property
    def finds_parts(self) -> bool:
        """Whether there is a first stage."""
        return self.kind in ("two_stage", "single_stage")

    @property
    def masked(self) -> bool:
        """Whether the masks of the data set are an input."""
        late = self.kind == "baseline" and self.pooling == "late_mask"
        return self.kind == "given_mask" or late

    def network(self, backbone, classes: int, *, rooms=(1.0,)):
        """Return the network of the kind; each stage has a backbone of its own."""
        classes = max(1, classes)
        if self.kind == "baseline":
            return networks.NoParts(networks.Baseline(backbone, classes, self.pooling))
        second = dict(classes=classes, rooms=rooms)
        if self.kind == "given_mask":
            one = networks.MaskedClassifier(backbone, norm=False, **second)
            return networks.NoParts(one)
        head = heads.PartHead(
            self.count,
            classes,
            self.temperature,
            self.modulation,
            self.classifier,
            self.dropout,
        )
        first = networks.PartNet(backbone.clone(), head)
        if self.kind == "single_stage":
            return networks.OneStage(first)
        other = backbone.clone(drop_path=self.drop_path_stage_2)
        other = networks.MaskedClassifier(other, **second)
        return networks.TwoStage(first, other, self.masks)

    def draws(self, rng, size, *, train) -> maps.Draws:
        """Return the random numbers of one pass over images of size = (B, h, w)."""
        keys, shape = jax.random.split(rng, 4), (*size, self.count + 1)
        noise = train or self.eval_noise

        def kept(key, rate):
            if not train or rate == 0.0:
                return None
            return jax.random.bernoulli(key, 1.0 - rate, (size[0], self.count))

        return maps.Draws(
            maps=jax.random.gumbel(keys[0], shape) if self.gumbel and noise else None,
            mask=jax.random.gumbel(keys[1], shape) if noise else None,
            keep_mask=kept(keys[2], self.mask_dropout),
            keep_features=kept(keys[3], self.dropout),
        )

    def check(self) -> Iterator[str]:
        """Yield what cannot be combined."""
        rising = list(self.rooms) == sorted(set(self.rooms))
        if not rising or self.rooms[-1:] != (1.0,):
            yield f"rooms={self.rooms}: rising fractions, the last of them 1.0"
        if wrong := [k for k in self.removed if not 0 <= k < self.count]:
            yield f"removed={self.removed}: {wrong}: parts are 0 to {self.count - 1}"
        if self.thresholds and len(self.thresholds) != self.count:
            have = len(self.thresholds)
            yield f"thresholds has {have} numbers for count={self.count} parts"
