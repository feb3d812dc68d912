"""Numbers of parts and groups, against scikit-learn and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from vitssl.methods.parts import measures, scores
from vitssl.pictures import overlays


def _maps(b=3, h=6, w=6, k=3, seed=0):
    x = jax.random.normal(jax.random.key(seed), (b, h, w, k + 1))
    return jax.nn.softmax(4.0 * x, axis=-1)


@pytest.mark.parametrize("seed", range(3))
def test_agreement_is_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    ours, theirs = rng.integers(0, 4, 300), rng.integers(0, 6, 300)
    ours[:150] = theirs[:150] % 4
    found = scores.agreement(ours, theirs)
    want = metrics.normalized_mutual_info_score(theirs, ours)
    np.testing.assert_allclose(found["nmi"], want, rtol=1e-9)
    want = metrics.adjusted_rand_score(theirs, ours)
    np.testing.assert_allclose(found["ari"], want, rtol=1e-9)


def test_agreement_of_equal_and_of_trivial_labellings():
    x = np.array([0, 1, 1, 2])
    assert scores.agreement(x, x) == {"nmi": 1.0, "ari": 1.0}
    same = np.zeros(4, int)
    assert scores.agreement(same, same) == {"nmi": 1.0, "ari": 1.0}
    np.testing.assert_allclose(scores.agreement(same, x)["nmi"], 0.0)


def test_auroc_is_scikit_learns_with_ties_and_several_classes():
    rng = np.random.default_rng(0)
    score, labels = rng.integers(0, 4, 60), rng.integers(0, 2, 60)
    two = np.stack([np.zeros(60), score.astype(float)], axis=-1)
    want = metrics.roc_auc_score(labels, score)
    np.testing.assert_allclose(scores.auroc(two, labels), want)
    logits, labels = rng.normal(size=(60, 3)), rng.integers(0, 3, 60)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = metrics.roc_auc_score(labels, p, multi_class="ovr")
    np.testing.assert_allclose(scores.auroc(logits, labels), want)
    # A class without examples counts 0, as in torchmetrics.
    np.testing.assert_allclose(scores.auroc(np.eye(3)[[0, 1]], np.array([0, 1])), 2 / 3)


def test_groups_by_hand():
    logits = np.eye(2)[[0, 0, 1, 1, 1, 0]]
    labels, group = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 3, 3, 3])
    found = scores.groups(logits, labels, group)
    assert found["group0"] == 1.0 and found["group1"] == 0.0
    np.testing.assert_allclose(found["group3"], 2 / 3)
    assert found["worst_group"] == 0.0
    np.testing.assert_allclose(found["group_mean"], 5 / 9)


def _rows(m=40, noise=0.0, seed=0):
    """Centres of two parts, and keypoints that are a linear map of them."""
    rng = np.random.default_rng(seed)
    centres = rng.random((m, 2, 2))
    flat = centres.reshape(m, 4)
    weights = np.random.default_rng(9).normal(size=(4, 6))
    points = (flat @ weights + 0.3 + noise * rng.normal(size=(m, 6))).reshape(m, 3, 2)
    return dict(
        centres=centres,
        part_there=np.ones((m, 2), bool),
        keypoints=points,
        keypoint_seen=rng.random((m, 3)) < 0.8,
    )


def test_keypoints_that_follow_from_the_parts_have_no_error():
    fit, test = _rows(), _rows(seed=1)
    assert scores.keypoint_error(fit, test) < 1e-6
    assert 0.5 < scores.keypoint_error(_rows(noise=0.01), test) < 2.0
    hidden = test | {"keypoint_seen": np.zeros((40, 3), bool)}
    assert np.isnan(scores.keypoint_error(fit, hidden))


def test_an_absent_part_counts_as_being_at_its_mean():
    fit, test = _rows(), _rows(m=2, seed=1)
    gone = test | {"part_there": np.zeros((2, 2), bool)}
    moved = gone | {"centres": gone["centres"] + 100.0}
    assert scores.keypoint_error(fit, gone) == scores.keypoint_error(fit, moved)


def test_points_read_the_map_under_them():
    owner = np.zeros((1, 4, 4), int)
    owner[0, 1, 2], owner[0, 3, 0] = 1, 2
    maps = jax.nn.one_hot(owner, 3)
    xy = jnp.array([[[20.0, 12.0], [4.0, 28.0], [1.0, 1.0], [99.0, -5.0]]])
    found = measures.at_points(maps, xy, 32)
    np.testing.assert_array_equal(found, [[1, 2, 0, 0]])


def test_at_points_agrees_with_the_whole_picture():
    maps, size = _maps(), 30
    full = np.asarray(measures.owner(maps, size))
    rng = np.random.default_rng(0)
    pixel = rng.integers(0, size, (3, 50, 2))
    found = measures.at_points(maps, jnp.asarray(pixel + 0.5), size)
    want = np.stack([full[b, p[:, 1], p[:, 0]] for b, p in enumerate(pixel)])
    np.testing.assert_array_equal(found, want)
    np.testing.assert_array_equal(full, overlays.labels(maps, (size, size)))


def test_contingency_counts_every_pixel_once():
    maps = _maps()
    truth = np.random.default_rng(0).integers(0, 5, (3, 24, 24))
    table = np.asarray(measures.contingency(maps, jnp.asarray(truth)))
    assert table.shape == (3, 4, measures.LABELS) and table.sum() == truth.size
    ours = np.asarray(measures.owner(maps, 24))
    want = metrics.cluster.contingency_matrix(ours[1].ravel(), truth[1].ravel())
    np.testing.assert_array_equal(table[1][:, :5], want)


def test_overlap_of_a_known_rectangle_and_of_a_single_part():
    owner = np.ones((1, 8, 8), int)
    owner[0, :, :4] = 0
    mask = np.zeros((1, 8, 8))
    mask[0, :4, :4] = 1
    counts = np.asarray(measures.overlap(jax.nn.one_hot(owner, 2), mask))
    found = scores.intersection_over_union(counts)
    np.testing.assert_allclose(found["iou_fg"], 16 / 32)
    np.testing.assert_allclose(found["iou_bg"], 32 / 48)


def test_a_mask_is_read_in_the_middle_of_every_cell():
    mask = np.arange(36.0).reshape(1, 6, 6)
    got = measures.nearest(jnp.asarray(mask), (3, 2))
    np.testing.assert_array_equal(got[0], mask[0][np.ix_([1, 3, 5], [1, 4])])


def test_thresholds_of_a_part_that_owns_nothing_are_not_numbers():
    maps = np.zeros((1, 2, 2, 3))
    maps[..., 0] = 1
    dot = np.arange(12.0).reshape(1, 2, 2, 3)
    own = np.take_along_axis(dot, maps.argmax(-1)[..., None], axis=-1)[..., 0]
    found = scores.thresholds(maps.argmax(-1), own, 2, (0.0, 0.5))
    np.testing.assert_allclose(found[0.0], [0.0, np.nan])
    np.testing.assert_allclose(found[0.5], [4.5, np.nan])


def test_scores_use_what_there_is():
    rng = np.random.default_rng(0)
    rows = dict(logits=rng.normal(size=(20, 3)), label=rng.integers(0, 3, 20))
    found = scores.scores(rows)
    assert "top1" in found and "nmi" not in found and "worst_group" not in found
    rows |= dict(logits_swap_same=rows["logits"], logits_swap_random=-rows["logits"])
    rows["logits_without"] = np.stack([rows["logits"]] * 2, axis=1)
    found = scores.scores(rows)
    assert found["swap_same"] == found["without_0"] == found["top1"]
    np.testing.assert_allclose(
        found["bg_gap"], found["swap_same"] - found["swap_random"]
    )
