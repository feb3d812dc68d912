"""LocalMIM and ViTFreeze: the state dict of their ViT/models_mim.py.

    cls_token, patch_embed.*, blocks.*    encoder/
    norm.k, decoder.k                     norm_k, decoder_k; the last norm encoder/norm

The fixed position tables and the HOG convolutions are no parameters here.
"""

from collections.abc import Mapping

from vitssl.convert import Rule, Table, vit_names


def decoder(scale: float) -> Table:
    """Return the table of `models.decoder.StageDecoder` of one scale."""
    rules = [Rule("mask_token", "mask_token")]
    rules += [*vit_names.linear("embed", "embed"), *vit_names.norm("norm", "norm")]
    ups = 0
    while 2 ** (ups + 1) <= scale:
        place = 3 * ups  # A normalisation and a GELU follow each but the last.
        rules += [
            Rule(f"pred.{place}.weight", f"up_{ups}/kernel", "i o p q -> i p q o"),
            vit_names.bias(f"pred.{place}", f"up_{ups}"),
            *vit_names.norm(f"pred.{place + 1}", f"up_norm_{ups}"),
        ]
        ups += 1
    last = 0 if scale == 1 else max(1, 3 * ups - 2)
    # The normalisation of the last transposed convolution does not exist.
    rules = [r for r in rules if not r.torch.startswith(f"pred.{last}.")]
    rules += [
        Rule(f"pred.{last}.weight", "pred/kernel", "o i 1 1 -> i o"),
        vit_names.bias(f"pred.{last}", "pred"),
    ]
    aside = ("decoder_pos_embed", "pos_embed")
    blocks = vit_names.table("", "").under()
    blocks = Table(
        tuple(r for r in blocks.rules if r.torch.startswith("blocks.")), aside
    )
    return Table(tuple(rules)) + blocks


def table(scales: tuple[float, ...], first: int = 0) -> Table:
    """Return the table of a pre-training checkpoint.

    Args:
        scales: of all stages of the model.
        first: stages that were already frozen and deleted when it was written; PyTorch
            numbers the rest from 0.
    """
    count = len(scales)
    found = Table((), ("pos_embed", "hog_enc.{*}", "head.{*}"))
    for k in range(first, count):
        ours = "encoder/norm" if k == count - 1 else f"norm_{k}"
        found += Table(vit_names.norm(f"norm.{k - first}", ours))
        found += decoder(scales[k]).under(f"decoder.{k - first}.", f"decoder_{k}/")
    # The plain final `norm` of a ViT is not there.
    return found + vit_names.table("", "encoder/")


def dropped(state: Mapping, count: int) -> int:
    """Return how many of `count` stages a checkpoint has lost to freezing."""
    present = {key.split(".")[1] for key in state if key.startswith("decoder.")}
    return count - len(present)
