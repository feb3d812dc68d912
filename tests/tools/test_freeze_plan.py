"""`vitssl freeze-plan`: what counts as settled, and the overrides that follow."""

import re

import numpy as np
import pytest

from vitssl import errors
from vitssl.optim import freezeout
from vitssl.tools import freeze_plan

NONE = float("nan")


def _course(cka, update=None):
    cka = np.array(cka, float)
    if update is None:
        update = np.zeros((len(cka) - 1, cka.shape[1]))
    names = {
        0: ("encoder/patch_embed/bias", "encoder/patch_embed/kernel"),
        1: ("encoder/block_0/mlp/bias", "encoder/block_0/mlp/kernel", "encoder/cls"),
        2: ("encoder/block_1/mlp/kernel",),
    }
    steps = (0, 10, 20, 30)
    return freeze_plan.Course(
        steps, 40, 4, names, np.array(update), NONE * cka[1:], cka
    )


def test_a_layer_settles_when_it_stays_alike_and_all_before_it_have():
    found = _course(
        [[0.2, 0.1, 0.9], [0.97, 0.5, 0.9], [0.3, 0.97, 0.9], [1.0, 1.0, 1.0]]
    )
    # Layer 0 was alike at 10, but not at 20: it is not settled before the end.
    assert found.settled(0.95, 0.2) == {}
    found = _course(
        [[0.2, 0.99, 0.9], [0.3, 0.99, 0.9], [0.97, 0.99, 0.9], [1.0, 1.0, 1.0]]
    )
    assert found.settled(0.95, 0.2) == {0: 20, 1: 20}


def test_without_blocks_it_is_the_size_of_the_updates_that_says_so():
    cka = np.full((4, 3), NONE)
    update = [[1.0, 1.0, 1.0], [0.1, 0.5, 0.1], [0.1, 0.1, 0.1]]
    assert _course(cka, update).settled(0.95, 0.2) == {0: 20, 1: 30}


def test_outputs_that_are_turned_and_scaled_are_alike():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6))
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    assert freeze_plan.alike(x, 3 * x @ turn + 1) == pytest.approx(1.0)
    assert freeze_plan.alike(x, rng.normal(size=(50, 6))) < 0.4


@pytest.mark.parametrize("name, t_0", [("linear", 0.5), ("cubic", 0.8)])
def test_the_schedule_that_is_there_is_found_again(name, t_0):
    shares = {k: freezeout.ratio(name, t_0, k, 12) for k in range(12)}
    assert freeze_plan.closest(shares, 12) == (name, t_0)


def test_a_pattern_is_short_and_matches_what_settled_alone():
    names = ["encoder/block_1/a", "encoder/block_1/b", "encoder/cls", "norm_0/scale"]
    every = [*names, "encoder/block_10/a", "encoder/norm/scale", "norm_01/scale"]
    pattern = freeze_plan.covering(names, every)
    assert pattern == "encoder/block_1/.*|encoder/cls|norm_0/.*"
    assert [n for n in every if re.fullmatch(pattern, n)] == names


def test_the_overrides_are_of_the_whole_run_and_of_what_follows_the_warm_up():
    said = freeze_plan.text(_course(np.ones((4, 3))), {0: 10, 1: 20})
    assert (
        "--config.optim.freeze=\"(('encoder/patch_embed/.*', 0.25), "
        "('encoder/block_0/.*|encoder/cls', 0.5),)\"" in said
    )
    # After a warm-up of 4 of 40 steps: 6 / 36 and 16 / 36 are near to 0.54 ** 3 = 0.157
    # and 0.77 ** 3 = 0.457.
    assert "--config.freeze.schedule=cubic --config.freeze.t_0=0.54 " in said


def test_a_run_with_two_checkpoints_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(freeze_plan.opened, "past", lambda path: path)
    monkeypatch.setattr(freeze_plan.seals, "sealed", lambda _: [0, 4])
    past = type("Past", (), {"directory": tmp_path})
    monkeypatch.setattr(freeze_plan.opened, "past", lambda path: past)
    assert freeze_plan.main(["run"]) == errors.CheckpointError.code
    assert "checkpoint.keep_every_epochs" in capsys.readouterr().err
    assert freeze_plan.main(["run", "--alike=2"]) == errors.UsageError.code
