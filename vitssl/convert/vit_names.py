"""The vision transformer: timm's names, and the spellings of code built on timm."""

from vitssl import convert


def norm(torch: str, flax: str) -> tuple[convert.Rule, ...]:
    """Return the rules of a LayerNorm."""
    return (convert.Rule(f"{torch}.weight", f"{flax}/scale"), bias(torch, flax))


def linear(torch: str, flax: str) -> tuple[convert.Rule, ...]:
    """Return the rules of a linear layer."""
    return (
        convert.Rule(f"{torch}.weight", f"{flax}/kernel", convert.LINEAR),
        bias(torch, flax),
    )


def bias(torch: str, flax: str) -> convert.Rule:
    """Return the rule of a bias."""
    return convert.Rule(f"{torch}.bias", f"{flax}/bias")


_BLOCK = (
    *norm("norm1", "norm1"),
    *linear("attn.qkv", "attn/qkv"),
    *norm("attn.q_norm", "attn/q_norm"),
    *norm("attn.k_norm", "attn/k_norm"),
    *linear("attn.proj", "attn/proj"),
    *norm("norm2", "norm2"),
    *linear("mlp.fc1", "mlp/fc1"),
    *linear("mlp.fc2", "mlp/fc2"),
    convert.Rule("ls1.gamma", "ls1"),
    convert.Rule("ls2.gamma", "ls2"),
    convert.Rule("ls_attn.gamma", "ls1"),  # H-JEPA's spelling.
    convert.Rule("ls_mlp.gamma", "ls2"),
)

_STEM = (
    convert.Rule("patch_embed.proj.weight", "patch_embed/kernel", convert.CONV),
    bias("patch_embed.proj", "patch_embed"),
    convert.Rule("cls_token", "cls"),
    convert.Rule("reg_token", "registers"),
    convert.Rule("register_tokens", "registers"),  # DINOv2's spelling.
    convert.Rule("pos_embed", "pos_embed"),
    *norm("norm", "norm"),
)


def table(torch: str = "", flax: str = "") -> convert.Table:
    """Return the table of `models.vit.ViT`, under prefixes of either side.

    A classifier's head is left aside.
    """
    # H-JEPA's wrapper of rotary attention holds the wrapped module beside its parts.
    aside = ("head.{*}", "blocks.{i}.attn.attn.{*}")
    blocks = convert.Table(_BLOCK).under("blocks.{i}.", "block_{i}/")
    return (convert.Table(_STEM, aside) + blocks).under(torch, flax)
