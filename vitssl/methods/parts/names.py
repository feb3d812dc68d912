"""iFAM, PDiscoFormer, PDiscoNet and their baselines: the originals' state dicts.

Those of released two-stage models are timm's (or Hugging Face's) under "stage_1." and
"stage_2.". Batch statistics go under "stats/", as in the extra state of a run.
"""

from vitssl.convert import LINEAR, Rule, Table, cnn_names, huggingface, vit_names

# The originals' buffers that hold no weights.
ASIDE = ("{*}num_batches_tracked", "num_batches_tracked", "{*}prefix_attn_mask")


def head(torch: str = "", flax: str = "head/") -> Table:
    """Return the table of `heads.PartHead`, every modulation and classifier."""
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
    return Table(tuple(rules), ASIDE).under(torch, flax)


def _backbone(torch: str, flax: str, hf: bool, cnn: str = "") -> Table:
    vit = huggingface.table if hf else vit_names.table
    return cnn_names.TABLES.get(cnn, vit)(torch, f"{flax}backbone/")


def _classifier(torch: str, flax: str) -> Table:
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
    )
    statistics = (
        Rule("aim_head.bn.running_mean", f"stats/{flax}pool/bn/mean"),
        Rule("aim_head.bn.running_var", f"stats/{flax}pool/bn/var"),
    )
    found = Table(rules, ASIDE).under(flax=flax) + Table(statistics)
    return found.under(torch)


def part_net(
    torch: str = "", flax: str = "", *, hf: bool = False, cnn: str = ""
) -> Table:
    """Return the table of `networks.PartNet` on a ViT, or on a `cnn_names.TABLES`."""
    return head(torch, f"{flax}head/") + _backbone(torch, flax, hf, cnn)


def masked(torch: str = "", flax: str = "", *, hf: bool = False) -> Table:
    """Return the table of `MaskedClassifier`, and of `Baseline`."""
    # The classifier first: the ViT's table lays keys "head.*" aside.
    return _classifier(torch, flax) + _backbone(torch, flax, hf)


def two_stage(*, hf: bool = False) -> Table:
    """Return the table of `networks.TwoStage`."""
    return part_net("stage_1.", "stage_1/", hf=hf) + masked(
        "stage_2.", "stage_2/", hf=hf
    )
