"""Supervised training: fine-tuning, the linear probe, and training from scratch.

Which of them it is, the config says: start from a checkpoint with `init.from`, give
the backbone smaller rates with `optim.lr_rules`, or freeze it with `optim.freeze`. A
frozen backbone is never differentiated.

Sources: He et al. 2021, arXiv:2111.06377, appendix A (recipes); facebookresearch/mae
main_finetune.py, main_linprobe.py; utkutpcgl/ViTFreeze@30e80f9.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import errors, methods, tree
from vitssl.data import views
from vitssl.data.augment import randaugment
from vitssl.evals import accuracy
from vitssl.losses import classification
from vitssl.methods import backbone_pictures
from vitssl.models import head as heads
from vitssl.models import hvit, vit
from vitssl.ops import erase, mix, patches


@dataclasses.dataclass(frozen=True)
class Augment:
    """Config section `augment`: one crop on the host, erasing on the device.

    Attributes:
        size: side of the crop, in pixels.
        scale, flip, crop, interpolation: see `data.views.Supervised`.
        randaugment: such as "rand-m9-mstd0.5-inc1"; "" is none.
        erase: probability of random erasing.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    randaugment: str = ""
    erase: float = 0.0
    crop: Literal["sampled", "clipped"] = "sampled"
    interpolation: str = "bicubic"

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        if self.size < 1:
            yield f"size={self.size}: 1 or more pixels"
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
    """Config section `mix`; see `ops.mix.mix`.

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
        smoothing: of the labels.
        balanced: weight classes by N / (K count), as scikit-learn does.
        ema: decay of an average of the parameters that is scored beside them; 0.0 is
            off.
    """

    smoothing: float = 0.0
    balanced: bool = False
    ema: float = 0.0

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        for key in ("smoothing", "ema"):
            if not 0 <= getattr(self, key) < 1:
                yield f"{key}={getattr(self, key)}: in [0, 1)"


@dataclasses.dataclass(frozen=True)
class Classify:
    """The method; fields are the sections of its config.

    Parameters: "backbone", "head". Extra: "stats" (head.batchnorm), "ema".
    """

    run: methods.Run
    model: vit.ViT | hvit.HViT
    augment: Augment
    head: heads.Head = heads.Head()
    mix: Mix = Mix()
    objective: Objective = Objective()
    couples_batch = False

    def transform(self) -> views.Supervised:
        """Return the training transform."""
        a = self.augment
        return views.Supervised(
            size=a.size,
            scale=a.scale,
            flip=a.flip,
            randaugment=randaugment.RandAugment.parse(a.randaugment),
            crop=a.crop,
            interpolation=a.interpolation,
            fill=tuple(min(255, round(255 * m)) for m in self.run.mean),
        )

    def evaluation_transform(self, size: int) -> views.Evaluate:
        """Return the transform of evaluation images."""
        return views.classifier_evaluation(size, self.augment.interpolation)

    def phase(self, step: int) -> None:
        """Return None: every step is alike."""
        del step

    def init(self, rng, batch):
        """Return (params, extra) of a fresh network."""
        keys = jax.random.split(rng)
        image = jnp.zeros((1, *batch["image"].shape[1:]))
        backbone = self.model.init(keys[0], image)["params"]
        feature = jax.eval_shape(lambda: self._pooled({"backbone": backbone}, image))
        head, stats = self.head.init(keys[1], feature.shape[-1], self.run.classes)
        params = {"backbone": backbone, "head": head}
        extra = {"stats": stats} if stats else {}
        if self.objective.ema:
            extra["ema"] = tree.copy(params)
        return params, extra

    def _pooled(self, params, image, *, train=False, rng=None):
        """Return the features [B, D] of normalised images."""
        rngs = {}
        if train:
            rngs = dict(
                zip(("drop_path", "dropout"), jax.random.split(rng), strict=True)
            )
        return self.model.apply(
            {"params": params["backbone"]},
            image,
            how=self.head.feature,
            train=train,
            rngs=rngs,
            method="pooled",
        )

    def logits(self, params, extra, image):
        """Return logits [B, K] of [B, H, W, C] uint8 or normalised images."""
        x = patches.normalise(image, self.run.mean, self.run.std)
        x = self._pooled(params, x)
        return self.head(params["head"], extra.get("stats", {}), x)[0]

    def loss(self, params, extra, batch, rng, *, phase):
        """Return (loss [], (extra, metrics)) of one (micro-)batch."""
        keys = jax.random.split(rng, 4)
        image = patches.normalise(batch["image"], self.run.mean, self.run.std)
        smoothing = self.objective.smoothing
        if self.augment.erase:
            image = erase.erase(keys[0], image, prob=self.augment.erase)
        if self.mix.on:
            image, target = mix.mix(
                keys[1],
                image,
                batch["label"],
                classes=self.run.classes,
                mixup_alpha=self.mix.mixup,
                cutmix_alpha=self.mix.cutmix,
                prob=self.mix.prob,
                switch=self.mix.switch,
                smooth=smoothing,
            )
        else:
            target = classification.soft_targets(
                batch["label"], self.run.classes, smoothing
            )
        # Of a frozen backbone no layer is dropped: it is a fixed function.
        train = not _backbone_frozen(params, phase)
        x = self._pooled(params, image, train=train, rng=keys[2])
        logits, stats, _ = self.head(
            params["head"], extra.get("stats", {}), x, train=True, rng=keys[3]
        )
        value = classification.cross_entropy(logits, target, self.class_weights)
        hit = logits.argmax(-1) == target.argmax(-1)
        if stats:
            extra = extra | {"stats": stats}
        return value, (extra, {"train_top1": hit.mean()})

    @property
    def class_weights(self):
        """Return N / (K count) of every class [K] float32, or None."""
        if not self.objective.balanced:
            return None
        counts = np.maximum(1, np.asarray(self.run.counts, np.float32))
        return counts.sum() / (len(counts) * counts)

    def freeze_layers(self) -> tuple:
        """Return `FreezeOut.layers`: the backbone's; the head never freezes."""
        return self.model.freeze_layers("backbone/")

    def after(self, params, extra, step):
        """Return `extra` after update `step`: the average follows the parameters."""
        del step
        if "ema" not in extra:
            return extra
        return extra | {"ema": tree.ema(extra["ema"], params, self.objective.ema)}

    def adopt(self, params, extra):
        """Return `extra` with an average that starts as the loaded parameters."""
        return extra | {"ema": tree.copy(params)} if "ema" in extra else extra

    def features(self, params, extra, image):
        """Return {"pooled", "tokens", "gap", "mean", "cls"} of the backbone.

        "pooled" is what the head sees, after its normalisations.
        """
        x = patches.normalise(image, self.run.mean, self.run.std)
        net = {"params": params["backbone"]}
        found = self.model.apply(net, x, method="features")
        stats, x = extra.get("stats", {}), found[self.head.feature]
        _, _, found["pooled"] = self.head(params["head"], stats, x)
        return found

    def pictures(self, params, extra, batch, image) -> dict:
        """Return fields of `evals.pictures.Material`."""
        del extra, batch
        own = params["backbone"]
        return backbone_pictures.arrays(self.model, own, self.run, image)

    def outputs(self, params, extra, batch) -> dict:
        """Return the logits of a batch, and the average's if there is one."""
        found = {"logits": self.logits(params, extra, batch["image"])}
        if "ema" in extra:
            found["ema_logits"] = self.logits(extra["ema"], extra, batch["image"])
        return found

    def scores(self, rows) -> dict:
        """Return top-1, top-5, cross-entropy and macro F1; "ema_..." of the average."""
        found = {}
        known = rows["label"] >= 0
        for prefix in ("", "ema_"):
            if f"{prefix}logits" not in rows or not known.any():
                continue
            one = accuracy.measure(rows[f"{prefix}logits"][known], rows["label"][known])
            one["f1_macro"] = f1_macro(one["confusion"])
            found |= {f"{prefix}{key}": value for key, value in one.items()}
        return found

    def check(self) -> Iterator[str]:
        """Yield one line per impossible combination of the sections."""
        size = self.augment.size
        for fault in self.model.check_image(size):
            yield f"augment.size={size}: {fault}"
        for fault in self.model.check_channels(self.run.channels):
            yield f"data.channels={fault}"
        if self.mix.on and self.run.batch_size % 2:
            yield (
                f"batch_size={self.run.batch_size}: mixup and cutmix pair the images "
                "of a batch; an even number is needed (or mix.prob=0)"
            )
        if self.head.feature not in self.model.poolings:
            known = ", ".join(self.model.poolings)
            yield f"head.pool={self.head.pool}: there is no class token; use {known}"
        if self.augment.randaugment and self.run.channels not in (1, 3):
            yield f"augment.randaugment: needs 1 or 3 channels, not {self.run.channels}"


def _backbone_frozen(params, phase) -> bool:
    """Return whether no parameter of the backbone trains in this phase."""
    names = (f"backbone/{name}" for name in tree.flat(params["backbone"]))
    return phase is not None and all(name in phase.frozen for name in names)


def f1_macro(confusion) -> float:
    """Return the mean F1 over the classes that occur, from counts [true, predicted].

    F1 = 2 TP / (2 TP + FP + FN), 0 for a class that is never predicted.
    """
    confusion = np.asarray(confusion, np.float64)
    hit = np.diag(confusion)
    total = confusion.sum(0) + confusion.sum(1)
    seen = total > 0
    return float((2 * hit[seen] / total[seen]).mean())
