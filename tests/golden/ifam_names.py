"""State dicts of iFAM's models for the golden cases, as ours and back."""

from collections.abc import Mapping

from vitssl import convert
from vitssl.convert import CONV, Rule, Table, huggingface, vit_names
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


def _batch_norm(torch, ours):
    """A batch normalisation: parameters and statistics."""
    return (
        Rule(f"{torch}.weight", f"params/{ours}/scale"),
        Rule(f"{torch}.bias", f"params/{ours}/bias"),
        Rule(f"{torch}.running_mean", f"batch_stats/{ours}/mean"),
        Rule(f"{torch}.running_var", f"batch_stats/{ours}/var"),
    )


def resnet() -> Table:
    """PartNet on a ResNet, into {"params", "batch_stats"}."""
    rules = [Rule("conv1.weight", "params/backbone/conv1/kernel", CONV)]
    rules += _batch_norm("bn1", "backbone/bn1")
    for s in range(1, 5):
        theirs, ours = f"layer{s}.{{i}}", f"backbone/layer{s}_{{i}}"
        for j in range(1, 4):
            kernel = f"params/{ours}/conv{j}/kernel"
            rules.append(Rule(f"{theirs}.conv{j}.weight", kernel, CONV))
            rules += _batch_norm(f"{theirs}.bn{j}", f"{ours}/bn{j}")
        kernel = f"params/{ours}/down_conv/kernel"
        rules.append(Rule(f"{theirs}.downsample.0.weight", kernel, CONV))
        rules += _batch_norm(f"{theirs}.downsample.1", f"{ours}/down_norm")
    return Table(tuple(rules), names.ASIDE) + names.head("", "params/head/")


def convnext() -> Table:
    """PartNet on a ConvNeXt, into {"params"}."""
    ours = "params/backbone/stage{s}"
    rules = (
        Rule("stem.0.weight", "params/backbone/stem/kernel", CONV),
        vit_names.bias("stem.0", "params/backbone/stem"),
        *vit_names.norm("stem.1", "params/backbone/stem_norm"),
        *vit_names.norm("stages.{s}.downsample.0", f"{ours}_down_norm"),
        Rule("stages.{s}.downsample.1.weight", f"{ours}_down_conv/kernel", CONV),
        vit_names.bias("stages.{s}.downsample.1", f"{ours}_down_conv"),
    )
    theirs, ours = "stages.{s}.blocks.{i}", f"{ours}_block{{i}}"
    rules += (
        Rule(f"{theirs}.gamma", f"{ours}/gamma"),
        Rule(f"{theirs}.conv_dw.weight", f"{ours}/conv_dw/kernel", CONV),
        vit_names.bias(f"{theirs}.conv_dw", f"{ours}/conv_dw"),
        *vit_names.norm(f"{theirs}.norm", f"{ours}/norm"),
        *vit_names.linear(f"{theirs}.mlp.fc1", f"{ours}/mlp/fc1"),
        *vit_names.linear(f"{theirs}.mlp.fc2", f"{ours}/mlp/fc2"),
    )
    return Table(rules, names.ASIDE) + names.head("", "params/head/")
