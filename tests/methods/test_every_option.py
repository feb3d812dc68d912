"""The trainer's options, each on each method, built from its own config.

Gradients are compared by Adam's first moment after one step, (1 - b1) g: its update
alone is the sign of the gradient, near enough, and would hide a wrong size.
"""

import contextlib
import functools
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import narrow, runs
from vitssl import errors, tree
from vitssl.methods import table
from vitssl.run import build, devices, evaluation, experiment, loop

# Method, or one by other options: its config, and what makes the smoke run smaller and
# the same every time.
SMALL = {
    "classify": (
        "finetune_vit",
        "model.width=16 model.heads=2 model.depth=1 model.drop_path=0.0 "
        "augment.erase=0.0 mix.mixup=0.0 mix.cutmix=0.0 "
        "head.init_std=0.1 head.pool=mean",
    ),
    "dino": (
        "dino",
        "model.width=16 model.heads=2 model.depth=1 multicrop.global_crop_size=24 "
        "multicrop.local_crop_size=12 head.outputs=16 head.hidden=16 head.bottleneck=8",
    ),
    "dinov2": (
        "dino",
        "model.width=16 model.heads=2 model.depth=1 multicrop.global_crop_size=24 "
        "multicrop.num_local_crops=0 head.outputs=16 head.hidden=16 head.bottleneck=8 "
        "head.lengths=True objective.patch=1.0 objective.shared=False "
        "objective.koleo=0.1 objective.centring=sinkhorn",
    ),
    "distill": (
        "distill",
        "model.width=16 model.heads=2 model.depth=1 multicrop.num_local_crops=1",
    ),
    "hjepa": (
        "hjepa",
        "model.width=16 model.heads=2 model.depth=1 predictor.heads=2 "
        "masking.strategy=global_only masking.num_hierarchies=2 "
        "multicrop.num_local_crops=0 objective.weights=(1.0,0.5)",
    ),
    "latent_mim": (
        "latent_mim",
        "inputs.modalities=('sentinel1',) data.options.modalities=('sentinel1',) "
        "objective.same_target_modalities=() mask.decode_only=() mask.type=random",
    ),
    "localmim": (
        "localmim",
        "model.width=16 model.heads=2 model.depth=2 stages.blocks=(0,1) "
        "stages.scales=(2.0,1.0) decoder.width=16 decoder.heads=2",
    ),
    "mae": (
        "mae",
        "model.width=16 model.heads=2 model.depth=1 augment.size=24 "
        "decoder.width=16 decoder.heads=2 decoder.depth=1",
    ),
    "simmim": (
        "mae",
        "model.width=16 model.heads=2 model.depth=1 augment.size=24 masking.block=2 "
        "objective.hidden=token objective.loss=l1 objective.normalise=False",
    ),
    "parts": ("parts", "model.width=16 model.heads=2"),
    "simclr": ("simclr_hvit", "model.width=16"),
}
# Layer 0 freezes after the second of four steps, which is saved.
RUN = (
    "steps=4",
    "freeze.schedule=linear",
    "freeze.t_0=0.25",
    "data.threads=1",
    "data.workers=0",
    "log.tensorboard=False",
    "evals.every_epochs=0",
    "evals.final=()",
)
ALL = sorted(SMALL)
# Distance of the losses and of the gradients of a batch in two parts and in one.
# H-JEPA's is a mean over tokens to predict; some micro-batches have more of them.
WHOLE = {
    "classify": (1e-5, 1e-5),
    "dino": (1e-5, 1e-4),
    "distill": (1e-5, 1e-5),
    "hjepa": (5e-3, 0.05),
    "simclr": (1e-6, 1e-5),
}
# Two blocks, of methods whose `SMALL` has but one.
ONE_BLOCK = "classify dino dinov2 distill hjepa mae parts simmim".split()
DEEP = {name: ("model.depth=2",) for name in ONE_BLOCK}
DEEP["latent_mim"] = ("network.depth=2",)
DEEP["simclr"] = ("model.depths=(1,2)",)
# Those with stacks of their own; the others are a ViT on whole images.
STACKS = ("hjepa", "latent_mim", "localmim", "mae", "parts", "simclr")
# Masks or noise are drawn for each micro-batch.
DRAWN = ("dinov2", "latent_mim", "localmim", "mae", "parts", "simmim")
pytestmark = pytest.mark.usefixtures("few_executables")


class First(NamedTuple):
    """What the first step of a run says.

    Attributes:
        metrics: {name: float}.
        grads, moved: {leaf: gradient} and {leaf: its change}.
        recomputes: whether the program has activations computed anew.
        loops: how many loops it has.
    """

    metrics: dict
    grads: dict
    moved: dict
    recomputes: bool
    loops: int


@pytest.fixture(autouse=True, scope="module")
def _forget():
    yield
    for kept in (_first_step, _fresh):
        kept.cache_clear()


@contextlib.contextmanager
def _devices(count):
    """Let the trainer see the first `count` of the simulated devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: count)
        yield


def _read(name, *changes):
    file, small = SMALL[name]
    overrides = [*small.split(), *RUN, *changes]
    spec = f"{runs.ROOT}/configs/{file}.py:smoke"
    return experiment.read(experiment.load(spec, overrides))


@functools.cache
def _fresh(name, *changes):
    with _devices(1):
        return build.build(_read(name, *changes)).fresh()


@functools.cache
def _first_step(name, *changes, count=1) -> First:
    fresh = _fresh(name, *(c for c in changes if "depth" in c))
    with _devices(count):
        parts = build.build(_read(name, *changes))
        phase = parts.phase(0)
        state = jax.tree.map(lambda x: jnp.array(x, copy=True), fresh)
        state = jax.device_put(state, parts.compiled.state_sharding(phase))
        with contextlib.closing(parts.stream(0)) as stream:
            batch = devices.put(next(stream), devices.batch_sharding(parts.mesh))
        executable = parts.compiled.get(phase, batch)
        state, metrics = executable(state, batch)
    before, after, opt = jax.device_get((fresh.params, state.params, state.opt))
    moved = jax.tree.map(np.subtract, after, before)
    return First(
        {k: float(v) for k, v in dict(metrics).items()},
        {k: v / (1 - parts.optimizer.b1(0)) for k, v in opt.mu.items()},
        tree.flat(moved),
        "rematted_computation" in executable.as_text(),
        executable.as_text().count(" while("),
    )


def _distance(a, b):
    """Return |a - b| / |b| of {leaf: array}."""
    assert a.keys() == b.keys()
    far = sum(np.square(a[k] - b[k]).sum() for k in b)
    return np.sqrt(far / sum(np.square(x).sum() for x in b.values()))


def _same(found, want, *, loss=1e-5, grads=1e-5):
    """Compare the first steps of two runs, within these relative distances."""
    assert found.metrics.keys() == want.metrics.keys()
    np.testing.assert_allclose(found.metrics["loss"], want.metrics["loss"], rtol=loss)
    assert _distance(found.grads, want.grads) < grads


def test_every_method_is_here():
    methods = {_read(name).settings.method for name in ALL}
    assert methods == set(table.METHODS) and set(ALL) == {*WHOLE, *DRAWN}


@pytest.mark.parametrize("name", ALL)
def test_a_step_moves_every_leaf(name):
    first = _first_step(name)
    assert np.isfinite(list(first.metrics.values())).all()
    assert first.metrics["nonfinite"] == 0 and first.metrics["grad_norm"] > 0.01
    assert {k for k, x in first.moved.items() if not np.any(x)} == set()


@pytest.mark.parametrize("name", WHOLE)
def test_a_batch_in_two_parts_has_the_loss_and_gradient_of_the_whole(name):
    loss, grads = WHOLE[name]
    split = _first_step(name, "accumulate=2")
    _same(split, _first_step(name), loss=loss, grads=grads)


@pytest.mark.parametrize("name", DRAWN)
def test_a_batch_in_two_parts_trains_where_each_part_has_draws_of_its_own(name):
    whole, split = _first_step(name), _first_step(name, "accumulate=2")
    assert split.metrics.keys() == whole.metrics.keys()
    assert np.isfinite(list(split.metrics.values())).all()
    np.testing.assert_allclose(split.metrics["loss"], whole.metrics["loss"], rtol=0.2)
    assert {k for k, x in split.moved.items() if not np.any(x)} == set()


@pytest.mark.parametrize(
    "options",
    [
        ("model.remat=True",),
        ("precision=bfloat16",),
        ("model.scan=True", "model.depths=(1,2)"),
    ],
    ids=str,
)
def test_a_loss_over_the_batch_in_parts_takes_other_options_too(options):
    whole = _first_step("simclr", *options)
    split = _first_step("simclr", *options, "accumulate=2")
    half = "bfloat16" in options[0]
    _same(split, whole, loss=1e-3 if half else 1e-6, grads=0.02 if half else 1e-5)
    two = _first_step("simclr", *options, "accumulate=2", count=2)
    _same(two, split, loss=1e-3 if half else 1e-6, grads=0.02 if half else 1e-5)


def test_latent_mim_compares_the_samples_of_all_parts_if_asked():
    same = ("hybrid.loss_tokens_per_modality=1024",)  # All: none is drawn.
    own = (*same, "objective.per_microbatch=False")
    split = _first_step("latent_mim", *own, "accumulate=2")
    _same(split, _first_step("latent_mim", *own), loss=1e-5, grads=1e-4)
    apart = _first_step("latent_mim", *same, "accumulate=2").metrics["loss"]
    assert abs(apart - split.metrics["loss"]) > 1e-3


def test_a_network_that_mixes_samples_says_that_it_cannot_be_split():
    with pytest.raises(errors.UsageError, match="accumulate=2: .* set accumulate=1"):
        _read("parts", "objective.presence_group=0", "accumulate=2")


@pytest.mark.parametrize("name", ALL)
def test_remat_changes_the_program_and_not_the_numbers(name):
    section = "network" if name == "latent_mim" else "model"
    plain, remat = _first_step(name), _first_step(name, f"{section}.remat=True")
    assert remat.recomputes and not plain.recomputes
    _same(remat, plain)


def _scanned(name, scan=True):
    """Return the overrides of two blocks or more, as a loop or not."""
    section = "network" if name == "latent_mim" else "model"
    return *DEEP.get(name, ()), f"{section}.scan={scan}"


@pytest.mark.parametrize("name", STACKS)
def test_a_loop_over_the_blocks_has_the_numbers_of_blocks_written_out(name):
    plain, loop = (_first_step(name, *_scanned(name, scan)) for scan in (False, True))
    assert loop.loops > plain.loops
    _same(loop, plain)


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_summed_in_float32_where_values_are_bfloat16(name):
    deep = DEEP.get(name, ())
    with _devices(1):
        parts = build.build(_read(name, "precision=bfloat16", *_scanned(name)))
        phase, state = parts.phase(0), _fresh(name, *deep)
        with contextlib.closing(parts.stream(0)) as stream:
            batch = jax.tree.map(jnp.asarray, next(stream))

    def loss(params):
        own = dict(step=0, phase=phase)
        params = tree.nest(params)
        return parts.method.loss(params, state.extra, batch, state.rng, **own)[0]

    flat = tree.flat(state.params)
    assert narrow.sums(loss, flat) == {}
    assert "scan[" in str(jax.make_jaxpr(loss)(flat))


@pytest.mark.parametrize("name", ALL)
def test_two_devices_are_one(name):
    _same(_first_step(name, count=2), _first_step(name))


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_is_near_float32(name):
    half, full = _first_step(name, "precision=bfloat16"), _first_step(name)
    _same(half, full, loss=0.01, grads=0.2)
    assert half.metrics["loss"] != full.metrics["loss"]


@pytest.mark.parametrize("name", ALL)
def test_layers_freeze_within_a_run_that_resumes_bit_for_bit(
    name, monkeypatch, tmp_path
):
    # Only training is looked at.
    monkeypatch.setattr(evaluation.Evaluation, "online", lambda self, state: {})
    monkeypatch.setattr(evaluation.Evaluation, "final", lambda self, *states: ({}, ""))
    whole, again = tmp_path / "whole", tmp_path / "again"
    # Blocks as loops, those that are frozen in one of their own. With as many layers as
    # SimCLR's would have, another one would have no rate left in the third step.
    looped = _scanned(name) if name != "simclr" else ()
    with _devices(1):
        parts = build.build(_read(name, *looped))
        every = f"checkpoint.every_epochs={2 / parts.run.steps_per_epoch}"
        words = (*looped, every)
        loop.run(_read(name, *words), whole, name="whole")
        # As if it had been killed before its last checkpoint.
        shutil.copytree(whole, again)
        shutil.rmtree(again / "checkpoints" / "4")
        loop.run(_read(name, *words), again, name="again")
    assert runs.digest(again, 4) == runs.digest(whole, 4)
    assert runs.metrics(again) == runs.metrics(whole)
    before, after = (runs.state(whole, at) for at in (2, 4))
    early, late = parts.phase(2).frozen, parts.phase(3).frozen
    assert early and not parts.phase(1).frozen
    for leaf in tree.flat(_fresh(name, *looped).params):
        still = np.array_equal(before[f"params/{leaf}"], after[f"params/{leaf}"])
        assert still == (leaf in early), leaf
    moments = [k for k in after if k.startswith("opt/")]
    assert moments and not any(k.endswith(f"/{leaf}") for k in moments for leaf in late)
