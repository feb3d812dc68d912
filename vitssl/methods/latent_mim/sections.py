"""Config sections of latent masked modelling: inputs, network, hybrid patch, losses."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from vitssl import errors
from vitssl.data import modalities as sensors
from vitssl.losses import contrastive
from vitssl.methods.latent_mim import discrimination, network
from vitssl.models import encodings, flexi, layers

LEARNED = ("pixel_shuffle", "skip")  # Upsamplers with parameters.


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Config section `inputs`.

    Attributes:
        modalities: names, in the order of the sequence; ("rgb",) for pictures.
        groups: ((modality, ((band, ...), ...)), ...): other bandsets than the table's.
    """

    modalities: tuple[str, ...] = sensors.TRAINED
    groups: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = ()

    def kinds(self, names=None) -> tuple[sensors.Modality, ...]:
        """Return the modalities, or those of `names`, with their bandsets."""
        groups = dict(self.groups)
        chosen = self.modalities if names is None else names
        return tuple(sensors.find(name, groups) for name in chosen)

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
class Network:
    """Config section `network`: encoder and predictor.

    Attributes:
        size: a published size, or "" for the four numbers after it.
        width, heads, depth, decoder_depth: of size ""; a multiple of 16.
        mlp_ratio: of the blocks.
        base_patch: side of the patch that the kernels are for.
        drop_path: of every block of the encoder.
        registers: extra tokens of the encoder.
        qk_norm: LayerNorm of queries and keys.
        patch_resize, frequencies, anchor, channels: see `models.flexi` and
            `models.encodings`; "input", "legacy", "corner" are OlmoEarth's weights.
        projections, aggregate_first: linear layers of the vector that views are
            compared by, and whether tokens are averaged before them.
        remat: recompute the blocks in the backward pass.
        attention: see `models.layers`.
    """

    size: str = "nano"
    width: int = 0
    heads: int = 0
    depth: int = 0
    decoder_depth: int = 0
    mlp_ratio: float = 4.0
    base_patch: int = 8
    drop_path: float = 0.1
    registers: int = 0
    qk_norm: bool = False
    patch_resize: flexi.Resize = "weights"
    frequencies: encodings.Frequencies = "standard"
    anchor: encodings.Anchor = "center"
    channels: encodings.Channels = "learnable"
    projections: int = 1
    aggregate_first: bool = True
    remat: bool = False
    attention: layers.Implementation = "auto"

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """Return (width, heads, depth, decoder depth)."""
        if self.size:
            return network.SIZES[self.size]
        return self.width, self.heads, self.depth, self.decoder_depth

    def build(self, kinds, dtype: str):
        """Return (`methods.latent_mim.network.Encoder`, `Predictor`)."""
        width, heads, depth, short = self.numbers
        both = dict(
            mlp_ratio=self.mlp_ratio,
            qk_norm=self.qk_norm,
            frequencies=self.frequencies,
            anchor=self.anchor,
            channels=self.channels,
            most_times=sensors.TIMES,
            remat=self.remat,
            dtype=dtype,
            attention=self.attention,
        )
        encoder = network.Encoder(
            kinds,
            width,
            depth,
            heads,
            base=self.base_patch,
            drop_path=self.drop_path,
            registers=self.registers,
            projections=self.projections,
            aggregate_first=self.aggregate_first,
            patch_resize=self.patch_resize,
            **both,
        )
        return encoder, network.Predictor(kinds, width, width, short, heads, **both)

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        if self.size and self.size not in network.SIZES:
            yield f"size={self.size!r}: '' or one of {', '.join(network.SIZES)}"
            return
        width, heads, depth, short = self.numbers
        if min(width, heads, depth, short) < 1:
            yield "size='': set width, heads, depth and decoder_depth"
            return
        if width % 16:
            yield f"width={width}: a multiple of 16 (four encodings of pairs of pairs)"
        if width % heads:
            yield f"heads={heads} does not divide width={width}"
        if self.base_patch < 1:
            yield f"base_patch={self.base_patch}: 1 or more pixels"
        if not 0 <= self.drop_path < 1:
            yield f"drop_path={self.drop_path}: in [0, 1)"


@dataclasses.dataclass(frozen=True)
class Hybrid:
    """Config section `hybrid`: patches that are processed, patches that come out.

    Attributes:
        processing_patch_size: p, in pixels; of several one is drawn per batch; () draws
            from sampling.min_patch to max_patch.
        output_patch_size: q; 0 = p, no hybrid.
        upsampler: from p to q. "bilinear" and "nearest" have no parameters and add no
            detail; "pixel_shuffle" is learned; "skip" is learned and reads the pixels
            of what the encoder saw.
        decoder: "mixed": what is read at p, what is asked for at q; "output": all at q;
            "processing": all at p, upsampled for evaluation alone.
        loss_tokens_per_modality: most tokens of a modality and sample in the loss.
        sampled_keys: the decoder reads one fine child, drawn at random, of each coarse
            token, which trains a learned upsampler.
        visible_loss_weight: of the same loss on the upsampled tokens that were seen,
            which trains a learned upsampler too.
        pool_at: where the vectors that views are compared by are averaged.
        max_output_tokens: most tokens of a sample at q with decoder "output".
    """

    processing_patch_size: tuple[int, ...] = (8,)
    output_patch_size: int = 1
    upsampler: Literal["bilinear", "nearest", "pixel_shuffle", "skip"] = "bilinear"
    decoder: Literal["mixed", "output", "processing"] = "mixed"
    loss_tokens_per_modality: int = 1024
    sampled_keys: bool = False
    visible_loss_weight: float = 0.0
    pool_at: Literal["processing", "output"] = "processing"
    max_output_tokens: int = 16384

    @property
    def learned(self) -> bool:
        """Whether the upsampler has parameters."""
        return self.upsampler in LEARNED and bool(self.output_patch_size)

    @property
    def trains_upsampler(self) -> bool:
        """Whether the loss reaches the upsampler."""
        fine = self.sampled_keys or self.pool_at == "output"
        if self.decoder == "processing":
            return False
        return self.decoder == "output" or self.visible_loss_weight > 0 or fine

    def check(self) -> Iterator[str]:
        """Yield what is out of range or cannot be combined."""
        q, sizes = self.output_patch_size, self.processing_patch_size
        for p in sizes:
            if p < 1:
                yield f"processing_patch_size={p}: 1 or more pixels"
            elif q and (q > p or p % q):
                fit = [d for d in range(1, p + 1) if p % d == 0]
                yield (
                    f"output_patch_size={q} does not divide processing_patch_size={p}; "
                    f"one of {', '.join(map(str, fit))}, or 0 for no hybrid"
                )
        if q < 0:
            yield f"output_patch_size={q}: 0 (as processed) or more pixels"
        if q and not sizes:
            yield f"output_patch_size={q}: needs processing_patch_size"
        if self.learned and not self.trains_upsampler:
            yield (
                f"upsampler={self.upsampler}: nothing trains it with decoder="
                f"{self.decoder}; set sampled_keys=True, visible_loss_weight above 0, "
                "or decoder=output"
            )
        if self.sampled_keys and self.decoder != "mixed":
            yield f"sampled_keys=True: of decoder=mixed, not {self.decoder}"
        if self.visible_loss_weight and self.decoder == "processing":
            yield "visible_loss_weight: needs tokens at q, decoder=mixed or output"
        if self.upsampler == "pixel_shuffle" and len(set(sizes)) > 1:
            yield f"upsampler=pixel_shuffle: of one processing_patch_size, not {sizes}"
        for key in ("loss_tokens_per_modality", "max_output_tokens"):
            if getattr(self, key) < 1:
                yield f"{key}={getattr(self, key)}: 1 or more"
        if self.visible_loss_weight < 0:
            yield f"visible_loss_weight={self.visible_loss_weight}: 0 or more"


@dataclasses.dataclass(frozen=True)
class Objective:
    """Config section `objective`.

    Attributes:
        type: a key of `methods.latent_mim.discrimination.KINDS`.
        tau, weight: its temperature and factor.
        modality_weights: ((modality, factor), ...); 1 where not named.
        pred2unit: standardise predictions over the batch first.
        same_target_threshold: negatives whose targets have a larger cosine are left
            out; 0 = none are.
        same_target_modalities: where; () = everywhere.
        contrast_weight, contrast_tau: of InfoNCE between the vectors of two views.
        koleo_weight: of KoLeo on those vectors.
        per_microbatch: what compares samples does so within a micro-batch, as the
            original does; False refuses accumulate > 1 with such losses.
    """

    type: str = "modality_patch_discrimination"
    tau: float = 0.1
    weight: float = 1.0
    modality_weights: tuple[tuple[str, float], ...] = ()
    pred2unit: bool = False
    same_target_threshold: float = 0.0
    same_target_modalities: tuple[str, ...] = sensors.MAPS
    contrast_weight: float = 0.1
    contrast_tau: float = 0.1
    koleo_weight: float = 0.0
    per_microbatch: bool = True

    @property
    def couples_batch(self) -> bool:
        """Whether a batch may not be split."""
        kind = discrimination.KINDS[self.type]
        across = kind.across or self.pred2unit
        compares = across or self.contrast_weight > 0 or self.koleo_weight > 0
        return compares and not self.per_microbatch

    def of_tokens(self, pairs):
        """Return (loss [], {modality: []}) of {modality: Pair}."""
        threshold = self.same_target_threshold
        total, parts = discrimination.patch_discrimination(
            pairs,
            kind=self.type,
            tau=self.tau,
            weights=dict(self.modality_weights),
            standardise=self.pred2unit,
            same_target=threshold or None,
            same_target_in=self.same_target_modalities or None,
        )
        return self.weight * total, parts

    def of_views(self, pooled):
        """Return {name: weighted loss []} of the vectors [B, D] of each view."""
        found = {}
        if self.contrast_weight and len(pooled) == 2:
            found["contrast"] = self.contrast_weight * contrastive.infonce_one_way(
                *pooled, temperature=self.contrast_tau
            )
        if self.koleo_weight:
            each = [contrastive.koleo(x) for x in pooled]
            found["koleo"] = self.koleo_weight * sum(each) / len(each)
        return found

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        if self.type not in discrimination.KINDS:
            known = ", ".join(discrimination.KINDS)
            yield f"type={self.type!r}: one of {known}"
        for key in ("tau", "contrast_tau"):
            if getattr(self, key) <= 0:
                yield f"{key}={getattr(self, key)}: above 0"
        for key in ("weight", "contrast_weight", "koleo_weight"):
            if getattr(self, key) < 0:
                yield f"{key}={getattr(self, key)}: 0 or more"
        if not 0 <= self.same_target_threshold <= 1:
            yield f"same_target_threshold={self.same_target_threshold}: in [0, 1]"


@dataclasses.dataclass(frozen=True)
class Target:
    """Config section `target`: what is predicted.

    Attributes:
        depth: blocks of the target encoder that tokens pass; 0 = its patch embedding
            alone, which never attends.
        start, end: momentum with which it follows the encoder, along the run; 1 and 1 =
            it stays as it was drawn.
        centre: take away the mean of a modality's targets over the batch. It is nearly
            all of them at small q, where they otherwise point one way: of drawn
            farmland at 1 px even a perfect predictor gets no further than 95 to 99 %
            of the loss at chance, and 45 to 65 % with it.
    """

    depth: int = 0
    start: float = 1.0
    end: float = 1.0
    centre: bool = False

    @property
    def moves(self) -> bool:
        """Whether it follows the encoder."""
        return self.start < 1 or self.end < 1

    def momentum(self, step, total_steps: int):
        """Return the momentum before 0-based step `step`."""
        return self.start + step * (self.end - self.start) / max(1, total_steps)

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        if self.depth < 0:
            yield f"depth={self.depth}: 0 or more"
        for key in ("start", "end"):
            if not 0 <= getattr(self, key) <= 1:
                yield f"{key}={getattr(self, key)}: in [0, 1]"


@dataclasses.dataclass(frozen=True)
class Readout:
    """Config section `readout`: what evaluations read from the network.

    Attributes:
        p, q: patches that are processed and put out; 0 = those of training.
        mode: "upsampled": tokens through the upsampler; "decoder": what the predictor
            answers about every fine token.
        times: most time steps of a sample.
        modalities: names; () = those that training may read.
        pool: of the features of a place: "mean" over all times; "times": those of
            different times side by side, which keeps the seasons apart.
    """

    p: int = 0
    q: int = 0
    mode: Literal["upsampled", "decoder"] = "upsampled"
    times: int = 4
    modalities: tuple[str, ...] = ()
    pool: Literal["mean", "times"] = "mean"

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        if self.p < 0 or self.q < 0:
            yield f"p={self.p}, q={self.q}: 0 (as in training) or more pixels"
        if not 1 <= self.times <= sensors.TIMES:
            yield f"times={self.times}: 1 to {sensors.TIMES}"
