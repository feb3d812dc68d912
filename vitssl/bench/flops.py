"""FLOPs by formula: what the mathematics asks for, not what a compiler emits.

Convention: a multiply-add is 2 FLOP; norms, softmax and activations are not counted;
training is 3 x the forward pass of what carries a gradient, plus 1 x targets;
recomputation (remat) is not counted; a frozen prefix counts 1 x.
"""

import numpy as np


def block(tokens: int, width: int, mlp_ratio: float = 4.0) -> float:
    """Return the FLOPs of one transformer block's forward pass for one image."""
    dense = 2 * (4 + 2 * mlp_ratio) * width**2 * tokens
    attention = 4 * tokens**2 * width
    return dense + attention


def cross_block(queries: int, keys: int, width: int, mlp_ratio: float = 4.0) -> float:
    """Return the FLOPs of a block whose queries attend to other tokens, one image."""
    dense = 2 * (2 + 2 * mlp_ratio) * width**2 * queries + 4 * width**2 * keys
    return dense + 4 * queries * keys * width


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


def stage_decoder(
    patches: int, visible: int, *, inner: int, width: int, scale: float, out: int
) -> float:
    """Return the FLOPs of a LocalMIM decoder's forward pass for one image.

    Every patch is predicted, as in the original; a head that leaves out the visible
    ones does (1 - visible / patches) of its part.

    Args:
        patches, visible: N and K.
        inner: width of the encoder.
        width: of the decoder, of one block.
        scale, out: see `models.decoder.StageDecoder`.
    """
    total = 2 * (1 + visible) * inner * width + block(1 + patches, width)
    cells, features = patches * min(1.0, scale) ** 2, width
    while scale > 1:
        total += 2 * cells * features * 4 * (features // 2)
        cells, features, scale = 4 * cells, features // 2, scale / 2
    return total + 2 * cells * features * out


def localmim(
    frozen: int,
    *,
    embed: float,
    linear: float,
    attention: float,
    decoders: tuple[float, ...],
    stage_layers: tuple[int, ...],
    depth: int,
    target: float = 0.0,
    as_coded: bool = False,
    kept: int = 0,
) -> tuple[float, float]:
    """Return (forward, backward) FLOPs per image with `frozen` layers frozen.

    The forward pass of frozen blocks stays; decoder and target of a frozen stage go.
    Backward of a block is two products per weight matrix and twice the attention.

    Args:
        frozen: layers 0 (patch embedding) .. frozen - 1 are frozen.
        embed: forward of the patch embedding, whose backward is weights only.
        linear, attention: forward of a block.
        decoders, stage_layers: forward and layer of each stage.
        depth: blocks.
        target: forward of one stage's target.
        as_coded: the class token trains for ever, so that activation gradients cross
            all blocks.
        kept: blocks whose output is read from a store (`freeze.store`).
    """
    live = [
        d for d, layer in zip(decoders, stage_layers, strict=True) if layer >= frozen
    ]
    forward = (depth - kept) * (linear + attention) + (0.0 if kept else embed)
    forward += sum(live) + target * len(live)
    backward = 2 * sum(live) + (embed if frozen == 0 else 0.0)
    trained = depth - max(0, frozen - 1)
    backward += trained * linear  # Gradients of weights.
    # Layer 1 needs no gradient of its input once the patch embedding has frozen, which
    # the formula, like the original, leaves out of account.
    crossed = depth if as_coded else trained
    return forward, backward + crossed * (linear + 2 * attention)


def saving(costs, active) -> float:
    """Return the share of a run's cost that freezing saves.

    Args:
        costs: [L + 1] cost with n layers frozen.
        active: [L + 1] share of the run that layer i trains, rising.

    Source: layers freeze in order, so n are frozen from active[n - 1] to active[n].
    """
    costs, active = np.asarray(costs, float), np.asarray(active, float)
    shares = np.diff(active, prepend=0.0)
    return 1.0 - float((shares * costs).sum() / costs[0])
