"""HierarchialViT: the state dict of its hvit/models/hvt.py (DiseaseAwareHVT).

    rgb_* and spectral_*, simple_fusion_projector, dfca_module, *_to_dfca_proj
                                                            encoder/
    classifier_head_norm, classifier_head                   head/
    aux_head_*, contrastive_projector, mae_decoder_*        aux_*, projector, mae_*

Blocks count through all stages here, within their stage there.
"""

from collections.abc import Mapping

import numpy as np

from vitssl import convert
from vitssl.convert import CONV, LINEAR, Rule, Table, vit

STREAMS = {"rgb": "", "spectral": "spectral/"}
BLOCK = (
    *vit.norm("norm1", "norm1"),
    *vit.linear("attn.qkv", "attn/qkv"),
    *vit.linear("attn.proj", "attn/proj"),
    *vit.norm("norm2", "norm2"),
    *vit.linear("mlp.fc1", "mlp/fc1"),
    *vit.linear("mlp.fc2", "mlp/fc2"),
)
MERGE = (
    *vit.norm("norm", "norm"),
    Rule("reduction.weight", "reduction/kernel", LINEAR),
)
DFCA = (
    Rule("disease_mask_param", "disease_mask"),
    Rule("cross_attention.in_proj_weight", "attn/kernel", LINEAR),
    Rule("cross_attention.in_proj_bias", "attn/bias"),
    *vit.linear("cross_attention.out_proj", "attn/proj"),
    *vit.norm("norm1", "norm1"),
    *vit.linear("ffn.0", "mlp/fc1"),
    *vit.linear("ffn.3", "mlp/fc2"),
    *vit.norm("norm2", "norm2"),
)


def encoder(depths: tuple[int, ...], flax: str = "") -> Table:
    """Return the table of `models.hvit.HViT`.

    Args:
        depths: blocks of every stage.
        flax: prefix of the leaves, "encoder/".
    """
    found = Table(DFCA).under("dfca_module.", "dfca/")
    for theirs, ours in STREAMS.items():
        found += Table(
            (
                Rule(f"{theirs}_pos_embed", f"{ours}pos_embed"),
                Rule(
                    f"{theirs}_patch_embed.proj.weight",
                    f"{ours}patch_embed/kernel",
                    CONV,
                ),
                vit.bias(f"{theirs}_patch_embed.proj", f"{ours}patch_embed"),
                *vit.norm(f"{theirs}_patch_embed.norm", f"{ours}patch_norm"),
                *vit.norm(f"norm_{theirs}_final_encoder", f"{ours}norm"),
                *vit.linear(f"{theirs}_to_dfca_proj", f"{theirs}_to_dfca"),
            )
        )
        first = 0
        for s, depth in enumerate(depths):
            stage = f"{theirs}_stages.{s}."
            for i in range(depth):
                block = f"{ours}block_{first + i}/"
                found += Table(BLOCK).under(f"{stage}blocks.{i}.", block)
            merge = f"{ours}merge_{s}/"
            found += Table(MERGE).under(f"{stage}downsample_layer.", merge)
            first += depth
    found += Table(vit.linear("simple_fusion_projector", "concat"))
    return found.under(flax=flax)


def heads() -> Table:
    """Return the table of the heads of `models.hvit_heads.HViTModel`."""
    rules = [
        *vit.norm("classifier_head_norm", "head/norm"),
        *vit.linear("classifier_head", "head"),
    ]
    for name in STREAMS:
        rules += vit.linear(f"aux_head_{name}", f"aux_{name}/fc1")
        rules += mae_head(f"mae_decoder_{name}.", f"mae_{name}/")
    # GELUs stand between the linear layers.
    for i in range(8):
        rules += vit.linear(f"contrastive_projector.{2 * i}", f"projector/fc{i + 1}")
    return Table(tuple(rules))


def mae_head(torch: str = "", flax: str = "") -> tuple[Rule, ...]:
    """Return the rules of a MAEPredictionHead under two prefixes."""
    first = vit.linear(f"{torch}decoder_pred.0", f"{flax}fc1")
    return (*first, *vit.linear(f"{torch}decoder_pred.2", f"{flax}fc2"))


def table(depths: tuple[int, ...], flax: str = "backbone/") -> Table:
    """Return the table of `models.hvit_heads.HViTModel`: backbone and heads.

    Args:
        depths: blocks of every stage.
        flax: prefix of the backbone's leaves.
    """
    return encoder(depths, flax) + heads()


def projector(batchnorm: bool) -> Table:
    """Return the table of `models.projector.Projector`, into {"params", "stats"}.

    Args:
        batchnorm: that of the logged runs, phase3_pretraining/models; else that of
            scripts/pretrain.py.
    """
    if not batchnorm:
        one = vit.linear("0", "params/fc1")
        return Table((*one, *vit.linear("2", "params/fc2")))
    rules = (
        *vit.linear("head.0", "params/fc1"),
        *vit.norm("head.1", "params/norm"),
        Rule("head.1.running_mean", "stats/mean"),
        Rule("head.1.running_var", "stats/var"),
        *vit.linear("head.3", "params/fc2"),
    )
    return Table(rules, ("head.1.num_batches_tracked",))


def depths(state: Mapping, stream: str = "rgb") -> tuple[int, ...]:
    """Return the number of blocks of every stage."""
    found = {}
    for key in state:
        parts = key.split(".")
        if parts[0] == f"{stream}_stages" and parts[2] == "blocks":
            stage, block = int(parts[1]), int(parts[3])
            found[stage] = max(found.get(stage, 0), block + 1)
    return tuple(found[s] for s in sorted(found))


def load(state: Mapping, like) -> dict:
    """Return parameters like those of `HViTModel` with an original's weights.

    Args:
        state: {key: array}.
        like: nested arrays or shapes.

    Raises:
        CheckpointError: see `convert.convert`.
    """
    return convert.convert(state, like, table(depths(state)))


def fields(state: Mapping) -> dict:
    """Return what the tensors tell of the fields of `models.hvit.HViT`.

    They do not tell the number of heads, which is width / 32 in every published size.
    """
    kernel = state["rgb_patch_embed.proj.weight"]  # [D, C, P, P]
    width, channels, patch, _ = np.shape(kernel)
    count = depths(state)
    side = np.shape(state["rgb_pos_embed"])[1]
    fc1 = np.shape(state["rgb_stages.0.blocks.0.mlp.fc1.weight"])[0]
    made = dict(
        width=width,
        depths=count,
        heads=tuple(max(1, width * 2**s // 32) for s in range(len(count))),
        patch=patch,
        image_size=patch * round(side**0.5),
        mlp_ratio=fc1 / width,
        qkv_bias="rgb_stages.0.blocks.0.attn.qkv.bias" in state,
    )
    if "spectral_patch_embed.proj.weight" in state:
        other = np.shape(state["spectral_patch_embed.proj.weight"])
        made |= dict(spectral_channels=other[1], rgb_channels=channels)
        made |= dict(spectral_width=other[0], fusion="none")
        if "simple_fusion_projector.weight" in state:
            made["fusion"] = "concat"
        if "dfca_module.norm1.weight" in state:
            wide = np.shape(state["dfca_module.norm1.weight"])[0]
            last = width * 2 ** (len(count) - 1)
            made |= dict(
                fusion="dfca",
                dfca_width="rgb" if wide == last else "spectral",
                disease_mask="dfca_module.disease_mask_param" in state,
            )
    return made
