"""The side of training images, step by step."""

import numpy as np
import pytest

from vitssl import config
from vitssl.data import resolution
from vitssl.methods import base
from vitssl.methods.classify import views
from vitssl.methods.simclr import views as simclr

RUN = base.Run(
    total_steps=40,
    steps_per_epoch=4,
    batch_size=2,
    classes=2,
    channels=3,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
)


def _sides(size, multiple, **spec):
    sides = resolution.Resolution(**spec).sides(size, multiple, RUN)
    return [sides(t) for t in range(RUN.total_steps)]


def test_the_side_grows_by_epochs_to_that_of_the_section():
    # 96 + 128 e / 10 in epoch e, rounded to a multiple of 32, each for four steps.
    want = [96, 96, 128, 128, 160, 160, 160, 192, 192, 224]
    want[1] = round(int(96 + 12.8) / 32) * 32
    assert _sides(224, 32, start=96)[::4] == want
    sides = _sides(224, 32, start=96, epochs=4.0)
    assert sides[::4] == [96, 128, 160, 192] + [224] * 6
    assert all(len(set(sides[e : e + 4])) == 1 for e in range(0, 40, 4))


def test_some_batches_have_another_side():
    sides = _sides(64, 16, sizes=(30, 100))
    assert set(sides) == {32, 48, 64, 80, 96}
    assert sides == _sides(64, 16, sizes=(30, 100))
    long = resolution.Resolution(sizes=(96, 96), prob=0.3).sides(64, 16, RUN)
    share = np.mean([long(t) == 96 for t in range(2000)])
    assert abs(share - 0.3) < 0.03
    assert set(_sides(64, 16, sizes=(96, 96), prob=1.0, start=32)) == {96}


def test_a_fixed_side_leaves_the_transform_alone():
    assert _sides(50, 16) == [50] * 40
    assert _sides(50, 16, sizes=(16, 32), prob=0.0) == [50] * 40
    plain = resolution.Resolution().sides(50, 16, RUN)
    view = simclr.Views(size=50)
    assert resolution.sized(view, plain) is view


@pytest.mark.parametrize("view", [simclr.Views(size=48), views.Leaves(48, "light")])
def test_rows_of_a_step_share_its_side(view):
    sides = resolution.Resolution(start=16).sides(48, 16, RUN)
    transform = resolution.sized(view, sides)
    image = np.random.default_rng(0).integers(0, 256, (60, 70, 3), np.uint8)
    for step, side in ((0, 16), (20, 32), (39, 48)):
        assert sides(step) == side
        row = transform(dict(image=image, step=step), np.random.default_rng(step))
        own = row.get("global", row.get("image"))
        assert own.shape[-3:] == (side, side, 3)


def test_impossible_values_are_one_line_each():
    for values, fault in (
        (dict(start=-1), "start=-1: 0 or more"),
        (dict(epochs=-1.0), "epochs=-1.0: 0 or more"),
        (dict(sizes=(64,)), "sizes=(64,): (least, largest) in pixels, or ()"),
        (dict(sizes=(64, 32)), "sizes=(64, 32): (least, largest) in pixels, or ()"),
        (dict(prob=1.5), "prob=1.5: in [0, 1]"),
    ):
        found = config.Problems()
        config.section(resolution.Resolution, values, "r", found)
        assert found == [f"r.{fault}"]
    fits = resolution.Resolution(start=300, sizes=(33, 47)).faults(224, 32)
    assert list(fits) == [
        "resolution.start=300: at most augment.size=224",
        "resolution.sizes=(33, 47): no multiple of 32 lies between",
    ]
    (odd,) = resolution.Resolution(start=64).faults(100, 32)
    assert "multiple of 32; nearest are 96 and 128" in odd
    assert not list(resolution.Resolution().faults(100, 32))
