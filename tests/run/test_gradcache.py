"""A loss over the batch, embedded in parts: value, gradient, keys and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.hjepa import tiny
from vitssl.methods import base
from vitssl.methods.simclr import method as simclr
from vitssl.methods.simclr import views
from vitssl.models import vit
from vitssl.optim import optimizer as optim
from vitssl.run import step

QUICK = {"xla_backend_optimization_level": 0}
KEY = jax.random.key(3)


def _simclr(batch_size=8, projector=None, objective=None, **model):
    net = dict(width=16, depth=2, heads=2, patch=4, image_size=16)
    return simclr.SimCLR(
        run=base.Run(20, 5, batch_size, 0, 3, (0.5,) * 3, (0.25,) * 3),
        model=vit.ViT(**net | model),
        augment=views.Views(16),
        projector=simclr.Projector(width=8, **projector or {}),
        objective=simclr.Objective(**objective or {}),
    )


def _pixels(of):
    shape = (of.run.batch_size, 2, 16, 16, 3)
    images = np.random.default_rng(0).integers(0, 256, shape)
    return {"global": images.astype(np.uint8)}


def _init(of, batch):
    shapes = jax.eval_shape(lambda: batch)
    make = jax.jit(lambda: of.init(KEY, shapes), compiler_options=QUICK)
    return make()


def _state(of, batch, **spec):
    """Return (state, optimizer, phase) of Adam, whose first moment is 0.1 g."""
    params, extra = _init(of, batch)
    values = dict(name="adamw", lr=1e-6, schedule="constant", warmup_epochs=0.0)
    values |= dict(min_lr=0.0, wd=0.0, clip_norm=0.0)
    spec = optim.Optim(**values | spec)
    counts = dict(total_steps=20, steps_per_epoch=5, batch_size=of.run.batch_size)
    optimizer = optim.make(spec, params, **counts)
    phase = step.phase_at(of, optimizer, 0)
    return step._state(0, params, extra, optimizer, KEY, phase), optimizer, phase


def _step(of, batch, accumulate, **spec):
    """Return (state, metrics, {leaf: gradient}) after one step."""
    state, optimizer, phase = _state(of, batch, **spec)
    function = step.make(of, optimizer, accumulate)
    run = jax.jit(function, static_argnums=2, compiler_options=QUICK)
    state, metrics = run(state, batch, phase)
    return state, metrics, {k: 10 * v for k, v in state.opt.mu.items()}


def _near(a, b, far=1e-5):
    """Compare {leaf: array} by their distance, relative to the length of b."""
    assert a.keys() == b.keys()
    gap = sum(np.square(a[k] - b[k]).sum() for k in b)
    assert np.sqrt(gap / sum(np.square(x).sum() for x in b.values())) < far


SIMCLR = {
    "nt_xent": dict(),
    "batch statistics": dict(projector=dict(batchnorm=True)),
    "infonce": dict(objective=dict(loss="infonce", pool="cls")),
}
ENCODED = dict(strategy="global_only", levels="finest")
HJEPA = {
    "vicreg of crops": dict(
        masking=ENCODED, objective=dict(type="combined", vicreg_adaptive=True)
    ),
    "vicreg of halves": dict(
        masking=dict(ENCODED, mode="zero"),
        objective=dict(type="combined", views="batch_halves"),
    ),
    "vicreg and sigreg of predictions": dict(
        masking=dict(accumulate_crops=True), objective=dict(type="hybrid")
    ),
    "sigreg end to end": dict(
        masking=ENCODED,
        ema=dict(target_encoder=False),
        objective=dict(type="hjepa_sigreg"),
    ),
    "nt_xent of class tokens": dict(masking=ENCODED, objective=dict(type="cjepa")),
    "batch statistics of the levels": dict(levels=dict(norm="batchnorm")),
}


@pytest.mark.parametrize("name", [*SIMCLR, *HJEPA])
def test_parts_of_a_batch_have_the_loss_and_gradient_of_the_whole(name):
    if name in SIMCLR:
        of = _simclr(**SIMCLR[name])
        batch = _pixels(of)
    else:
        of = tiny.method(batch_size=4, **HJEPA[name])
        batch = tiny.batch(of)
    assert of.couples_batch and of.divisible
    whole, want, slopes = _step(of, batch, 1)
    state, got, grads = _step(of, batch, 4 if name in SIMCLR else 2)
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=2e-6)
    _near(grads, slopes)
    assert got.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, 1e-4, 1e-4, err_msg=key)
    # Batch statistics, adapted weights and targets are those of the whole, too.
    for a, b in zip(*map(jax.tree.leaves, (state.extra, whole.extra)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_second_pass_draws_what_the_first_did():
    of = _simclr(drop_path=0.5)
    batch = _pixels(of)
    state, _, _ = _state(of, batch)
    rng = jax.random.fold_in(KEY, 0)

    def in_one_piece(params):
        """The loss of all rows, each embedded by the key of its micro-batch."""
        rows = [None] * 8
        for part in range(2):
            own = {"global": batch["global"][part::2]}
            key = jax.random.fold_in(rng, part)
            rows[part::2] = of.embed(params, {}, own, key)
        return of.compare(params, {}, jnp.stack(rows), rng)[0]

    value, grads = jax.jit(jax.value_and_grad(in_one_piece), compiler_options=QUICK)(
        state.params
    )
    _, got, found = _step(of, batch, 2)
    np.testing.assert_allclose(got["loss"], value, rtol=2e-6)
    _near(found, step.tree.flat(grads))
    assert _step(of, batch, 1)[1]["loss"] != got["loss"]


def test_frozen_leaves_stay_and_the_others_have_their_gradient():
    of, rules = _simclr(), (("encoder/(?!block_1|norm).*", 0.0), (".*", 1.0))
    batch = _pixels(of)
    _, _, whole = _step(of, batch, 1, lr_rules=rules)
    _, _, parts = _step(of, batch, 2, lr_rules=rules)
    assert 0 < len(parts) < 30 and not any("block_0" in k for k in parts)
    _near(parts, whole)


def test_a_batch_in_parts_takes_less_memory():
    of = _simclr(64, depth=4, width=32, patch=2)
    batch = _pixels(of)

    def temporary(accumulate):
        shapes = jax.eval_shape(lambda: batch)
        state, optimizer, phase = _state(of, batch)
        function = step.make(of, optimizer, accumulate)
        run = jax.jit(function, static_argnums=2).lower(state, shapes, phase)
        return run.compile().memory_analysis().temp_size_in_bytes

    whole, parts = temporary(1), temporary(8)
    assert parts < 0.3 * whole, (parts, whole)
