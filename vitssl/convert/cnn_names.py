"""Convolutional backbones: ResNet of torchvision and timm, ConvNeXt of three codes.

Batch statistics stand under "stats/", as in the extra state of a run. What comes after
the last stage (a norm, a classifier) is left aside: tokens here are of two stages.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import errors
from vitssl.convert import CONV, Rule, Table, family, vit_names
from vitssl.models import MODELS

STAGES = range(4)


def _conv(torch, flax):
    return Rule(f"{torch}.weight", f"{flax}/kernel", CONV)


def _batch_norm(torch, flax):
    """Return the rules of a batch normalisation: parameters and statistics."""
    return (
        *vit_names.norm(torch, flax),
        Rule(f"{torch}.running_mean", f"stats/{flax}/mean"),
        Rule(f"{torch}.running_var", f"stats/{flax}/var"),
    )


def resnet(torch: str = "", flax: str = "") -> Table:
    """Return the table of `models.resnet.ResNet` under prefixes of either side."""
    theirs, ours = "layer{s}.{i}", flax + "layer{s}_{i}"
    rules = (
        _conv("conv1", f"{flax}conv1"),
        *_batch_norm("bn1", f"{flax}bn1"),
        _conv(f"{theirs}.conv{{j}}", f"{ours}/conv{{j}}"),
        *_batch_norm(f"{theirs}.bn{{j}}", f"{ours}/bn{{j}}"),
        _conv(f"{theirs}.downsample.0", f"{ours}/down_conv"),
        *_batch_norm(f"{theirs}.downsample.1", f"{ours}/down_norm"),
    )
    return Table(rules, ("fc.{*}", "{*}.num_batches_tracked")).under(torch)


def _resnet_fields(state: Mapping, options) -> dict:
    """Return the fields of `models.resnet.ResNet`.

    Raises:
        CheckpointError: a stage is missing; blocks of another kind (wide, grouped).
    """
    del options
    basic = "layer1.0.conv3.weight" not in state
    widths = tuple(_shape(state, f"layer{s + 1}.0.conv1.weight")[0] for s in STAGES)
    key = f"layer1.0.conv{2 if basic else 3}.weight"
    out, held = _shape(state, key)[0], _shape(state, "layer1.0.conv2.weight")[1]
    if out != widths[0] * (1 if basic else 4) or held != widths[0]:
        raise errors.CheckpointError(
            f"{key}: {out} channels of {widths[0]}, convolved {held} at a time: wide "
            "and grouped ResNets (ResNeXt) are not supported; use a plain one"
        )
    return dict(
        depths=tuple(family.depth(state, f"layer{s + 1}.{{i}}.") for s in STAGES),
        widths=widths,
        stem=_shape(state, "conv1.weight")[0],
        kind="basic" if basic else "bottleneck",
    )


def _shape(state, key) -> tuple:
    if key not in state:
        raise errors.CheckpointError(f"{key}: missing; a network of four stages has it")
    return np.shape(state[key])


class Spelling(NamedTuple):
    """How a code names the parts of a ConvNeXt."""

    stem: str  # Its convolution and norm are numbers 0 and 1 of it.
    down: Callable  # Of a stage: a norm and a convolution, numbers 0 and 1.
    block: Callable  # Of a stage: the template of a block.
    inside: tuple[str, str, str, str]  # Convolution, norm and both linear layers.
    gamma: str
    gain: str = ""  # Pattern of gamma.
    aside: tuple[str, ...] = ()


SPELLINGS = {
    "convnext": Spelling(
        "stem",
        lambda s: f"stages.{s}.downsample",
        lambda s: f"stages.{s}.blocks.{{i}}",
        ("conv_dw", "norm", "mlp.fc1", "mlp.fc2"),
        "gamma",
        aside=("head.{*}", "norm_pre.{*}"),
    ),
    "convnext_facebook": Spelling(
        "downsample_layers.0",
        lambda s: f"downsample_layers.{s}",
        lambda s: f"stages.{s}.{{i}}",
        ("dwconv", "norm", "pwconv1", "pwconv2"),
        "gamma",
        # DINOv3's release has its last norm twice.
        aside=("head.{*}", "norm.{*}", "norms.{*}"),
    ),
    "convnext_torchvision": Spelling(
        "features.0",
        lambda s: f"features.{2 * s}",
        lambda s: f"features.{2 * s + 1}.{{i}}",
        ("block.0", "block.2", "block.3", "block.5"),
        "layer_scale",
        gain="d 1 1 -> d",
        aside=("classifier.{*}",),
    ),
}


def convnext(torch: str = "", flax: str = "", names: str = "convnext") -> Table:
    """Return the table of `models.convnext.ConvNeXt` under prefixes of either side.

    Args:
        names: key of `SPELLINGS`.
    """
    n = SPELLINGS[names]
    rules = _affine_conv(f"{n.stem}.0", "stem") + vit_names.norm(
        f"{n.stem}.1", "stem_norm"
    )
    for s in STAGES:
        ours, down, block = f"stage{s}_block{{i}}", n.down(s), n.block(s)
        if s:
            rules += vit_names.norm(f"{down}.0", f"stage{s}_down_norm")
            rules += _affine_conv(f"{down}.1", f"stage{s}_down_conv")
        conv, norm, fc1, fc2 = (f"{block}.{name}" for name in n.inside)
        rules += _affine_conv(conv, f"{ours}/conv_dw")
        rules += vit_names.norm(norm, f"{ours}/norm")
        rules += vit_names.linear(fc1, f"{ours}/mlp/fc1")
        rules += vit_names.linear(fc2, f"{ours}/mlp/fc2")
        rules += (Rule(f"{block}.{n.gamma}", f"{ours}/gamma", n.gain),)
    return Table(rules, n.aside).under(torch, flax)


def _affine_conv(torch, flax):
    return (_conv(torch, flax), vit_names.bias(torch, flax))


def _convnext_fields(n: Spelling):
    def fields(state: Mapping, options) -> dict:
        """Return the fields of `models.convnext.ConvNeXt`."""
        del options
        kernels = [f"{n.block(s).format(i=0)}.{n.inside[0]}.weight" for s in STAGES]
        gain = f"{n.block(0).format(i=0)}.{n.gamma}" in state
        return dict(
            depths=tuple(family.depth(state, f"{n.block(s)}.") for s in STAGES),
            widths=tuple(_shape(state, key)[0] for key in kernels),
            layerscale=1e-6 if gain else 0.0,
        )

    return fields


def _flat_linear(state: Mapping, notes: list) -> dict:
    """Return the state with linear layers for 1x1 convolutions, timm's `conv_mlp`."""
    del notes
    return {
        key: value[:, :, 0, 0]
        if ".mlp.fc" in key and np.shape(value)[2:] == (1, 1)
        else value
        for key, value in state.items()
    }


def _shapes(kind, stem):
    def shapes(fields: Mapping, state: Mapping) -> dict:
        """Return the shapes of {"encoder", "stats"}, as nested dicts."""
        image = jax.ShapeDtypeStruct((1, 64, 64, np.shape(state[stem])[1]), jnp.float32)
        found = jax.eval_shape(MODELS[kind](**fields).init, jax.random.key(0), image)
        like = {"encoder": found["params"]}
        if "batch_stats" in found:
            like["stats"] = {"encoder": found["batch_stats"]}
        return like

    return shapes


RESNET = family.Family(
    name="resnet",
    about="ResNet-18 to 152 of torchvision and timm, the backbone alone",
    fits=lambda state: {"conv1.weight", "layer1.0.bn1.running_mean"} <= set(state),
    model=_resnet_fields,
    table=lambda fields: resnet("", "encoder/"),
    kind="resnet",
    shapes=_shapes("resnet", "conv1.weight"),
    pool="mean",
)
_TITLES = {
    "convnext": "timm's ConvNeXt, the backbone alone",
    "convnext_facebook": "facebookresearch/ConvNeXt and DINOv3's, the backbone alone",
    "convnext_torchvision": "torchvision's ConvNeXt, the backbone alone",
}


def _family(name) -> family.Family:
    n = SPELLINGS[name]
    marks = {f"{n.stem}.0.weight", f"{n.block(0).format(i=0)}.{n.inside[0]}.weight"}
    return family.Family(
        name=name,
        about=_TITLES[name],
        fits=lambda state: marks <= set(state),
        model=_convnext_fields(n),
        table=lambda fields: convnext("", "encoder/", name),
        prepare=_flat_linear,
        kind="convnext",
        shapes=_shapes("convnext", f"{n.stem}.0.weight"),
        pool="mean",
    )


FAMILIES = (RESNET, *map(_family, SPELLINGS))
TABLES = {"resnet": resnet, "convnext": convnext}  # By kind of model, timm's names.
