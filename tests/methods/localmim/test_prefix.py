"""Masking features of a frozen prefix, computed in the step or read from a store."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.localmim import test_method
from vitssl import errors, tree
from vitssl.data import views
from vitssl.methods.localmim import store as feature_store
from vitssl.run import step


def _at(m, boundary, store=""):
    return dataclasses.replace(m, prefix=feature_store.Prefix(boundary, store))


def _losses(m, params, image, masks, tokens, active):
    def run(params):
        blocks = (1, 3, 4, 6)
        return m.stage_losses(params, {}, image, masks, active, blocks, None, tokens)

    found = jax.jit(run, compiler_options=test_method.QUICK)(params)
    return {k: float(v) for k, v in found.items()}


def test_masking_right_after_the_embedding_is_the_ordinary_forward():
    m = test_method._method()
    params, _ = test_method._fresh(m)
    image = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    masks = m.masking.draw(jax.random.key(1), 2, m.grid, 4)
    tokens = m.run_prefix(params, image)  # No block: what the first one would get.
    plain = _losses(m, params, image, masks, None, (0, 1, 2, 3))
    late = _losses(m, params, image, masks, tokens, (0, 1, 2, 3))
    assert plain.keys() == late.keys()
    for k in plain:
        np.testing.assert_allclose(plain[k], late[k], rtol=1e-5)


def _frozen(m, n):
    names = list(tree.flat(test_method._fresh(m)[0]))
    found = tree.match(names, m.freeze_layers(), what="x", default=-1)
    return frozenset(k for k, i in found.items() if 0 <= i < n)


class _Images:
    name, classes = "images", ()

    def __len__(self):
        return 6

    def at(self, i, epoch):
        rng = np.random.default_rng(i)
        image = rng.integers(0, 256, (40, 48, 3), np.uint8)
        return {"image": image, "label": 0, "index": i}


def _store(m, params, root, views=2):
    norm = lambda x: (x / 255.0 - 0.5) / 0.25  # noqa: E731
    run = jax.jit(
        lambda x: m.run_prefix(params, norm(x.astype(jnp.float32))),
        compiler_options=test_method.QUICK,
    )
    about = {
        "weights": feature_store.digest(params, m.prefix.pattern),
        "boundary": m.prefix.boundary,
        "views": views,
        "seed": 3,
        "view": m.view_key,
    }
    view = dataclasses.replace(m, prefix=feature_store.Prefix()).transform()
    return feature_store.write(
        root, _Images(), view, run, about=about, batch_size=5, show=lambda line: None
    )


def test_a_step_from_the_store_is_the_step_that_computes(tmp_path):
    m = _at(test_method._method(), 2)
    params, extra = test_method._fresh(m)
    _store(m, params, tmp_path)
    stored = _at(m, 2, str(tmp_path))
    transform = stored.transform()
    rows = [
        transform(_Images().at(i, 0), np.random.default_rng(i)) for i in (0, 3, 4, 5)
    ]
    batch = {k: np.stack([row[k] for row in rows]) for k in ("global", "tokens")}
    assert batch["tokens"].dtype == np.float16
    phase = step.Phase(_frozen(m, 3), m.phase(0))
    values = []
    for method in (m, stored):
        run = functools.partial(method.loss, phase=phase)
        run = jax.jit(run, compiler_options=test_method.QUICK)
        values.append(float(run(params, extra, batch, jax.random.key(0))[0]))
    np.testing.assert_allclose(values[0], values[1], rtol=2e-3)  # Of float16.
    # Before the prefix freezes, patches are masked as ever.
    early = step.Phase(frozenset(), m.phase(0))
    assert m._prefix(params, jnp.zeros((1, 32, 32, 3)), {}, early.frozen) is None


def test_a_store_is_refused_for_other_weights_blocks_or_a_training_prefix(tmp_path):
    m = _at(test_method._method(), 2)
    params, extra = test_method._fresh(m)
    _store(m, params, tmp_path)
    stored = _at(m, 2, str(tmp_path))
    stored.adopt(params, extra)
    other = jax.tree.map(lambda x: x + 1, params)
    with pytest.raises(errors.CheckpointError, match="weights is .* write the store"):
        stored.adopt(other, extra)
    with pytest.raises(errors.CheckpointError, match="boundary is 2, this run has 3"):
        _at(m, 3, str(tmp_path)).adopt(params, extra)
    with pytest.raises(errors.UsageError, match="freeze it from the start"):
        stored._prefix(params, None, {}, frozenset())
    with pytest.raises(errors.UsageError, match="encoder/cls trains"):
        blocks = {k for k in _frozen(m, 3) if "/block_" in k}
        stored._prefix(params, None, {}, blocks | {"encoder/patch_embed/kernel"})
    flipped = dataclasses.replace(stored, augment=views.SingleCrop(size=32, flip=0.0))
    with pytest.raises(errors.UsageError, match="use the same augment"):
        flipped.transform()
    for text in ("[]", "{}", "[" * 100_000):
        (tmp_path / "damaged").mkdir(exist_ok=True)
        (tmp_path / "damaged" / "manifest.json").write_text(text)
        with pytest.raises(
            errors.DataError, match="no manifest.json there that is whole"
        ):
            feature_store.open(tmp_path / "damaged")
    with pytest.raises(errors.DataError, match="no manifest.json there"):
        feature_store.open(tmp_path / "nothing")
    with pytest.raises(errors.UsageError, match="holds a store already"):
        _store(m, params, tmp_path)


def test_a_stage_before_the_mask_must_be_frozen_too():
    m = _at(test_method._method(), 2)
    params, extra = test_method._fresh(m)
    frozen = {k for k in _frozen(m, 3) if k.startswith("encoder/")}
    phase = step.Phase(frozenset(frozen), m.phase(0))
    with pytest.raises(errors.UsageError, match="stage 0 reads block 1, before the"):
        m.loss(params, extra, test_method._batch(m), jax.random.key(0), phase=phase)


def test_the_manifest_says_what_is_stored(tmp_path):
    m = _at(test_method._method(), 1)
    params, _ = test_method._fresh(m)
    store = _store(m, params, tmp_path, views=1)
    about = json.loads((tmp_path / "manifest.json").read_text())
    assert about["images"] == 6 and about["tokens"] == [17, 16]
    assert store[5, 0].nbytes == 17 * 16 * 2
    with pytest.raises(errors.DataError, match="holds 6 images, not number 6"):
        store[6, 0]


def test_targets_may_be_the_tokens_at_the_boundary():
    m = test_method._method(stages=dict(targets=("prefix",), scales=(1.0,) * 4))
    m = _at(m, 2)
    params, _ = test_method._fresh(m)
    tokens = jax.random.normal(jax.random.key(0), (2, 17, 16))
    goal = m.goals(params, {}, None, (1,), tokens)[1][:, :, 0, 0]
    x = np.asarray(tokens[:, 1:])
    want = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    np.testing.assert_allclose(goal, want, atol=1e-3)


def test_a_boundary_leaves_something_to_train():
    (line,) = _at(test_method._method(), 7).check()
    assert line.startswith("prefix.boundary=7: below model.depth=7")
    (line,) = feature_store.Prefix(store="x").check()
    assert line.startswith("store: needs boundary")
