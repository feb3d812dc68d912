"""H-JEPA: the state dict of jonwiggins/H-JEPA src/models/hjepa.py.

One table leads into {"params": ..., "extra": ...} of `methods.hjepa.method.HJEPA`:

    context_encoder.vit.*, target_encoder.vit.*   params/encoder, extra/target
    predictor.*                                   params/predictor
    hierarchy_projections.k.*, fpn_*.k.*          params/levels, extra/stats

`role_embed`, which the original does not have, is where the golden cases and exports
keep the vectors of extra context. The encoder alone is what an import takes, see
`convert.timm_names.HJEPA`.
"""

from collections.abc import Mapping

from vitssl import convert, tree
from vitssl.convert import LINEAR, Rule, Table, vit_names

_BLOCK = (
    *vit_names.norm("norm1", "norm1"),
    Rule("attn.in_proj_weight", "attn/qkv/kernel", LINEAR),
    Rule("attn.in_proj_bias", "attn/qkv/bias"),
    *vit_names.linear("attn.out_proj", "attn/proj"),
    *vit_names.norm("norm2", "norm2"),
    *vit_names.linear("mlp.0", "mlp/fc1"),
    *vit_names.linear("mlp.3", "mlp/fc2"),
)

# Which of our levels' layers a torch module list holds.
_LISTS = {
    "hierarchy_projections": "proj",
    "fpn_lateral_convs": "lateral",
    "fpn_top_down_convs": "top_down",
    "fpn_fusion_convs": "fuse",
}


def predictor(torch: str = "", flax: str = "") -> Table:
    """Return the table of `methods.hjepa.predictor.Predictor` under two prefixes."""
    own = (
        Rule("mask_token", "mask_token"),
        Rule("pos_embed_predictor", "pooled_query"),
        *vit_names.norm("norm", "norm"),
        *vit_names.linear("head", "head"),
    )
    # Not an error where a model does not use it.
    stem = Table(own, ("pos_embed_predictor",))
    return (stem + Table(_BLOCK).under("blocks.{i}.", "block_{i}/")).under(torch, flax)


def levels(params: str = "", stats: str = "stats/") -> Table:
    """Return the table of `methods.hjepa.levels.Levels`.

    Args:
        params, stats: prefixes of the leaves that are trained, and of the running
            statistics of batch normalisation.
    """
    rules = []
    for theirs, ours in _LISTS.items():
        layer = f"{params}{ours}_{{k}}"
        rules += vit_names.linear(f"{theirs}.{{k}}.0", f"{layer}/dense")
        rules += vit_names.norm(f"{theirs}.{{k}}.1", f"{layer}/norm")
    theirs, ours = "hierarchy_projections.{k}.1.bn", "proj_{k}/norm"
    rules += vit_names.norm(theirs, f"{params}{ours}")
    rules += [
        Rule(f"{theirs}.running_mean", f"{stats}{ours}/mean"),
        Rule(f"{theirs}.running_var", f"{stats}{ours}/var"),
    ]
    return Table(tuple(rules), (f"{theirs}.num_batches_tracked",))


def table() -> Table:
    """Return the table of the whole model, into {"params": ..., "extra": ...}."""
    return (
        vit_names.table("context_encoder.vit.", "params/encoder/")
        + vit_names.table("target_encoder.vit.", "extra/target/")
        + Table((Rule("role_embed", "params/predictor/roles"),))
        + predictor("predictor.", "params/predictor/")
        + levels("params/levels/", "extra/stats/")
    )


def load(state: Mapping, params, extra) -> tuple:
    """Return (params, extra) with the weights of a state dict.

    What the original does not have stays as it is (role vectors, momentum, adaptive
    weights) or follows from what it has (averaged levels start as a copy).

    Args:
        state: {key: array}.
        params, extra: of `HJEPA.init`, arrays or shapes.

    Raises:
        CheckpointError: see `convert.convert`.
    """
    leaves = tree.flat({"params": params, "extra": extra})
    ours = ("extra/momentum", "extra/vicreg", "extra/target_levels/")
    if "role_embed" not in state:
        ours += ("params/predictor/roles",)
    kept = {k: v for k, v in leaves.items() if k.startswith(ours)}
    like = tree.nest({k: v for k, v in leaves.items() if k not in kept})
    found = tree.flat(convert.convert(state, like, table()))
    for name in kept:
        head, _, rest = name.partition("extra/target_levels/")
        if rest and not head:
            kept[name] = found[f"params/levels/{rest}"]
    both = tree.nest(found | kept)
    return both["params"], both.get("extra", {})


def export(params, extra) -> dict:
    """Return the state dict of trained networks; `load` backwards.

    Raises:
        CheckpointError: a leaf the original has no place for.
    """
    extra = {k: extra[k] for k in ("target", "stats") if k in extra}
    return convert.export({"params": params, "extra": extra}, table())
