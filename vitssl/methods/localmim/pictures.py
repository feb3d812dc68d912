"""What LocalMIM has to show: what it makes of hidden patches, stage by stage."""

import functools

import einops
import jax
import jax.numpy as jnp

from vitssl.models import patches


def arrays(method, params, extra, batch) -> dict:
    """Return fields of `pictures.drawing.Material` of a training batch on the host."""
    crops = batch["global"][:, 0]
    found = _stages(params, extra, crops, method=method)
    hidden, stages = jax.device_get(found)
    titles = {
        k: f"stage {k}: {method.stages.target(k)}" for k in range(method.stages.count)
    }
    return {
        "reconstruction": (crops, hidden, {titles[k]: v for k, v in stages.items()})
    }


@functools.partial(jax.jit, static_argnames="method")
def _stages(params, extra, crops, *, method):
    """Return (hidden [B, h, w] bool, {stage: {kind: (predicted, target)}})."""
    image = patches.normalise(crops, method.run.mean, method.run.std)
    at = method.phase(max(0, method.run.total_steps - 1))
    key = jax.random.key(0)
    masks = method.masking.draw(key, len(image), method.grid, at.visible)
    tokens = method.run_prefix(params, image) if method.prefix.boundary else None
    outputs = method.encode(params, image, masks, tokens=tokens)
    every = tuple(range(method.stages.count))
    goals = method.goals(params, extra, image, every, tokens)
    found = {}
    for k in every:
        guess = method.predicted(params, outputs[at.blocks[k]], masks, k)
        both = [_as_map(x, method, k) for x in (guess, goals[k])]
        found[k] = _shown(both, image, method, k)
    hidden = einops.rearrange(masks.mask > 0, "b (h w) -> b h w", h=method.grid[0])
    return hidden, found


def _as_map(x, method, k):  # [B, N, s, s, C] -> [B, h s, w s, C]
    rows = round(method.grid[0] * min(1, method.stages.scales[k]))
    return einops.rearrange(
        x.astype(jnp.float32), "b (h w) p q c -> b (h p) (w q) c", h=rows
    )


def _shown(both, image, method, k):
    """Return {kind: (predicted, target)} as `pictures.reconstruction` draws it."""
    kind = method.stages.target(k)
    if kind == "hog":
        bins = dict(n=method.target.nbins)
        mean = "b h w (c n) -> b h w n"
        return {"hog": tuple(einops.reduce(x, mean, "mean", **bins) for x in both)}
    if kind != "pixel":
        return {"tokens": tuple(both)}
    cell = image.shape[1] // both[0].shape[1]
    normalised = method.target.normalise_pixels
    both = [patches.paint(x, image, cell, normalised) for x in both]
    mean, std = (jnp.asarray(v) for v in (method.run.mean, method.run.std))
    return {"pixels": tuple(x * std + mean for x in both)}
