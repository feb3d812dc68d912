"""What part discovery has to show: its maps over test images."""

import jax
import numpy as np

from vitssl.ops import patches


def arrays(method, params, extra, batch, image) -> dict:
    """Return fields of `evals.pictures.Material`.

    Args:
        method: Parts.
        params, extra: of the method.
        batch: not used.
        image: uint8 [B, H, W, C] whole images.
    """
    del batch
    if not method.parts.finds_parts:
        return {"grid": patches.grid(image, method.model.patch)}
    maps = jax.jit(lambda p, e, x: method.predict(p, e, x).found.maps)
    return {"grid": method.grid(image), "parts": np.asarray(maps(params, extra, image))}
