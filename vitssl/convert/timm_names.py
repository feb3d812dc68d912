"""Families whose checkpoints carry timm's names: they differ in wrapping and extras.

timm itself, DINO, DINOv2 (github.com/facebookresearch/dinov2), MAE, I-JEPA, LocalMIM
with its frozen runs (ViTFreeze), H-JEPA.
"""

import re
from collections.abc import Mapping

import numpy as np

from vitssl import errors
from vitssl.convert import Table, family, vit_names

NAMES = {
    "kernel": "patch_embed.proj.weight",
    "fc1": "blocks.0.mlp.fc1.weight",
    "cls": "cls_token",
    "registers": "reg_token",
    "pos_embed": "pos_embed",
    "ls1": "blocks.0.ls1.gamma",
    "block": "blocks.{i}.",
}


def _table(*ignore):
    """Return (fields -> table) of a ViT with further keys left aside."""

    def table(fields: dict) -> Table:
        del fields
        return family.encoder_and_head(vit_names.table() + Table((), ignore))

    return table


def _model(**fixed):
    """Return the function (state, options) -> fields of ViT."""

    def model(state: Mapping, options: family.Options) -> dict:
        fields = family.geometry(state, NAMES, options) | fixed
        if "blocks.0.attn.q_norm.weight" in state:
            fields["qk_norm"] = True
        return fields

    return model


def _tells(state: Mapping) -> dict:
    """Return the heads by the norm of a head's queries, where there is one."""
    norm = state.get("blocks.0.attn.q_norm.weight")
    if norm is None or not len(norm):
        return {}
    return {"heads": np.shape(state[NAMES["kernel"]])[0] // len(norm)}


def _prepare(state: Mapping, notes: list) -> dict:
    """Return a timm state: qkv with bias, registers without position."""
    state = dict(state)
    if "fc_norm.weight" in state:
        raise errors.CheckpointError(
            "fc_norm.weight: this model normalises the mean of its tokens, not the "
            "tokens (a fine-tuned classifier with average pooling); import the "
            "pre-trained checkpoint it started from"
        )
    blocks = range(family.depth(state, "blocks.{i}."))
    biases = [f"blocks.{i}.attn.qkv.bias" for i in blocks]
    family.add_zero_bias(state, biases, notes)
    if "register_tokens" in state:  # DINOv2's spelling.
        state["reg_token"] = state.pop("register_tokens")
    _distilled(state, notes)
    _fold_registers(state, notes)
    return state


def _distilled(state, notes):
    """Make DeiT's distillation token a register, whose position is added to it.

    It takes part in attention as a register does; its own classifier is left aside.
    Source: Touvron et al. 2020, arXiv:2012.12877.
    """
    if "dist_token" not in state or "reg_token" in state:
        return
    table = state.get("pos_embed")
    if table is None or "cls_token" not in state:
        raise errors.CheckpointError(
            "dist_token: DeiT's distillation token, without a class token or positions "
            "beside it; there is no such model"
        )
    token = state.pop("dist_token")
    state["reg_token"] = np.asarray(token) + np.asarray(table[:, 1:2])
    state["pos_embed"] = np.delete(table, 1, axis=1)
    notes.append(
        "dist_token, DeiT's distillation token, is a register here with its position "
        "added: the features are the same; its classifier head_dist has no place"
    )


def _fold_registers(state, notes):
    """Add the positions of registers, where a table has them, to the registers."""
    if "reg_token" not in state or "pos_embed" not in state:
        return
    table, registers = state["pos_embed"], state["reg_token"]
    rows, has_cls = table.shape[1], int("cls_token" in state)
    count = registers.shape[1]
    n = rows - has_cls - count
    square = round(max(n, 0) ** 0.5) ** 2 == n
    plain = any(round((rows - k) ** 0.5) ** 2 == rows - k for k in (0, has_cls))
    if plain or not square:
        return
    first = has_cls
    state["reg_token"] = registers + table[:, first : first + count]
    state["pos_embed"] = np.delete(table, slice(first, first + count), axis=1)
    notes.append("positions of the registers are added to the registers")


def _chunked(state: Mapping, notes: list) -> dict:
    """Return DINOv2's state with blocks.{chunk}.{i}. as blocks.{i}.

    Its training code groups blocks for FSDP; within their group they keep their own
    number.
    """
    pattern = re.compile(r"blocks\.\d+\.(\d+\..*)")
    found = {}
    for key, value in state.items():
        match = pattern.fullmatch(key)
        found[f"blocks.{match[1]}" if match else key] = value
    return _prepare(found, notes)


def _stages(state: Mapping, notes: list) -> dict:
    """Return LocalMIM's state with the norm of its last stage as the norm.

    It has one norm per stage, norm.{k}; a run that froze stages deletes theirs, which
    renumbers the others, so the last stage is the highest number there is.
    """
    found, last = dict(state), family.depth(state, "norm.{i}.") - 1
    for kind in ("weight", "bias"):
        found[f"norm.{kind}"] = found.pop(f"norm.{last}.{kind}")
    notes.append(
        f"norm.{last} of the last stage is the encoder's norm; its users pool tokens "
        "before any norm when they fine-tune"
    )
    return _prepare(found, notes)


def _localmim_model(state: Mapping, options: family.Options) -> dict:
    """Return the fields of LocalMIM's encoder: a fixed table may not be stored."""
    fields = _model(resampling="plain")(state, options)
    if "pos_embed" not in state:
        fields["positions"] = "sincos"
    return fields


TIMM = family.Family(
    name="timm",
    about="timm's VisionTransformer: class token, registers, LayerScale, qk-norm",
    fits=family.is_vit,
    model=_model(),
    table=_table("head_dist.{*}"),
    prepare=_prepare,
    tells=_tells,
    places=("state_dict_ema", "state_dict", "model", ""),
)
DINO = family.Family(
    name="dino",
    about="facebookresearch/dino; of a training checkpoint, the teacher",
    fits=lambda state: family.is_vit(state) and "head.last_layer.weight_g" in state,
    model=_model(resampling="plain"),
    table=_table("head.mlp.{*}", "head.last_layer.{*}"),
    prepare=_prepare,
    places=("teacher", "student", "state_dict", ""),
    strip=("module.", "backbone."),
    rule="offset",
)
DINOV2 = family.Family(
    name="dinov2",
    about="facebookresearch/dinov2, with or without registers",
    fits=lambda state: (
        family.is_vit(state)
        and "mask_token" in state
        and "pos_embed" in state
        and any(key.endswith("ls1.gamma") for key in state)
    ),
    model=_model(resampling="plain"),
    table=_table("mask_token", "dino_head.{*}", "ibot_head.{*}"),
    prepare=_chunked,
    places=("teacher", "model", ""),
    strip=("module.", "backbone."),
    rule="offset",
)
MAE = family.Family(
    name="mae",
    about="facebookresearch/mae: the encoder; the decoder is left aside",
    fits=lambda state: family.is_vit(state) and "decoder_embed.weight" in state,
    model=_model(resampling="plain"),
    table=_table("mask_token", "decoder_{*}"),
    prepare=_prepare,
    rule="plain",
    pool="mean",
)
IJEPA = family.Family(
    name="ijepa",
    about="facebookresearch/ijepa: the target encoder",
    fits=lambda state: family.is_vit(state) and "cls_token" not in state,
    model=_model(resampling="plain"),
    table=_table(),
    prepare=_prepare,
    places=("target_encoder", "encoder"),
    named=True,
    rule="plain",
    pool="mean",
)
LOCALMIM = family.Family(
    name="localmim",
    about="LocalMIM and ViTFreeze: the encoder; decoders are left aside",
    fits=lambda state: family.is_vit(state) and "norm.0.weight" in state,
    model=_localmim_model,
    table=_table(
        "norm.{i}.{*}", "decoder.{*}", "mask_token", "hog{*}", "pos_embed_{*}"
    ),
    prepare=_stages,
    rule="plain",
    pool="mean",
)
_TARGET = "target_encoder.vit."
_HJEPA_NAMES = {key: _TARGET + name for key, name in NAMES.items()}
_HJEPA_NAMES["ls1"] = f"{_TARGET}blocks.0.ls_attn.gamma"
_HJEPA_ASIDE = (
    "context_encoder.{*}",
    "predictor.{*}",
    "hierarchy_projections.{*}",
    "fpn_{*}",
)
HJEPA = family.Family(
    name="hjepa",
    about="jonwiggins/H-JEPA: the target encoder",
    fits=lambda state: _HJEPA_NAMES["kernel"] in state,
    model=lambda state, options: family.geometry(state, _HJEPA_NAMES, options),
    table=lambda fields: vit_names.table(_TARGET, "encoder/") + Table((), _HJEPA_ASIDE),
    places=("model_state_dict", "model", "state_dict", ""),
    pool="mean",
)
