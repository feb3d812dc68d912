"""Latent masked modelling with hybrid patch size: process at p, predict at q.

With p = q this is OlmoEarth's training step, operation by operation.

Source: allenai/olmoearth_pretrain train/train_module (LatentMIM); the idea of a hybrid
patch size from its branch piperw/ps-exploration, with upsampling that is aware of
masks and a predictor that is asked for fine tokens over coarse ones.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vitssl import errors
from vitssl.methods.latent_mim import network
from vitssl.models import fieldblock, flexi, patches, tokens, upsample

Decoder = Literal["mixed", "output", "processing"]


class Asked(NamedTuple):
    """Tokens of one modality that a loss looks at.

    Attributes:
        prediction: [B, Q, D].
        index: [B, Q] int32 places on the grid of the targets; None = all of them.
        valid: [B, Q] bool, which count.
    """

    prediction: jax.Array
    index: jax.Array | None
    valid: jax.Array


class View(NamedTuple):
    """What a network makes of one masked view of a batch.

    Attributes:
        asked: {name: Asked} of tokens to predict.
        visible: {name: Asked} of tokens it saw, {} without that loss.
        pooled: [B, D] float32.
        counts: {"encoder", "decoder_queries", "decoder_keys", "loss": [] float32},
            tokens per sample, means over the batch.
    """

    asked: dict
    visible: dict
    pooled: jax.Array
    counts: dict


class HybridMIM(nn.Module):
    """Encoder, upsampler and predictor of one system.

    Attributes:
        encoder, predictor: see `methods.latent_mim.network`.
        p, q: sides of the patches that are processed and put out, q divides p.
        upsampler: see `hybrid.Upsampler`.
        decoder: "mixed": the predictor is asked for fine tokens over coarse ones;
            "output": the tokens are upsampled first and both are fine; "processing":
            both are coarse, and q is for `features` alone.
        loss_tokens: most tokens per sample and modality that are predicted, drawn
            uniformly; 0 = all.
        sampled_keys: "mixed" attends to one fine child of every coarse token instead,
            so that a learned upsampler gets a gradient.
        visible_loss: also predict fine tokens the encoder saw, through a linear layer.
        pool_at: whether pooled vectors are means of coarse or of fine tokens.
        max_output_tokens: most tokens per sample where all fine ones are made.
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
    pool_at: Literal["processing", "output"] = "processing"
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
            self.visible_head = fieldblock.Linear(
                self.encoder.width, self.encoder.dtype
            )

    def __call__(self, fields, *, slots=0, bounds=None, train=False):
        """Encode one masked view and predict its DECODER tokens.

        Random numbers: streams "drop_path" (train), "tokens" (which tokens the loss
        sees, which children stand for a key).

        Args:
            fields: batch with masks, see `methods.latent_mim.network`.
            slots: bound on the ONLINE tokens of a sample, static; 0 = none.
            bounds: {name: bound on the DECODER tokens of a sample at p}, static; None =
                none.
            train: drop paths.

        Returns:
            `View`.

        Raises:
            ValueError: p does not divide the field, q does not divide p, or all fine
                tokens are made (output) and are more than max_output_tokens.
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
            m.name: self._choose(m, states, tokens.DECODER, bounds)
            for m in self.modalities
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
        return {
            m.name: upsample.upsample_mask(mask[m.name], self.factor)
            if m.space
            else mask[m.name]
            for m in self.modalities
        }

    def _context(self, seen, fine, fields, slots):
        """Return what the predictor attends to."""
        dates, r = fields["timestamps"], self.factor
        shapes = tokens.shapes_of(seen.tokens)
        if r == 1 or self.decoder == "processing":
            codes = self.predictor.codes(shapes, dates, self.p)
            return self.predictor.context(seen.packed, codes)
        if self.decoder == "output":
            codes = self.predictor.codes(tokens.shapes_of(fine), dates, self.q)
            return self.predictor.context(self._pack_fine(seen, fine, slots), codes)
        if not self.sampled_keys:
            codes = self.predictor.codes(shapes, dates, self.p)
            return self.predictor.context(seen.packed, codes)
        return self._children(seen, fields)

    def _children(self, seen, fields):
        """Return the context of one drawn fine child per coarse token."""
        dates, r, parts = fields["timestamps"], self.factor, []
        shapes, states = tokens.shapes_of(seen.tokens), self._fine_states(seen.mask)
        rng = self.make_rng("tokens")
        places = upsample.draw_children(rng, shapes, self.modalities, len(dates), r)
        drawn = self.up(seen.tokens, seen.mask, fields, places)
        for m in self.modalities:
            shape, name = states[m.name].shape[1:], m.name
            if m.space:
                code = self.predictor.codes_at(name, places[name], shape, dates, self.q)
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
        return tokens.pack(x, states == tokens.ONLINE, slots * self.factor**2)

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
            m.name: self._choose(m, states, tokens.ONLINE)
            for m in self.modalities
            if m.space
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

        Raises:
            ValueError: unknown mode, or p does not divide the field.
        """
        tokens.shapes(fields, self.modalities, self.p)
        seen = self.encoder(fields, self.p)
        if mode == "upsampled":
            fine, states = self.up(seen.tokens, seen.mask, fields)
        elif mode == "decoder":
            fine, states = self._answers(seen, fields)
        else:
            raise ValueError(f"features: mode={mode!r}: upsampled or decoder")
        return {
            "pooled": seen.pooled,
            "tokens_p": seen.tokens,
            "features_q": fine,
            "mask_p": seen.mask,
            "mask_q": states,
        }

    def _answers(self, seen, fields):
        """Return the predictor's answers about all fine tokens, and their states."""
        dates, states = fields["timestamps"], self._fine_states(seen.mask)
        codes = self.predictor.codes(tokens.shapes_of(seen.tokens), dates, self.p)
        context = self.predictor.context(seen.packed, codes)
        queries = {k: (None, v.shape[1:], self.q) for k, v in states.items()}
        found = self.predictor(context, queries, dates)
        return {k: v.reshape(*states[k].shape, -1) for k, v in found.items()}, states

    def check(self) -> Iterator[str]:
        """Yield one line per impossible combination of the fields."""
        yield from upsample.faults(self.p, self.q)
        learned = self.upsampler in upsample.LEARNED and self.p != self.q
        trained = self.decoder == "output" or self.visible_loss
        trained |= self.decoder == "mixed" and self.sampled_keys
        trained |= self.decoder == "mixed" and self.pool_at == "output"
        if learned and not trained:
            yield (
                f"upsampler={self.upsampler} gets no gradient with decoder="
                f"{self.decoder}: set decoder=output, sampled_keys=True (mixed) or a "
                "visible_loss_weight above 0"
            )
        fine = self.sampled_keys or self.visible_loss or self.pool_at == "output"
        if self.decoder == "processing" and fine:
            yield (
                "decoder=processing: sampled_keys, the visible loss and pool_at=output "
                "need tokens at q"
            )
        if self.loss_tokens < 0:
            yield f"loss_tokens_per_modality={self.loss_tokens}: 0 (all) or positive"


def draw(rng, member, count):
    """Draw `count` members of each set uniformly, without replacement.

    Args:
        rng: key.
        member: [B, N] bool.
        count: static number of places K < N.

    Returns:
        (index [B, K] int32, valid [B, K] bool: fewer where a set has fewer members).
    """
    score = jnp.where(member, jax.random.uniform(rng, member.shape), -1.0)
    best, index = jax.lax.top_k(score, count)
    return index.astype(jnp.int32), best >= 0


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


def targets(module, params, fields, asked, patch):
    """Return what a frozen projection makes of the pixels of the tokens asked for.

    Args:
        module: `targets_of` an encoder.
        params: its parameters.
        fields: batch.
        asked: {name: Asked}.
        patch: `HybridMIM.target_patch`.

    Returns:
        {name: [B, Q, D]} float32; no gradient flows back.
    """
    params, whole, found = {"params": jax.lax.stop_gradient(params)}, None, {}
    for name, a in asked.items():
        if a.index is None:
            if whole is None:
                whole = module.apply(params, fields, patch)
            found[name] = einops.rearrange(whole[name], "b ... d -> b (...) d")
        else:
            found[name] = module.apply(
                params, fields, name, a.index, patch, method="at"
            )
    return jax.tree.map(jax.lax.stop_gradient, found)


def targets_of(encoder: network.Encoder) -> flexi.PatchEmbeddings:
    """Return the module of the frozen random-projection target of an encoder.

    Its parameters are a copy of the encoder's "patch_embed" at the start; computed in
    float32.
    """
    return flexi.PatchEmbeddings(
        encoder.modalities,
        encoder.width,
        encoder.base,
        encoder.patch_resize,
        by_time=True,
    )


def online_bound(shapes, modalities, ratio, decode_only=()) -> int:
    """Return how many tokens of a sample random masking can make ONLINE at most."""
    return sum(
        int(int(np.prod(shapes[m.name])) * ratio)
        for m in modalities
        if m.name not in decode_only
    )
