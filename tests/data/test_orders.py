import tracemalloc

import numpy as np
import pytest

from vitssl.data import orders


def _shuffled(n, seed=0, position=None):
    position = np.arange(n) if position is None else position
    return orders.bijection(position, n, np.random.default_rng(seed))


@pytest.mark.parametrize("n", [*range(1, 40), 97, 100, 101, 4096, 4097, 50_000])
def test_every_image_comes_once(n):
    found = _shuffled(n)
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(n))


def test_any_part_of_an_order_is_that_of_the_whole():
    whole = _shuffled(1001)
    part = np.array([[3, 1000], [0, 77]])
    assert np.array_equal(_shuffled(1001, position=part), whole[part])
    assert _shuffled(1001, position=5) == whole[5]


def test_orders_look_random():
    n, trials = 12, 20_000
    rng = np.random.default_rng(0)
    drawn = np.stack([orders.bijection(np.arange(n), n, rng) for _ in range(trials)])
    # Where an image goes, and what comes after an image: all alike, by chi squared.
    places = np.stack([np.bincount(column, minlength=n) for column in drawn.T])
    want = trials / n
    assert ((places - want) ** 2 / want).sum() < 121 + 6 * np.sqrt(2 * 121)
    pairs = np.bincount((drawn[:, 0] * n + drawn[:, 1]), minlength=n * n)
    pairs = np.delete(pairs, np.arange(n) * (n + 1))
    want = trials / pairs.size
    assert ((pairs - want) ** 2 / want).sum() < 131 + 6 * np.sqrt(2 * 131)
    large = _shuffled(200_000)
    ranks = np.arange(len(large))
    assert abs(np.corrcoef(large, ranks)[0, 1]) < 0.01
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.01


def test_an_order_of_two_billion_takes_no_memory():
    orders.shuffled.cache_clear()
    tracemalloc.start()
    n = 2**31 - 1
    found = orders.shuffled(n, 0, 0, n - 4096, n)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert len(set(found.tolist())) == 4096
    assert 0 <= found.min() < n // 100 and n - n // 100 < found.max() < n
    assert not np.array_equal(found, orders.shuffled(n, 0, 1, n - 4096, n))
    assert not np.array_equal(found, orders.shuffled(n, 1, 0, n - 4096, n))
    # Pinned: a change of it would silently break every run that is to be resumed.
    assert found[:3].tolist() == [1837520219, 923546880, 1702839643]


def test_sets_that_fit_are_visited_as_they_always_were():
    listed = orders.shuffled(100, 0, 3, 20, 40)
    assert np.array_equal(listed, orders.listed(100, 0, 3)[20:40])
    n = orders.LISTED
    assert orders.name(n, "shuffle") == "listed"
    assert orders.name(n + 1, "shuffle") == "bijection"
    assert orders.name(n + 1, "balanced") == "listed"
