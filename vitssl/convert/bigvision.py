"""Arrays of Flax ViTs in .npz: big_vision, and the first release (vision_transformer).

Blocks stand side by side or, trained with a scan, stacked along a leading axis. Layer
names number the modules of a block in order; the first release counted dropouts.
"""

import re
from collections.abc import Mapping

import numpy as np

from vitssl.convert import Rule, Table, family

_ATTENTION = "MultiHeadDotProductAttention"
_BLOCK = (
    Rule("LayerNorm_0/scale", "norm1/scale"),
    Rule("LayerNorm_0/bias", "norm1/bias"),
    Rule(f"{_ATTENTION}_0/qkv/kernel", "attn/qkv/kernel"),
    Rule(f"{_ATTENTION}_0/qkv/bias", "attn/qkv/bias"),
    Rule(f"{_ATTENTION}_0/out/bias", "attn/proj/bias"),
    Rule("LayerNorm_1/scale", "norm2/scale"),
    Rule("LayerNorm_1/bias", "norm2/bias"),
    Rule("MlpBlock_0/Dense_0/kernel", "mlp/fc1/kernel"),
    Rule("MlpBlock_0/Dense_0/bias", "mlp/fc1/bias"),
    Rule("MlpBlock_0/Dense_1/kernel", "mlp/fc2/kernel"),
    Rule("MlpBlock_0/Dense_1/bias", "mlp/fc2/bias"),
)
_STEM = (
    Rule("cls", "cls"),
    Rule("pos_embedding", "pos_embed"),
    Rule("embedding/kernel", "patch_embed/kernel"),
    Rule("embedding/bias", "patch_embed/bias"),
    Rule("Transformer/encoder_norm/scale", "norm/scale"),
    Rule("Transformer/encoder_norm/bias", "norm/bias"),
)
_HEAD = (
    Rule("head/kernel", "head/kernel"),
    Rule("head/bias", "head/bias"),
)
_OLD = (  # First release -> big_vision.
    (r"/MultiHeadDotProductAttention_1/", f"/{_ATTENTION}_0/"),
    (r"/LayerNorm_2/", "/LayerNorm_1/"),
    (r"/MlpBlock_3/", "/MlpBlock_0/"),
    (r"^Transformer/posembed_input/pos_embedding$", "pos_embedding"),
)
_STACK = "Transformer/encoderblock/"


def table(fields: Mapping) -> Table:
    """Return the table of a state that went through `prepare`."""
    heads = (("h", fields["heads"]),)
    out = f"{_ATTENTION}_0/out/kernel"
    block = (*_BLOCK, Rule(out, "attn/proj/kernel", "h c d -> (h c) d", heads))
    # The head of SigLIP pools by attention; pre_logits is a layer before the head.
    aside = ("MAPHead_0/{*}", "pre_logits/{*}", "opt/{*}")
    blocks = Table(block).under("Transformer/encoderblock_{i}/", "block_{i}/")
    encoder = (Table(_STEM, aside) + blocks).under(flax="encoder/")
    return Table(_HEAD) + encoder


def prepare(state: Mapping, notes: list) -> dict:
    """Return a state with one name per block and one qkv layer per attention."""
    found = {}
    for key, value in state.items():
        for pattern, new in _OLD:
            key = re.sub(pattern, new, key)
        if key.startswith(_STACK):
            for i, one in enumerate(value):
                found[f"Transformer/encoderblock_{i}/{key.removeprefix(_STACK)}"] = one
        else:
            found[key] = value
    if any(key.startswith("MAPHead_0/") for key in found):
        notes.append("MAPHead_0 (pooling by attention) has no place here; left aside")
    # Flax's default; the blocks here have the exact one.
    notes.append("trained with the tanh form of GELU: features differ by about 1e-3")
    for i in range(family.depth(found, "Transformer/encoderblock_{i}/")):
        attention = f"Transformer/encoderblock_{i}/{_ATTENTION}_0"
        for kind in ("kernel", "bias"):
            keys = [f"{attention}/{name}/{kind}" for name in ("query", "key", "value")]
            if not all(key in found for key in keys):
                continue  # The table says what is missing.
            parts = [found.pop(key) for key in keys]
            # [D, heads, c] or [heads, c]: the last two axes are one of ours.
            flat = [p.reshape(*p.shape[:-2], -1) for p in parts]
            found[f"{attention}/qkv/{kind}"] = np.concatenate(flat, axis=-1)
    return found


def export(state: Mapping, heads: int) -> dict:
    """Return a state of `table` with query, key and value apart: [D, heads, c]."""
    found = {}
    for key, value in state.items():
        head, qkv, kind = key.rpartition("/qkv/")
        if not qkv:
            found[key] = value
            continue
        for name, part in zip(
            ("query", "key", "value"), np.split(value, 3, axis=-1), strict=True
        ):
            shape = (*part.shape[:-1], heads, -1)
            found[f"{head}/{name}/{kind}"] = part.reshape(shape)
    return found


def tells(state: Mapping) -> dict:
    """Return the heads, an axis of the kernel that joins them: [heads, c, D]."""
    block = f"Transformer/encoderblock_0/{_ATTENTION}_0"
    return {"heads": state[f"{block}/out/kernel"].shape[0]}


def model(state: Mapping, options: family.Options) -> dict:
    """Return the fields of `models.vit.ViT`."""
    kernel = state["embedding/kernel"]  # [p, p, C, D], as ours.
    as_torch = {
        "kernel": np.transpose(kernel, (3, 2, 0, 1)),
        "fc1": state["Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"].T,
    }
    if "cls" in state:
        as_torch["cls"] = state["cls"]
    if "pos_embedding" in state:
        as_torch["pos_embed"] = state["pos_embedding"]
    known = family.Options(tells(state)["heads"], options.image_size)
    names = {k: k for k in ("kernel", "fc1", "cls", "registers", "pos_embed", "ls1")}
    fields = family.geometry(as_torch, names | {"block": "-{i}"}, known)
    fields["depth"] = family.depth(state, "Transformer/encoderblock_{i}/")
    return fields


BIGVISION = family.Family(
    name="bigvision",
    about=".npz of google-research/big_vision and vision_transformer",
    fits=lambda state: (
        "embedding/kernel" in state
        and any(key.startswith("Transformer/encoderblock") for key in state)
    ),
    model=model,
    table=table,
    prepare=prepare,
    tells=tells,
    places=("",),
    strip=("params/", "img/"),
    rule="corners",
    mean=family.HALF[0],
    std=family.HALF[1],
)
