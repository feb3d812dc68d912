"""What is predicted: pixels through a frozen projection, or through an encoder.

No gradient flows into any of it.
"""

import dataclasses

import einops
import jax
import jax.numpy as jnp

from vitssl import ranges
from vitssl.data import states
from vitssl.methods.latent_mim import embed, tokens
from vitssl.models import patches


@dataclasses.dataclass(frozen=True)
class Target:
    """Config section `target`: what is predicted.

    Attributes:
        depth: blocks of the target encoder that tokens pass; 0 = its patch embedding
            alone, which never attends.
        start, end: momentum with which it follows the encoder, along the run; 1 and 1 =
            it stays as it was drawn.
        centre: take away the mean of a bandset's targets over the batch. It is nearly
            all of them at small q, where they otherwise point one way: of drawn
            farmland at 1 px even a perfect predictor gets no further than 95 to 99 %
            of the loss at chance, and 45 to 65 % with it. (Of a whole modality the
            mean would leave the means of its bandsets, and those would be all that is
            predicted.)
    """

    depth: ranges.OrNone = 0
    start: ranges.Probability = 1.0
    end: ranges.Probability = 1.0
    centre: bool = False

    @property
    def moves(self) -> bool:
        """Whether it follows the encoder."""
        return self.start < 1 or self.end < 1

    def momentum(self, step, total_steps: int):
        """Return the momentum before 0-based step `step`."""
        return self.start + step * (self.end - self.start) / max(1, total_steps)


def projection(encoder) -> embed.PatchEmbeddings:
    """Return the module of the frozen random-projection target of an encoder.

    Its parameters are a copy of the encoder's "patch_embed" at the start; computed in
    float32.
    """
    return embed.PatchEmbeddings(
        encoder.modalities,
        encoder.width,
        encoder.base,
        encoder.patch_resize,
        by_time=True,
    )


def projected(module, params, fields, asked, patch):  # -> {name: [B, Q, D]} float32
    """Return what a `projection` makes of the pixels of the tokens asked for.

    Args:
        asked: {name: `hybrid.Asked`}.
        patch: `HybridMIM.target_patch`.
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


def encoded(encoder, params, fields, asked, patch, depth):  # -> {name: [B, Q, D]}
    """Return what a target encoder makes of the tokens asked for.

    It reads all that is not missing, on the grid of the targets.

    Args:
        fields: batch with masks on the coarse grid.
        asked: {name: `hybrid.Asked`}.
        patch: of the targets.
        depth: blocks that tokens pass.
    """
    whole = {k: v for k, v in fields.items() if not k.endswith("_mask")}
    fine, shapes = {}, tokens.shapes(fields, encoder.modalities, patch)
    for kind in encoder.modalities:
        key = kind.mask_key
        gone = fields[key] == states.MISSING
        if kind.space:
            r = shapes[kind.name][0] // gone.shape[1]
            gone = einops.repeat(gone, "b h w t s -> b (h r) (w q) t s", r=r, q=r)
        fine[key] = jnp.where(gone, states.MISSING, states.ONLINE)
    exits = None
    if depth < encoder.depth:
        exits = {kind.name: depth for kind in encoder.modalities}
    seen = encoder.apply({"params": params}, whole | fine, patch, exits=exits)
    found = {}
    for name, a in asked.items():
        x = einops.rearrange(seen.tokens[name], "b ... d -> b (...) d")
        found[name] = x if a.index is None else patches.take(x, a.index)
    return jax.tree.map(jax.lax.stop_gradient, found)


def centred(goal, valid, bandset, bandsets):
    """Return targets without the mean of what is valid of their bandset.

    Args:
        goal: [..., D].
        valid: bool [...].
        bandset: int32 [...], below `bandsets`.
    """
    goal = goal.astype(jnp.float32)
    found = goal
    for s in range(bandsets):
        of = (bandset == s)[..., None]
        keep = of & valid[..., None]
        total = jnp.where(keep, goal, 0).sum(tuple(range(valid.ndim)))
        found = jnp.where(of, goal - total / jnp.maximum(keep.sum(), 1), found)
    return found
