"""From a `Backbone` to a file that timm or transformers loads.

A layout is a function from a backbone to (arrays by name, what builds the model
there). What a layout cannot say is an error that names the field.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vitssl import convert, disk, errors, tree
from vitssl.convert import (
    backbone,
    beside,
    bigvision,
    cnn_names,
    dinov3,
    families,
    family,
    hub,
    huggingface,
    hvit_names,
    onnxgraph,
    place,
    safetensors,
    vit_names,
)
from vitssl.models import posemb


@dataclasses.dataclass(frozen=True)
class Export:
    """A network in someone else's layout.

    Attributes:
        arrays: by name.
        recipe: arguments of timm's VisionTransformer, or a transformers config.json.
        snippet: the lines that load it; {file} stands for the file's path.
        hub: config.json of a folder of timm's hub, {} where none can say the model.
        graph: `onnx.ModelProto` that holds the arrays, or None.
    """

    arrays: dict[str, np.ndarray]
    recipe: dict
    snippet: str
    hub: dict = dataclasses.field(default_factory=dict)
    graph: Any = None


def write(
    source: backbone.Backbone,
    to: disk.AnyPath,
    layout: str = "timm",
    dtype: str = "float32",
) -> pathlib.Path:
    """Write a backbone in a layout, with its model card beside it; return the file.

    Args:
        source: what to write.
        to: a file (`.safetensors`; `.npz` for "bigvision", `.onnx`), or a folder, which
            "hf" and "timm" make one of a hub: `model.safetensors`, `config.json`,
            `README.md` and, for transformers, `preprocessor_config.json`.
        layout: key of `LAYOUTS`, or "vitssl".
        dtype: of the arrays of "vitssl".

    Raises:
        UsageError: no such layout, or a layout that cannot hold this model.
    """
    _check_layout(layout)
    source.check()
    if layout == "vitssl":
        file = file_of(to, layout)
        backbone.write(file, source, dtype=dtype)
        backbone.write_card(file, source, layout, OURS)
        return file
    fitting = _fitting(source)
    if layout not in fitting:
        kind = source.about.model.get("name", "vit")
        what = f"a model {kind!r}" if source.about.model else "a whole method"
        raise errors.UsageError(
            f"--layout={layout}: cannot hold {what}; use {', '.join(fitting)} or vitssl"
        )
    made = LAYOUTS[layout](source)
    file = file_of(to, layout)
    for name, array in made.arrays.items():
        backbone.check_finite(name, array)
    file.parent.mkdir(parents=True, exist_ok=True)
    if made.graph is not None:
        onnxgraph.save(made.graph, file)
    elif layout == "bigvision":
        np.savez(file, **made.arrays)  # type: ignore[arg-type]
    else:
        metadata = {"format": "pt", "vitssl.recipe": json.dumps(made.recipe)}
        safetensors.write(file, made.arrays, metadata | beside.facts_of(source.about))
    if layout == "hf":
        _write_json(file.with_name("config.json"), made.recipe)
        _write_json(file.with_name("preprocessor_config.json"), hub.processor(source))
    if layout == "timm" and made.hub and backbone.is_of_hub(file):
        _write_json(file.with_name("config.json"), made.hub)
        made = dataclasses.replace(made, snippet=_TIMM_FOLDER)
    backbone.write_card(file, source, layout, made.snippet)
    return file


def file_of(to: disk.AnyPath, layout: str) -> pathlib.Path:
    """Return the file that `write` writes.

    Raises:
        UsageError: no such layout, or the ending of another kind of file.
    """
    _check_layout(layout)
    own = {"vitssl": backbone.FILE, "bigvision": "model.npz", "onnx": "model.onnx"}
    return place.file_in(to, own.get(layout, "model.safetensors"))


def _check_layout(layout):
    if layout not in (*LAYOUTS, "vitssl"):
        names = ", ".join([*LAYOUTS, "vitssl"])
        raise errors.UsageError(f"--layout={layout}: one of {names}")


def _write_json(file, value):
    file.write_text(json.dumps(value, indent=1), "utf-8")


def _fitting(source) -> tuple[str, ...]:
    """Return the layouts for the kind of model that a source is."""
    if not source.about.model:
        return WHOLE
    kind = source.about.model.get("name", "vit")
    if kind == "hvit" or kind in cnn_names.TABLES:
        return ("hvit",) if kind == "hvit" else ("timm",)
    return tuple(name for name in LAYOUTS if name not in (*WHOLE, "hvit"))


OURS = """\
import vitssl

features = vitssl.load("{file}")
pooled = features(images)["pooled"]  # images: uint8 [B, H, W, C]
"""


def timm(source: backbone.Backbone) -> Export:
    """Return timm's layout, for `timm.models.VisionTransformer(**recipe)`.

    Raises:
        UsageError: rotary positions, which that class does not have.
    """
    if source.about.model.get("name") in cnn_names.TABLES:
        return _convolutional(source)
    source = _settled(source)
    module, about = source.module(), source.about
    if module.rope:
        raise errors.UsageError(
            "--layout=timm: timm's VisionTransformer has no rotary positions; use "
            "--layout=hf for DINOv3, or vitssl"
        )
    leaves = _folded(source, module)
    state = convert.export(
        tree.nest(leaves), family.encoder_and_head(vit_names.table())
    )
    recipe = dict(
        img_size=module.image_size,
        patch_size=module.patch,
        in_chans=leaves["encoder/patch_embed/kernel"].shape[2],
        num_classes=_classes(source),
        global_pool="token" if about.pool == "cls" else "avg",
        fc_norm=False,  # The norm of the tokens comes before the mean, as here.
        embed_dim=module.width,
        depth=module.depth,
        num_heads=module.heads,
        mlp_ratio=module.mlp_ratio,
        class_token=module.cls,
        no_embed_class=bool(module.registers or not module.class_position),
        reg_tokens=module.registers,
        qk_norm=module.qk_norm,
    )
    if module.layerscale:
        recipe["init_values"] = module.layerscale
    arguments = ", ".join(f"{key}={value!r}" for key, value in recipe.items())
    norm, imports = "", "import timm, torch\nfrom safetensors.torch import load_file\n"
    if module.norm_eps != 1e-6:
        norm = f", norm_layer=lambda n: torch.nn.LayerNorm(n, eps={module.norm_eps!r})"
    snippet = imports + (
        f"model = timm.models.VisionTransformer({arguments}{norm})\n"
        'model.load_state_dict(load_file("{file}"))\n'
        "pooled = model.eval().forward_head("
        "model.forward_features(images), pre_logits=True)\n"
    )
    return Export(state, recipe, snippet, hub.of_timm(source, recipe, module.norm_eps))


_TIMM_FOLDER = """\
import timm
# On a hub: "hf-hub:NAME/OF_THE_FOLDER".
model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
pooled = model.forward_head(model.forward_features(images), pre_logits=True)
"""


def _convolutional(source) -> Export:
    """Return timm's layout of a ResNet or ConvNeXt, the backbone alone."""
    module, kind = source.module(), source.about.model["name"]
    leaves = _copied(source)
    recipe = dict(in_chans=backbone.channels(leaves), num_classes=0)
    recipe["output_stride"] = module.output_stride
    if kind == "resnet":
        name, sizes = "ResNet", dict(layers=module.depths, channels=module.widths)
        block = {"basic": "BasicBlock", "bottleneck": "Bottleneck"}[module.kind]
        first = f"timm.models.resnet.{block}, "
    else:
        name, sizes = "ConvNeXt", dict(depths=module.depths, dims=module.widths)
        first = ""
        sizes["ls_init_value"] = module.layerscale or None
    recipe = sizes | recipe
    arguments = first + ", ".join(f"{key}={value!r}" for key, value in recipe.items())
    snippet = (
        "import timm\nfrom safetensors.torch import load_file\n"
        f"model = timm.models.{name}({arguments})\n"
        "# Not strict: what comes after the last stage is not in the file.\n"
        'model.load_state_dict(load_file("{file}"), strict=False)\n'
    )
    table = cnn_names.TABLES[kind]("", "encoder/")
    return Export(convert.export(tree.nest(leaves), table), recipe, snippet)


def hf(source: backbone.Backbone) -> Export:
    """Return transformers' layout: the class that has what the model has.

    DINOv3ViTModel for its rotary positions, Dinov2Model and its kind with registers
    for LayerScale, IJepaModel without a class token, else ViTModel. A classifier's
    head is left out.

    Raises:
        UsageError: no class of transformers is this model.
    """
    source = _settled(source)
    module = source.module()
    if module.qk_norm:
        raise errors.UsageError(
            "--layout=hf: no ViT of transformers has qk_norm; use timm or vitssl"
        )
    recipe = dict(
        hidden_size=module.width,
        num_hidden_layers=module.depth,
        num_attention_heads=module.heads,
        image_size=module.image_size,
        patch_size=module.patch,
        num_channels=source.leaves["encoder/patch_embed/kernel"].shape[2],
        layer_norm_eps=module.norm_eps,
        hidden_act="gelu",
        qkv_bias=True,
        dtype="float32",
    )
    hidden = int(module.width * module.mlp_ratio)
    if module.rope:
        make = _hf_dinov3
    else:
        make = _hf_dinov2 if module.layerscale or module.registers else _hf_vit
    kind, more, state = make(source, module, hidden)
    recipe |= dict(architectures=[kind], model_type=_MODEL_TYPES[kind]) | more
    option = ", add_pooling_layer=False" if kind in ("ViTModel", "IJepaModel") else ""
    snippet = (
        f"from transformers import {kind}\n"
        f'model = {kind}.from_pretrained("{{folder}}"{option})\n'
        "tokens = model.eval()(pixel_values=images).last_hidden_state\n"
    )
    return Export(state, recipe, snippet)


_MODEL_TYPES = {
    "DINOv3ViTModel": "dinov3_vit",
    "Dinov2Model": "dinov2",
    "Dinov2WithRegistersModel": "dinov2_with_registers",
    "ViTModel": "vit",
    "IJepaModel": "ijepa",
}


def _hf_dinov3(source, module, hidden):
    if not (module.rope_unit and module.layerscale and module.positions == "none"):
        raise errors.UsageError(
            "--layout=hf: rotary positions of transformers are DINOv3's, not these; "
            "use --layout=vitssl"
        )
    state = convert.export(source.encoder(), dinov3.table(module.heads))
    more = dict(
        intermediate_size=hidden,
        num_register_tokens=module.registers,
        rope_theta=module.rope_theta,
        query_bias=True,
        key_bias=False,
        value_bias=True,
    )
    state = dinov3.export_hf(state)
    state["embeddings.mask_token"] = np.zeros((1, 1, module.width), np.float32)
    if not module.registers:
        state["embeddings.register_tokens"] = np.zeros((1, 0, module.width), np.float32)
    return "DINOv3ViTModel", more, state


def _hf_dinov2(source, module, hidden):
    if hidden % module.width or not module.cls:
        raise errors.UsageError(
            "--layout=hf: Dinov2Model needs a class token and a whole mlp_ratio; use "
            "--layout=timm"
        )
    leaves = _class_row(tree.flat(source.encoder()), module)
    if not module.layerscale:
        ones = np.ones(module.width, np.float32)
        blocks = range(module.depth)
        leaves |= {f"block_{i}/ls{k}": ones for i in blocks for k in (1, 2)}
    state = convert.export(tree.nest(leaves), huggingface.table())
    more = dict(mlp_ratio=hidden // module.width, layerscale_value=1.0)
    state["embeddings.mask_token"] = np.zeros((1, module.width), np.float32)
    if module.registers:
        more["num_register_tokens"] = module.registers
        return "Dinov2WithRegistersModel", more, huggingface.split(state)
    return "Dinov2Model", more, huggingface.split(state)


def _hf_vit(source, module, hidden):
    leaves = _class_row(tree.flat(source.encoder()), module)
    state = convert.export(tree.nest(leaves), huggingface.table(of_vit=True))
    kind = "ViTModel" if module.cls else "IJepaModel"
    return kind, dict(intermediate_size=hidden), huggingface.split(state)


def big_vision(source: backbone.Backbone) -> Export:
    """Return big_vision's layout, as `.npz` arrays by name.

    Raises:
        UsageError: the model has parts that big_vision's ViT does not have.
    """
    source = _settled(source)
    module = source.module()
    absent = ("registers", "layerscale", "qk_norm", "rope")
    extra = [field for field in absent if getattr(module, field)]
    if extra:
        raise errors.UsageError(f"layout bigvision: its ViT has no {', '.join(extra)}")
    leaves = _copied(source)
    state = convert.export(tree.nest(leaves), bigvision.table({"heads": module.heads}))
    return Export(bigvision.export(state, module.heads), {}, _BIG_VISION)


_BIG_VISION = """\
import numpy as np
params = dict(np.load("{file}"))  # {"Transformer/encoderblock_0/...": array}
"""


def onnx(source: backbone.Backbone) -> Export:
    """Return an ONNX graph of a ViT, its normalisation and its head."""
    source = dataclasses.replace(source, leaves=_copied(source))
    return Export({}, {}, onnxgraph.SNIPPET, graph=onnxgraph.model(source))


def hierarchical(source: backbone.Backbone) -> Export:
    """Return the layout of HierarchialViT, for its DiseaseAwareHVT.

    The recipe is its `hvt_params`. A classifier's head goes with it.
    """
    module = source.module()
    leaves = _copied(source)
    state = convert.export(
        tree.nest(leaves), hvit_names.table(module.depths, "encoder/")
    )
    recipe = dict(
        patch_size=module.patch,
        embed_dim_rgb=module.width,
        embed_dim_spectral=module.spectral_width or module.width,
        spectral_channels=module.spectral_channels,
        depths=module.depths,
        num_heads=module.heads,
        mlp_ratio=module.mlp_ratio,
        qkv_bias=module.qkv_bias,
        use_dfca=module.fusion == "dfca",
        dfca_num_heads=module.dfca_heads,
        dfca_embed_dim_match_rgb=module.dfca_width == "rgb",
        dfca_use_disease_mask=module.disease_mask,
    )
    size = module.table_size
    snippet = _HVIT.format(params=recipe, size=size, classes=_classes(source))
    return Export(state, recipe, snippet)


_HVIT = """from hvit.models.hvt import DiseaseAwareHVT
from safetensors.torch import load_file
params = {params}
model = DiseaseAwareHVT(img_size={size}, num_classes={classes}, hvt_params=params)
model.load_state_dict(load_file("{{file}}"), strict=False)
"""


def part_discovery(source: backbone.Backbone, hf: bool = False) -> Export:
    """Return the layout of iFAM and PDiscoFormer, all parameters.

    Raises:
        UsageError: weights of another method.
    """
    return Export(families.to_parts(_copied(source), hf), {}, _STATE)


def olmo_earth(source: backbone.Backbone) -> Export:
    """Return the layout of OlmoEarth, all parameters.

    Raises:
        UsageError: weights of another method.
    """
    return Export(families.to_olmoearth(_copied(source)), {}, _STATE)


def _copied(source) -> dict:
    return {k: backbone.contiguous(v) for k, v in source.leaves.items()}


_STATE = """from safetensors.torch import load_file
# model: the original's, built for the same sizes; what it computes is not in the file.
model.load_state_dict(load_file("{file}"), strict=False)
"""
WHOLE = ("parts", "parts_hf", "olmoearth")
LAYOUTS: dict[str, Callable[[backbone.Backbone], Export]] = {
    "timm": timm,
    "hf": hf,
    "bigvision": big_vision,
    "onnx": onnx,
    "hvit": hierarchical,
    "parts": part_discovery,
    "parts_hf": functools.partial(part_discovery, hf=True),
    "olmoearth": olmo_earth,
}


def _settled(source: backbone.Backbone) -> backbone.Backbone:
    """Return a network whose positions, if it has any, are a parameter.

    Other codes know no fixed table of sines: it is written out, and without positions
    of any kind zeros are.
    """
    module, model = source.module(), dict(source.about.model)
    if module.positions in ("learned", "learned_sincos") or module.rope:
        return source
    grid = module.table_grid
    table = np.zeros((grid[0] * grid[1], module.width), np.float32)
    if module.positions == "sincos":
        table = posemb.sincos(grid, module.width)
    model |= dict(positions="learned", class_position=False)
    about = dataclasses.replace(source.about, model=model)
    leaves = dict(source.leaves) | {"encoder/pos_embed": table[None]}
    return backbone.Backbone(about, leaves)


def _classes(source) -> int:
    """Return the classes of the head, 0 without one."""
    bias = source.leaves.get("head/bias")
    return 0 if bias is None else len(bias)


def _class_row(leaves: dict, module) -> dict:
    """Return the leaves with a row of the position table for the class token."""
    if module.cls and not module.class_position:
        zero = np.zeros((1, 1, module.width), np.float32)
        leaves["pos_embed"] = np.concatenate([zero, leaves["pos_embed"]], axis=1)
    return leaves


def _folded(source, module) -> Mapping:
    """Return all leaves; with registers, the class token's position inside the token.

    timm's models with registers give positions to patches alone.
    """
    leaves = _copied(source)
    if module.registers and module.cls and module.class_position:
        table = leaves["encoder/pos_embed"]
        leaves["encoder/cls"] = leaves["encoder/cls"] + table[:, :1]
        leaves["encoder/pos_embed"] = table[:, 1:]
    return leaves
