"""DINOv3: facebookresearch/dinov3, transformers' DINOv3ViTModel, timm's port.

No position table but rotary positions that turn channel c with channel c + half of a
head; ours turns neighbours. Attention does not care in which order the channels of a
head stand as long as queries, keys, values and the projection agree, so the tables
reorder channels and the model stays as it is. Keys have no bias: ours holds zeros.

Source: Simeoni et al. 2025, arXiv:2508.10104.
"""

import re
from collections.abc import Mapping

import numpy as np

from vitssl import errors
from vitssl.convert import CONV, Rule, Table, family, vit_names

THETA = 100.0
_QKV = "(s h t c) i -> i (s h c t)"
_QKV_BIAS = "(s h t c) -> (s h c t)"

_HF_NAMES = (  # transformers -> facebookresearch.
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.mask_token", "mask_token"),
    (r"^embeddings\.register_tokens", "storage_tokens"),
    (r"^(?:model\.)?layer\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+)\.attention\.o_proj\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.attention\.([qkv])_proj\.", r"\1.attn.\2."),
    (r"^(blocks\.\d+)\.layer_scale([12])\.lambda1", r"\1.ls\2.gamma"),
    (r"^(blocks\.\d+)\.mlp\.up_proj\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.mlp\.down_proj\.", r"\1.mlp.fc2."),
)
_TIMM_NAMES = (  # timm -> facebookresearch.
    (r"^reg_token$", "storage_tokens"),
    (r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma"),
    (r"^(blocks\.\d+)\.attn\.([qkv])_bias$", r"\1.attn.\2.bias"),
)
_TO_HF = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^cls_token", "embeddings.cls_token"),
    (r"^storage_tokens", "embeddings.register_tokens"),
    (r"^blocks\.", "layer."),
    (r"^(layer\.\d+)\.attn\.proj\.", r"\1.attention.o_proj."),
    (r"^(layer\.\d+)\.attn\.qkv\.", r"\1.attention.qkv."),
    (r"^(layer\.\d+)\.ls([12])\.gamma", r"\1.layer_scale\2.lambda1"),
    (r"^(layer\.\d+)\.mlp\.fc1\.", r"\1.mlp.up_proj."),
    (r"^(layer\.\d+)\.mlp\.fc2\.", r"\1.mlp.down_proj."),
)
_NAMES = {
    "kernel": "patch_embed.proj.weight",
    "fc1": "blocks.0.mlp.fc1.weight",
    "cls": "cls_token",
    "registers": "storage_tokens",
    "pos_embed": "pos_embed",
    "ls1": "blocks.0.ls1.gamma",
    "block": "blocks.{i}.",
}


def table(heads: int, torch: str = "", flax: str = "") -> Table:
    """Return the table of the original's names, for a model of so many heads."""
    sizes = (("s", 3), ("h", heads), ("t", 2))
    two = (("h", heads), ("t", 2))
    qkv = "attn.qkv", "attn/qkv"
    block = (
        *vit_names.norm("norm1", "norm1"),
        Rule(f"{qkv[0]}.weight", f"{qkv[1]}/kernel", _QKV, sizes),
        Rule(f"{qkv[0]}.bias", f"{qkv[1]}/bias", _QKV_BIAS, sizes),
        Rule("attn.proj.weight", "attn/proj/kernel", "o (h t c) -> (h c t) o", two),
        vit_names.bias("attn.proj", "attn/proj"),
        Rule("ls1.gamma", "ls1"),
        *vit_names.norm("norm2", "norm2"),
        *vit_names.linear("mlp.fc1", "mlp/fc1"),
        *vit_names.linear("mlp.fc2", "mlp/fc2"),
        Rule("ls2.gamma", "ls2"),
    )
    stem = (
        Rule("cls_token", "cls"),
        Rule("storage_tokens", "registers"),
        Rule("patch_embed.proj.weight", "patch_embed/kernel", CONV),
        vit_names.bias("patch_embed.proj", "patch_embed"),
        *vit_names.norm("norm", "norm"),
    )
    aside = ("mask_token", "rope_embed.periods", "blocks.{i}.attn.qkv.bias_mask")
    blocks = Table(block).under("blocks.{i}.", "block_{i}/")
    return (Table(stem, aside) + blocks).under(torch, flax)


def export_hf(state: Mapping) -> dict:
    """Return a state dict of `table` with the names of transformers' DINOv3ViTModel.

    Raises:
        CheckpointError: keys have a bias, which that model does without.
    """
    found = {}
    for key, value in state.items():
        for pattern, new in _TO_HF:
            key = re.sub(pattern, new, key)
        if ".attention.qkv." not in key:
            found[key] = value
            continue
        for name, part in zip("qkv", np.split(value, 3), strict=True):
            short = key.replace(".qkv.", f".{name}_proj.")
            if short.endswith("k_proj.bias"):
                if np.any(part):
                    raise errors.CheckpointError(
                        f"{short}: transformers' DINOv3 has no bias of keys"
                    )
                continue
            found[short] = part
    return found


def _prepare(state: Mapping, notes: list) -> dict:
    """Return a state with the original's names, one qkv layer, and all biases."""
    found = {}
    for key, value in state.items():
        for pattern, new in _HF_NAMES + _TIMM_NAMES:
            key = re.sub(pattern, new, key)
        found[key] = value
    if not np.shape(found.get("storage_tokens", [[0]]))[-2]:
        del found["storage_tokens"]  # transformers stores none as none.
    if any(".mlp.w1." in k or ".gate_proj." in k for k in found):
        raise errors.CheckpointError(
            "mlp.w1: gated MLPs (DINOv3 ViT-S+, H+ and 7B) have no place in models.vit"
        )
    blocks = range(family.depth(found, "blocks.{i}."))
    lacking = []
    for i in blocks:
        for kind in ("weight", "bias"):
            lacking += _fuse(found, f"blocks.{i}.attn", kind)
    if lacking:
        notes.append(
            f"{len(lacking)} biases the model does without: zeros ({lacking[0]})"
        )
    biases = [f"blocks.{i}.attn.qkv.bias" for i in blocks]
    family.add_zero_bias(found, biases, notes)
    for i in blocks:
        mask = found.get(f"blocks.{i}.attn.qkv.bias_mask")
        if mask is not None:  # It is nan in the place of 1 in checkpoints of training.
            bias = np.array(found[f"blocks.{i}.attn.qkv.bias"], np.float32)
            d = len(bias) // 3
            bias[d : 2 * d] = 0.0
            found[f"blocks.{i}.attn.qkv.bias"] = bias
    _check_periods(found)
    return found


def _fuse(state, attn, kind) -> list[str]:
    """Join q, k and v of one block; return the names of those it lacks, now zeros.

    Raises:
        CheckpointError: a weight is missing.
    """
    names = [f"{attn}.{name}.{kind}" for name in "qkv"]
    there = [state[name] for name in names if name in state]
    missing = [name for name in names if name not in state]
    if not there:
        return []
    if missing and kind == "weight":
        raise errors.CheckpointError(f"the checkpoint lacks {missing[0]}")
    parts = [state.pop(name, np.zeros_like(there[0])) for name in names]
    state[f"{attn}.qkv.{kind}"] = np.concatenate(parts)
    return missing


def _check_periods(state):
    """Refuse frequencies that are not the published ones (stored in bfloat16)."""
    periods = state.get("rope_embed.periods")
    if periods is None:
        return
    m = len(periods)
    want = THETA ** (np.arange(m) / m)
    if not np.allclose(np.asarray(periods, np.float32), want, rtol=1e-2):
        raise errors.CheckpointError(
            f"rope_embed.periods: not those of base {THETA:g}; no other is supported"
        )


def _model(state: Mapping, options: family.Options) -> dict:
    rotary = dict(rope=True, rope_unit=True, rope_theta=THETA)
    rotary["norm_eps"] = options.eps or 1e-5
    return family.geometry(state, _NAMES, options) | rotary


def _tells(state):
    """Return the heads by the frequencies: a quarter of a head's channels."""
    periods = state.get("rope_embed.periods")
    if periods is None:
        return {}
    width = np.shape(state["patch_embed.proj.weight"])[0]
    return {"heads": width // (4 * len(periods))}


def _fits(state):
    hf = "embeddings.register_tokens" in state and "norm.weight" in state
    original = "storage_tokens" in state
    timm = "blocks.0.gamma_1" in state and "reg_token" in state
    return (hf or original or timm) and "pos_embed" not in state


DINOV3 = family.Family(
    name="dinov3",
    about="DINOv3 ViT-S to L: facebookresearch, transformers, timm",
    fits=_fits,
    model=_model,
    table=lambda fields: table(fields["heads"], flax="encoder/"),
    prepare=_prepare,
    tells=_tells,
    places=("teacher", "model", "state_dict", ""),
    strip=("module.", "backbone.", "dinov3_vit."),
)
