"""Families of whole models: every parameter of a method, not an encoder alone.

An import of them is for `init.from` of the method of the same name, whose parameters
have the same names; it has no features of its own. To add one: a `family.Family` with
`whole=True` here, and its line in `families.ORDER`.
"""

from collections.abc import Mapping

from vitssl.convert import Table, dinov2, olmoearth, parts
from vitssl.convert.family import Family

_HF = "encoder.layer."  # Hugging Face's name of a block.


def _parts_table(fields: Mapping) -> Table:
    make = parts.two_stage if fields["stages"] == 2 else parts.part_net
    return make(hf=fields["hf"])


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

OLMOEARTH = Family(
    name="olmoearth",
    about="OlmoEarth: encoder, predictor and target, for the method latent_mim",
    fits=lambda state: bool(olmoearth.sensors(state)),
    model=lambda state, options: dict(sensors=olmoearth.sensors(state)),
    table=lambda fields: olmoearth.table(fields["sensors"]),
    places=("model", "model_state_dict", "state_dict", ""),
    strip=("module.", "model."),
    whole=True,
)
