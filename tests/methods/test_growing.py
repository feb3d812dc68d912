"""Growing depth: what waits is the identity, what comes is a copy of what is there."""

import jax
import numpy as np
import pytest

from tests import runs
from vitssl import config, errors
from vitssl.methods import growing
from vitssl.run import build, experiment, log, loop, step

# Block 1 comes at step 2 of 4.
TINY = runs.TINY_FREEZING | {
    "steps": 4,
    "data.per_class": 8,
    "model.depth": 2,
    "stages.blocks": "(1,)",
    "stages.scales": "(1.0,)",
    "optim.thaw": "()",
    "freeze.schedule": "none",
    "freeze.layers": "()",
    "freeze.grow_depth": "((0.0, 1), (0.5, 2))",
    "checkpoint.every_epochs": 0.4,
}


def _read(workdir, name="localmim", base=TINY, **changes):
    spec, *words = runs.arguments(workdir, name=name, base=base, **changes)
    overrides = [w.removeprefix("--config.") for w in words if "--config." in w]
    c = config.recipe(spec.removeprefix("--config="))
    experiment.apply(c, overrides)
    return experiment.read(c)


def test_blocks_that_wait_are_the_identity_and_cost_nothing(tmp_path):
    parts = build.build(_read(tmp_path))
    state, method, whole = parts.fresh(), parts.method, parts.method.method
    batch, phase = parts.stream(0).load(0), parts.phase(0)
    args = state.params, state.extra, batch, jax.random.key(1)

    def compiled(method, phase):
        own = jax.jit(lambda *a: method.loss(*a, phase=phase)[0])
        return own.lower(*args).compile()

    few = compiled(method, phase)
    all_ = compiled(whole, phase._replace(method=whole.phase(0)))
    assert few(*args) == all_(*args)
    flops = [f.cost_analysis()["flops"] for f in (few, all_)]
    assert flops[0] < 0.9 * flops[1]
    assert [parts.phase(t).method.depth for t in range(4)] == [1, 1, 2, 2]
    waiting = [{n.split("/")[1] for n in parts.phase(t).frozen} for t in (0, 2)]
    assert waiting == [{"block_1"}, set()]


def test_an_initialisation_is_traced_once_for_all_phases(tmp_path, monkeypatch):
    calls, own = [], growing.Growing.init

    def counted(self, rng, batch):
        calls.append(self)
        return own(self, rng, batch)

    monkeypatch.setattr(growing.Growing, "init", counted)
    parts = build.build(_read(tmp_path))
    parts.fresh()
    for at in (0, 2):  # Of other blocks, frozen otherwise.
        parts.compiled.abstract(parts.phase(at))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "old, new, sources", [(1, 3, [0, 0, 0]), (3, 4, [0, 1, 2, 2]), (2, 4, [0, 1, 0, 1])]
)
def test_blocks_that_come_are_copies_of_the_last_ones(old, new, sources):
    net = {f"block_{i}": {"x": np.array([i])} for i in range(4)} | {"cls": 7}
    decoder = {"block_0": {"x": np.array([9])}}
    params = {"encoder": net, "decoder": decoder}
    method = growing.Growing(None, ())
    phases = [step.Phase(frozenset(), growing.Phase((), n)) for n in (old, new)]
    (found, extra) = method.enter(params, {"ema": params}, *phases)
    for tree in (found, extra["ema"]):
        blocks = [int(tree["encoder"][f"block_{i}"]["x"][0]) for i in range(new)]
        assert blocks == sources
        assert tree["decoder"] == decoder and tree["encoder"]["cls"] == 7
    assert method.enter(params, {}, phases[1], phases[1])[0] is params


def test_a_run_that_died_grows_as_one_that_did_not(tmp_path, monkeypatch):
    push = log.Metrics.push
    loop.run(_read(tmp_path / "whole"), tmp_path / "whole", name="test")

    def dies(self, step, *args):
        if step == 2:  # The state of step 2 was saved before it grew.
            raise RuntimeError("died")
        push(self, step, *args)

    died = tmp_path / "died"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="died"):
        patch.setattr(log.Metrics, "push", dies)
        loop.run(_read(died), died, name="test")
    loop.run(_read(died), died, name="test")
    assert runs.digest(died, 4) == runs.digest(tmp_path / "whole", 4)
    assert runs.metrics(died) == runs.metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    "name, stairs, said",
    [
        ("localmim", "((0.0, 1), (0.5, 3))", "must end with model.depth=2"),
        ("localmim", "((0.5, 1), (0.7, 2))", "grow_depth=.*both rising"),
        ("localmim", "((0.0, 2), (0.7, 2))", "grow_depth=.*both rising"),
        ("hjepa", "((0.0, 1), (0.5, 2))", "grows a plain encoder"),
        ("latent_mim", "((0.0, 1), (0.5, 2))", "grows a plain encoder"),
        ("simclr_hvit", "((0.0, 1), (0.5, 2))", "grows a plain encoder"),
    ],
)
def test_stairs_that_cannot_be_are_refused(name, stairs, said, tmp_path):
    base = TINY if name == "localmim" else {}
    own = base | {"freeze.grow_depth": stairs}
    with pytest.raises(errors.UsageError, match=said):
        _read(tmp_path, name=name, base=own)
