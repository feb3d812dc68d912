"""Part discovery, and classification from the parts alone: iFAM and its relatives.

A first network assigns every patch to one of K parts or the background, trained from
image labels and losses on the maps; a second network, with weights of its own, sees
the foreground patches only and gives the class. A copy of each batch under one random
affine warp asks the parts to move with the image.

Sources: Aniraj et al. 2025, arXiv:2506.08915 (two stages); Aniraj et al. 2024,
arXiv:2407.04538 (PDiscoFormer); code ananthu-aniraj/ifam@bc8eeae.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from vitssl import errors, ranges, tree
from vitssl.methods import base
from vitssl.methods.parts import affine as warps
from vitssl.methods.parts import kinds, maps, networks, pictures, scores, views
from vitssl.methods.parts import measures as measuring
from vitssl.methods.parts import objective as losses
from vitssl.models import convnext, patches, resnet, vit
from vitssl.optim import schedules


@dataclasses.dataclass(frozen=True)
class Average:
    """Config section `average`: an EMA of the weights, which is then evaluated.

    Attributes:
        decay: 0 = off; 0.9999 is timm's default.
        warmup: let the decay grow from 0, see `schedules.averaging`.
    """

    decay: ranges.BelowOne = 0.0
    warmup: bool = True


@dataclasses.dataclass(frozen=True)
class PartDiscovery(base.Method):
    """The method; fields are the sections of its config.

    Parameters: "stage_1" and "stage_2", see `networks`. Extra: "stats" (batch
    statistics of convolutional networks), "average" (EMA of the parameters).
    """

    run: base.Run
    model: vit.ViT | resnet.ResNet | convnext.ConvNeXt
    parts: kinds.Parts
    augment: views.Augment
    objective: losses.Objective = losses.Objective()
    affine: warps.Affine = warps.Affine()
    average: Average = Average()
    measures: measuring.Measures = measuring.Measures()
    unstored = "the second network sees what the first, which trains, makes of it"
    labelled = True
    scored = True

    @staticmethod
    def training_size(c) -> int:
        """Return the side of training images of a config."""
        return c.augment.size

    # Networks.

    def network(self, *, train: bool):
        """Return the network; in training the second stage has one room."""
        rooms = (1.0,) if train else self.parts.rooms
        return self.parts.network(self.model, self.run.classes, rooms=rooms)

    def _apply(self, params, extra, *args, train, rng=None, **options):
        """Return (what the network returns, new batch statistics)."""
        variables = {"params": params}
        if "stats" in extra:
            variables["batch_stats"] = extra["stats"]
        options |= {"train": train, "rngs": {} if rng is None else {"drop_path": rng}}
        net = self.network(train=train)
        if not train or "stats" not in extra:
            return net.apply(variables, *args, **options), extra.get("stats", {})
        out, moved = net.apply(variables, *args, mutable=["batch_stats"], **options)
        return out, moved["batch_stats"]

    def grid(self, image):
        """Return the grid (h, w) of the maps of an image [..., H, W, C]."""
        if isinstance(self.model, vit.ViT):
            return patches.grid(image, self.model.patch)
        stride = min(16, self.model.output_stride)
        height, width = image.shape[-3:-1]
        return -(-height // stride), -(-width // stride)

    def draws(self, rng, image, *, train) -> maps.Draws:
        """Return the random numbers of one pass over images [B, H, W, C]."""
        size = len(image), *self.grid(image)
        return self.parts.draws(rng, size, train=train)

    def _given(self, batch) -> tuple:
        """Return the data set's own masks on the grid [B, h, w], where needed."""
        if not self.parts.masked:
            return ()
        return (measuring.nearest(batch["mask"], self.grid(batch["image"])),)

    def _pixels(self, image):
        return patches.normalise(image, self.run.mean, self.run.std)

    # Training.

    @property
    def couples_batch(self) -> bool:
        """Whether the loss mixes samples, so that a batch may not be split."""
        if not isinstance(self.model, vit.ViT):
            return True
        o = self.objective
        if not self.parts.finds_parts:
            return self.parts.pooling == "aim"  # It normalises over the batch.
        return o.presence > 0 and o.presence_group == 0

    def transform(self) -> views.Training:
        """Return the training transform."""
        return views.Training(self.augment, self.parts.masked)

    def init(self, rng, batch):
        """Return (params, extra) of fresh networks."""
        image = jnp.zeros((1, *batch["image"].shape[1:]))
        mask = (jnp.ones((1, *self.grid(image))),) if self.parts.masked else ()
        found = self.network(train=True).init(rng, image, *mask)
        params, extra = found["params"], {}
        if "batch_stats" in found:
            extra["stats"] = found["batch_stats"]
        return params, self.adopt(params, extra)

    def loss(self, params, extra, batch, rng, *, step=0, phase=()):
        """Return (loss [], (extra, metrics)); see the module."""
        del step, phase
        image, labels = self._pixels(batch["image"]), batch["label"]
        keys = jax.random.split(rng, 5)
        if self.parts.finds_parts:
            warp = self.affine.draw(keys[0], image.shape[1])
            draws = [self.draws(key, image, train=True) for key in keys[1:3]]
            terms, out, stats = self.terms(
                params, extra, image, labels, warp, draws, keys[3:]
            )
        else:
            args = (image, *self._given(batch))
            out, stats = self._apply(params, extra, *args, train=True, rng=keys[0])
            terms = self.objective.of_classes(labels, second=out.logits)
        extra = extra | {"stats": stats} if stats else extra
        return sum(terms.values()), (extra, terms | self._watch(out, labels))

    def terms(self, params, extra, image, labels, warp, draws, rngs=(None, None)):
        """Return the weighted losses of one batch, given everything random.

        Args:
            image: [B, S, S, C], normalised.
            labels: [B].
            warp: `affine.Warp` of the second pass.
            draws: `maps.Draws` of both passes.
            rngs: keys of the drop paths of both.

        Returns:
            ({name: float32 []}, `networks.Outputs`, batch statistics).
        """
        o, p = self.objective, self.parts
        out, stats = self._apply(
            params, extra, image, draws[0], train=True, rng=rngs[0]
        )
        second = out.logits if p.kind == "two_stage" else None
        found = out.found
        terms = o.of_classes(labels, second=second, first=found.class_logits)
        own = p.modulated_orthogonality
        terms |= o.of_maps(found, found.modulated if own else found.features)
        if o.equivariance:
            warped = warps.bilinear(image, warp)
            options = dict(train=True, rng=rngs[1], method=networks.discover)
            moved, _ = self._apply(params, extra, warped, draws[1], **options)
            terms |= o.of_warp(found.maps, moved.maps, warp, image.shape[1])
        return terms, out, stats

    def _watch(self, out, labels) -> dict:
        """Return scalars to watch; none of them has a gradient."""
        found = {"acc": (out.logits.argmax(-1) == labels).mean()}
        if out.found is not None:
            first = out.found.class_logits.argmax(-1)
            found["acc_stage_1"] = (first == labels).mean()
            found["foreground"] = out.found.hard[..., 0].mean()
            found["largest_part"] = out.found.maps[..., :-1].mean((0, 1, 2)).max()
        return jax.lax.stop_gradient(found)

    def after(self, params, extra, step):
        """Return `extra` after update `step`: the average follows."""
        decay = self.average.decay
        if not decay:
            return extra
        if self.average.warmup:
            decay = schedules.averaging(step + 1, decay=decay)
        return extra | {"average": tree.ema(extra["average"], params, decay)}

    def adopt(self, params, extra):
        """Return `extra` whose average starts as a copy of the parameters."""
        if not self.average.decay:
            return extra
        return extra | {"average": tree.copy(params)}

    def freeze_layers(self) -> tuple:
        """Return `FreezeOut.layers`: of the backbone of either stage, in step.

        What follows a backbone goes with its last layer, which never freezes.
        """
        stages = {"two_stage": (1, 2), "single_stage": (1,)}.get(self.parts.kind, (2,))
        each = (self.model.freeze_layers(f"stage_{s}/backbone/") for s in stages)
        layers = sum(each, ())
        last = max(index for _, index in layers)
        return (*layers, ("stage_[12]/(head|fc_norm|pool)/.*", last))

    # Evaluation, with the average where there is one.

    def evaluation_transform(self, size) -> views.Evaluation:
        """Return the transform of test images, with what the scores need."""
        return views.Evaluation(self.augment, size)

    def _evaluate(self, params, extra, image, *args, **options):
        weights = extra.get("average", params)
        x = self._pixels(image)
        return self._apply(weights, extra, x, *args, train=False, **options)[0]

    def features(self, params, extra, image):
        """Return the features of images [B, H, W, C].

        Returns:
            "tokens" [B, N, D] patch tokens of the network that finds parts (of the
            only one, where there is none), "pooled" [B, D]: the class embedding of the
            second stage; the mean token in a single-stage model; "maps" [B, h, w, K+1]
            where parts are found, the background last.
        """
        tokens, pooled, found = self._evaluate(params, extra, image, method="embed")
        tokens = tokens.reshape(len(tokens), -1, tokens.shape[-1])
        each = {"tokens": tokens, "pooled": pooled}
        return each if found is None else each | {"maps": found}

    def predict(self, params, extra, image, *, rng=None, **options) -> networks.Outputs:
        """Return what is found in images [B, H, W, C], and their classes.

        Args:
            image: uint8, or float and normalised.
            rng: of the noise, with `parts.eval_noise`.
            **options: override those of the section: removed, thresholds.
        """
        p, draws = self.parts, maps.QUIET
        if p.eval_noise:
            key = jax.random.key(0) if rng is None else rng
            draws = self.draws(key, image, train=False)
        given = {"on_distance": p.threshold_on_distance}
        thresholds = options.get("thresholds", p.thresholds)
        if len(thresholds):
            given["thresholds"] = jnp.asarray(thresholds)
        if p.kind == "two_stage":
            given |= dict(removed=options.get("removed", p.removed), removal=p.removal)
        return self._evaluate(params, extra, image, draws, **given)

    def _outputs(self, params, extra, batch, key="image") -> networks.Outputs:
        """Return what is said of the images under a key of a test batch."""
        if self.parts.finds_parts:
            return self.predict(params, extra, batch[key])
        return self._evaluate(params, extra, batch[key], *self._given(batch))

    def class_logits(self, params, extra, image) -> dict:
        """Return {"average" or "parameters": logits [B, K]} of images [B, H, W, C]."""
        if self.parts.masked:
            raise errors.UsageError(
                f"parts.kind={self.parts.kind}, parts.pooling={self.parts.pooling}: "
                "classifies by the masks of a data set, which plain images lack"
            )
        name = "average" if "average" in extra else "parameters"
        return {name: self._outputs(params, extra, {"image": image}).logits}

    def outputs(self, params, extra, batch) -> dict:
        """Return what the scores of a test batch need, one row per image."""
        rows = self._rows(self._outputs(params, extra, batch), batch)
        for key in ("swap_same", "swap_random"):
            if key in batch:
                swapped = self._outputs(params, extra, batch, key)
                rows[f"logits_{key}"] = swapped.logits
        if self.measures.leave_one_out and self.parts.kind == "two_stage":
            gone = self.parts.removed
            each = [
                self.predict(params, extra, batch["image"], removed=(*gone, k)).logits
                for k in range(self.parts.count)
                if k not in gone
            ]
            rows["logits_without"] = jnp.stack(each, axis=1)  # [B, parts left, C]
        return rows

    @staticmethod
    def _rows(out, batch) -> dict:
        """Return the rows of what was found in a test batch."""
        rows = {key: batch[key] for key in ("group",) if key in batch}
        rows["logits"] = out.logits
        if out.found is not None:
            rows["logits_stage_1"] = out.found.class_logits
            rows |= measuring.of_maps(out.found.maps, batch)
        return rows

    def scores(self, rows) -> dict:
        """Return the numbers of a test split, see `scores.scores`."""
        return scores.scores(rows, self.parts.removed)

    def final_scores(self, rows) -> dict:
        """Return the scores of thresholds and of ImageNet-9, where asked for."""
        return measuring.final(self, rows)

    def confidence(self, params, extra, batch) -> dict:
        """Return {"owner", "value"} [B, h, w]: `scores.thresholds` of them."""
        found = self.predict(params, extra, batch["image"], thresholds=()).found
        owner = found.maps.argmax(-1)
        value = jnp.take_along_axis(found.dot, owner[..., None], axis=-1)[..., 0]
        return {"owner": owner, "value": value}

    def thresholded(self, params, extra, thresholds, batch) -> dict:
        """Return rows like `outputs`, without patches below the thresholds [K]."""
        out = self.predict(params, extra, batch["image"], thresholds=thresholds)
        return self._rows(out, batch)

    def guesses(self, params, extra, batch) -> dict:
        """Return {"guess": [B]}, the predicted class."""
        return {"guess": self._outputs(params, extra, batch).logits.argmax(-1)}

    def drawn(self, step: int) -> float:
        """Return the probability that a test batch is drawn after `step` updates."""
        return pictures.probability(self.measures, self.run, step)

    def snapshot(self, params, extra, batch, path):
        """Draw a test batch with its parts into a file."""
        pictures.snapshot(self, params, extra, batch, path)

    def pictures(self, params, extra, batch, image):
        """Return fields of `pictures.drawing.Material`."""
        del batch
        return pictures.arrays(self, params, extra, image)

    def check(self) -> Iterator[str]:
        """Yield one line per impossible combination of the sections."""
        is_vit, p, size = isinstance(self.model, vit.ViT), self.parts, self.augment.size
        for fault in self.model.check_image(size):
            yield f"augment.size={size}: {fault}"
        if not is_vit and p.kind != "single_stage":
            yield f"parts.kind={p.kind}: convolutional models are single_stage only"
        if is_vit and not self.model.cls and p.kind != "single_stage":
            yield f"model.cls=False: parts.kind={p.kind} classifies from that token"
        if p.kind == "baseline" and is_vit:
            many = networks.SLICES.get(p.pooling, 1)
            if self.model.width % many:
                yield f"parts.pooling={p.pooling}: {many} must divide model.width"
        for key in ("thresholds", "maps"):
            if getattr(self.measures, key) and not p.finds_parts:
                yield f"measures.{key}: parts.kind={p.kind} finds no parts"
        if self.measures.backgrounds and p.masked:
            yield f"measures.backgrounds: has no masks for parts.kind={p.kind}"
        yield from self._check_group()

    def _check_group(self) -> Iterator[str]:
        group, run = self.objective.presence_group, self.run
        if not (self.parts.finds_parts and self.objective.presence and group):
            return
        # A group beyond the batch is the batch; in parts that would be another loss.
        least = 1 if run.accumulate > 1 else group
        if run.micro_batch % group and run.micro_batch >= least:
            yield (
                f"objective.presence_group={group}: does not divide a micro-batch "
                f"of {run.micro_batch} (batch_size={run.batch_size}, accumulate="
                f"{run.accumulate}); {math.gcd(group, run.micro_batch)} does"
            )
