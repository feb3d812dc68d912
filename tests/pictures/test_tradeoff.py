"""The picture of a study: what the arms reach against what they cost."""

import numpy as np

from vitssl.pictures import tradeoff


def test_every_arm_is_a_point_at_its_means_and_gaps_are_left_out(tmp_path):
    found = {
        "none": {"cost": [2.0, 2.0], "score": [0.5, 0.7]},
        "half": {"cost": [1.0, 1.0], "score": [0.6, None]},
        "empty": {"cost": [None], "score": [None]},
    }
    path = tmp_path / "study.png"
    figure = tradeoff.arms(found, "cost", "score", path=path)
    (axis,) = figure.axes
    centres = [c.lines[0].get_xydata()[0] for c in axis.containers]
    np.testing.assert_allclose(centres, [(2.0, 0.6), (1.0, 0.6)])
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["none", "half"]
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_arms_that_cost_alike_stand_side_by_side_the_best_first():
    found = {
        "worse": {"cost": [2.0, 2.02], "score": [0.1, 0.3]},
        "better": {"cost": [2.05, 2.05], "score": [0.5, 0.7]},
    }
    axis = tradeoff.arms.__wrapped__(found, "cost", "score").axes[0]
    centres = [c.lines[0].get_xydata()[0] for c in axis.containers]
    np.testing.assert_allclose(centres, [(1.0, 0.2), (0.0, 0.6)])
    assert [t.get_text() for t in axis.get_xticklabels()] == ["better", "worse"]
    assert axis.get_xlabel() == "cost: 2.01 to 2.05"


def test_no_two_arms_look_the_same():
    found = {f"arm{i}": {"cost": [1.0, 2.0], "score": [0.1, i]} for i in range(30)}
    axis = tradeoff.arms.__wrapped__(found, "cost", "score").axes[0]
    lines = [c.lines[0] for c in axis.containers]
    assert len({(x.get_color(), x.get_marker()) for x in lines}) == 30
