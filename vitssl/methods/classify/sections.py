"""The config sections of `methods.classify`: augment, mix, objective, scoring."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from vitssl import errors, sizes
from vitssl.data import randaugment, views
from vitssl.methods.classify import objective
from vitssl.methods.classify import views as leaves
from vitssl.optim import schedules


@dataclasses.dataclass(frozen=True)
class Augment:
    """Config section `augment`: one crop on the host, erasing on the device.

    Attributes:
        size: side of the crop, or (height, width), in pixels.
        severity: "" is what follows here. Otherwise a recipe for photographs of leaves,
            whose numbers take the place of scale, flip and randaugment: light,
            moderate, aggressive, mild, strong, or minimal (see `augment.leaves`); the
            evaluation then warps the whole image to `size`.
        scale, flip, crop, interpolation: see `data.views.Supervised`.
        randaugment: such as "rand-m9-mstd0.5-inc1"; "" is none.
        erase: probability of random erasing.
    """

    size: sizes.Size
    severity: str = ""
    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    randaugment: str = ""
    erase: float = 0.0
    crop: Literal["sampled", "clipped"] = "sampled"
    interpolation: str = "bicubic"

    def training(self, mean):
        """Return the training transform; corners of a turned image have `mean`."""
        if self.severity:
            return leaves.Leaves(self.size, self.severity)
        return views.Supervised(
            size=self.size,
            scale=self.scale,
            flip=self.flip,
            randaugment=randaugment.RandAugment.parse(self.randaugment),
            crop=self.crop,
            interpolation=self.interpolation,
            fill=tuple(min(255, round(255 * m)) for m in mean),
        )

    def evaluation(self, size: sizes.Size):
        """Return the transform of evaluation images of a size."""
        if self.severity:
            return views.Warp(size)
        return views.classifier_evaluation(size, self.interpolation)

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        if min(sizes.pair(self.size)) < 1:
            yield f"size={self.size}: 1 or more pixels"
        known = ("", *leaves.SEVERITIES, "minimal")
        if self.severity not in known:
            names = ", ".join(repr(k) for k in known)
            yield f"severity={self.severity!r}: one of {names}"
        low, high = self.scale
        if not 0 < low <= high <= 1:
            yield f"scale={self.scale}: 0 < smallest <= largest <= 1"
        for key in ("flip", "erase"):
            if not 0 <= getattr(self, key) <= 1:
                yield f"{key}={getattr(self, key)}: a probability"
        try:
            randaugment.RandAugment.parse(self.randaugment)
        except errors.UsageError as e:
            yield str(e).removeprefix("augment.")


@dataclasses.dataclass(frozen=True)
class Mix:
    """Config section `mix`; see `methods.classify.mix.mix`.

    To draw MixUp with probability p and, if it was not drawn, CutMix with q, as HViT
    does, is prob = p + q - p q and switch = q (1 - p) / prob.

    Attributes:
        mixup, cutmix: parameters of the Beta distributions; 0.0 is off.
        prob: probability that a batch is mixed.
        switch: probability of CutMix where both are on.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch: float = 0.5

    @property
    def on(self) -> bool:
        """Whether batches are mixed at all."""
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        for key in ("mixup", "cutmix"):
            if getattr(self, key) < 0:
                yield f"{key}={getattr(self, key)}: 0.0 (off) or more"
        for key in ("prob", "switch"):
            if not 0 <= getattr(self, key) <= 1:
                yield f"{key}={getattr(self, key)}: a probability"


@dataclasses.dataclass(frozen=True)
class Objective:
    """Config section `objective`.

    Attributes:
        loss: "cross_entropy", "focal", or "combined": ce_weight times the first plus
            focal_weight times the second.
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

    loss: Literal["cross_entropy", "focal", "combined"] = "cross_entropy"
    smoothing: float = 0.0
    balanced: bool = False
    class_weights: tuple[float, ...] = ()
    focal_gamma: float = 2.0
    focal_alpha: tuple[float, ...] = ()
    ce_weight: float = 0.5
    focal_weight: float = 0.5
    consistency: float = 0.0
    ema: float = 0.0
    ema_warmup: bool = False

    def __call__(self, logits, label, weight):
        """Return the loss [] of logits [B, K] and labels [B].

        Args:
            logits, label: of one batch.
            weight: [K] of the classes, or None.
        """
        ce = focal = 0.0
        if self.loss != "focal":
            ce = objective.labelled(
                logits, label, smoothing=self.smoothing, weight=weight
            )
        if self.loss != "cross_entropy":
            a = self.focal_alpha
            alpha = a[0] if len(a) == 1 else jnp.asarray(a or 1.0)
            focal = objective.focal(logits, label, gamma=self.focal_gamma, alpha=alpha)
        if self.loss == "combined":
            return self.ce_weight * ce + self.focal_weight * focal
        return ce + focal

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
        """Yield what is out of range."""
        for key in ("smoothing", "ema"):
            if not 0 <= getattr(self, key) < 1:
                yield f"{key}={getattr(self, key)}: in [0, 1)"
        for key in ("focal_gamma", "ce_weight", "focal_weight", "consistency"):
            if getattr(self, key) < 0:
                yield f"{key}={getattr(self, key)}: must not be negative"
        if min(self.focal_alpha, default=0.0) < 0:
            yield f"focal_alpha={self.focal_alpha}: must not be negative"
        if self.loss == "focal" and (self.balanced or self.smoothing):
            yield (
                "loss=focal: has neither smoothing nor class weights; set smoothing=0 "
                "and balanced=False, or loss=combined"
            )
        if self.class_weights and self.balanced:
            yield "balanced=True: the weights are given by class_weights already"
        if self.ema_warmup and not self.ema:
            yield "ema_warmup=True: needs ema, the decay it grows to"


# Views of test-time augmentation, in the order of the original.
TURNS = {
    "identity": lambda x: x,
    "hflip": lambda x: x[:, :, ::-1],
    "vflip": lambda x: x[:, ::-1],
    "rot90": lambda x: jnp.rot90(x, 1, (1, 2)),
    "rot180": lambda x: jnp.rot90(x, 2, (1, 2)),
    "rot270": lambda x: jnp.rot90(x, 3, (1, 2)),
}
VIEWS = {"none": (), "flip": ("identity", "hflip"), "six": tuple(TURNS)}


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Config section `scoring`: how the test split is scored.

    Attributes:
        tta: test-time augmentation, scored beside the plain images as "tta_...":
            "flip" averages the probabilities of an image and its mirror image; "six"
            of these, upside down, and turned by 90, 180 and 270 degrees.
        calibration: report the calibration error before and after temperature scaling.
    """

    tta: Literal["none", "flip", "six"] = "none"
    calibration: bool = False

    def averaged(self, logits, image):
        """Return the log of the mean probability [B, K] over the views of images.

        Args:
            logits: function of images.
            image: [B, H, W, C]; square for "six".
        """
        each = [logits(TURNS[name](image)) for name in VIEWS[self.tta]]
        each = jnp.stack([jax.nn.log_softmax(x.astype(jnp.float32)) for x in each])
        return jax.nn.logsumexp(each, 0) - jnp.log(float(len(each)))
