"""HierarchialViT: the state dict of its hvit/models/hvt.py (DiseaseAwareHVT).

    rgb_* and spectral_*, simple_fusion_projector, dfca_module, *_to_dfca_proj
                                                            encoder/
    classifier_head_norm, classifier_head                   head/
    aux_head_*, contrastive_projector, mae_decoder_*        aux_*, projector, mae_*

Blocks count through all stages here, within their stage there.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import errors
from vitssl.convert import CONV, LINEAR, Rule, Table, family, positions, vit_names
from vitssl.models import head as heads_
from vitssl.models import hvit

STREAMS = {"rgb": "", "spectral": "spectral/"}
ATTENTION = (*vit_names.linear("qkv", "qkv"), *vit_names.linear("proj", "proj"))
MLP = (*vit_names.linear("fc1", "fc1"), *vit_names.linear("fc2", "fc2"))
BLOCK = (
    *vit_names.norm("norm1", "norm1"),
    *Table(ATTENTION).under("attn.", "attn/").rules,
    *vit_names.norm("norm2", "norm2"),
    *Table(MLP).under("mlp.", "mlp/").rules,
)
MERGE = (
    *vit_names.norm("norm", "norm"),
    Rule("reduction.weight", "reduction/kernel", LINEAR),
)
DFCA = (
    Rule("disease_mask_param", "disease_mask"),
    Rule("cross_attention.in_proj_weight", "attn/kernel", LINEAR),
    Rule("cross_attention.in_proj_bias", "attn/bias"),
    *vit_names.linear("cross_attention.out_proj", "attn/proj"),
    *vit_names.norm("norm1", "norm1"),
    *vit_names.linear("ffn.0", "mlp/fc1"),
    *vit_names.linear("ffn.3", "mlp/fc2"),
    *vit_names.norm("norm2", "norm2"),
)


def encoder(depths: tuple[int, ...], flax: str = "") -> Table:
    """Return the table of `models.hvit.HViT`, of so many blocks per stage."""
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
                vit_names.bias(f"{theirs}_patch_embed.proj", f"{ours}patch_embed"),
                *vit_names.norm(f"{theirs}_patch_embed.norm", f"{ours}patch_norm"),
                *vit_names.norm(f"norm_{theirs}_final_encoder", f"{ours}norm"),
                *vit_names.linear(f"{theirs}_to_dfca_proj", f"{theirs}_to_dfca"),
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
    found += Table(vit_names.linear("simple_fusion_projector", "concat"))
    return found.under(flax=flax)


def heads() -> Table:
    """Return the table of the heads of the original's model."""
    rules = list(_CLASSIFIER.rules)
    for name in STREAMS:
        rules += vit_names.linear(f"aux_head_{name}", f"aux_{name}/fc1")
        rules += mae_head(f"mae_decoder_{name}.", f"mae_{name}/")
    # GELUs stand between the linear layers.
    for i in range(8):
        rules += vit_names.linear(
            f"contrastive_projector.{2 * i}", f"projector/fc{i + 1}"
        )
    return Table(tuple(rules))


_CLASSIFIER = Table(
    (
        *vit_names.norm("classifier_head_norm", "head/norm"),
        *vit_names.linear("classifier_head", "head"),
    ),
    ("aux_head_{*}", "contrastive_projector.{*}", "mae_decoder_{*}"),
)


def mae_head(torch: str = "", flax: str = "") -> tuple[Rule, ...]:
    """Return the rules of a MAEPredictionHead under two prefixes."""
    first = vit_names.linear(f"{torch}decoder_pred.0", f"{flax}fc1")
    return (*first, *vit_names.linear(f"{torch}decoder_pred.2", f"{flax}fc2"))


def table(depths: tuple[int, ...], flax: str = "backbone/") -> Table:
    """Return the table of the original's model: backbone and heads."""
    return encoder(depths, flax) + heads()


def depths(state: Mapping, stream: str = "rgb") -> tuple[int, ...]:
    """Return the number of blocks of every stage."""
    found: dict[int, int] = {}
    for key in state:
        parts = key.split(".")
        if parts[0] == f"{stream}_stages" and parts[2] == "blocks":
            stage, block = int(parts[1]), int(parts[3])
            found[stage] = max(found.get(stage, 0), block + 1)
    return tuple(found[s] for s in sorted(found))


def fields(state: Mapping, options: family.Options) -> dict:
    """Return the fields of `models.hvit.HViT`.

    Tensors do not tell the number of heads: 32 channels each, unless the checkpoint's
    own description or `options.heads`, of the first stage, says otherwise.

    Raises:
        UsageError: a width of which heads of 32 channels cannot be made.
        CheckpointError: a position table that is no square grid.
    """
    width, channels, patch, _ = np.shape(state["rgb_patch_embed.proj.weight"])
    count = depths(state)
    rows = np.shape(state["rgb_pos_embed"])[1]
    made = dict(
        width=width,
        depths=count,
        heads=_heads(width, len(count), options),
        patch=patch,
        image_size=patch * positions.side(rows),
        mlp_ratio=np.shape(state[f"{_FIRST}.mlp.fc1.weight"])[0] / width,
        qkv_bias=f"{_FIRST}.attn.qkv.bias" in state,
    )
    if "spectral_patch_embed.proj.weight" not in state:
        return made
    other, more, _, _ = np.shape(state["spectral_patch_embed.proj.weight"])
    made |= dict(spectral_channels=more, rgb_channels=channels, spectral_width=other)
    if "dfca_module.norm1.weight" not in state:
        joined = "simple_fusion_projector.weight" in state
        return made | dict(fusion="concat" if joined else "none")
    wide = np.shape(state["dfca_module.norm1.weight"])[0]
    return made | dict(
        fusion="dfca",
        dfca_width="rgb" if wide == width * 2 ** (len(count) - 1) else "spectral",
        dfca_heads=int(options.config.get("dfca_num_heads", 12)),
        disease_mask="dfca_module.disease_mask_param" in state,
    )


_FIRST = "rgb_stages.0.blocks.0"


def _heads(width, stages, options) -> tuple[int, ...]:
    told = options.config.get("num_heads", ())
    if not options.heads and len(told) == stages:
        return tuple(map(int, told))
    if not options.heads and width % 32:
        raise errors.UsageError(
            f"a width of {width} is none of the published ones; say --heads=N, of the "
            "first stage"
        )
    return tuple((options.heads or width // 32) * 2**s for s in range(stages))


def shapes(made: Mapping, state: Mapping) -> dict:
    """Return the shapes of {"encoder", "head"}, as nested dicts."""
    net = hvit.HViT(**made)
    both = net.spectral_channels
    channels = np.shape(state["rgb_patch_embed.proj.weight"])[1] + both
    image = jax.ShapeDtypeStruct((1, *net.table_size, channels), jnp.float32)
    like = {"encoder": jax.eval_shape(net.init, jax.random.key(0), image)["params"]}
    if "classifier_head.weight" in state:
        classes, width = np.shape(state["classifier_head.weight"])
        head = heads_.Head(pool="mean_norm")
        like["head"] = jax.eval_shape(
            lambda rng: head.init(rng, width, classes)[0], jax.random.key(0)
        )
    return like


def _told(tree) -> dict:
    """Return the parameters of the model that a checkpoint of the original names."""
    for path in (("model_backbone_init_config",), ("config", "model", "hvt_params")):
        found = tree
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping):
            return dict(found)
    return {}


FAMILY = family.Family(
    name="hvit",
    about="HierarchialViT, RGB or with a spectral image: backbone and classifier",
    fits=lambda state: "rgb_patch_embed.proj.weight" in state,
    model=fields,
    table=lambda made: encoder(made["depths"], "encoder/") + _CLASSIFIER,
    # Of a fine-tuning checkpoint the average, which its authors evaluate.
    places=(
        "ema_state_dict",
        "model_state_dict",
        "model_backbone_state_dict",
        "state_dict",
        "",
    ),
    strip=("module.", "_orig_mod.", "backbone."),
    kind="hvit",
    shapes=shapes,
    told=_told,
    rule="plain",
    pool="mean",
)
