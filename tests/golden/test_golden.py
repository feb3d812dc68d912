"""Every golden case in `--golden-dir` is run through the check of its component."""

import importlib
import pathlib
import pkgutil

from tests.golden import reading

from . import checks

SYSTEMS = {}
for _module in pkgutil.iter_modules([str(pathlib.Path(checks.__file__).parent)]):
    # A file is named after its system, with a suffix when one file would be too long.
    _system = _module.name.split("_")[0]
    _found = importlib.import_module(f"{checks.__name__}.{_module.name}").CHECKS
    SYSTEMS.setdefault(_system, {}).update(_found)


def test_case_matches_the_original(case):
    system, component = case.meta["system"], case.meta["component"]
    known = SYSTEMS.get(system, {})
    assert component in known, (
        f"{case.path.name}: no check for {system!r} {component!r}; "
        f"known: {sorted(known)}"
    )
    known[component](case)
    left = set(case.out) - case.compared
    assert not left, f"never compared: {sorted(left)}"
    # A number of the config that a check has of its own is right for one case only.
    unread = reading.forgotten(case)
    assert not unread, f"config keys never read: {unread}"


def test_there_are_cases(request):
    root = pathlib.Path(request.config.getoption("--golden-dir"))
    assert list(root.rglob("*.json")), f"no golden cases under {root}"
