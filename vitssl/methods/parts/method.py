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

import einops
import jax
import jax.numpy as jnp

from vitssl import tree
from vitssl.methods import base
from vitssl.methods.parts import affine as warps
from vitssl.methods.parts import baselines, kinds, maps, sections, studies, views
from vitssl.methods.parts import measures as partmeasures
from vitssl.methods.parts import pictures as parts_pictures
from vitssl.methods.parts import scores as partscores
from vitssl.models import convnext, patches, resnet, vit
from vitssl.optim import schedules


@dataclasses.dataclass(frozen=True)
class Parts(base.Method):
    """The method; fields are the sections of its config.

    Parameters: "stage_1" and "stage_2", see `parts_networks`. Extra: "stats" (batch
    statistics of convolutional networks), "average" (EMA of the parameters).
    """

    run: base.Run
    model: vit.ViT | resnet.ResNet | convnext.ConvNeXt
    parts: sections.Parts
    augment: views.Augment
    objective: sections.Objective = sections.Objective()
    affine: warps.Range = warps.Range()
    average: sections.Average = sections.Average()
    measures: partscores.Measures = partscores.Measures()
    labelled = True

    @staticmethod
    def training_size(c) -> int:
        """Return the side of training images of a config."""
        return c.augment.size

    # Networks.

    def network(self, *, train: bool):
        """Return the network; in training the second stage has one room."""
        rooms = None if train else self.parts.rooms
        return kinds.build(self.model, self.parts, self.run.classes, rooms=rooms)

    def _apply(self, params, extra, *args, train, rng=None, **options):
        """Return (what the network returns, new batch statistics)."""
        variables = {"params": params}
        rngs = {} if rng is None else {"drop_path": rng}
        net = self.network(train=train)
        options |= {} if options.get("method") == "embed" else {"train": train}
        if "stats" not in extra:
            return net.apply(variables, *args, rngs=rngs, **options), {}
        variables["batch_stats"] = extra["stats"]
        if not train:
            return net.apply(variables, *args, rngs=rngs, **options), extra["stats"]
        out, moved = net.apply(
            variables, *args, rngs=rngs, mutable=["batch_stats"], **options
        )
        return out, moved["batch_stats"]

    def _weights(self, params, extra):
        """Return the parameters to evaluate."""
        return extra.get("average", params)

    def grid(self, image):
        """Return the grid (h, w) of the maps of an image [..., H, W, C]."""
        if isinstance(self.model, vit.ViT):
            return patches.grid(image, self.model.patch)
        stride = min(16, self.model.output_stride)
        height, width = image.shape[-3:-1]
        return -(-height // stride), -(-width // stride)

    def draws(self, rng, image, *, train) -> maps.Draws:
        """Return the random numbers of one pass over images [B, H, W, C]."""
        p = self.parts
        return maps.draw(
            rng,
            (len(image), *self.grid(image)),
            p.count,
            gumbel=p.gumbel,
            mask_dropout=p.mask_dropout,
            part_dropout=p.dropout,
            train=train,
            noise=train or p.eval_noise,
        )

    # The contract.

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
        return views.Training(self.augment, self._masked)

    def evaluation_transform(self, size) -> views.Evaluation:
        """Return the transform of test images, with what the scores need."""
        return views.Evaluation(self.augment, size)

    def init(self, rng, batch):
        """Return (params, extra) of fresh networks."""
        image = jnp.zeros((1, *batch["image"].shape[1:]))
        args = (image, jnp.ones((1, *self.grid(image)))) if self._masked else (image,)
        found = self.network(train=True).init(rng, *args)
        params, extra = found["params"], {}
        if "batch_stats" in found:
            extra["stats"] = found["batch_stats"]
        if self.average.decay:
            extra["average"] = tree.copy(params)
        return params, extra

    @property
    def _masked(self) -> bool:
        """Whether the masks of the data set are an input."""
        p = self.parts
        late = p.kind == "baseline" and p.pooling == "late_mask"
        return p.kind == "given_mask" or late

    def loss(self, params, extra, batch, rng, *, step=0, phase=()):
        """Return (loss [], (extra, metrics)); see the module."""
        del step, phase
        image = self._pixels(batch["image"])
        labels = batch["label"]
        keys = jax.random.split(rng, 5)
        if not self.parts.finds_parts:
            return self._plain_loss(params, extra, batch, keys[0])
        warp = self.affine.draw(keys[0], image.shape[1])
        near, far = (self.draws(key, image, train=True) for key in keys[1:3])
        terms, out, stats = self.terms(
            params, extra, image, labels, warp, (near, far), keys[3:]
        )
        metrics = terms | self._watch(out, labels)
        return sum(terms.values()), (self._with(extra, stats), metrics)

    def terms(self, params, extra, image, labels, warp, draws, rngs=(None, None)):
        """Return the weighted losses of one batch, given everything random.

        Args:
            params, extra: of the method.
            image: [B, S, S, C], normalised.
            labels: [B].
            warp: `affine.Warp` of the second pass.
            draws: `partmaps.Draws` of both passes.
            rngs: keys of the drop paths of both.

        Returns:
            ({name: float32 []}, `methods.parts.networks.Outputs`, batch statistics).
        """
        o = self.objective
        out, stats = self._apply(
            params, extra, image, draws[0], train=True, rng=rngs[0]
        )
        two = self.parts.kind == "two_stage"
        terms = o.of_classes(
            labels,
            second=out.logits if two else None,
            first=out.found.class_logits,
        )
        own = self.parts.modulated_orthogonality
        terms |= o.of_maps(
            out.found, out.found.modulated if own else out.found.features
        )
        if o.equivariance:
            moved, _ = self._apply(
                params,
                extra,
                warps.bilinear(image, warp),
                draws[1],
                train=True,
                rng=rngs[1],
                method="discover",
            )
            terms |= o.of_warp(out.found.maps, moved.maps, warp, image.shape[1])
        return terms, out, stats

    def _plain_loss(self, params, extra, batch, rng):
        """Return the loss of a classifier that finds no parts."""
        image, labels = self._pixels(batch["image"]), batch["label"]
        args = (self._given(batch),) if self._masked else ()
        out, stats = self._apply(params, extra, image, *args, train=True, rng=rng)
        terms = self.objective.of_classes(labels, second=out.logits)
        metrics = terms | self._watch(out, labels)
        return sum(terms.values()), (self._with(extra, stats), metrics)

    def _given(self, batch):
        """Return the data set's own masks on the grid of patches: [B, h, w]."""
        return partmeasures.nearest(batch["mask"], self.grid(batch["image"]))

    @staticmethod
    def _with(extra, stats):
        return extra | {"stats": stats} if stats else extra

    def _watch(self, out, labels) -> dict:
        """Return scalars to watch; none of them has a gradient."""
        found = {"acc": (out.logits.argmax(-1) == labels).mean()}
        if out.found is not None:
            first = out.found.class_logits.argmax(-1)
            found["acc_stage_1"] = (first == labels).mean()
            found["foreground"] = out.found.hard[..., 0].mean()
            found["largest_part"] = out.found.maps[..., :-1].mean((0, 1, 2)).max()
        return jax.lax.stop_gradient(found)

    def _pixels(self, image):
        return patches.normalise(image, self.run.mean, self.run.std)

    def after(self, params, extra, step):
        """Return `extra` after update `step`: the average follows."""
        if not self.average.decay:
            return extra
        decay = self.average.decay
        if self.average.warmup:
            decay = schedules.averaging(step + 1, decay=decay)
        return extra | {"average": tree.ema(extra["average"], params, decay)}

    def adopt(self, params, extra):
        """Return `extra` whose average starts as a copy of loaded parameters."""
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

    def features(self, params, extra, image):
        """Return the features of images [B, H, W, C].

        Returns:
            "tokens" [B, N, D] patch tokens of the network that finds parts (of the
            only one, where there is none), "pooled" [B, D]: the class embedding of the
            second stage; the mean token in a single-stage model.
        """
        x = self._pixels(image)
        net, weights = self.network(train=False), self._weights(params, extra)
        variables = {"params": weights}
        if "stats" in extra:
            variables["batch_stats"] = extra["stats"]
        if self.parts.kind == "two_stage":
            tokens, pooled = net.apply(variables, x, method="embed")
        elif self.parts.kind == "single_stage":
            tokens = net.apply(variables, x, method=lambda m, i: m.stage_1.tokens(i))
            pooled = tokens.astype(jnp.float32).mean((1, 2))
        else:
            tokens, _ = net.apply(
                variables, x, method=lambda m, i: m.stage_2.backbone(i)
            )
            pooled = tokens[:, 0].astype(jnp.float32)
            tokens = tokens[:, self.model.prefix :]
        if tokens.ndim == 4:
            tokens = einops.rearrange(tokens, "b h w d -> b (h w) d")
        return {"tokens": tokens, "pooled": pooled}

    # Evaluation.

    scored = True

    def predict(self, params, extra, image, *, rng=None, **options):
        """Return `methods.parts.networks.Outputs` of images in evaluation mode.

        Args:
            params, extra: of the method.
            image: [B, H, W, C] uint8, or float and normalised.
            rng: of the noise, with `parts.eval_noise`.
            **options: override those of the section: removed, thresholds.
        """
        p, x = self.parts, self._pixels(image)
        draws = None
        if p.eval_noise:
            key = jax.random.key(0) if rng is None else rng
            draws = self.draws(key, x, train=False)
        given = {"on_distance": p.threshold_on_distance, "thresholds": None}
        thresholds = options.get("thresholds", p.thresholds)
        if len(thresholds):
            given["thresholds"] = jnp.asarray(thresholds)
        if p.kind == "two_stage":
            given |= dict(removed=options.get("removed", p.removed), removal=p.removal)
        weights = self._weights(params, extra)
        out, _ = self._apply(weights, extra, x, draws, train=False, **given)
        return out

    def outputs(self, params, extra, batch) -> dict:
        """Return what the scores of a test batch need, one row per image."""
        if not self.parts.finds_parts:
            weights = self._weights(params, extra)

            def classify(image):
                args = (self._given(batch),) if self._masked else ()
                x = self._pixels(image)
                return self._apply(weights, extra, x, *args, train=False)[0].logits

            return partmeasures.swaps(classify, batch) | partmeasures.passed(batch)
        out = self.predict(params, extra, batch["image"])
        rows = self._rows(out, batch)
        rows |= partmeasures.swaps(
            lambda image: self.predict(params, extra, image).logits, batch, rows
        )
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
        rows = {"logits": out.logits, "logits_stage_1": out.found.class_logits}
        rows |= partmeasures.of_maps(out.found.maps, batch)
        return rows | partmeasures.passed(batch)

    def scores(self, rows) -> dict:
        """Return the numbers of a test split, see `methods.parts.scores.scores`."""
        return partscores.scores(rows, self.parts.removed)

    def final_scores(self, rows) -> dict:
        """Return the scores of thresholds and of ImageNet-9, where asked for."""
        return studies.scores(self, rows)

    def confidence(self, params, extra, batch) -> dict:
        """Return {"owner", "value"} [B, h, w]: `partscores.least` of them."""
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
        if self.parts.finds_parts:
            logits = self.predict(params, extra, batch["image"]).logits
        else:
            args = (self._given(batch),) if self._masked else ()
            x, weights = self._pixels(batch["image"]), self._weights(params, extra)
            logits = self._apply(weights, extra, x, *args, train=False)[0].logits
        return {"guess": logits.argmax(-1)}

    def drawn(self, step: int) -> float:
        """Return the probability that a test batch is drawn after `step` updates."""
        return parts_pictures.probability(self.measures, self.run, step)

    def snapshot(self, params, extra, batch, path):
        """Draw a test batch with its parts into a file."""
        parts_pictures.snapshot(self, params, extra, batch, path)

    def pictures(self, params, extra, batch, image):
        """Return fields of `pictures.drawing.Material`."""
        return parts_pictures.arrays(self, params, extra, batch, image)

    def check(self) -> Iterator[str]:
        """Yield one line per impossible combination of the sections."""
        for name in (
            "model",
            "parts",
            "augment",
            "objective",
            "affine",
            "average",
            "measures",
        ):
            for line in getattr(self, name).check():
                yield f"{name}.{line}"
        yield from self._check_together()

    def _check_together(self) -> Iterator[str]:
        is_vit, p = isinstance(self.model, vit.ViT), self.parts
        size = self.augment.size
        for fault in self.model.check_image(size):
            yield f"augment.size={size}: {fault}"
        if not is_vit and p.kind != "single_stage":
            yield f"parts.kind={p.kind}: convolutional models are single_stage only"
        if is_vit and not self.model.cls and p.kind != "single_stage":
            yield f"model.cls=False: parts.kind={p.kind} classifies from that token"
        if p.kind == "baseline" and is_vit:
            pool = baselines.Baseline(self.model, 1, p.pooling)
            yield from (f"parts.{line}" for line in pool.check())
        for key in ("thresholds", "maps"):
            if getattr(self.measures, key) and not p.finds_parts:
                yield f"measures.{key}: parts.kind={p.kind} finds no parts"
        if self.measures.backgrounds and self._masked:
            yield f"measures.backgrounds: has no masks for parts.kind={p.kind}"
        group, run = self.objective.presence_group, self.run
        # A group beyond the batch is the batch; in parts that would be another loss.
        least = 1 if run.accumulate > 1 else group
        if p.finds_parts and self.objective.presence and group:
            if run.micro_batch % group and run.micro_batch >= least:
                yield (
                    f"objective.presence_group={group}: does not divide a micro-batch "
                    f"of {run.micro_batch} (batch_size={run.batch_size}, accumulate="
                    f"{run.accumulate}); {math.gcd(group, run.micro_batch)} does"
                )
