"""FLOPs by formula: what the mathematics asks for, not what a compiler emits.

Convention: a multiply-add is 2 FLOP; norms, softmax and activations are not counted;
training is 3 x the forward pass of what carries a gradient, plus 1 x targets;
recomputation (remat) is not counted; a frozen prefix counts 1 x.
"""


def block(tokens: int, width: int, mlp_ratio: float = 4.0) -> float:
    """Return the FLOPs of one transformer block's forward pass for one image."""
    dense = 2 * (4 + 2 * mlp_ratio) * width**2 * tokens
    attention = 4 * tokens**2 * width
    return dense + attention


def vit(
    tokens: int,
    patches: int,
    *,
    width: int,
    depth: int,
    patch: int,
    channels: int,
    mlp_ratio: float = 4.0,
) -> float:
    """Return the FLOPs of a ViT's forward pass for one image.

    Args:
        tokens: of the sequence, with class token and registers.
        patches: of them embedded from pixels.
        width, depth, patch, channels, mlp_ratio: see `models.vit.ViT`.
    """
    embed = 2 * patches * width * channels * patch**2
    return embed + depth * block(tokens, width, mlp_ratio)
