import dataclasses
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading

import cv2
import numpy as np
import pytest
from PIL import Image

from vitssl import errors
from vitssl.data import loader, orders, pipeline, sources

BATCH = 6


@dataclasses.dataclass(frozen=True)
class Crop:
    """A random crop, with everything that tells two examples apart."""

    side: int = 8

    def __call__(self, example, rng):
        h, w, _ = example["image"].shape
        y, x = rng.integers(0, (h - self.side + 1, w - self.side + 1))
        return {
            "image": example["image"][y : y + self.side, x : x + self.side],
            "label": example["label"],
            "index": example["index"],
            "epoch": np.int32(example["epoch"]),
            "noise": rng.random(2),
        }


@dataclasses.dataclass(frozen=True)
class Growing(Crop):
    """As many crops as the epoch's number and one."""

    def __call__(self, example, rng):
        crops = [super().__call__(example, rng)["image"]]
        return {"local": np.stack(crops * (example["epoch"] + 1))}


def _source(count=40):
    return sources.open(
        "fake", "", "train", count=count, height=11, width=13, classes=5
    )


def _batches(count, source=None, transform=None, **options):
    options = {"threads": 0, "batch_size": BATCH, "seed": 3, **options}
    with pipeline.train(source or _source(), transform or Crop(), **options) as loader:
        return [next(loader) for _ in range(count)]


def _same(ours, theirs):
    """Two lists of batches are equal, bit by bit."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.fixture(scope="module")
def truth():
    """Twenty batches, over three epochs of six, loaded one by one by the caller."""
    return _batches(20)


def test_every_epoch_shows_other_images_once_in_another_order(truth):
    assert [b["epoch"].tolist() for b in truth[:18:3]] == [
        [e] * BATCH for e in (0, 0, 1, 1, 2, 2)
    ]
    epochs = [
        np.concatenate([b["index"] for b in truth[k : k + 6]]) for k in (0, 6, 12)
    ]
    for order in epochs:
        assert len(set(order.tolist())) == 36  # floor(40 / 6) * 6 distinct images.
        assert set(order.tolist()) <= set(range(40))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])
    # What an epoch drops is not always the same.
    assert len({frozenset(range(40)) - frozenset(e.tolist()) for e in epochs}) > 1
    assert set(np.concatenate(epochs).tolist()) == set(range(40))


def test_an_image_seen_again_is_augmented_anew(truth):
    seen = {}
    for batch in truth[:18]:
        for index, noise in zip(batch["index"], batch["noise"], strict=True):
            seen.setdefault(int(index), []).append(tuple(noise))
    draws = [n for noises in seen.values() for n in noises]
    assert len(draws) == 108
    assert len(set(draws)) == 108


def test_rows_are_the_images_their_index_and_label_say(truth):
    source = _source()
    for batch in truth[:3]:
        for r in range(BATCH):
            item = source[int(batch["index"][r])]
            assert batch["label"][r] == item["label"]
            windows = np.lib.stride_tricks.sliding_window_view(
                item["image"], (8, 8), (0, 1)
            )
            got = batch["image"][r].transpose(2, 0, 1)
            assert (windows == got).all((2, 3, 4)).any()


@pytest.mark.parametrize("threads, prefetch", [(1, -1), (4, -1), (2, 7), (0, 3)])
def test_threads_change_nothing(truth, threads, prefetch):
    _same(_batches(20, threads=threads, prefetch=prefetch), truth)


@pytest.mark.parametrize("workers, threads, start", [(1, 0, 0), (2, 2, 5)])
def test_worker_processes_change_nothing(truth, workers, threads, start):
    got = _batches(6, workers=workers, threads=threads, start_step=start)
    _same(got, truth[start : start + 6])
    # In memory of our own: shared memory would outlive the workers.
    assert all(type(v) is np.ndarray for b in got for v in b.values())


@pytest.mark.parametrize("start", [1, 5, 6, 7, 17])
@pytest.mark.parametrize("threads", [0, 3])
def test_a_resumed_run_sees_what_the_uninterrupted_one_would_have(
    truth, start, threads
):
    _same(_batches(20 - start, start_step=start, threads=threads), truth[start:])


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_rows_of_the_same_global_batch(truth, count):
    parts = [_batches(20, process=(p, count)) for p in range(count)]
    joined = [
        {k: np.concatenate([part[k] for part in step]) for k in step[0]}
        for step in zip(*parts, strict=True)
    ]
    _same(joined, truth)


def test_another_seed_is_another_run(truth):
    other = _batches(20, seed=4)
    pairs = zip(other, truth, strict=True)
    assert any(not np.array_equal(a["index"], b["index"]) for a, b in pairs)
    ours = {tuple(n) for b in truth for n in b["noise"]}
    assert not ours & {tuple(n) for b in other for n in b["noise"]}


def test_negative_and_large_seeds_are_seeds():
    runs = [_batches(1, seed=s)[0]["noise"].tobytes() for s in (-1, 0, 1, 2**40)]
    assert len(set(runs)) == 4


def test_order_is_a_permutation_that_depends_on_its_arguments():
    first = orders.listed(100, 0, 0)
    assert sorted(first) == list(range(100))
    assert not np.array_equal(first, orders.listed(100, 0, 1))
    assert not np.array_equal(first, orders.listed(100, 1, 0))
    # Pinned: a change of it would silently break every run that is to be resumed.
    assert orders.listed(10, 0, 0).tolist() == [4, 3, 7, 1, 5, 6, 2, 0, 9, 8]
    assert orders.listed(10, 7, 3).tolist() == [0, 3, 1, 9, 8, 7, 4, 2, 6, 5]


def test_a_set_too_large_to_list_is_seen_once_an_epoch_and_resumes(monkeypatch):
    monkeypatch.setattr(orders, "LISTED", 39)
    orders.shuffled.cache_clear()
    whole = _batches(12)
    _same(_batches(5, start_step=7, threads=3), whole[7:])
    epochs = [np.concatenate([b["index"] for b in whole[k : k + 6]]) for k in (0, 6)]
    assert all(len(set(seen.tolist())) == 36 for seen in epochs)
    assert not np.array_equal(*epochs)
    assert not np.array_equal(epochs[0], orders.listed(40, 3, 0)[:36])
    orders.shuffled.cache_clear()


def test_steps_per_epoch_drops_the_rest():
    assert pipeline.steps_per_epoch(_source(40), 6) == 6
    assert pipeline.steps_per_epoch(_source(42), 6) == 7
    with pytest.raises(errors.DataError, match="holds 5 images, fewer than one batch"):
        pipeline.steps_per_epoch(_source(5), 6)
    with pytest.raises(errors.DataError, match="fewer than one batch of 6"):
        _batches(1, source=_source(5))


def test_a_batch_must_split_over_the_processes():
    with pytest.raises(errors.UsageError, match="batch_size=6 does not split over 4"):
        _batches(1, process=(0, 4))


def test_spec_is_the_batch_of_any_step_without_loading_it(truth):
    with pipeline.train(
        _source(), Growing(), batch_size=BATCH, seed=3, threads=0, process=(1, 2)
    ) as loader:
        assert loader.spec(5) == {"local": ((BATCH, 1, 8, 8, 3), np.uint8)}
        assert loader.spec(6) == {"local": ((BATCH, 2, 8, 8, 3), np.uint8)}
        assert loader.spec(13)["local"].shape == (BATCH, 3, 8, 8, 3)
        assert loader.step == 0
        assert next(loader)["local"].shape == (BATCH // 2, 1, 8, 8, 3)
    with pipeline.train(_source(), Crop(), batch_size=BATCH, seed=3) as loader:
        for key, spec in loader.spec(4).items():
            assert (truth[4][key].shape, truth[4][key].dtype) == spec


def test_the_number_of_crops_may_change_between_epochs():
    shapes = [b["local"].shape[1] for b in _batches(14, transform=Growing(), threads=2)]
    assert shapes == [1] * 6 + [2] * 6 + [3] * 2


def test_evaluation_sees_every_image_once_in_order():
    source = _source(20)
    with pipeline.evaluate(source, Crop(), batch_size=8, threads=2) as loader:
        batches = list(loader)
    assert [len(b["valid"]) for b in batches] == [8, 8, 8]
    valid = np.concatenate([b["valid"] for b in batches])
    assert valid.tolist() == [True] * 20 + [False] * 4
    index = np.concatenate([b["index"] for b in batches])
    assert index.tolist() == [*range(20), -1, -1, -1, -1]
    label = np.concatenate([b["label"] for b in batches])
    assert label.tolist() == [i % 5 for i in range(20)] + [-1] * 4
    parts = [
        list(pipeline.evaluate(source, Crop(), batch_size=8, process=(p, 2)))
        for p in (0, 1)
    ]
    joined = [
        {k: np.concatenate([a[k], b[k]]) for k in a}
        for a, b in zip(*parts, strict=True)
    ]
    _same(joined, batches)


def _images(root, count, broken=()):
    for i in range(count):
        file = root / f"{i:03}.png"
        if i in broken:
            file.write_bytes(b"" if i % 2 else b"not an image at all")
        else:
            Image.new("RGB", (12, 12), (i % 256, 0, 0)).save(file)
    return sources.open("folder", str(root), "all")


def test_broken_images_are_replaced_the_same_way_by_every_loader(tmp_path, caplog):
    source = _images(tmp_path, 200, broken=(13, 100))
    with caplog.at_level(logging.WARNING, "vitssl.data"):
        alone = _batches(33, source)
    seen = np.concatenate([b["index"] for b in alone])
    assert not {13, 100} & set(seen.tolist())
    pixels = np.concatenate([b["image"][:, 0, 0, 0] for b in alone])
    np.testing.assert_array_equal(pixels, seen % 256)  # Never a black stand-in.
    planned = orders.listed(200, 3, 0)[: 33 * BATCH]
    np.testing.assert_array_equal(
        seen, np.where((planned == 13) | (planned == 100), planned + 1, planned)
    )
    assert sorted(r.getMessage().count("013.png") for r in caplog.records) == [0, 1]
    _same(_batches(33, source, threads=3), alone)
    _same(_batches(13, source, start_step=20), alone[20:])


def test_broken_images_in_worker_processes(tmp_path):
    source = _images(tmp_path, 100, broken=(50,))
    at = orders.listed(100, 3, 0).tolist().index(50) // BATCH
    alone = _batches(at + 1, source)
    assert 50 not in alone[at]["index"]
    _same(_batches(at + 1, source, workers=1), alone)
    source = _images(tmp_path, 100, broken=(3, 50))
    with pytest.raises(errors.DataError, match="2 of 100 images are broken"):
        _batches(16, source, workers=1)


@pytest.mark.parametrize("threads", [0, 2])
def test_too_many_broken_images_stop_the_run(tmp_path, threads):
    source = _images(tmp_path, 100, broken=(3, 50))
    with pytest.raises(errors.DataError, match="2 of 100 images are broken"):
        _batches(16, source, threads=threads)
    with pytest.raises(errors.DataError, match=r"0\d\d\.png: cannot be decoded"):
        _batches(16, source, on_bad_image="raise", threads=threads)


def test_a_broken_image_is_not_evaluated_in_place_of_another(tmp_path):
    source = _images(tmp_path, 100, broken=(50,))
    with pipeline.evaluate(source, Crop(), batch_size=20) as loader:
        batches = list(loader)
    valid = np.concatenate([b["valid"] for b in batches])
    index = np.concatenate([b["index"] for b in batches])
    assert np.flatnonzero(~valid).tolist() == [50]
    assert index[50] == -1
    assert np.delete(index, 50).tolist() == [i for i in range(100) if i != 50]


def test_mixtures_draw_anew_each_epoch_and_skip_by_file(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _images(tmp_path / "a", 150, broken=(7,))
    _images(tmp_path / "b", 150)
    parts = f"folder={tmp_path / 'a'},folder={tmp_path / 'b'}"
    mixed = sources.open("mixture", "", "train", parts=parts, how="weighted")
    run = _batches(66, mixed)
    epochs = [run[:22], run[22:44], run[44:]]
    draws = [
        np.sort(np.concatenate([b["image"][:, 0, 0, 0] for b in e])) for e in epochs
    ]
    assert not np.array_equal(draws[0], draws[1])
    # What was met before a restart must not matter after it.
    _same(_batches(22, mixed, start_step=44), run[44:])


def test_a_fault_in_the_transform_surfaces():
    def broken(example, rng):
        raise ZeroDivisionError("in the transform")

    for threads in (0, 2):
        with pytest.raises(ZeroDivisionError, match="in the transform"):
            _batches(1, transform=broken, threads=threads)


def test_rows_of_different_shapes_are_named(tmp_path):
    def ragged(example, rng):
        return {"crop": np.zeros(2 + int(example["index"]) % 2)}

    with pytest.raises(ValueError, match=r"'crop' differ in shape: \[\(2,\), \(3,\)\]"):
        _batches(1, transform=ragged)


def test_the_time_spent_waiting_is_counted():
    with pipeline.train(_source(), Crop(), batch_size=BATCH, seed=0) as loader:
        assert loader.waited == 0
        next(loader)
        first = loader.waited
        next(loader)
        assert 0 < first < loader.waited
        assert loader.step == 2


def test_closing_ends_threads_and_iteration():
    before = set(threading.enumerate())
    loader = pipeline.train(_source(), Crop(), batch_size=BATCH, seed=0, threads=4)
    next(loader)
    assert set(threading.enumerate()) - before
    loader.close()
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


def test_opencv_does_not_start_threads_of_its_own():
    cv2.setNumThreads(2)
    _batches(1)
    assert cv2.getNumThreads() <= 1


def test_prefetching_is_bounded():
    """The library's own default would make 501 batches for the first."""
    source, loads = _source(), []

    class Counting:
        def __getattr__(self, key):
            return getattr(source, key)

        def __len__(self):
            return len(source)

        def __getitem__(self, i):
            loads.append(i)
            return source[i]

    with pipeline.train(
        Counting(), Crop(), batch_size=BATCH, seed=0, threads=2, prefetch=3
    ) as loader:
        next(loader)
    # One given, three ahead; what is running when we close may still finish.
    assert len(loads) <= (1 + 3 + 1) * BATCH


@pytest.mark.parametrize(
    "cores, asked, given",
    [
        (1, (-1, 0, -1), (2, 0, 3)),
        (2, (-1, -1, -1), (2, 0, 3)),
        (8, (-1, -1, -1), (8, 0, 9)),
        (64, (-1, -1, -1), (8, 8, 9)),
        (64, (-1, 0, -1), (8, 0, 9)),
        (2, (0, 0, 5), (0, 0, 0)),
        (2, (4, 1, 2), (4, 1, 4)),
    ],
)
def test_resources_suit_the_machine(cores, asked, given, monkeypatch):
    monkeypatch.setattr(loader, "cores", lambda: cores)
    assert loader.resources(*asked) == given


SCRIPT = """
import sys
from tests.data import test_pipeline as t
from vitssl.data import loader, orders, pipeline
if __name__ == "__main__":
    loader = pipeline.train(
        t._source(), t.Crop(), batch_size=t.BATCH, seed=3, workers=2, threads=1
    )
    next(loader)
    import multiprocessing
    print(*(p.pid for p in multiprocessing.active_children()), flush=True)
    sys.stdin.readline()
    for _ in range(20):
        next(loader)
"""


def _alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except FileNotFoundError:
        return False
    return state.split()[0] != "Z"


@pytest.fixture
def running(tmp_path):
    """A process that loads with two workers: (process, pids of the workers)."""
    script = tmp_path / "load.py"
    script.write_text(SCRIPT)
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process, [int(p) for p in process.stdout.readline().split()]
    process.kill()
    process.communicate()


def test_workers_leave_when_their_parent_was_killed(running):
    process, workers = running
    assert len(workers) == 2
    process.kill()
    process.wait()
    event = threading.Event()
    for _ in range(100):
        if not any(map(_alive, workers)):
            break
        event.wait(0.2)
    assert not any(map(_alive, workers))


def test_a_killed_worker_is_an_error_not_a_hang(running):
    process, workers = running
    os.kill(workers[0], signal.SIGKILL)
    _, said = process.communicate("go\n", timeout=60)
    assert process.returncode == 1
    assert "terminated unexpectedly with exit code -9" in said


def test_where_batches_grow_an_epoch_begins_and_no_row_is_drawn_twice():
    sizes = ((0, 4), (5, 6), (9, 12))
    found = [orders.place(12, sizes, t) for t in range(12)]
    # Three steps an epoch, two from step 5 on, one from step 9 on.
    assert [p.epoch for p in found] == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6]
    assert [p.start for p in found] == [0, 4, 8, 0, 4, 0, 6, 0, 6, 0, 0, 0]
    assert [p.size for p in found] == [4] * 5 + [6] * 4 + [12] * 3
    rows = [range(p.row, p.row + p.size) for p in found]
    assert [i for r in rows for i in r] == list(range(5 * 4 + 4 * 6 + 3 * 12))
    assert orders.place(12, ((0, 5),), 7) == (3, 5, 5, 35)
