"""State dicts of iFAM's models for the golden cases, as ours and back."""

from collections.abc import Mapping

from vitssl import convert
from vitssl.convert import huggingface
from vitssl.methods.parts import names


def load(state: Mapping, like, table=names.two_stage) -> dict:
    """Parameters like `like` with the weights of a state dict, timm's or HF's names."""
    hf = huggingface.is_hf(state)
    state = huggingface.fuse(state) if hf else state
    return convert.convert(state, like, table(hf=hf))


def export(params, table=names.two_stage, *, hf: bool = False) -> dict:
    """`load` backwards."""
    state = convert.export(params, table(hf=hf))
    return huggingface.split(state) if hf else state
