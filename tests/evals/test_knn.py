"""Exact k-NN against loops in float64, whatever the blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl import errors
from vitssl.evals import knn

# From all at once down to blocks of one query.
BYTES = (2**28, 200_000, 60_000, 30_000)


def _data(rows=517, queries=53, width=24, shift=0.0, spread=1.0):
    rng = np.random.default_rng(rows + width)
    bank = rng.normal(shift, spread, (rows, width)).astype(np.float32)
    query = rng.normal(shift, spread, (queries, width)).astype(np.float32)
    return bank, query


def _score(bank, query, metric):
    """[Q, M] in float64, one query at a time."""
    bank, query = bank.astype(float), query.astype(float)
    score = np.zeros((len(query), len(bank)))
    length = np.linalg.norm(bank, axis=1)
    for i, x in enumerate(query):
        if metric == "euclidean":
            score[i] = -np.linalg.norm(bank - x, axis=1)
        elif x.any():
            score[i] = bank @ x / np.linalg.norm(x) / np.where(length > 0, length, 1)
    return score


def _order(score, k):
    return np.argsort(-score, 1, kind="stable")[:, :k]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("max_bytes", BYTES)
@pytest.mark.parametrize("shift, spread", [(0, 1), (30, 1), (5, 1e-4)])
def test_it_finds_what_a_loop_finds(metric, max_bytes, shift, spread):
    bank, query = _data(shift=shift, spread=spread)
    truth = _score(bank, query, metric)
    score, index = knn.search(bank, query, 7, metric=metric, max_bytes=max_bytes)
    np.testing.assert_array_equal(index, _order(truth, 7))
    np.testing.assert_allclose(score, np.take_along_axis(truth, index, 1), atol=1e-12)


def test_these_limits_do_cut_the_search():
    cuts = [knn.blocks(53, 517, 24, 15, b) for b in BYTES]
    assert cuts[0] == knn.Blocks(held=53, query=53, bank=517)
    assert cuts[1].query < 53 and cuts[1].bank < 517
    assert cuts[3].held < 53 and cuts[3].query == 1
    assert len(set(cuts)) == len(BYTES)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_blocks_do_not_show_in_the_answer_not_even_in_ties(metric):
    # Small integers: equal distances in masses, exactly equal in float32.
    rng = np.random.default_rng(0)
    bank = rng.integers(0, 2, (400, 4)).astype(np.float32)
    query = rng.integers(0, 2, (40, 4)).astype(np.float32)
    bank = np.repeat(bank, 1 + (np.arange(400) == 7), 0)
    found = [knn.search(bank, query, 5, metric=metric, max_bytes=b) for b in BYTES]
    truth = _order(np.round(_score(bank, query, metric), 9), 5)
    for score, index in found:
        np.testing.assert_array_equal(index, truth)
        np.testing.assert_array_equal(score, found[0][0])


def test_what_differs_from_the_centre_by_rounding_does_not_differ():
    centre = np.array([0.3, -77.7, 1e-3, 0.0], np.float32)
    near = np.nextafter(np.nextafter(centre, np.float32(9)), np.float32(9))
    near[3] = 0
    assert not np.asarray(knn._offset(near[None], centre, False)).any()
    away = np.asarray(knn._offset(centre[None] * np.float32(1 + 1e-6), centre, False))
    assert away[0, :3].all()


def test_candidates_that_tie_are_taken_by_index_whatever_their_order():
    bank, query = np.ones((9, 3), np.float32), np.ones((2, 3), np.float32)
    bank[4] = -1
    near = np.array([[8, 4, 2, 7, 0], [4, 3, 6, 5, 1]], np.int32)
    for metric in ("cosine", "euclidean"):
        _, index = knn._compare(bank, query, near, 3, metric)
        np.testing.assert_array_equal(index, [[0, 2, 7], [1, 3, 5]])


@pytest.mark.parametrize("value", [0.3, 1e-3, 77.7])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_collapsed_features_give_the_first_rows(metric, value):
    bank = np.tile(np.arange(1, 34, dtype=np.float32) * value, (300, 1))
    for max_bytes in (2**28, 60_000):
        score, index = knn.search(bank, bank[:3], 4, metric=metric, max_bytes=max_bytes)
        np.testing.assert_array_equal(index, [[0, 1, 2, 3]] * 3)
        np.testing.assert_allclose(score, 1 if metric == "cosine" else 0, atol=1e-12)


@pytest.mark.parametrize("max_bytes", [2**28, 200_000, 70_000])
def test_a_row_of_zeros_has_cosine_zero_to_all(max_bytes):
    bank, query = _data(width=6)
    bank[::2], query[0] = 0, 0
    truth = _score(bank, query, "cosine")
    score, index = knn.search(bank, query, 300, max_bytes=max_bytes)
    np.testing.assert_array_equal(index, _order(truth, 300))
    np.testing.assert_array_equal(index[0], np.arange(300))
    np.testing.assert_allclose(score, np.take_along_axis(truth, index, 1), atol=1e-12)


@pytest.mark.parametrize("max_bytes", [2**28, 200_000, 60_000])
def test_leaving_one_out_leaves_out_that_one(max_bytes):
    bank, _ = _data(rows=90)
    bank[40] = bank[3]  # A twin is a neighbour, the row itself is not.
    truth = _score(bank, bank, "cosine")
    np.fill_diagonal(truth, -np.inf)
    score, index = knn.search(bank, bank, 5, max_bytes=max_bytes, leave_one_out=True)
    np.testing.assert_array_equal(index, _order(truth, 5))
    assert index[3, 0] == 40 and index[40, 0] == 3
    most, _ = knn.search(bank, bank, 89, max_bytes=max_bytes, leave_one_out=True)
    assert np.isfinite(most).all()


@pytest.mark.parametrize("m, k", [(64, 1), (1000, 3), (999, 40), (50, 50), (700, 200)])
def test_selection_by_groups_is_top_k(m, k):
    # Few values, so that most of them are equal.
    score = np.random.default_rng(m).integers(-9, 10, (20, m)).astype(np.float32)
    score[:, ::7] = -np.inf
    value, column = jax.jit(knn._largest, static_argnums=1)(score, k)
    truth, place = jax.lax.top_k(score, k)
    np.testing.assert_array_equal(value, truth)
    real = np.isfinite(truth)
    np.testing.assert_array_equal(np.asarray(column)[real], np.asarray(place)[real])


@pytest.mark.parametrize("width, k, max_bytes", [(64, 20, 2**24), (200, 200, 2**26)])
def test_the_device_holds_no_more_than_it_may(width, k, max_bytes, monkeypatch):
    # As large as on devices with memory of their own.
    monkeypatch.setattr(knn, "_CPU_QUERIES", 1024)
    monkeypatch.setattr(knn, "_CPU_SCORES", 2**40)
    keep = k + 8
    cut = knn.blocks(5000, 30_000, width, keep, max_bytes)
    n = cut.held // cut.query

    def like(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    integer = like(dtype=jnp.int32)
    best = like(n, cut.query, keep), like(n, cut.query, keep, dtype=jnp.int32)
    arguments = (
        best,
        like(n, cut.query, width),
        like(n, cut.query, dtype=jnp.int32),
        like(width),
        like(cut.bank, width),
        integer,
        integer,
    )
    used = knn._update.lower(*arguments, cosine=True).compile().memory_analysis()
    total = (
        used.argument_size_in_bytes
        + used.output_size_in_bytes
        - used.alias_size_in_bytes
        + used.temp_size_in_bytes
        + 4 * cut.bank * width  # The block that is on its way.
    )
    assert total <= max_bytes
    # Nor so much less that the limit would mean nothing.
    assert total > max_bytes / 8


def test_on_a_cpu_a_product_is_no_larger_than_its_cache():
    assert knn.blocks(1000, 80_000, 384, 28, 2**28) == knn.Blocks(1024, 256, 10_000)
    assert knn.blocks(1000, 5000, 384, 28, 2**28) == knn.Blocks(1024, 256, 5000)


def test_a_limit_too_small_for_anything_says_how_much_it_takes():
    with pytest.raises(errors.UsageError, match="knn_max_bytes=2000.* give") as e:
        knn.blocks(10, 1000, 64, 28, 2000)
    need = int(str(e.value).split("give ")[1].split()[0])
    assert knn.blocks(10, 1000, 64, 28, need).query == 1


def test_a_bank_on_disk_is_read_in_blocks(tmp_path):
    bank, query = _data()
    np.save(tmp_path / "bank.npy", bank)
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    for a, b in zip(
        knn.search(mapped, query, 3, max_bytes=60_000),
        knn.search(bank, query, 3),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_it_works_under_a_transfer_guard():
    bank, query = _data()
    with jax.transfer_guard("disallow"):
        knn.search(bank, query, 3)


def test_wrong_arguments_are_named():
    bank, query = _data()
    with pytest.raises(ValueError, match="k=518 of 517 rows; 1 to 517"):
        knn.search(bank, query, 518)
    with pytest.raises(ValueError, match="k=0"):
        knn.search(bank, query, 0)
    with pytest.raises(ValueError, match=r"\(517, 24\), \(53, 23\)"):
        knn.search(bank, query[:, 1:], 1)
    with pytest.raises(ValueError, match="leave_one_out needs"):
        knn.search(bank, query, 1, leave_one_out=True)
    with pytest.raises(ValueError, match="no row has a label"):
        _sweep((bank, -np.ones(517)), (query, np.ones(53)), 3, (1,), (1,))
    bank[3, 3] = np.nan
    with pytest.raises(errors.NonFiniteError):
        knn.search(bank, query, 517)


def _sweep(bank, query, classes, k, temperature, **options):
    pair = (dict(vector=x, label=np.asarray(y)) for x, y in (bank, query))
    return knn.KNN(k, temperature, **options).sweep(*pair, classes)


def _evaluate_by_loops(bank, bank_label, query, label, classes, k, tau, metric):
    score = _score(bank, query, metric)
    top1 = top5 = 0
    for i in range(len(query)):
        near = _order(score[i : i + 1], k)[0]
        votes = np.zeros(classes)
        for j in near:
            votes[bank_label[j]] += np.exp(score[i, j] / tau)
        ranked = np.argsort(-votes, kind="stable")
        top1 += ranked[0] == label[i]
        top5 += label[i] in ranked[:5] and votes[label[i]] > 0
    return top1 / len(query), top5 / len(query)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("max_bytes", [2**28, 40_000])
def test_a_sweep_is_every_pair_on_its_own(metric, max_bytes):
    bank, query = _data(rows=120, width=5)
    rng = np.random.default_rng(1)
    bank_label, label = rng.integers(0, 7, 120), rng.integers(0, 7, 53)
    options = dict(metric=metric, max_bytes=max_bytes)
    pair = (bank, bank_label), (query, label)
    found = _sweep(*pair, 7, (20, 1, 500), (0.07, 0.5), **options)
    # 500 neighbours of 120 are all 120.
    assert list(found) == [(k, t) for k in (20, 1, 120) for t in (0.07, 0.5)]
    for (k, tau), scores in found.items():
        truth = _evaluate_by_loops(bank, bank_label, query, label, 7, k, tau, metric)
        assert (scores["top1"], scores["top5"]) == pytest.approx(truth, abs=1e-12)


def test_images_without_a_label_take_no_part():
    bank, query = _data(rows=60)
    rng = np.random.default_rng(1)
    bank_label, label = rng.integers(-1, 3, 60), rng.integers(-1, 3, 53)
    options = 3, (5,), (0.07,)
    found = _sweep((bank, bank_label), (query, label), *options)
    b, q = bank_label >= 0, label >= 0
    again = _sweep((bank[b], bank_label[b]), (query[q], label[q]), *options)
    assert found == again and 0 < found[5, 0.07]["top1"] < 1


def test_the_weights_are_a_softmax_of_cosine_over_temperature():
    score = np.array([[1.0, 0.5, -1.0]])
    truth = np.exp(score / 0.07) / np.exp(score / 0.07).sum()
    np.testing.assert_allclose(knn.weights(score, temperature=0.07), truth)
    # No overflow where exp(score / temperature) alone has one.
    sharp = knn.weights(score, temperature=1e-4)
    np.testing.assert_allclose(sharp, [[1, 0, 0]])


def test_an_undecided_vote_goes_to_the_lower_class():
    bank, query = np.eye(4, dtype=np.float32), np.ones((1, 4), np.float32)
    # The four are equally near; the first two are taken, with half a vote each.
    for labels, right in (([3, 1, 0, 0], 1), ([2, 3, 0, 0], 2)):
        for truth in range(4):
            found = _sweep((bank, labels), (query, [truth]), 4, (2,), (1.0,))
            assert found[2, 1.0]["top1"] == (truth == right)


def test_a_class_without_a_vote_is_never_among_the_five():
    bank, query = np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)[:2]
    # The nearest is always the image itself, of class 7 of 9; the truth is class 0.
    found = _sweep((bank, [7] * 4), (query, [0, 0]), 9, (1,), (0.07,))
    assert found[1, 0.07] == {"top1": 0.0, "top5": 0.0}
    # A vote too small for a float is a vote: of classes 7 and 8, 7 comes first.
    near = np.array([[1.0, 0.0]], np.float32), np.array([[-1.0, 0.0], [1.0, 0.0]])
    for truth, five in ((7, 1.0), (8, 1.0), (0, 0.0)):
        found = _sweep((near[1], [8, 7]), (near[0], [truth]), 9, (2,), (1e-4,))
        assert found[2, 1e-4]["top5"] == five
    # With few classes, too.
    found = _sweep((bank, [2] * 4), (query, [0, 2]), 3, (1,), (0.07,))
    assert found[1, 0.07] == {"top1": 0.5, "top5": 0.5}


def test_standardised_features_are_compared_about_their_mean():
    rng = np.random.default_rng(3)
    label = rng.integers(0, 3, 90)
    x = rng.normal(size=(90, 4)) * (1, 30, 1, 0) + (50, 0, 0, 7)
    x[:, 2] += 4 * label  # The class, beside an offset and a wide dimension.
    both = [dict(vector=x[p].astype(np.float32), label=label[p]) for p in _HALVES]
    found = knn.KNN((5,), (0.07,), standardised=True)(*both, 3)
    mean, std = both[0]["vector"].mean(0), both[0]["vector"].std(0)
    std[std == 0] = 1
    scaled = [part | {"vector": (part["vector"] - mean) / std} for part in both]
    plain = knn.KNN((5,), (0.07,))
    assert found["standardised_top1"] == plain(*scaled, 3)["top1"]
    assert found["top1"] == plain(*both, 3)["top1"] < found["standardised_top1"] - 0.1


_HALVES = (slice(0, 60), slice(60, 90))
