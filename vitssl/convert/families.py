"""All families an import knows, and finding out which one a file is of.

To add one: a `family.Family` in a module of its own, and its line here, above the
families whose description fits it too. Whole methods stand here: every parameter of
one, not an encoder alone, for `init.from` of their method, whose parameters have the
same names; they have no features of their own, and `to_parts` and `to_olmoearth` are
the way back.
"""

from collections.abc import Mapping

import numpy as np

from vitssl import convert, errors, tree
from vitssl.convert import (
    Table,
    bigvision,
    dinov3,
    family,
    huggingface,
    hvit_names,
    reader,
    timm_names,
)
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
    return huggingface.fuse(state) if huggingface.is_hf(state) else dict(state)


PARTS = family.Family(
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


OLMOEARTH = family.Family(
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


# The first that fits wins: special ones stand before timm, which fits most.
ORDER = (
    PARTS,
    OLMOEARTH,
    hvit_names.FAMILY,
    timm_names.HJEPA,
    bigvision.BIGVISION,
    dinov3.DINOV3,
    huggingface.DINOV2,
    huggingface.VIT,
    timm_names.LOCALMIM,
    timm_names.MAE,
    timm_names.DINOV2,
    timm_names.DINO,
    timm_names.IJEPA,
    timm_names.TIMM,
)
FAMILIES = {f.name: f for f in ORDER}


def find(
    contents, name: str = "auto", part: str = ""
) -> tuple[family.Family, dict, str]:
    """Return (family, state dict, where in the file it stood).

    Args:
        contents: `reader.Weights.tree`.
        name: of the family, or "auto".
        part: which dict of a training checkpoint; "" = the family's first choice.

    Raises:
        UsageError: no such family or part.
        CheckpointError: no dict in the file is of the family, or of any.
    """
    if name != "auto" and name not in FAMILIES:
        raise errors.UsageError(
            f"--family={name}: one of auto, {', '.join(sorted(FAMILIES))}"
        )
    dicts = reader.state_dicts(contents)
    if part and part not in dicts:
        raise errors.UsageError(f"--part={part}: the file has {_parts(dicts)}")
    wanted = ORDER if name == "auto" else (FAMILIES[name],)
    for one in wanted:
        for place in _places(one, dicts, part, name == "auto"):
            state = family.stripped(dicts[place], one.strip)
            # A name given by the user decides; its table tells what does not fit.
            if one.fits(state) or (name != "auto" and _same_names(one, state)):
                if name == "auto" and one is timm_names.TIMM:
                    one = _dino_wrapped(one, contents)
                return one, state, place
    raise errors.CheckpointError(
        f"no weights of {'a known family' if name == 'auto' else name} found; the file "
        f"has {_parts(dicts)}; families: {', '.join(sorted(FAMILIES))}"
    )


def _places(one, dicts, part, auto):
    """Return where to look, the family's favourites first."""
    if part:
        return [part]
    first = [p for p in one.places if p in dicts]
    rest = [] if one.named and auto else [p for p in dicts if p not in first]
    return first + rest


def _same_names(one, state):
    """Whether a state has timm's names and so has the family."""
    return one.name in _TIMM_LIKE and family.is_vit(state)


_TIMM_LIKE = ("timm", "dino", "dinov2", "mae", "ijepa")


def _dino_wrapped(one, contents):
    """Return DINO for its training checkpoints: a student and a teacher."""
    both = isinstance(contents, Mapping) and {"student", "teacher"} <= set(contents)
    return timm_names.DINO if both else one


def _parts(dicts) -> str:
    lines = [f"{path or '(top)'}: {len(keys)} arrays" for path, keys in dicts.items()]
    return "; ".join(lines[:8]) or "no arrays"


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
    return huggingface.split(state) if hf else state


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
