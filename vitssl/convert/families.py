"""All families an import knows, and finding out which one a file is of.

To add one: a `family.Family` in a module of its own, and its line here, above the
families whose description fits it too.
"""

from collections.abc import Mapping

from vitssl import errors
from vitssl.convert import (
    bigvision,
    dinov3,
    family,
    huggingface,
    hvit_names,
    reader,
    timm_names,
    wholes,
)

# The first that fits wins: special ones stand before timm, which fits most.
ORDER = (
    wholes.PARTS,
    wholes.OLMOEARTH,
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


def find(tree, name: str = "auto", part: str = "") -> tuple[family.Family, dict, str]:
    """Return (family, state dict, where in the file it stood).

    Args:
        tree: `reader.Weights.tree`.
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
    dicts = reader.state_dicts(tree)
    if part and part not in dicts:
        raise errors.UsageError(f"--part={part}: the file has {_parts(dicts)}")
    wanted = ORDER if name == "auto" else (FAMILIES[name],)
    for one in wanted:
        for place in _places(one, dicts, part, name == "auto"):
            state = family.stripped(dicts[place], one.strip)
            # A name given by the user decides; its table tells what does not fit.
            if one.fits(state) or (name != "auto" and _same_names(one, state)):
                if name == "auto" and one is timm_names.TIMM:
                    one = _dino_wrapped(one, tree)
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


def _dino_wrapped(one, tree):
    """Return DINO for its training checkpoints: a student and a teacher."""
    both = isinstance(tree, Mapping) and {"student", "teacher"} <= set(tree)
    return timm_names.DINO if both else one


def _parts(dicts) -> str:
    lines = [f"{path or '(top)'}: {len(keys)} arrays" for path, keys in dicts.items()]
    return "; ".join(lines[:8]) or "no arrays"
