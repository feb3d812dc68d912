"""The k-NN benchmark prints its figures, with and without a torch beside it."""

import json

import numpy as np

from vitssl.bench import knn_time
from vitssl.evals import knn

OPTIONS = ["--rows=300", "--queries=20", "--width=8", "--k=3", "--repeats=2"]


def _figures():
    return json.loads(json.dumps(knn_time.run(OPTIONS)))


def test_without_torch_it_times_ours_alone(monkeypatch):
    monkeypatch.setattr(knn_time, "_torch", lambda *a: None)
    found = _figures()
    assert found["bench"] == "knn" and len(found["seconds"]) == 2
    rate = 20 / np.median(found["seconds"])
    assert found["queries_per_second"] == np.float64(rate)
    assert abs(found["gflop_per_second"] / (2e-9 * 300 * 8 * rate) - 1) < 1e-9
    assert "ratio" not in found


def test_with_a_peer_it_compares_times_and_neighbours(monkeypatch):
    def peer(bank, query, k, max_bytes):
        index = knn.search(bank, query, k)[1].copy()
        index[0, 0] = -1  # One neighbour of sixty is another.
        return lambda: index[:, ::-1]

    monkeypatch.setattr(knn_time, "_torch", peer)
    found = _figures()
    times = (np.median(found[key]) for key in ("torch_seconds", "seconds"))
    assert found["ratio"] == np.divide(*times)
    assert abs(found["agreement"] - 59 / 60) < 1e-9
