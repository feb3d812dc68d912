"""Supervised training: fine-tuning, the linear probe, and training from scratch.

Which of them it is, the config says: start from a checkpoint with `init.from`, give
the backbone smaller rates with `optim.lr_rules`, or freeze it with `optim.freeze`. A
frozen backbone is never differentiated.

Sources: He et al. 2021, arXiv:2111.06377, appendix A (recipes); facebookresearch/mae
main_finetune.py, main_linprobe.py; utkutpcgl/ViTFreeze@30e80f9.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vitssl import sizes, tree
from vitssl.data import resolution as resolutions
from vitssl.evals import accuracy, ranking
from vitssl.evals import metrics as measures
from vitssl.methods import base
from vitssl.methods.classify import mix as mixing
from vitssl.methods.classify import objective as classification
from vitssl.methods.classify import views
from vitssl.models import head as heads
from vitssl.models import hvit, layers, patches, vit

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

    def averaged(self, logits, image, several=False):
        """Return logits [B, K] of the mean probability over the views of images.

        `logits` is a function of images [B, H, W, C]; "six" wants squares. Of several
        labels a probability is a sigmoid.
        """
        each = [logits(TURNS[name](image)) for name in VIEWS[self.tta]]
        each = jnp.stack(each).astype(jnp.float32)
        if several:
            mean = [jax.nn.logsumexp(jax.nn.log_sigmoid(x), 0) for x in (each, -each)]
            return mean[0] - mean[1]
        return jax.nn.logsumexp(jax.nn.log_softmax(each), 0) - jnp.log(len(each) * 1.0)


class StreamHead(nn.Module):
    """A linear classifier on the mean token of one stream of an HViT, in float32."""

    classes: int

    @nn.compact
    def __call__(self, x):  # [B, D] -> [B, K]
        return layers.Dense(self.classes, name="fc1")(x.astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Classify(base.Storing):
    """The method; fields are the sections of its config.

    Parameters: "backbone", "head" (with "block_<n>" of head.blocks), and "aux_rgb",
    "aux_spectral" (objective.consistency). Extra: "stats" (head.batchnorm), "ema".
    """

    run: base.Run
    model: vit.ViT | hvit.HViT
    augment: views.Augment
    head: heads.Head = heads.Head()
    mix: mixing.Mix = mixing.Mix()
    objective: classification.Objective = classification.Objective()
    scoring: Scoring = Scoring()
    resolution: resolutions.Resolution = resolutions.Resolution()
    rectangles, labelled, scored, grows = True, True, True, True

    @staticmethod
    def training_size(c) -> sizes.Size:
        """Return the size of training images of a config."""
        return c.augment.size

    @property
    def several(self) -> bool:
        """Whether images have several labels, or none."""
        return self.objective.loss == "binary"

    @property
    def _sides(self) -> resolutions.Sides:
        return self.resolution.sides(self.augment.size, self.model.square, self.run)

    def transform(self):
        """Return the training transform."""
        whole = self.augment.training(self.run.mean)
        return resolutions.sized(whole, self._sides)

    def evaluation_transform(self, size: sizes.Size):
        """Return the transform of evaluation images."""
        return self.augment.evaluation(size)

    def phase(self, step: int) -> sizes.Size:
        """Return the size of a step's images; each is compiled once."""
        return self._sides(step)

    def init(self, rng, batch):
        """Return (params, extra) of a fresh network."""
        keys = jax.random.split(rng)
        image = jnp.zeros((1, *batch["image"].shape[1:]))
        backbone = self.model.init(keys[0], image)["params"]
        aux, early, feature = jax.eval_shape(
            lambda: self._pooled({"backbone": backbone}, image)
        )
        early = {n: x.shape[-1] for n, x in early.items()}
        width, classes = feature.shape[-1], self.run.classes
        head, stats = self.head.init(keys[1], width, classes, early)
        params = {"backbone": backbone, "head": head}
        for i, (name, x) in enumerate(sorted(aux.items())):
            key = jax.random.fold_in(keys[1], 1 + i)
            x = jnp.zeros(x.shape)
            params[f"aux_{name}"] = self._stream_head.init(key, x)["params"]
        extra = {"stats": stats} if stats else {}
        if self.objective.ema:
            extra["ema"] = tree.copy(params)
        return params, extra

    @property
    def _stream_head(self):
        return StreamHead(self.run.classes)

    def _pooled(self, params, image, *, train=False, rng=None):
        """Return ({stream: [B, D]}, {block: [B, D]}, [B, D]) of normalised images.

        Streams by themselves are looked at for objective.consistency alone, blocks
        before the last for head.blocks.
        """
        rngs = {}
        if train:
            keys = jax.random.split(rng)
            rngs = dict(zip(("drop_path", "dropout"), keys, strict=True))
        net, how = {"params": params["backbone"]}, self.head.feature
        options = dict(train=train, rngs=rngs)
        if not self.objective.consistency and not self.head.early:
            found = self.model.apply(net, image, how, method="pooled", **options)
            return {}, {}, found
        streams, early, found = self.model.apply(
            net, image, how, self.head.early, method="apart", **options
        )
        return streams if self.objective.consistency else {}, early, found

    def logits(self, params, extra, image):
        """Return logits [B, K] of [B, H, W, C] uint8 or normalised images."""
        x = patches.normalise(image, self.run.mean, self.run.std)
        _, early, x = self._pooled(params, x)
        each, _ = self.head.each(params["head"], extra.get("stats", {}), x, early)
        return self.head.predicted(each)

    def loss(self, params, extra, batch, rng, *, step=0, phase):
        """Return (loss [], (extra, metrics)) of one (micro-)batch."""
        del step
        keys = jax.random.split(rng, 4)
        label, lam = batch["labels" if self.several else "label"], 1.0
        # Of a frozen backbone no layer is dropped: it is a fixed function.
        train = not _backbone_frozen(params, phase)
        if phase is not None and phase.boundary:
            x = self._pooled_from(params, batch, phase, train, keys[2])
            streams, early = {}, {}
        else:
            image = self._augmented(batch, keys[0])
            if self.mix.on:
                image, lam = self.mix(keys[1], image)
            streams, early, x = self._pooled(params, image, train=train, rng=keys[2])
        given = params["head"], extra.get("stats", {}), x, early
        each, stats = self.head.each(*given, train=True, rng=keys[3])
        losses, named = zip(
            *(self._objective(y, label, lam) for y in each), strict=True
        )
        value = self.head.mean(losses)
        found = self.head.predicted(each).argmax(-1)
        if self.several:  # Whether an image shows what it most looks like.
            right = jnp.take_along_axis(label, found[:, None], 1)[:, 0] > 0
            metrics = {"train_hit": right.mean()}
        else:
            metrics = {"train_top1": (found == named[0]).mean()}
        for n, one in zip(self.head.blocks, losses, strict=False):
            metrics[f"loss_block_{n}"] = one
        if streams:
            alone = [
                self._stream_head.apply({"params": params[f"aux_{name}"]}, x)
                for name, x in streams.items()
            ]
            apart = classification.consistency(each[-1], alone)
            value = value + self.objective.consistency * apart
            metrics["consistency"] = apart
        if stats:
            extra = extra | {"stats": stats}
        return value, (extra, metrics)

    def _augmented(self, batch, key):  # -> [B, H, W, C]
        """Return normalised images, erased by `key` or by those of their views."""
        image = patches.normalise(batch["image"], self.run.mean, self.run.std)
        if not self.augment.erase:
            return image
        erase = functools.partial(mixing.erase, prob=self.augment.erase)
        if "view_seed" not in batch:
            return erase(key, image)
        return jax.vmap(lambda k, x: erase(k, x[None])[0])(batch["view_seed"], image)

    def _pooled_from(self, params, batch, phase, train, rng):  # -> [B, D]
        """Return the feature of images whose first blocks are frozen, or kept."""
        first, net = phase.boundary, {"params": params["backbone"]}
        x = batch.get("tokens")
        if x is None:
            x = self.frozen_tokens(params, batch, phase, 0, first)
        given = x, first, self.head.feature, train, phase.method
        keys = dict(zip(("drop_path", "dropout"), jax.random.split(rng), strict=True))
        return self.model.apply(net, *given, method="pooled_from", rngs=keys)

    def frozen_tokens(self, params, batch, phase, first, last):
        """Return all tokens [B, P + N, D] after `last` blocks."""
        x = batch["tokens"] if first else self._augmented(batch, None)
        net, own = {"params": params["backbone"]}, dict(size=phase.method)
        return self.model.apply(net, x, first, last, method="between", **own)

    def boundary(self, live, phase) -> int:
        """Return how many blocks train no more, nor what is before them."""
        del phase
        return self.model.frozen_blocks(live, "backbone/")

    def store_faults(self) -> Iterator[str]:
        """Yield why tokens cannot be kept."""
        key = "freeze.store.views"
        yield from self.model_store_faults()
        if self.mix.on:
            yield f"{key}: mixes no images; set it to 0, or mix.prob=0.0"
        if self.head.early:
            yield f"{key}: head.blocks reads early blocks; set it to 0"
        if not self.resolution.fixed:
            yield f"{key}: views have one size; set it to 0, or resolution to one"

    def _objective(self, logits, label, lam):
        """Return (loss [], the labels [B] that the images show most of).

        Of several labels those [B, K] before images were mixed.
        """
        weight = self.objective.weights(self.run.counts)

        def one(label):
            return self.objective(logits, label, weight)

        if not self.mix.on:
            return one(label), label
        shown = label
        if not self.several:
            shown = mixing.targets(label, self.run.classes, lam, 0.0).argmax(-1)
        return classification.mixed(one, label, label[::-1], lam), shown

    def freeze_layers(self) -> tuple:
        """Return `FreezeOut.layers`: the backbone's; no head ever freezes."""
        return self.model.freeze_layers("backbone/")

    def after(self, params, extra, step):
        """Return `extra` after update `step`: the average follows the parameters."""
        if "ema" not in extra:
            return extra
        decay = self.objective.decay(step)
        return extra | {"ema": tree.ema(extra["ema"], params, decay)}

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
        """Return fields of `pictures.drawing.Material`."""
        del batch  # The average is shown where there is one: it names the classes.
        return self.attention(extra.get("ema", params)["backbone"], image)

    def class_logits(self, params, extra, image) -> dict:
        """Return {name: logits [B, K]} of the best of `outputs`.

        By the average where there is one, over the views of `scoring.tta`.
        """
        own, views = extra.get("ema", params), self.scoring.tta != "none"
        names = ["ema"] * ("ema" in extra) + ["tta"] * views

        def logits(image):
            return self.logits(own, extra, image)

        if views:
            found = self.scoring.averaged(logits, image, self.several)
        else:
            found = logits(image)
        return {"_".join(names) or "parameters": found}

    def outputs(self, params, extra, batch) -> dict:
        """Return "logits", "ema_logits" of the average, "tta_..." of either, [B, K]."""
        found = {}
        weights = {"": params} | ({"ema_": extra["ema"]} if "ema" in extra else {})
        for prefix, own in weights.items():

            def logits(image, own=own):
                return self.logits(own, extra, image)

            found[f"{prefix}logits"] = logits(batch["image"])
            if self.scoring.tta != "none":
                given = logits, batch["image"], self.several
                mean = self.scoring.averaged(*given)
                found[f"{prefix}tta_logits"] = mean
        return found

    def scores(self, rows) -> dict:
        """Return accuracies, cross-entropy and F1 of all that `outputs` returns.

        Names begin with "", "ema_", "tta_" or "ema_tta_". Arrays, for the report:
        "confusion" [K, K], "precision", "recall", "f1", "support" [K], and
        "reliability" [3, bins] with scoring.calibration. Of several labels: those of
        `ranking.measure`, with the arrays "ap", "support" [K].
        """
        found = {}
        if self.several:
            for name in (n for n in rows if n.endswith("logits")):
                one = ranking.measure(rows[name], rows["labels"])
                found |= {
                    f"{name.removesuffix('logits')}{k}": v for k, v in one.items()
                }
            return found
        known = rows["label"] >= 0
        if not known.any():
            return found
        label = rows["label"][known]
        for name in rows:
            if not name.endswith("logits"):
                continue
            logits, prefix = rows[name][known], name.removesuffix("logits")
            one = accuracy.measure(logits, label)
            means = measures.summary(one["confusion"])
            del means["accuracy"]  # Which is "top1".
            # First what is looked at first: an online line shows the first four.
            one = {"f1_macro": means["f1_macro"]} | one | means
            one |= measures.per_class(one["confusion"])
            if self.scoring.calibration:
                one |= measures.calibration(logits, label)
                one["reliability"] = np.stack(measures.reliability(logits, label))
            found |= {f"{prefix}{key}": value for key, value in one.items()}
        counts = np.bincount(label)
        found |= {"images": len(label), "largest_class": counts.max() / len(label)}
        return found

    def written(self, scores) -> str:
        """Return scores as a table: weights and views in rows, 95 % in brackets."""
        count = scores.get("images")
        columns = ["f1_macro", "f1_weighted", "top1", "loss", "ece", "ece_scaled"]
        columns = ["map", "f1_macro", "f1_micro", "loss"] if self.several else columns
        columns = [c for c in columns if any(k.endswith(c) for k in scores)]
        lines = ["| scored | " + " | ".join(columns) + " |"]
        lines.append("|" + " --- |" * (1 + len(columns)))
        for prefix in ("", "tta_", "ema_", "ema_tta_"):
            if f"{prefix}{'map' if self.several else 'top1'}" in scores:
                cells = {c: scores.get(f"{prefix}{c}", math.nan) for c in columns}
                cells = {c: f"{value:.4f}" for c, value in cells.items()}
                if not self.several:
                    cells["top1"] = accuracy.written(scores[f"{prefix}top1"], count)
                name = prefix.rstrip("_") or "parameters"
                lines.append(f"| {name} | {' | '.join(cells.values())} |")
        if len(lines) < 3:
            return ""
        if self.several:
            return "\n".join(lines)
        of = f" of {count:.0f} images" if count else ""
        return "\n".join([*lines, f"top1{of}; in brackets: 95 %, Wilson's interval"])

    def check_size(self, size: sizes.Size) -> Iterator[str]:
        """Yield why evaluation images cannot have this size."""
        yield from super().check_size(size)
        if self.scoring.tta == "six" and len(set(sizes.pair(size))) > 1:
            yield f"evals.image_size={size}: scoring.tta=six turns squares; use flip"

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
        yield from self._block_faults()
        if self.objective.consistency and not isinstance(self.model, hvit.HViT):
            yield (
                f"objective.consistency={self.objective.consistency}: compares the "
                "streams of model.name=hvit; set 0.0"
            )
        yield from self._several_faults()
        yield from self.resolution.faults(size, self.model.square)
        for fault in self.objective.faults(self.run.classes):
            yield f"objective.{fault}"
        if self.augment.severity and self.run.channels < 3:
            yield f"augment.severity: needs 3 channels, not {self.run.channels}"
        if self.augment.randaugment and self.run.channels not in (1, 3):
            yield f"augment.randaugment: needs 1 or 3 channels, not {self.run.channels}"

    def _several_faults(self) -> Iterator[str]:
        """Yield what is of one label an image, where there may be several."""
        averaged = self.head.early and self.head.predict == "average"
        found = {
            f"objective.consistency={self.objective.consistency}": (
                self.objective.consistency
            ),
            "head.predict=average": averaged,
            "scoring.calibration=True": self.scoring.calibration,
        }
        for key in (key for key, on in found.items() if on and self.several):
            yield f"{key}: is of one label an image; objective.loss=binary of several"

    def _block_faults(self) -> Iterator[str]:
        """Yield why there cannot be a head after each of head.blocks."""
        blocks, exits = self.head.blocks, getattr(self.model, "exits", ())
        rising = tuple(sorted(set(blocks))) == blocks
        if blocks and not (
            rising and blocks[-1:] == exits[-1:] and {*blocks} <= {*exits}
        ):
            known = ", ".join(map(str, exits)) or "none"
            yield (
                f"head.blocks={blocks}: rising numbers of blocks, of those after which "
                f"this model has features ({known}), up to the last; or ()"
            )


def _backbone_frozen(params, phase) -> bool:
    """Return whether no parameter of the backbone trains in this phase."""
    names = (f"backbone/{name}" for name in tree.flat(params["backbone"]))
    return phase is not None and all(name in phase.frozen for name in names)
