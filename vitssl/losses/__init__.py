"""Losses: arrays -> a float32 scalar to minimise. No parameters, no state.

A loss is written on the global batch: under jit on a sharded batch its statistics
are those of all devices, with no collective in the code.
"""

from vitssl.losses import contrastive, regression, sigreg, vicreg
from vitssl.methods.hjepa import combined
from vitssl.methods.latent_mim import discrimination

__all__ = [
    "combined",
    "contrastive",
    "patch_discrimination",
    "regression",
    "sigreg",
    "vicreg",
]
