"""The table of methods: what the key `method` of a config may be."""

from vitssl.methods.classify import method
from vitssl.methods.dino import method as dino
from vitssl.methods.distill import method as distill
from vitssl.methods.hjepa import method as hjepa
from vitssl.methods.latent_mim import method as latent_mim
from vitssl.methods.localmim import method as localmim
from vitssl.methods.mae import method as mae
from vitssl.methods.parts import method as parts
from vitssl.methods.simclr import method as simclr

METHODS = {
    "classify": method.Classify,
    "dino": dino.DINO,
    "distill": distill.Distill,
    "hjepa": hjepa.HJEPA,
    "latent_mim": latent_mim.LatentMIM,
    "localmim": localmim.LocalMIM,
    "mae": mae.MAE,
    "parts": parts.PartDiscovery,
    "simclr": simclr.SimCLR,
}
