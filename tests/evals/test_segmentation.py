"""The segmentation probe and its measures."""

import numpy as np
import pytest

from vitssl.evals import segmentation
from vitssl.methods.latent_mim import readout


def test_measures_are_those_of_loops():
    rng = np.random.default_rng(0)
    said, truth = rng.integers(0, 4, (2, 3, 6, 6))
    truth[0, 0] = segmentation.IGNORE
    said[said == 3] = 0  # Class 3 is never said; class 4 does not occur at all.
    ious, recalls, f1s = [], [], []
    keep = truth >= 0
    for c in range(5):
        hit = ((said == c) & (truth == c) & keep).sum()
        is_, called = ((truth == c) & keep).sum(), ((said == c) & keep).sum()
        if is_ + called:
            ious.append(hit / (is_ + called - hit))
        if is_:
            recalls.append(hit / is_)
            f1s.append(2 * hit / (is_ + called))
    got = segmentation.measure(said, truth, 5)
    assert got["miou"] == pytest.approx(np.mean(ious))
    assert got["macro_accuracy"] == pytest.approx(np.mean(recalls))
    assert got["macro_f1"] == pytest.approx(np.mean(f1s))
    assert got["accuracy"] == pytest.approx((said == truth)[keep].mean())
    assert np.isnan(got["iou"][4])


def test_a_token_predicts_the_pixels_it_covers():
    """Each token codes the classes of its own 2 x 2 pixels; the probe finds how."""
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3, (24, 8, 8))
    cells = truth.reshape(24, 4, 2, 4, 2).swapaxes(2, 3).reshape(24, 4, 4, 4)
    features = np.eye(3, dtype=np.float32)[cells].reshape(24, 4, 4, 12)
    recipe = segmentation.Recipe(epochs=40, lr=0.1, batch_size=8)
    params = segmentation.fit(
        5 * features + 3, truth, classes=3, pixels=2, recipe=recipe
    )
    assert (segmentation.predict(params, 5 * features + 3, 2, (8, 8)) == truth).all()
    # Half of the resolution cannot say what differs within a token.
    blurred = features.reshape(24, 4, 4, 4, 3).mean(3)
    params = segmentation.fit(blurred, truth, classes=3, pixels=2, recipe=recipe)
    wrong = segmentation.predict(params, blurred, 2, (8, 8)) != truth
    assert wrong.mean() > 0.2


def test_a_solved_probe_is_near_the_best_there_is():
    rng = np.random.default_rng(4)
    truth = rng.integers(0, 3, (30, 8, 8))
    cells = truth.reshape(30, 4, 2, 4, 2).swapaxes(2, 3).reshape(30, 4, 4, 4)
    clean = np.eye(3, dtype=np.float32)[cells].reshape(30, 4, 4, 12)
    features = 7 + 3 * (clean + rng.normal(0, 0.6, clean.shape)).astype(np.float32)
    truth[:, 0, 0] = segmentation.IGNORE
    own = dict(classes=3, pixels=2)
    solved = segmentation.solve(features[:20], truth[:20], **own)
    recipe = segmentation.Recipe(epochs=5, lr=0.05)
    trained = segmentation.fit(features[:20], truth[:20], **own, recipe=recipe)

    def wrong(params):
        said = segmentation.predict(params, features[20:], 2, (8, 8))
        return (said != truth[20:])[truth[20:] >= 0].mean()

    # The best there is: the nearest of three corners.
    pixel = (features[20:] - 7) / 3
    best = pixel.reshape(10, 4, 4, 4, 3).argmax(-1).reshape(10, 4, 4, 2, 2)
    best = best.swapaxes(2, 3).reshape(10, 8, 8)
    floor = (best != truth[20:])[truth[20:] >= 0].mean()
    assert floor <= wrong(solved) < min(1.5 * floor, wrong(trained))
    # Noise alone: nothing is said but the share of each class.
    noise = rng.normal(size=(20, 4, 4, 6)).astype(np.float32)
    nothing = segmentation.solve(noise, truth[:20], **own)
    assert np.abs(nothing["kernel"]).max() < 0.05


def test_ignored_pixels_do_not_teach():
    rng = np.random.default_rng(2)
    features = rng.normal(size=(8, 4, 4, 3)).astype(np.float32)
    truth = (features[..., 0] > 0).astype(int)
    truth[:, :2] = segmentation.IGNORE
    recipe = segmentation.Recipe(epochs=3, lr=0.1, batch_size=4)
    a = segmentation.fit(features, truth, classes=2, pixels=1, recipe=recipe)
    moved = features.copy()
    # What is ignored may be anything, as long as its statistics stay the same.
    moved[:, :2] = np.roll(features[:, :2], 1, axis=0)
    b = segmentation.fit(moved, truth, classes=2, pixels=1, recipe=recipe)
    np.testing.assert_allclose(a["kernel"], b["kernel"], atol=1e-5)


def test_scores_are_of_images_the_probe_did_not_see():
    """Features that only name their image teach nothing about the others."""
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 2, (40, 1, 1)).repeat(4, 1).repeat(4, 2)
    named = np.eye(40, dtype=np.float32)[:, None, None].repeat(2, 1).repeat(2, 2)
    measures = readout.Measures(classes=2, epochs=30, lr=0.05)
    found = readout.scores(*readout.halves({"tokens": named, "truth": truth}), measures)
    assert found["accuracy"] < 0.8
    told = {"tokens": truth[:, ::2, ::2, None].astype(np.float32), "truth": truth}
    told["pixels"] = np.zeros((40, 4, 4, 2), np.float32)
    found = readout.scores(*readout.halves(told), measures)
    assert found["miou"] == 1.0 and found["miou_pixels"] == found["miou_guess"] < 0.5
    assert readout.scores({"label": truth}, {"label": truth}, measures) == {}


def test_what_pixels_are_worth_beside_features():
    """A class that neither names by itself: one says the row, one the column."""
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 2, (2, 40, 2, 2)).astype(np.float32)
    truth = (2 * a + b).astype(int).repeat(2, 1).repeat(2, 2)
    rows = {"tokens": a[..., None], "truth": truth}
    rows["pixels"] = b.repeat(2, 1).repeat(2, 2)[..., None]
    measures = readout.Measures(classes=4, probe="lbfgs", beside=True)
    found = readout.scores(*readout.halves(rows), measures)
    assert found["miou_beside"] == 1.0
    assert max(found["miou"], found["miou_pixels"], found["miou_blocks"]) < 0.5
    # Pixels of a patch beside each other tell what one by itself does not.
    rows["pixels"][:, ::2] = 0
    rows["pixels"][:, ::2, 1::2, 0] = a
    found = readout.scores(*readout.halves(rows), measures)
    assert found["miou_blocks"] == 1.0 and found["miou_pixels"] < 0.7
