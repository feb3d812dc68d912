"""The benchmark of growth: its lines, and what it counts without a clock."""

import numpy as np
import pytest

from vitssl.bench import growth_time


def test_a_power_law_is_found_and_continued():
    sizes = np.array([10, 100, 1000])
    found = growth_time.fit(sizes, 3e-6 * sizes**1.5, at=(10**6,))
    assert found["exponent"] == pytest.approx(1.5)
    assert found["at"] == {"1000000": pytest.approx(3e3)}


def test_an_order_takes_no_more_bytes_for_a_billion():
    found = growth_time._order([10**7, 10**9])
    assert found["sizes"] == [10**7, 10**9] and min(found["costs"]) > 0
    assert found["bytes"] < 100_000


def test_a_folder_is_opened_twice(monkeypatch):
    monkeypatch.setattr(growth_time.scan, "SETTLED", 0)
    found = growth_time._folder([1500, 3000])
    assert len(found["costs"]) == len(found["again"]) == 2
    assert found["at"]["1000000"] > 0
