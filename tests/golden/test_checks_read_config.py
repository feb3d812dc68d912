"""Another value of a key of a case's config makes its check fail.

That a key is read at all is asked of every case wherever it is run (`reading`); here,
that what is read counts.
"""

import copy
import json
import pathlib
import re

import pytest

from tests.golden import conftest, reading, test_golden

CASES = pathlib.Path(__file__).parent / "cases"

# Of the others every value compiles a network, a loss or a gradient anew, or draws
# thousands of samples: 0.1 to 14 s each.
CHEAP = (
    r"hjepa/(attention rollout|multi-crop mask.*|few-shot.*|crop augm.*|schedules)",
    r"hvit/(attention rollout|split.*|best checkpoint.*|augmentation primitives)",
    r"hybrid/(Olmo.*|position enc.*|Flip.*|FLOP.*|missing.*|split_batch|Normal.*)",
    r"hybrid/(token budget.*|lr / EMA.*)",
    r"ifam/(dataset|visualisation|schedule|param_groups|positional_embedding)",
    r"vitfreeze/(theoretical.*|FreezeOut.*|linear-probe crop|stage loss weighting)",
    r"vitfreeze/(parameter grouping .fine.*|pos-embed.*|positional.*|losses.*)",
)
# Keys that are read and may yet change nothing in the cases here, and why.
NO_EFFECT = {
    r"hybrid/OlmoEarthDataset.*/token_budget": "there are fewer steps than it allows",
    r"hybrid/missing masks.*/only_decode_modalities": "they have visible tokens too",
    r"hybrid/token budget.*/valid_starts.*": "steps that no start depends on",
    r"ifam/dataset/(files|image_sizes_hw)\..*": "not all of a tree is looked at",
}


def cheap():
    """Names of the cases whose checks can be run for every key."""
    for path in CASES.rglob("*.json"):
        meta = json.loads(path.read_text())
        where = f"{meta['system']}/{meta['component']}"
        if any(re.fullmatch(pattern, where) for pattern in CHEAP):
            yield path.relative_to(CASES)


def others(value):
    """Yield other values of the same type; of a list, with another first entry."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield from (type(value)(1.5 * value + 1), type(value)(value / 2))
    elif isinstance(value, str):
        yield f"?{value}"
    elif isinstance(value, list) and value:
        yield from ([one, *value[1:]] for one in others(value[0]))
    else:
        yield "?"


def leaves(value, path=()):
    """Yield the path of everything that is no dict and holds none."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, (*path, key))
    elif isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
        for i, one in enumerate(value):
            yield from leaves(one, (*path, i))
    else:
        yield path


def at(config, path, value):
    """The config with a value at a path."""
    config = copy.deepcopy(config)
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return config


def found(config, path):
    """The value at a path."""
    for key in path:
        config = config[key]
    return config


def passes(case, config):
    """Whether the check of a case is content with this config."""
    case.config, case.compared = reading.recorded(config), set()
    try:
        test_golden.SYSTEMS[case.meta["system"]][case.meta["component"]](case)
    except Exception:  # noqa: BLE001, any complaint will do.
        return False
    return case.compared == set(case.out)


def without_effect(case):
    """Keys of which no other value makes the check fail; * is any entry of a list."""
    config, counts = case.meta.get("config", {}), {}
    for path in leaves(config):
        now = found(config, path)
        values = [value for value in others(now) if value != now]
        key = ".".join("*" if str(k).isdigit() else k for k in path)
        stays = all(passes(case, at(config, path, value)) for value in values)
        counts[key] = counts.get(key, True) and stays
    return [key for key, idle in counts.items() if idle]


@pytest.mark.filterwarnings("ignore")  # What other values lead to is no matter.
@pytest.mark.parametrize("name", sorted(map(str, cheap())))
def test_another_value_of_a_key_fails_the_check(name):
    case = conftest.Case(CASES / name)
    where = f"{case.meta['system']}/{case.meta['component']}"
    table = {**reading.IDLE, **NO_EFFECT}
    left = [
        key
        for key in without_effect(case)
        if not any(re.fullmatch(idle, f"{where}/{key}") for idle in table)
    ]
    assert not left, f"{name}: {left} may be anything"
