"""What latent masked modelling reads from whole samples: states, means in place."""

import einops
import jax
import jax.numpy as jnp

from vitssl.data import modalities
from vitssl.models import patches
from vitssl.models import tokens as states


def online(kind, x, patch):
    """Return the states of the tokens of x [B, H, W, T, C]: ONLINE or MISSING.

    Args:
        kind: modality.
        x: its values, `modalities.MISSING` where there is nothing.
        patch: side in 10 m pixels; any missing pixel of it counts.
    """
    gone = x == modalities.MISSING
    sets = [gone[..., list(c)].any(-1) for c in kind.channels]
    gone = jnp.stack(sets, axis=-1)
    if kind.space:
        n = patch * kind.factor
        gone = einops.reduce(gone, "b (h p) (w q) t s -> b h w t s", "max", p=n, q=n)
    return jnp.where(gone, states.MISSING, states.ONLINE)


def in_place(tokens: dict, mask: dict, pool: str = "mean"):
    """Return one vector per place: [B, h, w, D] float32.

    Args:
        tokens: {modality: [B, h, w, T, S, D]}; those without places are left out.
        mask: {modality: [B, h, w, T, S]}; only ONLINE tokens count.
        pool: "mean", or "times": one mean for each time step, side by side:
            [B, h, w, T D]; what does not change with time counts at every one.

    Returns:
        The mean over times and bandsets of each modality, then over the modalities
        that have any there; 0 of none.
    """
    axes = (3, 4) if pool == "mean" else (4,)
    total, count = 0.0, 0.0
    for name, x in tokens.items():
        if x.ndim != 6:
            continue
        seen = (mask[name] == states.ONLINE)[..., None].astype(jnp.float32)
        held = seen.sum(axes)
        mean = (x.astype(jnp.float32) * seen).sum(axes) / jnp.maximum(held, 1)
        total, count = total + mean, count + (held > 0)
    found = total / jnp.maximum(count, 1)
    return einops.rearrange(found, "b h w ... d -> b h w (... d)")


def centred(goal, valid):
    """Return targets [B, Q, D] without their mean over what is valid [B, Q]."""
    goal = goal.astype(jnp.float32)
    keep = valid[..., None]
    mean = jnp.where(keep, goal, 0).sum((0, 1)) / jnp.maximum(valid.sum(), 1)
    return goal - mean


def pixels(kinds, image):
    """Return all that is known of a pixel: [B, H, W, K], 0 where there is nothing."""
    parts = [image[k.name] for k in kinds if k.space and k.factor == 1]
    parts = [einops.rearrange(x, "b h w t c -> b h w (t c)") for x in parts]
    x = jnp.concatenate(parts, axis=-1)
    return jnp.where(x == modalities.MISSING, 0.0, x)


def encoded(encoder, target, fields, asked, patch, depth):
    """Return what a target encoder makes of the tokens asked for, without gradient.

    It reads all that is not missing, on the grid of the targets.

    Args:
        encoder: `methods.latent_mim.network.Encoder`.
        target: its parameters.
        fields: batch with masks on the coarse grid.
        asked: {modality: `methods.latent_mim.hybrid.Asked`}.
        patch: of the targets.
        depth: blocks that tokens pass.

    Returns:
        {modality: [B, Q, D]}.
    """
    whole = {k: v for k, v in fields.items() if not k.endswith("_mask")}
    fine = {}
    for kind in encoder.modalities:
        x, key = fields[kind.name], states.mask_key(kind)
        shape = (len(x), *states.shapes(fields, encoder.modalities, patch)[kind.name])
        gone = fields[key] == states.MISSING
        if kind.space:
            r = shape[1] // gone.shape[1]
            gone = einops.repeat(gone, "b h w t s -> b (h r) (w q) t s", r=r, q=r)
        fine[key] = jnp.where(gone, states.MISSING, states.ONLINE)
    exits = None
    if depth < encoder.depth:
        exits = {kind.name: depth for kind in encoder.modalities}
    seen = encoder.apply({"params": target}, whole | fine, patch, exits=exits)
    found = {}
    for name, a in asked.items():
        x = einops.rearrange(seen.tokens[name], "b ... d -> b (...) d")
        found[name] = x if a.index is None else patches.take(x, a.index)
    return jax.tree.map(jax.lax.stop_gradient, found)
