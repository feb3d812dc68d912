"""Families of whole models: every parameter of a method, not an encoder alone.

An import of them is for `init.from` of their method, whose parameters have the same
names; it has no features of its own. `to_parts` and `to_olmoearth` are the way back.
To add one: a `family.Family` with `whole=True` here, and its line in `families.ORDER`.
"""

from collections.abc import Mapping

import numpy as np

from vitssl import convert, errors, tree
from vitssl.convert import Table, dinov2
from vitssl.convert.family import Family
from vitssl.methods.latent_mim import names
from vitssl.methods.parts import names as parts

_HF = "encoder.layer."  # Hugging Face's name of a block.


def _parts_table(fields: Mapping) -> Table:
    if fields["stages"] == 2:
        return parts.two_stage(hf=fields["hf"])
    # The names of the method's kind "single_stage".
    return parts.part_net(flax="stage_1/", hf=fields["hf"])


def _parts_fields(state: Mapping, options) -> dict:
    del options
    return dict(
        stages=2 if any(key.startswith("stage_2.") for key in state) else 1,
        hf=any(_HF in key for key in state),
    )


def _parts_prepare(state: Mapping, notes: list) -> dict:
    del notes
    return dinov2.fuse(state) if dinov2.is_hf(state) else dict(state)


PARTS = Family(
    name="parts",
    about="iFAM and PDiscoFormer: both stages, for the method parts",
    fits=lambda state: any(key.endswith("fc_landmarks.weight") for key in state),
    model=_parts_fields,
    table=_parts_table,
    prepare=_parts_prepare,
    places=("MODEL_STATE", "model", "state_dict", ""),
    whole=True,
)


def _fields_prepare(state: Mapping, notes: list) -> dict:
    """Return a state whose encoder, if it is alone, is named as in a whole one."""
    if not any(key.startswith("patch_embeddings.") for key in state):
        return dict(state)
    notes.append("the encoder alone: keys without the prefix 'encoder.'")
    return {f"encoder.{key}": value for key, value in state.items()}


OLMOEARTH = Family(
    name="olmoearth",
    about="OlmoEarth: encoder, predictor and target, for the method latent_mim",
    fits=lambda state: bool(names.sensors(state)),
    model=lambda state, options: dict(sensors=names.sensors(state)),
    table=lambda fields: names.table(fields["sensors"]),
    prepare=_fields_prepare,
    places=("model", "model_state_dict", "state_dict", ""),
    strip=("module.", "_orig_mod.", "model."),
    whole=True,
)


def to_parts(leaves: Mapping, hf: bool) -> dict[str, np.ndarray]:
    """Return iFAM's state dict, or PDiscoFormer's of a first stage alone.

    Args:
        leaves: {name: array} of the method parts.
        hf: Hugging Face's names instead of timm's.

    Raises:
        UsageError: leaves of another method.
        CheckpointError: see `convert.export`.
    """
    if not any(name.startswith("stage_") for name in leaves):
        raise errors.UsageError("--layout=parts: these are no weights of that method")
    first = not any(name.startswith("stage_2/") for name in leaves)
    fields = dict(stages=1 if first else 2, hf=hf)
    state = convert.export(tree.nest(dict(leaves)), _parts_table(fields))
    return dinov2.split(state) if hf else state


def to_olmoearth(leaves: Mapping) -> dict[str, np.ndarray]:
    """Return OlmoEarth's state dict, without its computed tables.

    Args:
        leaves: {name: array} of the method latent_mim.

    Raises:
        UsageError: leaves of another method.
        CheckpointError: see `convert.export`; an upsampler has no name there.
    """
    found = names.sensors_of(leaves)
    if not found:
        message = "--layout=olmoearth: these are no weights of latent_mim"
        raise errors.UsageError(message)
    return convert.export(tree.nest(dict(leaves)), names.table(found))
