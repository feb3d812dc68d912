"""Hugging Face's names: ViTModel, Dinov2Model (RAD-DINO), Dinov2WithRegistersModel.

Files on the hub have the names of transformers 4; what transformers 5 holds in memory
and may write has others (`_MODERN`). Queries, keys and values are three layers there,
which ours holds as one: `fuse` joins them before a table is used, `split` parts them
after an export.
"""

import re
from collections.abc import Mapping

import numpy as np

from vitssl import errors
from vitssl.convert import CONV, Rule, Table, family, vit_names

# transformers 5 -> transformers 4.
_MODERN = (
    (r"^layers\.(\d+)\.", r"encoder.layer.\1."),
    (r"^(encoder\.layer\.\d+\.attention)\.q_proj\.", r"\1.attention.query."),
    (r"^(encoder\.layer\.\d+\.attention)\.k_proj\.", r"\1.attention.key."),
    (r"^(encoder\.layer\.\d+\.attention)\.v_proj\.", r"\1.attention.value."),
    (r"^(encoder\.layer\.\d+\.attention)\.o_proj\.", r"\1.output.dense."),
)
_MODERN_VIT = (
    (r"^(encoder\.layer\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"^(encoder\.layer\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
)

_VIT_BLOCK = (
    *vit_names.norm("layernorm_before", "norm1"),
    *vit_names.linear("attention.attention.qkv", "attn/qkv"),
    *vit_names.linear("attention.output.dense", "attn/proj"),
    *vit_names.norm("layernorm_after", "norm2"),
    *vit_names.linear("intermediate.dense", "mlp/fc1"),
    *vit_names.linear("output.dense", "mlp/fc2"),
)
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
_QKV = ("query", "key", "value")
_ONE = re.compile(r"(.*attention\.attention\.)(query|key|value)\.(weight|bias)")
_ALL = re.compile(r"(.*attention\.attention\.)qkv\.(weight|bias)")

NAMES = {
    "kernel": "embeddings.patch_embeddings.projection.weight",
    "fc1": "encoder.layer.0.mlp.fc1.weight",
    "cls": "embeddings.cls_token",
    "registers": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "ls1": "encoder.layer.0.layer_scale1.lambda1",
    "block": "encoder.layer.{i}.",
}
_VIT_NAMES = NAMES | {"fc1": "encoder.layer.0.intermediate.dense.weight"}


def table(torch: str = "", flax: str = "", of_vit: bool = False) -> Table:
    """Return the table of Dinov2Model, or of ViTModel, after `fuse`."""
    aside = ("embeddings.mask_token",) + (("pooler.dense.{*}",) if of_vit else ())
    blocks = Table(_VIT_BLOCK if of_vit else _BLOCK)
    blocks = blocks.under("encoder.layer.{i}.", "block_{i}/")
    return (Table(_STEM, aside) + blocks).under(torch, flax)


def is_hf(state: Mapping) -> bool:
    """Return whether a state dict has Hugging Face's names."""
    return any(_ONE.fullmatch(key) for key in state)


def fuse(state: Mapping) -> dict:
    """Return a state dict in which query, key and value are one layer "qkv".

    Raises:
        CheckpointError: one of the three is missing.
    """
    out: dict[str, np.ndarray] = {}
    groups: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for key, value in state.items():
        if match := _ONE.fullmatch(key):
            head, which, kind = match.groups()
            groups.setdefault((head, kind), {})[which] = np.asarray(value)
        else:
            out[key] = value
    for (head, kind), parts in groups.items():
        if missing := [w for w in _QKV if w not in parts]:
            name = f"{head}{missing[0]}.{kind}"
            raise errors.CheckpointError(f"the checkpoint lacks {name}")
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


def old_names(state: Mapping, of_vit: bool) -> dict:
    """Return the state with the names of transformers 4, whichever it has."""
    found = {}
    for key, value in state.items():
        for pattern, new in _MODERN + (_MODERN_VIT if of_vit else ()):
            key = re.sub(pattern, new, key)
        found[key] = value
    return found


def _prepare(of_vit):
    def prepare(state: Mapping, notes: list) -> dict:
        state = old_names(state, of_vit)
        pattern = re.compile(r"(.*attention\.attention\.)(query|key|value)\.weight")
        biases = [
            f"{m[1]}{m[2]}.bias" for key in state if (m := pattern.fullmatch(key))
        ]
        family.add_zero_bias(state, biases, notes)
        return fuse(state)

    return prepare


def _model(names, eps):
    def model(state: Mapping, options: family.Options) -> dict:
        fields = family.geometry(state, names, options)
        return fields | dict(norm_eps=options.eps or eps, resampling="plain")

    return model


def _is_ours(state):
    return NAMES["kernel"] in state


VIT = family.Family(
    name="hf_vit",
    about="transformers' ViTModel and ViTForImageClassification",
    fits=lambda state: (
        _is_ours(state)
        and any(key.endswith("layernorm_before.weight") for key in state)
    ),
    # transformers' default of this model; other files say otherwise in config.json.
    model=_model(_VIT_NAMES, 1e-12),
    table=lambda fields: family.encoder_and_head(table(of_vit=True), "classifier"),
    prepare=_prepare(True),
    places=("", "model", "state_dict"),
    strip=("vit.",),
    rule="plain",
    mean=family.HALF[0],
    std=family.HALF[1],
)
DINOV2 = family.Family(
    name="hf_dinov2",
    about="transformers' Dinov2Model, Dinov2WithRegistersModel, microsoft/rad-dino",
    fits=lambda state: _is_ours(state) and NAMES["ls1"] in state,
    model=_model(NAMES, 1e-6),
    table=lambda fields: family.encoder_and_head(table(), "classifier"),
    prepare=_prepare(False),
    places=("", "model", "state_dict"),
    strip=("dinov2_with_registers.", "dinov2."),
    rule="plain",
)
