"""Latent masked modelling with hybrid patch size: process at p, predict at q.

With p = q this is OlmoEarth's training step, operation by operation.

Source: allenai/olmoearth_pretrain train/train_module (LatentMIM); the idea of a hybrid
patch size from its branch piperw/ps-exploration, with upsampling that is aware of
masks and a predictor that is asked for fine tokens over coarse ones.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vitssl import errors, ranges
from vitssl.data.states import DECODER, ONLINE
from vitssl.methods.latent_mim import network, tokens
from vitssl.models import patches, upsample, xavier

Decoder = Literal["mixed", "output", "processing"]
PoolAt = Literal["processing", "output"]


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

    processing_patch_size: tuple[ranges.Count, ...] = (8,)
    output_patch_size: ranges.OrNone = 1
    upsampler: upsample.Mode = "bilinear"
    decoder: Decoder = "mixed"
    loss_tokens_per_modality: ranges.Count = 1024
    sampled_keys: bool = False
    visible_loss_weight: ranges.NotNegative = 0.0
    pool_at: PoolAt = "processing"
    max_output_tokens: ranges.Count = 16384

    @property
    def learned(self) -> bool:
        """Whether the upsampler has parameters."""
        return self.upsampler in upsample.LEARNED and bool(self.output_patch_size)

    @property
    def trains_upsampler(self) -> bool:
        """Whether the loss reaches the upsampler."""
        fine = self.sampled_keys or self.pool_at == "output"
        if self.decoder == "processing":
            return False
        return self.decoder == "output" or self.visible_loss_weight > 0 or fine

    def check(self) -> Iterator[str]:
        """Yield what cannot be combined."""
        q, sizes = self.output_patch_size, self.processing_patch_size
        for p in sizes:
            if q and p % q:
                fit = [d for d in range(1, p + 1) if p % d == 0]
                yield (
                    f"output_patch_size={q} does not divide processing_patch_size={p}; "
                    f"one of {', '.join(map(str, fit))}, or 0 for no hybrid"
                )
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


class Asked(NamedTuple):
    """Tokens of one modality that a loss looks at."""

    prediction: jax.Array  # [B, Q, D]
    index: jax.Array | None  # [B, Q] int32 places among the targets; None = all.
    valid: jax.Array  # [B, Q] bool: which count.


class View(NamedTuple):
    """What a network makes of one masked view of a batch.

    Attributes:
        counts: {"encoder", "decoder_queries", "decoder_keys", "loss": [] float32},
            tokens per sample, means over the batch.
    """

    asked: dict  # {name: Asked} of tokens to predict.
    visible: dict  # {name: Asked} of tokens it saw, {} without that loss.
    pooled: jax.Array  # [B, D] float32
    counts: dict


class HybridMIM(nn.Module):
    """Encoder, upsampler and predictor of one system.

    Attributes:
        p, q: sides of the patches that are processed and put out, q divides p.
        upsampler, decoder, sampled_keys, pool_at, max_output_tokens: see `Hybrid`.
        loss_tokens: most tokens per sample and modality that are predicted, drawn
            uniformly; 0 = all.
        visible_loss: also predict fine tokens the encoder saw, through a linear layer.
    """

    encoder: network.Encoder
    predictor: network.Predictor
    p: int
    q: int
    upsampler: upsample.Mode = "bilinear"
    decoder: Decoder = "mixed"
    loss_tokens: int = 0
    sampled_keys: bool = False
    visible_loss: bool = False
    pool_at: PoolAt = "processing"
    max_output_tokens: int = 16384

    @property
    def modalities(self):
        """What a field consists of."""
        return self.encoder.modalities

    @property
    def factor(self):
        """Fine tokens per coarse token and side."""
        return upsample.factor(self.p, self.q)

    @property
    def target_patch(self):
        """Side of the patches whose targets are predicted."""
        return self.p if self.decoder == "processing" else self.q

    def setup(self):
        """Declare what is not a module of its own."""
        self.up = upsample.Upsampler(
            self.modalities, self.p, self.q, self.upsampler, self.encoder.dtype
        )
        if self.visible_loss:
            self.visible_head = xavier.Linear(self.encoder.width, self.encoder.dtype)

    def __call__(self, fields, *, slots=0, bounds=None, train=False):
        """Encode one masked view of a batch and predict its DECODER tokens: `View`.

        Random numbers: streams "drop_path" (train), "tokens" (which tokens the loss
        sees, which children stand for a key).

        Args:
            slots: bound on the ONLINE tokens of a sample, static; 0 = none.
            bounds: {name: bound on the DECODER tokens of a sample at p}, static; None =
                none.

        Raises:
            ValueError: p does not divide the field, or q not p.
            UsageError: all fine tokens are made (output), more than max_output_tokens.
        """
        tokens.shapes(fields, self.modalities, self.p)
        seen = self.encoder(fields, self.p, slots=slots, train=train)
        fine, states = seen.tokens, seen.mask
        if self._needs_fine:
            fine, states = self.up(seen.tokens, seen.mask, fields)
        elif self.decoder == "mixed":
            states = self._fine_states(seen.mask)
        context = self._context(seen, fine, fields, slots)
        shapes = {k: v.shape[1:] for k, v in states.items()}
        chosen = {
            m.name: self._choose(m, states, DECODER, bounds) for m in self.modalities
        }
        queries = {
            k: (index, shapes[k], self.target_patch) for k, (index, _) in chosen.items()
        }
        answers = self.predictor(context, queries, fields["timestamps"], train=train)
        asked = {k: Asked(answers[k], *chosen[k]) for k in answers}
        visible = self._visible(seen, states, fields) if self.visible_loss else {}
        return View(
            asked, visible, self._pool(seen, fine, slots), _counts(seen, context, asked)
        )

    @property
    def _needs_fine(self):
        """Whether the step needs the upsampled tokens themselves."""
        if self.decoder == "processing":
            return False
        fine = self.decoder == "output" or self.pool_at == "output"
        return self.factor > 1 and fine

    def _fine_states(self, mask):
        r, placed = self.factor, [m.name for m in self.modalities if m.space]
        return mask | {k: upsample.upsample_mask(mask[k], r) for k in placed}

    def _context(self, seen, fine, fields, slots):
        """Return what the predictor attends to."""
        dates, r = fields["timestamps"], self.factor
        shapes = tokens.shapes_of(seen.tokens)
        if r > 1 and self.decoder == "output":
            codes = self.predictor.codes(tokens.shapes_of(fine), dates, self.q)
            return self.predictor.context(self._pack_fine(seen, fine, slots), codes)
        if r > 1 and self.decoder == "mixed" and self.sampled_keys:
            return self._children(seen, fields)
        codes = self.predictor.codes(shapes, dates, self.p)
        return self.predictor.context(seen.packed, codes)

    def _children(self, seen, fields):
        """Return the context of one drawn fine child per coarse token."""
        dates, r, parts = fields["timestamps"], self.factor, []
        shapes, states = tokens.shapes_of(seen.tokens), self._fine_states(seen.mask)
        rng = self.make_rng("tokens")
        places = draw_children(rng, shapes, self.modalities, len(dates), r)
        drawn = self.up(seen.tokens, seen.mask, fields, places)
        for m in self.modalities:
            shape, name = states[m.name].shape[1:], m.name
            if m.space:
                code = self.predictor.encodings.at(
                    name, places[name], shape, dates, self.q
                )
            else:
                drawn[name] = seen.tokens[name]
                code = self.predictor.encodings({name: shape}, dates, self.q)[name]
            parts.append(code.reshape(len(code), -1, code.shape[-1]))
        parts = [jnp.broadcast_to(x, (len(dates), *x.shape[1:])) for x in parts]
        x = tokens.flatten(drawn, self.modalities)
        if seen.packed.keep is not None:
            x = patches.take(x, seen.packed.keep)
        packed = seen.packed._replace(tokens=x)
        return self.predictor.context(packed, jnp.concatenate(parts, axis=1))

    def _pack_fine(self, seen, fine, slots):
        """Return the fine tokens the encoder saw, packed."""
        x = tokens.flatten(fine, self.modalities)
        if x.shape[1] > self.max_output_tokens:
            raise errors.UsageError(
                f"decoder={self.decoder}, pool_at={self.pool_at} makes {x.shape[1]} "
                f"tokens at q={self.q}, more than max_output_tokens="
                f"{self.max_output_tokens}; use decoder=mixed with pool_at=processing, "
                "a larger q or a smaller crop"
            )
        if seen.packed.keep is None:
            return tokens.Packed(x)
        states = tokens.flatten_mask(self._fine_states(seen.mask), self.modalities)
        return tokens.pack(x, states == ONLINE, slots * self.factor**2)

    def _choose(self, m, states, state, bounds=None):
        """Return (index or None, valid [B, Q]) of tokens in a state."""
        member = einops.rearrange(states[m.name], "b ... -> b (...)") == state
        n = most = member.shape[1]
        if bounds is not None:
            r = self.factor if m.space and self.decoder != "processing" else 1
            most = min(n, max(1, bounds[m.name] * r * r))
        if self.loss_tokens and self.loss_tokens < most:
            key = self.make_rng("tokens")
            return draw(key, member, self.loss_tokens)
        if most == n:
            return None, member
        index, count = patches.pack(member, most)
        return index, patches.valid(count, most)

    def _visible(self, seen, states, fields):
        """Return {name: Asked} of fine tokens that the encoder saw."""
        chosen = {
            m.name: self._choose(m, states, ONLINE) for m in self.modalities if m.space
        }
        index = {
            k: jnp.broadcast_to(jnp.arange(valid.shape[1]), valid.shape)
            if index is None
            else index
            for k, (index, valid) in chosen.items()
        }
        # Only what is looked at is made: all of it costs more than the encoder.
        x = self.up(seen.tokens, seen.mask, fields, index)
        return {k: Asked(self.visible_head(x[k]), *chosen[k]) for k in chosen}

    def _pool(self, seen, fine, slots):
        coarse = "processing" in (self.pool_at, self.decoder)
        if coarse or self.factor == 1:
            return seen.pooled
        return self.encoder.aggregate(self._pack_fine(seen, fine, slots))

    def features(self, fields, mode="upsampled"):
        """Return features on both grids, of everything that is not MISSING.

        Args:
            fields: batch; without masks nothing is missing.
            mode: "upsampled": of the upsampler; "decoder": the predictor's answers
                about all fine tokens, which differ inside a patch for every upsampler.

        Returns:
            {"pooled": [B, D], "tokens_p": {name: [B, h, w, T, S, D]}, "features_q":
            {name: [B, h r, w r, T, S, D]}, "mask_p", "mask_q"}.
        """
        tokens.shapes(fields, self.modalities, self.p)
        seen = self.encoder(fields, self.p)
        if mode == "decoder":
            fine, states = self._answers(seen, fields)
        else:
            fine, states = self.up(seen.tokens, seen.mask, fields)
        found = {"pooled": seen.pooled, "tokens_p": seen.tokens, "mask_p": seen.mask}
        return found | {"features_q": fine, "mask_q": states}

    def _answers(self, seen, fields):
        """Return the predictor's answers about all fine tokens, and their states."""
        dates, states = fields["timestamps"], self._fine_states(seen.mask)
        codes = self.predictor.codes(tokens.shapes_of(seen.tokens), dates, self.p)
        context = self.predictor.context(seen.packed, codes)
        queries = {k: (None, v.shape[1:], self.q) for k, v in states.items()}
        found = self.predictor(context, queries, dates)
        return {k: v.reshape(*states[k].shape, -1) for k, v in found.items()}, states


def draw(rng, member, count):
    """Draw K = `count` < N of each set [B, N] uniformly, without replacement.

    Returns (index [B, K] int32, valid [B, K]: fewer where a set has fewer members).
    """
    score = jnp.where(member, jax.random.uniform(rng, member.shape), -1.0)
    best, index = jax.lax.top_k(score, count)
    return index.astype(jnp.int32), best >= 0


def draw_children(rng, shapes, modalities, batch, r):
    """Draw one of the r x r children of every coarse token, uniformly.

    Returns {name: [B, h w T S] int32 places on the fine grid, flattened}, of what has
    places, for the shapes {name: (h, w, T, S)} of the coarse grid.
    """
    places = {}
    for i, m in enumerate(modalities):
        if not m.space:
            continue
        h, w, *rest = shapes[m.name]
        count = int(np.prod(shapes[m.name]))
        index = jnp.broadcast_to(jnp.arange(count), (batch, count))
        key = jax.random.fold_in(rng, i)
        a, b = jax.random.randint(key, (2, batch, count), 0, r)
        row, column, *more = jnp.unravel_index(index, shapes[m.name])
        where, grid = (row * r + a, column * r + b, *more), (h * r, w * r, *rest)
        found = jnp.ravel_multi_index(where, grid, mode="clip")
        places[m.name] = found.astype(jnp.int32)
    return places


def _counts(seen, context, asked):
    """Return how many tokens per sample take part, see `View`."""

    def mean(packed):
        if packed.count is None:
            return jnp.float32(packed.tokens.shape[1])
        return packed.count.astype(jnp.float32).mean()

    loss = sum(a.valid.sum() for a in asked.values())
    size = len(context.tokens)
    queries = sum(a.valid.shape[1] for a in asked.values())
    return {
        "encoder": mean(seen.packed),
        "decoder_keys": mean(context),
        "decoder_queries": jnp.float32(queries),
        "loss": loss.astype(jnp.float32) / size,
    }
