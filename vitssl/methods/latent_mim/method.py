"""Latent masked modelling of several sensors, with hybrid patch size.

An encoder reads some of the tokens of all sensors together, at patch p; a predictor
tells what a frozen random projection makes of other tokens, at patch q that divides p.
Two views of a sample, turned and masked each by itself, are also told apart from those
of other samples. Attention is paid for at p, features come out at q.

Sources: OlmoEarth, arXiv:2511.13655; allenai/olmoearth_pretrain@5411573 (its branch on
hybrid patch sizes, whose step cannot run; what it meant is done here).
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Iterator

import einops
import jax
import jax.numpy as jnp

from vitssl import errors, sizes, tree
from vitssl.data import modalities
from vitssl.data.modalities import Modality
from vitssl.methods import base
from vitssl.methods.latent_mim import masks, readout, shapes, target, tokens, views
from vitssl.methods.latent_mim.hybrid import Hybrid, HybridMIM
from vitssl.methods.latent_mim.network import Network
from vitssl.methods.latent_mim.objective import Objective, Pair
from vitssl.methods.latent_mim.readout import Measures, Readout
from vitssl.methods.latent_mim.target import Target
from vitssl.models import patches

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Config section `inputs`.

    Attributes:
        modalities: names, in the order of the sequence; ("rgb",) for pictures.
        groups: ((modality, ((band, ...), ...)), ...): other bandsets than the table's.
    """

    modalities: tuple[str, ...] = modalities.TRAINED
    groups: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = ()

    def kinds(self, names=None) -> tuple[Modality, ...]:
        """Return the modalities, or those of `names`, with their bandsets."""
        groups = dict(self.groups)
        chosen = self.modalities if names is None else names
        return tuple(modalities.find(name, groups) for name in chosen)

    def check(self) -> Iterator[str]:
        """Yield unknown modalities and bands, and what cannot be combined."""
        try:
            kinds = self.kinds()
            alien = set(dict(self.groups)) - set(self.modalities)
        except errors.UsageError as e:
            yield f"modalities, groups: {e}"
            return
        if alien:
            yield f"groups: {sorted(alien)} not among the modalities"
        if len(set(self.modalities)) < len(self.modalities):
            yield f"modalities={self.modalities}: each once"
        if not any(k.space for k in kinds):
            yield f"modalities={self.modalities}: at least one with rows and columns"
        if "rgb" in self.modalities and len(kinds) > 1:
            yield "modalities: 'rgb' is alone"


@dataclasses.dataclass(frozen=True)
class LatentMIM(base.Embedding):
    """The method; fields are the sections of its config.

    Parameters: see `hybrid.HybridMIM`. Extra: "target", the parameters of the target:
    a patch embedding, or a whole encoder with target.depth above 0.
    """

    run: base.Run
    inputs: Inputs = Inputs()
    network: Network = Network()
    hybrid: Hybrid = Hybrid()
    mask: masks.Strategy = masks.Strategy()
    sampling: shapes.Sampling = shapes.Sampling()
    augment: views.Augment = views.Augment()
    objective: Objective = Objective()
    target: Target = Target()
    readout: Readout = Readout()
    measures: Measures = Measures()
    unstored = (
        "a sample has patches of several sensors and sizes, drawn anew for every step"
    )

    # Modules and sizes.

    @staticmethod
    def training_size(c) -> int:
        """Return the largest side of training crops of a config."""
        drawn = c.hybrid.processing_patch_size or (c.sampling.max_patch,)
        return min(c.sampling.tile, c.sampling.max_side * max(drawn))

    @property
    def kinds(self) -> tuple[Modality, ...]:
        """Return the modalities of training."""
        return self.inputs.kinds()

    @property
    def read(self) -> tuple[Modality, ...]:
        """Return the modalities that evaluations read."""
        never = self.mask.decode_only
        names = [n for n in self.inputs.modalities if n not in never]
        return self.inputs.kinds(self.readout.modalities or names)

    def module(self, kinds, p: int, q: int) -> HybridMIM:
        """Return the network for these modalities and patches."""
        encoder, predictor = self.network.build(kinds, self.run.dtype)
        h = self.hybrid
        return HybridMIM(
            encoder,
            predictor,
            p,
            q,
            upsampler=h.upsampler,
            decoder=h.decoder,
            loss_tokens=h.loss_tokens_per_modality,
            sampled_keys=h.sampled_keys,
            visible_loss=h.visible_loss_weight > 0,
            pool_at=h.pool_at,
            max_output_tokens=h.max_output_tokens,
        )

    @property
    def couples_batch(self) -> bool:
        """Whether the loss mixes samples of the whole batch."""
        return self.objective.couples_batch

    # The contract.

    def transform(self) -> views.Training:
        """Return the training transform."""
        _announce(self._summary())
        return views.Training(
            self.kinds,
            self.sampling,
            self.mask,
            self.augment,
            self.hybrid.processing_patch_size,
            self.hybrid.output_patch_size,
            self.run.mean,
            self.run.std,
        )

    def evaluation_transform(self, size: int) -> views.Evaluation:
        """Return the transform of evaluation samples, `size` pixels a side."""
        return views.Evaluation(
            self.read, size, self.readout.times, self.run.mean, self.run.std
        )

    def phase(self, step: int) -> shapes.Shape:
        """Return the patches and the size of a step's crops: one compilation each."""
        h = self.hybrid
        patches = (h.processing_patch_size, h.output_patch_size)
        return shapes.draw(self.sampling, self.kinds, step, *patches)

    def init(self, rng, batch):
        """Return (params, extra) of fresh networks."""
        shape = self.phase(0)
        module = self.module(self.kinds, shape.p, shape.q)
        one = {k: jnp.zeros((1, *v.shape[1:]), v.dtype) for k, v in batch.items()}
        fields = self.fields(one)
        keys = jax.random.split(rng, 2)
        params = module.init({"params": keys[0], "tokens": keys[1]}, fields)["params"]
        extra = {"target": tree.copy(self._followed(params))}
        return params, extra

    def _followed(self, params):
        """Return the parameters that the target starts as."""
        encoder = params["encoder"]
        return encoder if self.target.depth else encoder["patch_embed"]

    def fields(self, batch) -> dict:
        """Return all views of a batch as one, [B V, ...], those of a sample together.

        It is what `network` takes; rows stay on their device.
        """
        cut, stamps = len("view/"), batch["timestamps"]
        fields = {
            k[cut:]: einops.rearrange(x, "b v ... -> (b v) ...")
            for k, x in batch.items()
            if k.startswith("view/")
        }
        every = einops.repeat(stamps, "b t c -> (b v) t c", v=self.augment.views)
        return fields | {"timestamps": every}

    def embed(self, params, extra, batch, rng, *, step=0, phase):
        """Return what the networks make of each sample.

        {"asked", "visible": {modality: Pair} of [B, V, Q, ...], "asked_bandset",
        "visible_bandset": {modality: [B, V, Q]}, "pooled": [B, V, D], "counts": {name:
        [B]}}. `rng` is of dropped paths and of the tokens in the loss.
        """
        del step
        shape, fields = phase.method, self.fields(batch)
        module = self.module(self.kinds, shape.p, shape.q)
        drop, draw = jax.random.split(rng)
        slots, bounds = masks.bounds(self.mask, self.kinds, shape)
        view = module.apply(
            {"params": params},
            fields,
            slots=slots,
            bounds=bounds,
            train=True,
            rngs={"drop_path": drop, "tokens": draw},
        )
        rows = {"pooled": view.pooled}
        for name in ("asked", "visible"):
            asked = getattr(view, name)
            goals = self._goals(module, extra, fields, asked)
            rows[name] = {
                k: Pair(a.prediction, goals[k], a.valid) for k, a in asked.items()
            }
            rows[f"{name}_bandset"] = {k: self._bandset(k, a) for k, a in asked.items()}
        size = len(batch["timestamps"])
        counts = {k: jnp.broadcast_to(v, size) for k, v in view.counts.items()}
        apart = dict(v=self.augment.views)
        return {"counts": counts} | jax.tree.map(
            lambda x: einops.rearrange(x, "(b v) ... -> b v ...", **apart), rows
        )

    def compare(self, params, extra, rows, rng, *, step=0, phase):
        """Return (loss [], (extra, metrics)); see the module."""
        del params, rng
        shape = phase.method
        total, each = self._of_tokens(rows, "asked")
        metrics = {f"tokens/{k}": v.mean() for k, v in rows["counts"].items()}
        metrics |= {f"loss_of/{k}": v for k, v in each.items()}
        parts = {"tokens": total}
        if rows["visible"]:
            seen, _ = self._of_tokens(rows, "visible")
            parts["visible"] = self.hybrid.visible_loss_weight * seen
        parts |= self.objective.of_views(list(rows["pooled"].swapaxes(0, 1)))
        metrics |= {f"loss_{k}": v for k, v in parts.items()}
        metrics |= {"patch/p": float(shape.p), "patch/q": float(shape.q)}
        if self.target.moves:
            metrics["ema"] = self.target.momentum(step, self.run.total_steps)
        return sum(parts.values()), (extra, metrics)

    def _bandset(self, name, asked):
        """Return of which bandset of a modality the tokens are: int32 [B, Q]."""
        count, place = asked.valid.shape[1], asked.index
        place = jnp.arange(count) if place is None else place
        # Bandsets are the last axis of places.
        return jnp.broadcast_to(place % self._bandsets[name], asked.valid.shape)

    @property
    def _bandsets(self) -> dict:
        """Return how many bandsets each modality has."""
        return {kind.name: len(kind.channels) for kind in self.kinds}

    def _of_tokens(self, rows, name):
        """Return (loss [], {modality: []}), means over the views, of [B, V, ...]."""
        each, pairs = [], rows[name]
        if self.target.centre:
            pairs = {
                k: p._replace(
                    target=target.centred(
                        p.target,
                        p.valid,
                        rows[f"{name}_bandset"][k],
                        self._bandsets[k],
                    )
                )
                for k, p in pairs.items()
            }
        for v in range(self.augment.views):
            view = jax.tree.map(lambda x, v=v: x[:, v], pairs)
            each.append(self.objective.of_tokens(view))
        return jax.tree.map(lambda *x: sum(x) / len(x), *each)

    def _goals(self, module, extra, fields, asked):
        """Return {modality: targets [B, Q, D]}, without gradient."""
        given = (extra["target"], fields, asked, module.target_patch)
        if self.target.depth:
            return target.encoded(module.encoder, *given, self.target.depth)
        return target.projected(target.projection(module.encoder), *given)

    def after(self, params, extra, step):
        """Return `extra` after update `step`: a moving target follows."""
        if not self.target.moves:
            return extra
        momentum = self.target.momentum(step + 1, self.run.total_steps)
        followed = self._followed(params)
        return {"target": tree.ema(extra["target"], followed, momentum)}

    def adopt(self, params, extra):
        """Return `extra` for loaded parameters: the target is of them."""
        return extra | {"target": tree.copy(self._followed(params))}

    # Features.

    @property
    def patches(self) -> tuple[int, int]:
        """Return the patches (p, q) of evaluations."""
        drawn = self.hybrid.processing_patch_size or (self.sampling.max_patch,)
        p = self.readout.p or drawn[0]
        return p, self.readout.q or self.hybrid.output_patch_size or p

    def features(self, params, extra, image):
        """Return the features of whole samples.

        Args:
            image: {modality: [B, H, W, T, C], "timestamps": [B, T, 3]}, normalised,
                `modalities.MISSING` where there is nothing; or pictures [B, H, W, 3].

        Returns:
            "pooled" [B, D], the mean of all tokens at p; "tokens" [B, H/q W/q, D] at q
            and "tokens_p" at p, rows first: means over times and bandsets of each
            modality, then over the modalities; [.., T D] with readout.pool="times".
        """
        del extra
        fields, (p, q) = self._fields(image), self.patches
        module = self.module(self.read, p, q)
        for kind in self.read:
            fields[kind.mask_key] = readout.online(kind, fields[kind.name], p)
        found = module.apply(
            {"params": params}, fields, self.readout.mode, method="features"
        )
        pool = self.readout.pool
        coarse = readout.in_place(found["tokens_p"], found["mask_p"], pool)
        fine = readout.in_place(found["features_q"], found["mask_q"], pool)
        return {
            "pooled": tokens.pool(found["tokens_p"], found["mask_p"]),
            "tokens": einops.rearrange(fine, "b h w d -> b (h w) d"),
            "tokens_p": einops.rearrange(coarse, "b h w d -> b (h w) d"),
        }

    @property
    def reads(self) -> dict:
        """Return the option of data sets that `features` asks for."""
        return {"modalities": tuple(kind.name for kind in self.read)}

    def sample(self, images: dict, *, raw: bool = False) -> dict:
        """Return what `features` takes of {modality: array, "timestamps": [B, T, 3]}.

        A modality may lack; timestamps are (day, month 0 to 11, year).

        Args:
            raw: values are in the sensors' own units: `modalities.normalise_sensors`
                makes of them what is read otherwise.

        Raises:
            UsageError: none of the modalities is there; another shape than [B, H, W,
                T, C], [B, T, C] or [B, C].
        """
        if raw and "rgb" not in images:
            images = modalities.normalise_sensors(images)
        return readout.sample(self.read, images)

    def sample_shapes(self, size, channels):
        """Return shapes of what `features` takes, of one sample."""
        if [k.name for k in self.read] == ["rgb"]:
            return super().sample_shapes(size, channels)
        times = self.readout.times
        found = {
            k.name: jax.ShapeDtypeStruct((1, *k.shape(size[0], times)), jnp.float32)
            for k in self.read
        }
        stamps = jax.ShapeDtypeStruct((1, times, 3), jnp.int32)
        return found | {"timestamps": stamps}

    def _fields(self, image) -> dict:
        """Return evaluation inputs as a dict."""
        if isinstance(image, dict):
            return dict(image)
        x = patches.normalise(image, self.run.mean, self.run.std)
        stamps = jnp.zeros((len(x), 1, 3), jnp.int32)
        return {"rgb": x[:, :, :, None], "timestamps": stamps}

    def freeze_layers(self) -> tuple:
        """Return `FreezeOut.layers`: the encoder's blocks; the rest never freezes.

        Encodings and registers act through block 0 alone, and go with it.
        """
        n = self.network
        own = [("encoder/patch_embed/.*", 0)]
        own += [("encoder/encodings/.*", 1)] * (n.channels != "zero")
        own += [("encoder/registers", 1)] * bool(n.registers)
        blocks = [(f"encoder/block_{i}/.*", i + 1) for i in range(n.numbers[2])]
        return (*own, *blocks)

    # Evaluation.

    scored = True

    def outputs(self, params, extra, batch) -> dict:
        """Return what the scores of a test batch need; nothing without a truth."""
        if self.measures.taught == "bank":  # At the end, once.
            return {}
        return self.places(params, extra, batch)

    def places(self, params, extra, batch) -> dict:
        """Return the rows of a batch that `readout.scores` takes."""
        if not self.measures.classes or "truth" not in batch:
            return {}
        cut = len("image/")
        image = {k[cut:]: v for k, v in batch.items() if k.startswith("image/")}
        found = self.features(params, extra, image)
        side = batch["truth"].shape[1] // self.patches[1]
        rows = {"truth": batch["truth"].astype(jnp.int16)}
        fine = einops.rearrange(found["tokens"], "b (h w) d -> b h w d", h=side)
        rows["tokens"] = fine.astype(jnp.float16)
        if self.measures.pixels:
            rows["pixels"] = readout.pixels(self.read, image).astype(jnp.float16)
        return rows

    def scores(self, rows) -> dict:
        """Return the measures of a land cover probe, see `readout.scores`."""
        return readout.scores(*readout.halves(rows), self.measures)

    def final_scores(self, rows) -> dict:
        """Return the measures of a probe that learned from the bank split."""
        if self.measures.taught == "test" or not self.measures.classes:
            return {}
        bank, test = (rows(self.places, split=split) for split in ("bank", "test"))
        return readout.scores(bank, test, self.measures)

    # Checks.

    def _summary(self) -> str:
        """Return two lines: the patches, and the tokens of the first step."""
        h, s, shape = self.hybrid, self.sampling, self.phase(0)
        drawn = f"{s.min_patch} to {s.max_patch}"
        sides = (", ".join(map(str, h.processing_patch_size)) or drawn) + " px"
        fine = f"{h.output_patch_size} px" if h.output_patch_size else "the same"
        goal = fine if h.decoder != "processing" else sides
        counts = [
            sum(
                math.prod(k.tokens(shape.side * r if k.space else 1, shape.times))
                for k in self.kinds
            )
            for r in (1, shape.p // shape.q)
        ]
        return (
            f"  Hybrid patch size configuration: processing patch {sides}, output "
            f"patch {fine}, target patch {goal}; upsampler {h.upsampler}, decoder "
            f"{h.decoder}\n"
            f"  tokens    {shape.side} x {shape.side} patches, {shape.times} time "
            f"step(s) at step 0: {counts[0]:,} a sample at {shape.p} px, "
            f"{counts[1]:,} at {shape.q} px"
        )

    def check_size(self, size: int) -> Iterator[str]:
        """Yield what is wrong with evaluation samples of `size` pixels a side."""
        p, _ = self.patches
        for fault in sizes.faults(size, p, "the patch that is processed, p"):
            yield f"evals.image_size={size}: {fault}"

    def check(self) -> Iterator[str]:
        """Yield one line per impossible combination of the sections."""
        names = self.inputs.modalities
        if all(n in self.mask.decode_only for n in names):
            yield f"mask.decode_only: leaves none of {names} to read"
        for name in self.readout.modalities:
            if name not in names:
                yield f"readout.modalities: {name!r} is not among {names}"
        p, q = self.patches
        if p % q:
            yield f"readout.q={q} does not divide readout.p={p}"
        if self.target.depth > self.network.numbers[2]:
            yield (
                f"target.depth={self.target.depth}: the encoder has "
                f"{self.network.numbers[2]} blocks"
            )
        if self.objective.contrast_weight and self.augment.views != 2:
            yield "augment.views=1: objective.contrast_weight compares two views"
        if "rgb" in names and self.run.channels != 3:
            yield f"data.channels={self.run.channels}: 'rgb' has 3"
        try:
            for side in (self.sampling.min_side, self.sampling.max_side):
                shapes.max_times(self.kinds, self.sampling.token_budget, side)
            for p in self.hybrid.processing_patch_size:
                shapes.draw(self.sampling, self.kinds, 0, (p,))
        except ValueError as e:
            yield str(e)


@functools.cache
def _announce(text: str) -> None:
    """Log a line once."""
    logger.info("%s", text)
