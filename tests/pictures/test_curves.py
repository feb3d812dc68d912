import json

import numpy as np
import pytest
from PIL import Image

from vitssl.pictures import curves


@pytest.fixture
def path(tmp_path):
    lines = [
        {"step": 20, "loss": 2.0, "knn/top1": 0.5, "note": "words", "flag": True},
        {"step": 10, "loss": 3.0},
        {"step": 20, "loss": 1.5},
        {"loss": 9.0},
        {"step": 30, "loss": float("nan")},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n[1]\n{"step": 40, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    return tmp_path / "metrics.jsonl"


def run(steps=60):
    """Return the curves of a run that logged `steps` lines."""
    at = np.arange(1, steps + 1) * 10
    fall = np.exp(-at / 200)
    return {
        "lr": (at, 1e-3 * fall),
        "loss_h0": (at, fall + 1),
        "loss": (at, fall),
        "loss_h1": (at, fall + 0.5),
        "momentum": (at, np.linspace(0.996, 1, steps)),
        "grad_norm": (at, 1 + fall),
        "time/step_seconds": (at, fall),
    }


def test_reading_survives_a_torn_line_and_keeps_the_last_of_a_step(path):
    found = curves.read(path)
    assert set(found) == {"loss", "knn/top1"}
    steps, values = found["loss"]
    np.testing.assert_array_equal(steps, [10, 20, 30])
    np.testing.assert_array_equal(values, [3.0, 1.5, np.nan])


def test_smoothing_leaves_lines_where_they_are():
    line = np.linspace(3, 5, 200)
    np.testing.assert_allclose(curves.smooth(line, 3)[20:-20], line[20:-20])
    np.testing.assert_allclose(curves.smooth(np.ones(9), 4), 1.0)
    np.testing.assert_array_equal(curves.smooth(line, 0), line)


def test_smoothing_is_the_weighted_mean_and_passes_over_holes():
    values = np.random.default_rng(0).normal(size=40)
    values[7] = np.nan
    found = curves.smooth(values, 2)
    for i in (0, 7, 20, 39):
        total = mass = 0.0
        for j, value in enumerate(values):
            if np.isfinite(value) and abs(i - j) <= 8:
                weight = np.exp(-((i - j) ** 2) / 8)
                total, mass = total + weight * value, mass + weight
        assert found[i] == pytest.approx(total / mass)


def test_training_draws_the_losses_first_and_no_plumbing():
    figure = curves.training(run())
    titles = [a.get_title() for a in figure.axes if a.get_visible()]
    names = ["loss", "loss_h0", "loss_h1", "grad_norm", "lr", "momentum"]
    assert titles == names
    smoothed, raw = figure.axes[0].lines
    np.testing.assert_array_equal(raw.get_ydata(), run()["loss"][1])
    assert raw.get_alpha() < 1 and smoothed.get_alpha() is None


def test_training_draws_what_it_is_asked_for():
    figure = curves.training(run(5), keys=("lr", "time/step_seconds"))
    assert [a.get_title() for a in figure.axes[:2]] == ["lr", "time/step_seconds"]
    (line,) = figure.axes[0].lines  # Too short a curve to be smoothed.
    np.testing.assert_array_equal(line.get_xdata(), [10, 20, 30, 40, 50])


def test_levels_and_gradients_are_on_logarithmic_scales():
    figure = curves.levels(run())
    assert figure.axes[0].get_yscale() == "log"
    texts = [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    assert texts == ["loss_h0", "loss_h1"]
    assert curves.gradients(run()).axes[0].get_yscale() == "log"


def test_momentum_of_exactly_one_has_no_place_on_the_logarithmic_scale():
    left, right = curves.momentum(run()).axes
    np.testing.assert_array_equal(left.lines[0].get_ydata(), run()["momentum"][1])
    drawn = right.lines[0].get_ydata()
    assert np.isnan(drawn[-1]) and np.isfinite(drawn[:-1]).all()


@pytest.mark.parametrize("draw", [curves.levels, curves.momentum, curves.gradients])
def test_a_metric_that_is_missing_is_named(draw):
    with pytest.raises(ValueError, match=r"no curve.*\['lr'\]"):
        draw({"lr": run()["lr"]})


def test_what_does_not_move_or_is_measured_once_has_no_chart():
    once, flat = (np.array([60]), np.array([0.5])), (np.arange(9), np.ones(9))
    metrics = run() | {"wd": flat, "knn/top1": once, "final/trained/knn/top1": once}
    metrics["final/std"] = run()["loss"]  # Nor twice, by a run that was evaluated anew.
    assert set(curves.courses(metrics)) == set(curves.courses(run()))
    titles = [a.get_title() for a in curves.training(metrics).axes]
    assert not {"wd", "knn/top1", "final/trained/knn/top1", "final/std"} & set(titles)
    keys = [
        k for key in curves.COLLAPSE.values() for k in curves.matching(metrics, key)
    ]
    assert not any(key.startswith("final/") for key in keys)


def test_a_picture_is_no_larger_than_a_screen_however_many_there_are(tmp_path):
    many = {f"grad_norm/block_{i}": run()["loss"] for i in range(60)}
    many |= {f"loss_{i}": run()["loss"] for i in range(60)}
    for draw in (curves.training, curves.gradients):
        draw(many, path=tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as image:
            assert max(image.size) <= 2000
    assert "and 28 more" in curves.training(many).get_suptitle()
    names = [t.get_text() for t in curves.gradients(many).axes[0].get_legend().texts]
    assert names[0] == "grad_norm/block_0" and names[-1] == "grad_norm/block_59"
    order = curves.matching(many, "block")
    assert order[:3] == [f"grad_norm/block_{i}" for i in (0, 1, 2)] and len(names) == 16


def test_collapse_watches_features_and_not_predictions():
    at = np.arange(1, 4)
    values = {
        "target_std": np.array([0.5, 0.2, 0.005]),
        "online_rank": np.array([20.0, 10.0, 2.0]),
        "quality/rankme": np.array([8.0, 8.0, 8.0]),
        "quality/mean_similarity": np.array([0.1, 0.5, 0.95]),
        "cosine_h0": np.array([0.1, 0.9, 0.99]),  # Of predictions: high is good.
        "crank": np.array([1.0, 1.0, 1.0]),
    }
    figure = curves.collapse({k: (at, v) for k, v in values.items()}, width=64)
    names = [
        sorted(t.get_text() for t in a.get_legend().get_texts()) for a in figure.axes
    ]
    assert names == [
        ["target_std"],
        ["online_rank", "quality/rankme"],
        ["quality/mean_similarity"],
    ]
    zones = [
        (a.patches[0].get_y(), a.patches[0].get_y() + a.patches[0].get_height())
        for a in figure.axes
    ]
    np.testing.assert_allclose(zones, [(0, 0.01), (0, 6.4), (0.9, 1.0)])


def test_signs_that_were_not_logged_have_no_panel():
    figure = curves.collapse({"target_std": (np.arange(3), np.ones(3))}, width=8)
    assert [a.get_title() for a in figure.axes] == ["standard deviation of features"]
    with pytest.raises(ValueError, match="no curve like"):
        curves.collapse({"loss": run()["loss"]}, width=8)
