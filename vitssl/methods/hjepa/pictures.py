"""What H-JEPA has to show: masks, attention of its encoder, errors of its predictor.

Everything is named after the fields of `pictures.drawing.Material`.
"""

import dataclasses

import einops
import jax
import jax.numpy as jnp
import numpy as np

from vitssl.methods.hjepa import levels, masks
from vitssl.models import patches

DRAWS = 500


def arrays(method, params, extra, batch, image) -> dict:
    """Return fields of `pictures.drawing.Material`.

    Of a training batch on the host, and of whole images, uint8 [B, H, W, C].
    """
    found = jax.jit(_networks, static_argnums=0)(method, params, extra, batch, image)
    attention, cells = jax.device_get(found)
    sizes = [p.shape[1] for p, _, _ in cells]
    sides = [levels.cells(_grid(method), k) for k in range(len(cells))]
    # Groups of the list of targets have no place on a grid; cells have.
    placed = [c for c, n, s in zip(cells, sizes, sides, strict=True) if n == np.prod(s)]
    shown = batch["global"][:, 0], *map(list, zip(*placed, strict=True))
    return {
        "attention": attention,
        "grid": patches.grid(image, method.model.patch),
        "prediction": shown,
        **draws(method.masking, _grid(method)),
    }


def draws(spec: masks.Masking, grid) -> dict:
    """Return masks drawn as `spec` says, and as the other samplers would (seed 0)."""
    context, targets = masks.hierarchical(np.random.default_rng(0), spec, grid, DRAWS)
    samplers = {}
    for name in masks.SAMPLERS:
        other = dataclasses.replace(spec, sampler=name)
        one, blocks = masks.hierarchical(np.random.default_rng(0), other, grid)
        samplers[name] = one[0, 0], blocks[0, 0]
    return {
        "crop_masks": (context[0], targets[0]),
        "draws": (context, targets),
        "samplers": samplers,
    }


def _grid(method):
    return method.multicrop.grid("global", method.model.patch)


def _networks(method, params, extra, batch, image):
    """Return (attention [B, layers, heads, T, T], one Level of cells per level)."""
    net = method.networks(params, extra, train=False)
    x = patches.normalise(image, method.run.mean, method.run.std)
    _, state = net.encoder.apply({"params": net.target}, x, mutable=["intermediates"])
    sown = state["intermediates"]
    attention = [
        sown[f"block_{i}"]["attn"]["attention"][0] for i in range(net.encoder.depth)
    ]
    terms = method.terms(net, batch)
    cells = []
    for k, level in sorted(terms.near.levels.items()):
        level = jax.tree.map(lambda a: a[:, 0], level)  # Of global crop 0.
        if k == 0:
            # Level 0 is packed: one row per target, then padding; pass by pass if
            # several passes serve it.
            where, n = terms.targets.where[:, 0], terms.targets.tokens.shape[2]
            where = einops.rearrange(where, "b k m -> b (k m)")[:, : level[0].shape[1]]
            level = [_scatter(a, where, level.valid, n) for a in level]
        cells.append(tuple(level))
    return jnp.stack(attention, 1), cells


def _scatter(rows, where, valid, n):
    """Return [B, n, ...] with rows [B, M, ...] at `where` [B, M], zero elsewhere."""
    # Padding goes to a row of its own, which is cut off.
    where = jnp.where(valid, where, n)
    out = jnp.zeros((len(rows), n + 1, *rows.shape[2:]), rows.dtype)
    return jax.vmap(lambda o, i, r: o.at[i].set(r))(out, where, rows)[:, :n]
