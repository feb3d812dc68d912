"""What a method that trains one backbone has to show: where it looks."""

import jax

from vitssl.models import patches


def arrays(model, params, run, image) -> dict:
    """Return fields of `pictures.drawing.Material`.

    Args:
        model: a backbone with `attention_maps`.
        params: of the backbone.
        run: see `base.Run`.
        image: uint8 [B, H, W, C] whole images.
    """

    def maps(params, image):
        x = patches.normalise(image, run.mean, run.std)
        options = dict(method="attention_maps", mutable=["intermediates"])
        return model.apply({"params": params}, x, **options)[0]

    attention, grid = jax.device_get(jax.jit(maps)(params, image))
    return {"attention": attention, "grid": tuple(int(n) for n in grid)}
