"""What part discovery has to show: its maps over test images."""

import functools

import jax
import numpy as np


def arrays(method, params, extra, image) -> dict:
    """Return fields of `pictures.drawing.Material` of images uint8 [B, H, W, C]."""
    if not method.parts.finds_parts:
        weights = extra.get("average", params)
        return method.attention(weights["stage_2"]["backbone"], image)
    maps = _maps(params, extra, image, method=method)
    return {"grid": method.grid(image), "parts": np.asarray(maps)}


def probability(measures, run, step) -> float:
    """Return how likely a test batch is drawn after `step` updates; see `Measures`."""
    epoch = step / run.steps_per_epoch
    due = 0 < epoch <= 1 or step >= run.total_steps
    due |= epoch > 0 and epoch % measures.maps_every_epochs == 0
    return measures.maps if due else 0.0


def snapshot(method, params, extra, batch, path):
    """Draw the valid images of a test batch, on the host, with the parts found."""
    from vitssl.pictures import overlays

    maps = np.asarray(_maps(params, extra, batch["image"], method=method))
    valid = batch["valid"]
    overlays.write(path, batch["image"][valid], maps[valid])


@functools.partial(jax.jit, static_argnames="method")
def _maps(params, extra, image, *, method):
    return method.predict(params, extra, image).found.maps
