"""The table of methods: what the key `method` of a config may be."""

from vitssl.methods import classify, hjepa, latent_mim, localmim, parts, simclr

METHODS = {
    "classify": classify.Classify,
    "hjepa": hjepa.HJEPA,
    "latent_mim": latent_mim.LatentMIM,
    "localmim": localmim.LocalMIM,
    "parts": parts.Parts,
    "simclr": simclr.SimCLR,
}
