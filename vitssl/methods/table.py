"""The table of methods: what the key `method` of a config may be."""

from vitssl.methods import hjepa, parts

METHODS = {"hjepa": hjepa.HJEPA, "parts": parts.Parts}
