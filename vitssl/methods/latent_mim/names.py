"""OlmoEarth: the state dicts of allenai/olmoearth_pretrain.

One table leads into {"encoder": ..., "predictor": ..., "target": ...}:

    encoder.*                             encoder/  (network.Encoder)
    decoder.*                             predictor/  (network.Predictor)
    target_encoder.patch_embeddings.*     target/  (embed.PatchEmbeddings)

The tables of times and months are computed, not loaded; of a target encoder all but
its patch embeddings is left aside.
"""

import re
from typing import NamedTuple

import numpy as np

from vitssl.convert import CONV, LINEAR, Rule, Table, vit_names

_BLOCK = (
    *vit_names.norm("norm1", "norm1"),
    *(
        rule
        for name in ("q", "k", "v", "proj")
        for rule in vit_names.linear(f"attn.{name}", f"attn/{name}")
    ),
    *vit_names.norm("attn.q_norm", "attn/q_norm"),
    *vit_names.norm("attn.k_norm", "attn/k_norm"),
    *vit_names.norm("norm2", "norm2"),
    *vit_names.linear("mlp.fc1", "mlp/fc1"),
    *vit_names.linear("mlp.fc2", "mlp/fc2"),
)

_TABLES = ("pos_embed", "month_embed.weight", "latlon_embed.weight")
_EMBED = "patch_embeddings.per_modality_embeddings."


class Sensor(NamedTuple):
    """What the names of weights tell of a modality; the tables ask no more."""

    name: str
    channels: tuple
    space: bool


def sensors(state) -> tuple[Sensor, ...]:
    """Return the modalities that an encoder of a state dict embeds, in its order.

    Keys may lack the prefix "encoder.", as in a file of the encoder alone.
    """
    pattern = re.compile(
        rf"(?:encoder\.)?{re.escape(_EMBED)}(\w+)\.\1__(\d+)\.(proj\.)?weight"
    )
    found = (pattern.fullmatch(key) for key in state)
    return _sensors((m[1], int(m[2]), bool(m[3])) for m in found if m)


def sensors_of(leaves) -> tuple[Sensor, ...]:
    """Return the modalities of parameters by name, {"encoder/...": array}."""
    pattern = re.compile(r"encoder/patch_embed/(\w+)_(\d+)/kernel")
    found = ((pattern.fullmatch(name), np.ndim(x)) for name, x in leaves.items())
    return _sensors((m[1], int(m[2]), axes == 4) for m, axes in found if m)


def _sensors(found) -> tuple[Sensor, ...]:
    """Return the modalities of (name, number of a bandset, has space)."""
    sets, space = {}, {}
    for name, i, spread in found:
        sets[name] = max(sets.get(name, 0), 1 + i)
        space[name] = spread
    return tuple(Sensor(k, ((),) * n, space[k]) for k, n in sets.items())


def block(torch: str = "", flax: str = "") -> Table:
    """Return the table of `blocks.Block` under two prefixes."""
    return Table(_BLOCK).under(torch, flax)


def patch_embeddings(modalities, torch: str = "", flax: str = "") -> Table:
    """Return the table of `embed.PatchEmbeddings` under two prefixes."""
    rules = []
    for m in modalities:
        for g in range(len(m.channels)):
            theirs = f"per_modality_embeddings.{m.name}.{m.name}__{g}"
            ours = f"{m.name}_{g}"
            theirs += ".proj" if m.space else ""
            kind = CONV if m.space else LINEAR
            rules.append(Rule(f"{theirs}.weight", f"{ours}/kernel", kind))
            rules.append(vit_names.bias(theirs, ours))
    return Table(tuple(rules)).under(torch, flax)


def encodings(modalities, torch: str = "", flax: str = "") -> Table:
    """Return the table of `encodings.CompositeEncodings` under two prefixes."""
    rules = tuple(
        Rule(f"per_modality_channel_embeddings.{m.name}", m.name) for m in modalities
    )
    return Table(rules, _TABLES).under(torch, flax)


def aggregate(torch: str = "", flax: str = "", most: int = 8) -> Table:
    """Return the table of `network.Aggregate` of up to `most` layers."""
    rules = [
        rule
        for i in range(most)  # A ReLU stands between two layers.
        for rule in vit_names.linear(f"projection.{2 * i}", f"linear_{i}")
    ]
    return Table(tuple(rules)).under(torch, flax)


def encoder(modalities, torch: str = "", flax: str = "") -> Table:
    """Return the table of `network.Encoder` under two prefixes."""
    own = (Rule("register_tokens", "registers"), *vit_names.norm("norm", "norm"))
    found = (
        Table(own)
        + block("blocks.{i}.", "block_{i}/")
        + patch_embeddings(modalities, "patch_embeddings.", "patch_embed/")
        + encodings(modalities, "composite_encodings.", "encodings/")
        + aggregate("project_and_aggregate.", "aggregate/")
    )
    return found.under(torch, flax)


def predictor(modalities, torch: str = "", flax: str = "") -> Table:
    """Return the table of `network.Predictor` under two prefixes."""
    own = (
        Rule("mask_token", "mask_token"),
        *vit_names.norm("input_norm", "norm_in"),
        *vit_names.linear("encoder_to_decoder_embed", "embed"),
        *vit_names.norm("norm", "norm"),
        *vit_names.linear("to_output_embed", "head"),
    )
    found = (
        Table(own)
        + block("blocks.{i}.", "block_{i}/")
        + encodings(modalities, "composite_encodings.", "encodings/")
    )
    return found.under(torch, flax)


def target(modalities, torch: str = "", flax: str = "") -> Table:
    """Return the table of a random-projection target under two prefixes."""
    found = patch_embeddings(modalities, "patch_embeddings.")
    return Table(found.rules, ("{*}",)).under(torch, flax)


def table(modalities) -> Table:
    """Return the table of a training checkpoint."""
    return (
        encoder(modalities, "encoder.", "encoder/")
        + predictor(modalities, "decoder.", "predictor/")
        + target(modalities, "target_encoder.", "target/")
    )
