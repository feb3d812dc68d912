"""DINOv2 in Hugging Face's layout: transformers' Dinov2Model, microsoft/rad-dino.

timm's layout is that of `convert.vit_names`. Here queries, keys and values are three
layers, which ours holds as one: `fuse` joins them before the table is used, `split`
parts them after an export.
"""

import re
from collections.abc import Mapping

import numpy as np

from vitssl import convert
from vitssl.convert import CONV, Rule, Table, vit_names

_QKV = ("query", "key", "value")
_ONE = re.compile(r"(.*attention\.attention\.)(query|key|value)\.(weight|bias)")
_ALL = re.compile(r"(.*attention\.attention\.)qkv\.(weight|bias)")

_BLOCK = (
    *vit_names.norm("norm1", "norm1"),
    *vit_names.linear("attention.attention.qkv", "attn/qkv"),
    *vit_names.linear("attention.output.dense", "attn/proj"),
    Rule("layer_scale1.lambda1", "ls1"),
    *vit_names.norm("norm2", "norm2"),
    *vit_names.linear("mlp.fc1", "mlp/fc1"),
    *vit_names.linear("mlp.fc2", "mlp/fc2"),
    Rule("layer_scale2.lambda1", "ls2"),
)

_STEM = (
    Rule("embeddings.cls_token", "cls"),
    Rule("embeddings.register_tokens", "registers"),
    Rule("embeddings.position_embeddings", "pos_embed"),
    Rule("embeddings.patch_embeddings.projection.weight", "patch_embed/kernel", CONV),
    vit_names.bias("embeddings.patch_embeddings.projection", "patch_embed"),
    *vit_names.norm("layernorm", "norm"),
)


def table(torch: str = "", flax: str = "") -> Table:
    """Return the table of a state dict that went through `fuse`."""
    blocks = Table(_BLOCK).under("encoder.layer.{i}.", "block_{i}/")
    return (Table(_STEM, ("embeddings.mask_token",)) + blocks).under(torch, flax)


def is_hf(state: Mapping) -> bool:
    """Return whether a state dict has Hugging Face's names."""
    return any(_ONE.fullmatch(key) for key in state)


def fuse(state: Mapping) -> dict:
    """Return a state dict in which query, key and value are one layer "qkv".

    Raises:
        CheckpointError: one of the three is missing.
    """
    out, groups = {}, {}
    for key, value in state.items():
        if match := _ONE.fullmatch(key):
            head, which, kind = match.groups()
            groups.setdefault((head, kind), {})[which] = np.asarray(value)
        else:
            out[key] = value
    for (head, kind), parts in groups.items():
        if missing := [w for w in _QKV if w not in parts]:
            name = f"{head}{missing[0]}.{kind}"
            raise convert.errors.CheckpointError(f"the checkpoint lacks {name}")
        out[f"{head}qkv.{kind}"] = np.concatenate([parts[w] for w in _QKV])
    return out


def split(state: Mapping) -> dict:
    """Return a state dict with three layers again; `fuse` backwards."""
    out = {}
    for key, value in state.items():
        match = _ALL.fullmatch(key)
        if match is None:
            out[key] = value
            continue
        for which, part in zip(_QKV, np.split(value, 3), strict=True):
            out[f"{match[1]}{which}.{match[2]}"] = part
    return out
