"""Memory of a step: what is counted, and what the advice says and is worth."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests import runs
from vitssl import errors, main, tree
from vitssl.run import build, experiment, loop, memory


def _parts(*overrides):
    small = [w.removeprefix("--config.") for w in runs.arguments("")[2:]]
    spec = f"{runs.ROOT}/configs/hjepa.py:smoke"
    return build.build(experiment.read(experiment.load(spec, [*small, *overrides])))


@pytest.fixture(scope="module")
def parts():
    return _parts("batch_size=64")


@pytest.fixture(scope="module")
def whole(parts):
    return memory.estimate(parts)


def test_the_estimate_counts_every_array_of_a_device(parts, whole):
    params = parts.compiled.abstract(parts.phase(0)).params
    assert whole.parameters == 4 * tree.size(params)
    # Adam keeps two moments, and counts its steps at most.
    assert 0 <= whole.optimizer - 2 * whole.parameters <= 64
    images = parts.shapes(0)["global"]
    assert images.shape == (64, 2, 16, 16, 1)
    assert whole.batch >= images.size // jax.device_count()
    assert whole.images == 64 // jax.device_count()
    assert whole.activations > images.size and whole.limit > 2**28
    assert whole.total == whole.fixed + whole.activations


def test_more_devices_hold_a_share_of_the_parameters(parts, whole):
    split = memory._state(
        _parts("batch_size=64", "mesh.fsdp=4", "mesh.fsdp_min_size=1")
    )
    assert split.parameters < 0.4 * whole.parameters
    assert split.optimizer < 0.4 * whole.optimizer


def _e(**changes):
    given = dict(
        parameters=50, optimizer=100, extra=50, batch=0, activations=1600, code=0
    )
    return memory.Estimate(**{**given, "limit": 1000, "images": 16, **changes})


def test_the_most_images_that_fit():
    # 0.92 of 1000 without 200 fixed leaves 720; an image takes 100.
    assert _e().most_images() == 7 and not _e().fits
    assert _e(limit=200).most_images() == 0
    assert _e(limit=0).fits and _e(activations=720).fits
    assert not _e(activations=721).fits


def test_the_advice_fits(parts, whole, monkeypatch):
    # A device that holds what stays and half of the activations.
    monkeypatch.setattr(
        memory, "limit", lambda: int((whole.fixed + whole.activations / 2) / 0.9)
    )
    with pytest.raises(errors.OutOfMemoryError) as caught:
        memory.describe(parts)
    said = str(caught.value)
    assert "a step does not fit" in said and "--config.accumulate=2:" in said
    assert "--config.batch_size=32:" in said and "--config.model.remat=True" in said
    less = memory.estimate(_parts("batch_size=64", "accumulate=2"))
    # Micro-batches also need a sum of gradients.
    assert less.activations < 0.75 * whole.activations + whole.parameters


def test_a_loss_over_the_batch_is_not_told_to_accumulate(monkeypatch):
    coupled = _parts("batch_size=64")
    monkeypatch.setattr(type(coupled.method), "divisible", False)
    monkeypatch.setattr(memory, "limit", lambda: 2**20)
    said = memory.advice(coupled)
    assert "--config.batch_size=32 (this loss cannot be accumulated)" in said
    assert "--config.accumulate" not in said


def test_what_a_device_takes_at_a_time_is_lowered_where_it_is_set(monkeypatch):
    given = _parts("batch_size=64", "per_device=8")
    assert memory._state(given).images == 8
    said = memory.advice(given)
    assert "--config.per_device=4:" in said and "--config.accumulate" not in said


def test_when_the_step_should_have_fitted_evaluations_are_named(parts, whole):
    assert whole.fits
    said = memory.advice(parts)
    assert "--config.evals.batch_size=128: if it was an evaluation" in said
    # Half as many images is what is left to try.
    assert (
        f"--config.accumulate=2: the same batch in 2 parts, {whole.images // 2}" in said
    )


def test_when_the_state_alone_is_too_large_it_says_so(parts, whole, monkeypatch):
    monkeypatch.setattr(memory, "limit", lambda: whole.fixed)
    assert "shard them (mesh.fsdp)" in memory.advice(parts)


def test_dry_run_prints_config_parameters_and_memory_and_trains_nothing(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(loop, "run", lambda *a, **k: pytest.fail("it would train"))
    argv = [*runs.arguments(tmp_path / "w"), "--dry_run"]
    assert main.main(argv) == 0
    said = capsys.readouterr().out
    for part in ('"seed": 0', "trained at the start", "optimizer", "of the device"):
        assert part in said
    assert not (tmp_path / "w").exists()
    monkeypatch.setattr(memory, "estimate", lambda *unused: _e())
    assert main.main(argv) == 6
    assert "OutOfMemoryError: a step does not fit" in capsys.readouterr().err


def test_dry_run_needs_no_data(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "describe", lambda parts: parts.source.name)
    changes = dict(data__source="folder", data__root=str(tmp_path / "nowhere"))
    assert main.main([*runs.arguments(tmp_path, **changes), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "noise takes its place" in said and said.endswith("fake\n")


def test_sizes_are_written_with_units():
    assert memory.size(2**30) == "1.00 GiB" and memory.size(5 * 2**20) == "5.0 MiB"
    assert memory.size(512) == "0.5 KiB"


def test_fields_add_up():
    names = {f.name for f in dataclasses.fields(memory.Estimate)}
    counted = names - {"limit", "images"}
    assert _e(**{name: 1 for name in counted}).total == len(counted)


def test_where_the_system_is_no_unix_nothing_is_known(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delattr(memory.os, "sysconf")
    monkeypatch.setattr(memory, "_read", lambda path: "")  # No /proc either.
    assert (memory.limit(), memory.free(), memory.resident()) == (0, 0, None)


def test_what_started_a_run_is_not_counted_as_what_the_run_has():
    ours = np.ones(2**27)  # 1 GiB
    code = "from vitssl.run import memory; print(memory.resident())"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=runs.ROOT, env=runs.environment(),
    )  # fmt: skip
    assert 2**26 < int(said.stdout) < ours.nbytes < memory.resident()
