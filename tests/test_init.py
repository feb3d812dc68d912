"""Starting from stored parameters under other names."""

import numpy as np

from vitssl import init


def test_one_stored_network_fills_two():
    stored = {"encoder/cls": np.ones(2), "encoder/norm/scale": np.zeros(2)}
    names = ["stage_1/backbone/cls", "stage_2/backbone/cls", "stage_1/head/w"]
    rules = ((r"stage_[12]/backbone/(.*)", r"encoder/\1"),)
    got = init.renamed(stored, names, rules)
    assert set(got) == {*stored, "stage_1/backbone/cls", "stage_2/backbone/cls"}
    assert got["stage_2/backbone/cls"] is stored["encoder/cls"]


def test_the_first_rule_wins_and_what_is_not_stored_stays_unknown():
    stored = {"a": np.ones(1), "b": np.zeros(1)}
    got = init.renamed(stored, ["x", "y"], (("x", "b"), (".*", "c"), ("x", "a")))
    assert got["x"] is stored["b"] and "y" not in got


def test_a_broken_pattern_is_named():
    lines = list(init.Init(rename=(("(", "a"),)).check())
    assert lines and lines[0].startswith("rename: '('")
