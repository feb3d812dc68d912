"""Few-shot episodes: what is drawn, what is reported, what chance gives."""

import numpy as np
import pytest

from vitssl.evals import fewshot


def _data(classes=8, each=40, width=6, spread=0.0, seed=0):
    rng = np.random.default_rng(seed)
    label = np.repeat(np.arange(classes), each)
    noise = rng.normal(size=(len(label), width))
    return rng.normal(size=(classes, width))[label] * spread + noise, label


def _evaluate(x, label, seed=0, **options):
    """{shots: {name: value}} of the episodes."""
    found = {}
    query = {"vector": x, "label": label}
    for key, value in fewshot.FewShot(**options)({}, query, 0, seed).items():
        shots, name = key.split("/")
        found.setdefault(int(shots), {})[name] = value
    return found


def test_cosine_and_distance_differ_where_a_class_is_spread_out():
    # The first class has a short centroid in the very direction of the query.
    centre = np.array([[0.3, 0.0], [0.8, 0.6]])
    query = np.array([[4.0, 0.1]])
    assert fewshot.classify(query, centre, "cosine").tolist() == [1]
    assert fewshot.classify(query, centre, "euclidean").tolist() == [1]
    centre[1] = [0.3, -0.9]
    assert fewshot.classify(query, centre, "cosine").tolist() == [0]
    centre = np.array([[0.9, 0.0], [0.95, 0.9]])
    assert fewshot.classify(query, centre, "cosine").tolist() == [1]
    assert fewshot.classify(query, centre, "euclidean").tolist() == [0]


def test_noise_is_classified_at_chance_and_classes_far_apart_always():
    found = _evaluate(*_data(), episodes=300)
    assert list(found) == [1, 5, 10]
    for scores in found.values():
        # 300 episodes of 75 queries, five ways: a standard error below 0.01.
        assert scores["top1"] == pytest.approx(0.2, abs=0.03)
        assert scores["ways"] == 5
    x, label = _data(spread=100)
    for scores in _evaluate(x, label, episodes=20).values():
        assert scores == {"top1": 1.0, "std": 0.0, "interval": 0.0, "ways": 5.0}


def test_more_examples_help():
    x, label = _data(spread=1.0)
    found = _evaluate(x, label)
    assert found[1]["top1"] + 0.05 < found[5]["top1"] < found[10]["top1"] < 1


def test_the_interval_is_that_of_the_mean():
    x, label = _data(spread=1.0)
    found = _evaluate(x, label, shots=(5,), episodes=400)[5]
    assert found["interval"] == pytest.approx(1.96 * found["std"] / 20)
    means = [
        _evaluate(x, label, shots=(5,), episodes=400, seed=s)[5]["top1"]
        for s in range(12)
    ]
    # Twelve means lie within the interval around theirs, but for one or two.
    inside = np.abs(np.array(means) - np.mean(means)) < found["interval"]
    assert inside.sum() >= 9 and len(set(means)) > 6


def test_the_same_seed_draws_the_same_whatever_else_is_asked():
    x, label = _data(spread=1.0)
    both = _evaluate(x, label, shots=(1, 5), episodes=10)
    assert both[5] == _evaluate(x, label, shots=(5,), episodes=10)[5]


def test_no_query_is_among_the_examples():
    # One direction per sample: known by heart or not at all, and then a tie, which
    # goes to the first class.
    label = np.repeat(np.arange(4), 10)
    found = _evaluate(np.eye(40), label, ways=4, shots=(5,), queries=5, episodes=10)
    assert found[5]["top1"] == 0.25


def test_classes_too_small_do_not_take_part():
    x, label = _data(classes=4, each=20, spread=100)
    keep = np.flatnonzero((label != 1) | (np.arange(80) < 30))  # Ten of class 1.
    found = _evaluate(x[keep], label[keep], queries=15, episodes=5)
    assert list(found) == [1, 5] and found[5]["ways"] == 3
    unlabelled = np.where(label < 3, -1, label)
    assert _evaluate(x, unlabelled) == {}
