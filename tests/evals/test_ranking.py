"""Average precision of several labels: by hand, as scikit-learn's, in evaluators."""

import numpy as np
import pytest
from sklearn import linear_model
from sklearn import metrics as reference

from vitssl.evals import accuracy, fewshot, knn, linear, ranking, suite


def test_average_precision_is_the_mean_precision_at_the_hits():
    score = np.array([[0.9], [0.8], [0.7], [0.1]])
    truth = np.array([[1], [0], [1], [0]])
    assert ranking.average_precision(score, truth) == pytest.approx([(1 + 2 / 3) / 2])
    # Of equal scores all come at once, whatever their order.
    assert ranking.average_precision(score * 0, truth) == pytest.approx([0.5])
    assert ranking.average_precision(score * 0, truth[::-1]) == pytest.approx([0.5])


@pytest.mark.parametrize("levels", [3, 1000])
def test_average_precision_is_scikit_learns(levels):
    rng = np.random.default_rng(0)
    score = rng.integers(0, levels, (60, 5)).astype(float)
    truth = (rng.random((60, 5)) < (0.05, 0.3, 0.5, 0.9, 0.5)).astype(int)
    truth[:, 4] = 1
    each = ranking.average_precision(score, truth)
    want = reference.average_precision_score(truth, score, average=None)
    np.testing.assert_allclose(each, want, rtol=1e-12)
    found = ranking.measure(score, truth)
    macro = reference.average_precision_score(truth, score)
    assert found["map"] == pytest.approx(macro)
    f1 = [reference.f1_score(truth, score > 0, average=a) for a in ("macro", "micro")]
    assert [found["f1_macro"], found["f1_micro"]] == pytest.approx(f1)
    p = 1 / (1 + np.exp(-score / levels))
    got = ranking.measure(score / levels, truth)["loss"]
    want = -(truth * np.log(p) + (1 - truth) * np.log1p(-p)).sum(1).mean()
    assert got == pytest.approx(want, rel=1e-6)


def test_a_label_that_no_image_has_is_left_out_of_the_mean():
    truth = np.array([[1, 0], [0, 0]])
    found = ranking.measure(np.array([[1.0, 2.0], [0.0, 3.0]]), truth)
    assert found["map"] == 1.0 and np.isnan(found["ap"][1])
    assert found["support"].tolist() == [1, 0]
    assert np.isnan(ranking.measure(np.zeros((2, 2)), np.zeros((2, 2)))["map"])


def _images(count, seed):
    """Three labels, each seen in a direction of its own."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((count, 3)) < 0.4).astype(np.uint8)
    vector = truth @ np.eye(3, 6) + rng.normal(0, 0.5, (count, 6))
    label = np.full(count, -1, np.int32)
    return {"vector": vector.astype(np.float32), "label": label, "labels": truth}


BANK, QUERY = _images(200, 0), _images(80, 1)


def test_neighbours_vote_for_each_of_their_labels():
    near = knn.KNN((10, 5), (0.07,))
    found = near(BANK, QUERY, 3)
    score, index = knn.search(BANK["vector"], QUERY["vector"], 10)
    weight = knn.weights(score, temperature=0.07)
    share = (weight[..., None] * BANK["labels"][index]).sum(1)
    want = reference.average_precision_score(QUERY["labels"], share)
    assert found["map"] == found["k10_t0.07/map"] == pytest.approx(want, rel=1e-9)
    assert "top1" not in found and "k5_t0.07/map" in found
    # As many rows of votes at a time as the memory allows: one.
    least = knn.KNN((10, 5), (0.07,), max_bytes=2**20)
    assert least(BANK, QUERY, 3) == pytest.approx(found, rel=1e-9)


def test_the_linear_probe_is_one_logistic_regression_for_every_label():
    params, penalty = linear.logistic(
        BANK["vector"], BANK["labels"], 3, penalties=(0.01,)
    )
    mean, std = BANK["vector"].mean(0), BANK["vector"].std(0)
    x = (BANK["vector"] - mean) / std
    for k in range(3):
        one = linear_model.LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-8)
        one.fit(x, BANK["labels"][:, k])
        kernel = params["classifier"]["kernel"][:, k] * std
        np.testing.assert_allclose(kernel, one.coef_[0], atol=2e-3)
    assert penalty == 0.01
    for solver, epochs in (("lbfgs", 1), ("sgd", 30)):
        probe = linear.Linear(solver, linear.SGD(epochs, lr=0.5), folds=2)
        found = probe(BANK, QUERY, 3)
        assert 0.8 < found["map"] <= 1 and 0.7 < found["folds_map"] <= 1
        assert "top1" not in found and all(np.ndim(v) == 0 for v in found.values())


def test_the_table_has_map_and_what_shares_alone_would_score():
    section = suite.Evals(
        batch_size=16,
        every_epochs=0,
        online_samples_train=0,
        online_samples_test=0,
        final=("knn", "linear", "fewshot", "quality"),
        knn_k=(10,),
        knn_temperature=(0.07,),
        probe="lbfgs",
        probe_epochs=1,
        baselines=(),
        online_probe_epochs=20,
    )

    def network(image):
        return {"pooled": image}

    def batches(images):
        count = len(images["label"])
        yield {
            "image": images["vector"],
            "label": images["label"],
            "labels": images["labels"],
            "index": np.arange(count),
            "valid": np.ones(count, bool),
        }

    rows = suite.final(
        section,
        network,
        {"trained": ()},
        [*batches(BANK)],
        [*batches(QUERY)],
        classes=3,
    )
    assert rows[0]["knn/map"] > rows[1]["knn/map"]
    assert rows[1]["knn/map"] == pytest.approx(QUERY["labels"].mean())
    assert rows[1]["features"] == "shares of labels" and len(rows) == 2
    # What knows one label an image only is left out.
    assert not any(key.startswith("fewshot") for key in rows[0])
    assert fewshot.FewShot.several is False and "quality/rankme" in rows[0]
    head = suite.cells(rows)[0]
    assert head == ["features", "dim", "k-NN mAP", "linear mAP", "RankMe", "std"]
    online = suite.online(
        section, network, (), [*batches(BANK)], [*batches(QUERY)], classes=3
    )
    assert online["knn/map"] == rows[0]["knn/map"] and 0.5 < online["probe/map"] <= 1
    assert accuracy.top([0, 1], 3)["top1"] == 0.5
