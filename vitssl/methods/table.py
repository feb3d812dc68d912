"""The table of methods: what the key `method` of a config may be."""

from vitssl.methods import classify, hjepa, localmim, parts, simclr

METHODS = {
    "classify": classify.Classify,
    "hjepa": hjepa.HJEPA,
    "localmim": localmim.LocalMIM,
    "parts": parts.Parts,
    "simclr": simclr.SimCLR,
}
