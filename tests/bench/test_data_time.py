import json

import numpy as np

from vitssl.bench import data_time
from vitssl.data import decode


def test_photographs_depend_on_the_seed_and_have_their_size(tmp_path):
    a = data_time.write_jpegs(tmp_path / "a", 2, seed=1)
    b = data_time.write_jpegs(tmp_path / "b", 2, seed=1)
    c = data_time.write_jpegs(tmp_path / "c", 2, seed=2)
    one, two, other = (paths[1].read_bytes() for paths in (a, b, c))
    assert one == two != other
    assert a[0].read_bytes() != one
    assert all(50_000 < p.stat().st_size < 75_000 for p in a + c)
    assert decode.read(a[0], channels=3).shape == (375, 500, 3)


def test_bench_prints_every_number_it_promises(monkeypatch):
    monkeypatch.setattr(data_time, "_torchvision", lambda: None)
    got = json.loads(json.dumps(data_time.run(["--images=2", "--repeats=3"])))
    rates = got["samples_per_core_second"]
    assert set(rates) == {"vitssl_fast", "vitssl_bicubic"}
    for rate in rates.values():
        assert len(rate["all"]) == 3 and rate["median"] == np.median(rate["all"])
        assert rate["median"] > 0
    sources = got["images_per_core_second"]
    both = {"folder", "tar", "array_record"}
    assert both <= set(sources) <= both | {"parquet"}
    assert all(len(s["all"]) == 3 and s["median"] > 0 for s in sources.values())
    large = got["large_photograph_ms"]
    assert set(large) == {"evaluate_224", "crop_224", "crops_fast", "crops_bicubic"}
    assert all(0 < view["reduced"] < view["whole"] for view in large.values())
    assert set(got["parts_ms"]) == {
        "decode",
        "crops_fast",
        "crops_bicubic",
        "crops_fast_and_colour",
        "masks",
    }
    assert got["times_torchvision"] == {} and got["torchvision"] == "not installed"
    assert got["versions"]["cv2"]


def test_contenders_take_turns_and_are_compared_repeat_by_repeat(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(data_time.time, "thread_time", lambda: clock[0])
    calls = []

    def contender(name, seconds):
        def load(path, index):
            calls.append(name)
            clock[0] += seconds

        return load

    both = {"vitssl_fast": contender("a", 0.5), "torchvision": contender("b", 2.0)}
    rates = data_time._in_turn(both, ["x", "y"], 2)
    assert calls == list("aabb" + "aabbaabb")
    assert rates == {"vitssl_fast": [2.0, 2.0], "torchvision": [0.5, 0.5]}
    assert data_time._ratios(rates) == {"vitssl_fast": [4.0, 4.0]}


def test_whole_loader_is_measured_when_asked(monkeypatch):
    monkeypatch.setattr(data_time, "_torchvision", lambda: None)
    monkeypatch.setattr(data_time.loader, "cores", lambda: 1)
    got = data_time.run(
        ["--images=2", "--repeats=1", "--loader_batches=1", "--batch_size=2"]
    )
    assert got["loader"]["cores"] == 1 and got["loader"]["vitssl"][0] > 0
