"""vitssl: self-supervised vision transformers in JAX; five systems, one trainer."""

__version__ = "0.1.0"


def load(path, **options):
    """Return a callable from images to features; see `vitssl.run.inference.load`."""
    from vitssl.run import (
        inference,  # Not on import: the command line starts in no time.
    )

    return inference.load(path, **options)


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
