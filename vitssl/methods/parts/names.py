"""iFAM, PDiscoFormer, PDiscoNet and their baselines: the originals' state dicts.

Released checkpoints of the two-stage model load with `load`: their names are those of
timm (or Hugging Face) under "stage_1." and "stage_2.".
"""

from collections.abc import Mapping

from vitssl import convert
from vitssl.convert import CONV, LINEAR, Rule, Table, huggingface, vit_names

# The originals' buffers that hold no weights.
_ASIDE = ("{*}num_batches_tracked", "num_batches_tracked", "{*}prefix_attn_mask")


def head(torch: str = "", flax: str = "head/") -> Table:
    """Return the table of `partheads.PartHead`, every modulation and classifier."""
    rules = [
        Rule("fc_landmarks.weight", "prototypes", "k d 1 1 -> k d"),
        Rule("modulation.weight", "modulation/scale", "d k -> k d"),
        Rule("modulation.bias", "modulation/bias", "d k -> k d"),
        Rule("modulation", "modulation/gain", "1 d k -> k d"),
        Rule("fc_class_landmarks.weight", "classifier/kernel", LINEAR),
    ]
    for theirs, ours in (
        ("modulation", "modulation"),
        ("fc_class_landmarks", "classifier"),
    ):
        layer = f"{theirs}.feature_layers.{{k}}"
        rules += vit_names.norm(f"{layer}.fc_norm_0", f"{ours}/norm_{{k}}")
        rules += vit_names.linear(f"{layer}.fc_0", f"{ours}/fc_{{k}}")
    return Table(tuple(rules), _ASIDE).under(torch, flax)


def backbone(torch: str = "", flax: str = "backbone/", *, hf: bool = False) -> Table:
    """Return the table of a ViT in timm's or Hugging Face's names."""
    return (huggingface if hf else vit_names).table(torch, flax)


def classifier(torch: str = "", flax: str = "") -> Table:
    """Return the rules of a classifier on pooled tokens, every kind of pooling."""
    rules = (
        *vit_names.norm("fc_norm", "fc_norm"),
        *vit_names.linear("head", "head"),
        Rule("efficient_pool.cls_token", "pool/query"),
        Rule("efficient_pool.v.weight", "pool/v/kernel", LINEAR),
        Rule("aim_head.cls_token", "pool/query"),
        Rule("aim_head.k.weight", "pool/k/kernel", LINEAR),
        Rule("aim_head.v.weight", "pool/v/kernel", LINEAR),
        Rule("aim_head.linear.weight", "head/kernel", LINEAR),
        Rule("aim_head.bn.running_mean", "stats/pool/bn/mean"),
        Rule("aim_head.bn.running_var", "stats/pool/bn/var"),
    )
    return Table(rules, _ASIDE).under(torch, flax)


def part_net(torch: str = "", flax: str = "", *, hf: bool = False) -> Table:
    """Return the table of `methods.parts.networks.PartNet` on a ViT."""
    return head(torch, f"{flax}head/") + backbone(torch, f"{flax}backbone/", hf=hf)


def masked(torch: str = "", flax: str = "", *, hf: bool = False) -> Table:
    """Return the table of `MaskedClassifier`, and of `Baseline`."""
    # The classifier first: the ViT's table lays keys "head.*" aside.
    return classifier(torch, flax) + backbone(torch, f"{flax}backbone/", hf=hf)


def two_stage(*, hf: bool = False) -> Table:
    """Return the table of `methods.parts.networks.TwoStage`."""
    return part_net("stage_1.", "stage_1/", hf=hf) + masked(
        "stage_2.", "stage_2/", hf=hf
    )


def load(state: Mapping, like, table=two_stage) -> dict:
    """Return parameters like `like` with the weights of an original's state dict.

    Args:
        state: {key: array}; timm's or Hugging Face's names.
        like: nested arrays or shapes.
        table: `two_stage`, `part_net` or `masked`.

    Raises:
        CheckpointError: see `convert.convert`; also for a file of another width.
    """
    hf = huggingface.is_hf(state)
    state = huggingface.fuse(state) if hf else state
    return convert.convert(state, like, table(hf=hf))


def export(params, table=two_stage, *, hf: bool = False) -> dict:
    """Return the state dict of parameters; `load` backwards."""
    state = convert.export(params, table(hf=hf))
    return huggingface.split(state) if hf else state


def _batch_norm(torch, ours):
    """Return the rules of a batch normalisation: parameters and statistics."""
    return (
        Rule(f"{torch}.weight", f"params/{ours}/scale"),
        Rule(f"{torch}.bias", f"params/{ours}/bias"),
        Rule(f"{torch}.running_mean", f"batch_stats/{ours}/mean"),
        Rule(f"{torch}.running_var", f"batch_stats/{ours}/var"),
    )


def resnet() -> Table:
    """Return the table of PartNet on a ResNet, into {"params", "batch_stats"}."""
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
    return Table(tuple(rules), _ASIDE) + head("", "params/head/")


def convnext() -> Table:
    """Return the table of PartNet on a ConvNeXt, into {"params"}."""
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
    return Table(rules, _ASIDE) + head("", "params/head/")
