"""All families an import knows, and finding out which one a file is of.

To add one: a `family.Family` in a module of its own, and its line here, above the
families whose description fits it too. Whole methods stand here: every parameter of
one, not an encoder alone, for `init.from` of their method, whose parameters have the
same names; `whole` tells the config that gives them features, and `to_parts` and
`to_olmoearth` are the way back.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vitssl import convert, errors, tree
from vitssl.convert import (
    Table,
    bigvision,
    cnn_names,
    dinov3,
    family,
    huggingface,
    hvit_names,
    prefixes,
    reader,
    timm_names,
    whole,
)
from vitssl.methods.latent_mim import names
from vitssl.methods.parts import names as parts

_HF = "encoder.layer."  # Hugging Face's name of a block.
# First layers of convolutional networks: their names there, and here.
_CNN = {"resnet": ("conv1.weight", "conv1"), "convnext": ("stem.0.weight", "stem")}


def _parts_table(fields: Mapping) -> Table:
    if fields["stages"] == 2:
        return parts.two_stage(hf=fields["hf"])
    # The names of the method's kind "single_stage".
    return parts.part_net(flax="stage_1/", hf=fields["hf"], cnn=fields["cnn"])


def _parts_fields(state: Mapping, options) -> dict:
    del options
    return dict(
        stages=2 if any(key.startswith("stage_2.") for key in state) else 1,
        hf=any(_HF in key for key in state),
        cnn=next((k for k, (key, _) in _CNN.items() if key in state), ""),
    )


def _parts_prepare(state: Mapping, notes: list) -> dict:
    del notes
    return huggingface.fuse(state) if huggingface.is_hf(state) else dict(state)


PARTS = family.Family(
    name="parts",
    about="iFAM, PDiscoFormer, PDiscoNet: all stages, for the method parts",
    fits=lambda state: any(key.endswith("fc_landmarks.weight") for key in state),
    model=_parts_fields,
    table=_parts_table,
    prepare=_parts_prepare,
    places=("MODEL_STATE", "model", "state_dict", ""),
    whole=True,
    config=whole.parts,
    classes=whole.parts_classes,
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
    config=whole.olmoearth,
)


# The first that fits wins: special ones stand before timm, which fits most.
ORDER = (
    PARTS,
    OLMOEARTH,
    hvit_names.FAMILY,
    timm_names.HJEPA,
    *cnn_names.FAMILIES,
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
    contents: Any,
    name: str = "auto",
    part: str = "",
    options: family.Options | None = None,
    notes: list | None = None,
) -> tuple[family.Family, dict, str]:
    """Return (family, state dict, where in the file it stood).

    Args:
        contents: `reader.Weights.tree`.
        name: of the family, or "auto".
        part: which dict of a training checkpoint; "" = the family's first choice.
        options: prefix and keys to leave aside.
        notes: told what was taken off keys, and which were left aside.

    Raises:
        UsageError: no such family, part or key to leave aside.
        CheckpointError: no dict in the file is of the family, or of any; several
            networks are in it.
    """
    if name != "auto" and name not in FAMILIES:
        raise errors.UsageError(
            f"--family={name}: one of auto, {', '.join(sorted(FAMILIES))}"
        )
    notes, options = [] if notes is None else notes, options or family.Options()
    dicts = reader.state_dicts(contents)
    if part and part not in dicts:
        raise errors.UsageError(f"--part={part}: the file has {_parts(dicts)}")
    wanted = ORDER if name == "auto" else (FAMILIES[name],)
    plain = {place: prefixes.unwrapped(state) for place, state in dicts.items()}
    for find in (_as_named, _under_a_prefix):
        for one, place, head in find(wanted, plain, part, name == "auto", options):
            if name == "auto" and one is timm_names.TIMM:
                one = _dino_wrapped(one, contents)
            state = prefixes.under(plain[place], head)
            notes += prefixes.told(dicts[place], plain[place], head, one.strip)
            return one, _kept(state, one.strip, options.ignore, notes), place
    what = "a known family" if name == "auto" else name
    below = "" if options.prefix is None else f" below --prefix={options.prefix}"
    raise errors.CheckpointError(
        f"no weights of {what} found{below}; the file has {_parts(dicts)}; families: "
        f"{', '.join(sorted(FAMILIES))}"
    )


def _as_named(wanted, dicts, part, auto, options):
    """Yield (family, place, prefix) of what fits with the names as they are."""
    head = prefixes.written(options.prefix or "")
    for one in wanted:
        for place in _places(one, dicts, part, auto):
            state = prefixes.under(dicts[place], head)
            # A name given by the user decides; its table tells what does not fit.
            if _fits(one, state, auto):
                yield one, place, head


def _under_a_prefix(wanted, dicts, part, auto, options):
    """Yield (family, place, prefix) where one prefix makes the names fit.

    Raises:
        CheckpointError: several do.
    """
    if options.prefix is not None:
        return
    for place in dict.fromkeys(p for one in wanted for p in _places(one, dicts, part)):
        found = {}
        for head in prefixes.candidates(dicts[place]):
            if any(head.startswith(shorter) for shorter in found):
                continue
            state = prefixes.under(dicts[place], head)
            fitting = [one for one in wanted if _fits(one, state, auto)]
            if fitting:
                found[head] = fitting[0]
        if found:
            head = prefixes.chosen(dicts[place], found)
            yield found[head], place, head


def _fits(one, state, auto) -> bool:
    """Return whether a family fits; a name given by the user makes do with less."""
    try:
        state = family.stripped(state, one.strip)
    except errors.CheckpointError:
        return False
    return bool(state) and (one.fits(state) or (not auto and _same_names(one, state)))


def _kept(state, strip, ignore, notes) -> dict:
    """Return a state, its family's prefixes off, without the keys to leave aside.

    Raises:
        UsageError: there is no such key.
    """
    patterns: dict[str, list[str]] = {name: [] for name in ignore}
    for key in state:
        short = family.short_name(key, strip)
        for name, keys in patterns.items():
            if any(prefixes.names(name, k) for k in (key, short)):
                keys.append(short)
    for name, keys in patterns.items():
        if not keys:
            near = difflib.get_close_matches(name, state, 2, 0.0)
            raise errors.UsageError(
                f"--ignore={name}: no such key; the file has {', '.join(near)}, ..."
            )
        notes.append(f"left aside by --ignore={name}: {len(keys)} keys ({keys[0]})")
    gone = {key for keys in patterns.values() for key in keys}
    found = family.stripped(state, strip)
    return {key: x for key, x in found.items() if key not in gone}


def _places(one, dicts, part, auto=False):
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
    lines = [
        f"{path or '(top)'}: {len(keys)} arrays ({_some(keys)})"
        for path, keys in dicts.items()
    ]
    return "; ".join(lines[:8]) or "no arrays"


def _some(keys) -> str:
    """Return two keys of a dict, which say most about what it is."""
    two = [*keys][:1] + [*keys][len(keys) // 2 :][:1] * (len(keys) > 1)
    return ", ".join(two)


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
    backbone = "stage_1/backbone/{}/kernel"
    found = (k for k, (_, x) in _CNN.items() if backbone.format(x) in leaves)
    fields = dict(stages=1 if first else 2, hf=hf, cnn=next(found, ""))
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
