"""The table of parameters at the start of a run."""

import importlib
import subprocess
import sys
import types

import numpy as np
from clu import parameter_overview

from tests import runs
from vitssl import tree
from vitssl.run import notes


def _optimizer(params, **known):
    names = tree.flat(params)
    found = dict(frozen_from={}, frozen_until={}, wd_factor=dict.fromkeys(names, 1.0))
    found |= known
    return types.SimpleNamespace(frozen=lambda at: known.get("idle", ()), **found)


def _blocks(*numbers):
    return {
        "encoder": {f"block_{i}": {"kernel": np.zeros((3, i + 1))} for i in numbers}
    }


def _cells(lines):
    rows = [line for line in lines if line.strip().startswith("|")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


def test_blocks_stand_in_the_order_of_their_numbers():
    params = _blocks(10, 2, 1, 0)
    head, *rows = _cells(notes.parameter_table(params, _optimizer(params)))
    assert head == ["Module", "Parameters", "Trains", "Decays"]
    assert [row[0] for row in rows] == [f"encoder/block_{i}" for i in (0, 1, 2, 10)]
    assert [row[1] for row in rows] == ["3", "6", "9", "33"]


def test_what_trains_decays_and_freezes_is_said_of_every_module():
    params = _blocks(0, 1) | {"head": {"kernel": np.ones((9, 1)), "bias": np.ones(1)}}
    decays = dict.fromkeys(tree.flat(params), 1.0) | {"head/bias": 0.0}
    about = dict(
        idle={"head/kernel"},
        wd_factor=decays,
        frozen_from={"encoder/block_0/kernel": 7},
        frozen_until={"head/kernel": 3},
    )
    lines = notes.parameter_table(params, _optimizer(params, **about))
    assert lines[0] == "  parameters 19, 10 trained at the start"
    assert _cells(lines)[1:] == [
        ["encoder/block_0", "3", "100%", "100%", "frozen from step [7]"],
        ["encoder/block_1", "6", "100%", "100%", ""],
        ["head", "10", "10%", "90%", "frozen until step [3]"],
    ]


def test_the_table_needs_no_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    importlib.reload(parameter_overview)


def test_a_commit_is_of_the_clone_and_not_of_a_repository_around_it(tmp_path):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in ("init -q", "commit -q --allow-empty -m first"):
        subprocess.run([*git, *words.split()], cwd=tmp_path, check=True)
    installed = tmp_path / "venv" / "site-packages"
    installed.mkdir(parents=True)
    assert len(notes._commit(tmp_path)) >= 7
    assert notes._commit(installed) == ""
    assert "commit" not in notes.versions() or (runs.ROOT / ".git").exists()
