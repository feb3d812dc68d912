"""vitssl: self-supervised vision transformers in JAX; five systems, one trainer."""

__version__ = "0.1.0"


def load(path, **options):
    """Return a callable from images to features; see `vitssl.run.inference.load`."""
    from vitssl.run import (
        inference,  # Not on import: the command line starts in no time.
    )

    return inference.load(path, **options)


def train(data, method="", model="", **options):
    """Train on a folder of images by what fits it and this machine: `vitssl train DIR`.

        vitssl.train("photos", method="hjepa", model="vit_s16", epochs=50)

    Args:
        data: folder of images, in class folders or not.
        method, model, and as options weights, size, epochs, steps, batch_size, labels,
            workdir: see `vitssl.tools.own`; what is left out is chosen, and told.
        options: overrides, ("optim.lr=1e-3", ...): any other key of the config;
            verbose=True shows every line of the log.

    Returns:
        the metrics of the final evaluation, {"final/trained/knn/top1": ...}.

    Raises:
        VitsslError: whatever ends a run; the message says what to do.
    """
    from vitssl.tools import own

    return own.train(data, method, model, **options)


def normalise_sensors(raw, **options):
    """Return raw values of sensors as features of an OlmoEarth import take them.

        load = vitssl.load("olmoearth-nano")
        raw = {"sentinel2_l2a": dn, "timestamps": dates}  # [B, H, W, T, c], [B, T, 3]
        names = {"sentinel2_l2a": ("B02", "B03", "B04", "B08")}
        load(vitssl.normalise_sensors(raw, bands=names))["pooled"]

    See `vitssl.data.modalities.normalise_sensors`.
    """
    from vitssl.data import modalities

    return modalities.normalise_sensors(raw, **options)
