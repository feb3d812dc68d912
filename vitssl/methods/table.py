"""The table of methods: what the key `method` of a config may be."""

from vitssl.methods import hjepa, localmim, parts

METHODS = {
    "hjepa": hjepa.HJEPA,
    "localmim": localmim.LocalMIM,
    "parts": parts.Parts,
}
