"""F1 and its parts, the calibration error, temperature scaling."""

import json

import numpy as np
import pytest
from scipy import special
from sklearn import metrics

from vitssl.evals import accuracy
from vitssl.evals import metrics as scores
from vitssl.pictures import confusion

RNG = np.random.default_rng(0)


def test_macro_means_are_scikit_learns_absent_classes_included():
    truth = RNG.integers(0, 5, 80)  # Of 7 classes, two never occur.
    named = np.where(RNG.random(80) < 0.6, truth, RNG.integers(0, 6, 80))
    got = scores.summary(accuracy.confusion(truth, named, 7))
    for average in ("macro", "weighted"):
        want = metrics.precision_recall_fscore_support(
            truth, named, labels=range(7), average=average, zero_division=0
        )
        keys = [f"{k}_{average}" for k in ("precision", "recall", "f1")]
        np.testing.assert_allclose([got[k] for k in keys], want[:3], rtol=1e-12)
    assert got["accuracy"] == metrics.accuracy_score(truth, named)


def _softened(t, count=4000):
    """Logits whose softmax is right as often as it says, then divided by t."""
    logits = 2.0 * RNG.normal(size=(count, 4))
    p = np.exp(special.log_softmax(logits, axis=1))
    label = np.array([RNG.choice(4, p=row) for row in p])
    return logits / t, label


def test_the_calibration_error_is_the_sum_over_bins():
    logits, label = _softened(0.5, 300)
    p = np.exp(special.log_softmax(logits, axis=1))
    sure, right = p.max(1), p.argmax(1) == label
    want = 0.0
    for low in range(10):
        inside = (sure > low / 10) & (sure <= (low + 1) / 10)
        if inside.any():
            gap = abs(right[inside].mean() - sure[inside].mean())
            want += inside.mean() * gap
    assert scores.calibration_error(logits, label, 10) == pytest.approx(want, rel=1e-9)
    certain = np.array([[50.0, 0.0], [50.0, 0.0]])
    assert scores.calibration_error(certain, [0, 0]) == pytest.approx(0, abs=1e-12)
    assert scores.calibration_error(certain, [1, 1]) == pytest.approx(1)


def test_temperature_scaling_finds_and_undoes_overconfidence():
    logits, label = _softened(0.4)  # Two and a half times too sure.
    found = scores.calibration(logits, label)
    assert found["temperature"] == pytest.approx(2.5, rel=0.1)
    assert found["ece"] > 0.1 > 0.04 > found["ece_scaled"]
    # Dividing by one number changes no decision.
    assert (np.asarray(logits).argmax(1) == (logits / 2.5).argmax(1)).all()


def test_the_report_is_of_the_average_and_says_the_same_on_the_page(tmp_path):
    logits, label = _softened(1.0, 60)
    one = accuracy.measure(logits, label)
    found = {
        "confusion": np.eye(4, dtype=int),
        "ema_tta_confusion": one["confusion"],
        "ema_tta_reliability": np.stack(scores.reliability(logits, label)),
    }
    names = ("a", "b", "c", "d")
    confusion.write(found, names, path=tmp_path / "report.json")
    got = json.loads((tmp_path / "report.json").read_text())
    assert got["scored"] == "ema_tta" and got["confusion"] == one["confusion"].tolist()
    assert got["f1_macro"] == scores.summary(one["confusion"])["f1_macro"]
    assert got["ece"] == pytest.approx(scores.calibration_error(logits, label))
    assert sum(row["support"] for row in got["classes"].values()) == 60
    figure = confusion.page(found, names, path=tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert f"macro F1 {got['f1_macro']:.3f}" in figure._suptitle.get_text()
    table = figure.axes[1].texts[0].get_text()
    assert all(name in table for name in names) and "macro mean" in table
