"""The loop in this process: no compilation, no hidden transfer after the warm-up."""

import json

import jax
import numpy as np
import pytest

from tests import runs
from vitssl import config
from vitssl.run import build, experiment, log, loop, warmstart


def _read(workdir, **changes):
    words = runs.arguments(workdir, **changes)
    overrides = [w.removeprefix("--config.") for w in words if "--config." in w]
    return experiment.read(
        experiment.load(words[0].removeprefix("--config="), overrides)
    )


def test_the_loop_neither_compiles_nor_transfers_behind_our_back(tmp_path, monkeypatch):
    seen, counts = [], {"compile": 0, "put": 0, "get": 0}

    def on_event(name, seconds, **unused):
        if name == "/jax/core/compile/backend_compile_duration":
            counts["compile"] += 1

    def counting(key, call):
        def wrapped(*args, **kwargs):
            counts[key] += 1
            return call(*args, **kwargs)

        return wrapped

    push = log.Metrics.push

    def at_step(self, step, *args):
        push(self, step, *args)
        seen.append(dict(counts))

    monkeypatch.setattr(log.Metrics, "push", at_step)
    monkeypatch.setattr(jax, "device_put", counting("put", jax.device_put))
    monkeypatch.setattr(jax, "device_get", counting("get", jax.device_get))
    jax.monitoring.register_event_duration_secs_listener(on_event)
    # One checkpoint at the very end, no evaluation: what is left is the loop.
    quiet = dict(checkpoint__every_epochs=1.0, batch_size=16)
    loop.run(_read(tmp_path, **quiet), tmp_path, name="test")
    assert counts["compile"] > 0, "the listener heard nothing; is its event renamed?"
    steps = [
        {k: b[k] - a[k] for k in counts}
        for a, b in zip(seen[1:-1], seen[2:], strict=True)
    ]
    # One batch goes in, one set of metrics comes out (two reads around a log line).
    assert {s["compile"] for s in steps} == {0}
    assert {s["put"] for s in steps} <= {0, 1}
    assert {s["get"] for s in steps} <= {0, 1, 2}
    assert sum(s["put"] for s in steps) == len(steps)


def test_a_hidden_transfer_would_be_an_error(tmp_path):
    fn = jax.jit(lambda x: x + 1)
    host = np.ones(3)
    fn(host)
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="isallowed"):
        fn(host)


def test_local_crops_that_grow_are_compiled_ahead_and_trained(tmp_path):
    per_epoch = 89
    changes = dict(
        steps=2 * per_epoch + 4,
        multicrop__adaptive=True,
        multicrop__min_local_crops=1,
        multicrop__max_local_crops=3,
        multicrop__adaptive_warmup_epochs=2,
        multicrop__local_crop_size=8,
        masking__strategy="global_with_local_context",
        log__every_steps=per_epoch,
        checkpoint__every_epochs=3.0,
    )
    checked = _read(tmp_path, **changes)
    parts = build.build(checked)
    counts = [parts.phase(i).method for i in (0, per_epoch, 2 * per_epoch)]
    assert counts == [1, 2, 3]
    shapes = [parts.shapes(i)["local"].shape[1] for i in (0, per_epoch)]
    assert shapes == [1, 2]
    loop.run(checked, tmp_path, name="test")
    lines = runs.metrics(tmp_path)
    assert [m["step"] for m in lines] == [89, 178, 182]
    assert all(m["nonfinite_steps"] == 0 for m in lines)


def test_fresh_states_are_one_compilation(tmp_path):
    parts = build.build(_read(tmp_path))
    one, two = parts.fresh(), parts.fresh()
    assert parts._make._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


def test_histograms_are_written_with_the_line_of_their_step(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator

    keys = dict(steps=3, log__every_steps=2, log__tensorboard=True)
    loop.run(_read(tmp_path, **keys, log__histograms=True), tmp_path, name="test")
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    # The last line is of a step that is not due.
    assert [e.step for e in events.Histograms("grad/encoder/block_0")] == [2]
    names = {name.partition("/")[2] for name in events.Tags()["histograms"]}
    size = sum(x.size for k, x in runs.state(tmp_path, 3).items() if "params" in k)
    seen = [events.Histograms(f"param/{k}")[0].histogram_value for k in names]
    assert sum(value.num for value in seen) == size
    for line in runs.metrics(tmp_path):
        parts = [v for k, v in line.items() if k.startswith("grad_norm/")]
        assert len(parts) == len(names)
        if line["step"] == 3:  # A line of one step.
            whole = np.linalg.norm(parts)
            np.testing.assert_allclose(whole, line["grad_norm"], rtol=1e-5)


def test_init_from_takes_the_parameters_of_a_run(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    loop.run(_read(first, steps=1), first, name="a")
    taken = runs.state(first, 1)
    checked = _read(second, steps=1, init__from=str(first), optim__lr=1e-9)
    loop.run(checked, second, name="b")
    ours = runs.state(second, 0)
    for key in taken:
        if key.startswith("params/"):
            assert (ours[key] == taken[key]).all(), key
    fresh = runs.state(first, 0)
    key = "params/encoder/block_0/mlp/fc1/kernel"
    assert (fresh[key] != ours[key]).any()
    # The target of a JEPA must start from what was loaded, too.
    target = key.replace("params/encoder", "extra/target")
    assert (ours[target] == taken[key]).all()


def test_init_from_names_what_does_not_fit(tmp_path):
    first = tmp_path / "a"
    loop.run(_read(first, steps=1), first, name="a")
    checked = _read(tmp_path / "b", steps=1, init__from=str(first), model__width=32)
    with pytest.raises(Exception, match=r"proj/bias: \(16,\) stored, \(32,\) here"):
        loop.run(checked, tmp_path / "b", name="b")
    missing = warmstart.Init(from_=str(tmp_path / "nowhere"))
    with pytest.raises(Exception, match="no complete checkpoint; want WORKDIR"):
        runs.start(missing, {})


def test_status_and_config_are_written(tmp_path):
    loop.run(_read(tmp_path, steps=2), tmp_path, name="test")
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "finished" and status["step"] == 2
    again = config.from_json((tmp_path / "config.json").read_text())
    assert experiment.read(again).settings.batch_size == 16
    assert "jax" in json.loads((tmp_path / "versions.json").read_text())
