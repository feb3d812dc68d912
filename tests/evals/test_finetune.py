"""Fine-tuning on a small problem that a frozen encoder cannot solve."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vitssl.evals import finetune

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (48, 4, 4, 1)).astype(np.uint8)
# Brightness of the left half, of which `START` looks at nothing.
LABEL = (IMAGE[:, :, :2].mean((1, 2, 3)) > 127.5).astype(np.int32)
START = {"kernel": np.repeat(np.array([[0.0], [0.0], [1.0], [1.0]]) / 2, 3, 1)}
START = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), START)


def encode(params, image, train, rng):
    """Mean over rows of columns, mixed by the kernel; noise when training."""
    columns = (image[..., 0].astype(jnp.float32) / 255 - 0.5).mean(1)  # [B, 4]
    x = jnp.tanh(columns @ params["kernel"])  # [B, 3]
    if train:
        x = x + 1e-3 * jax.random.normal(rng, x.shape)
    return x


def batches(epoch, size=16):
    order = np.random.default_rng(epoch).permutation(len(IMAGE))
    for rows in order.reshape(-1, size):
        yield {"image": IMAGE[rows], "label": LABEL[rows]}


RECIPE = finetune.Recipe(epochs=25, head_lr=0.1, encoder_lr=0.1)


def test_it_learns_and_leaves_the_given_parameters_alone():
    before = jax.tree.map(np.copy, START)
    weights, history, test = finetune.finetune(
        encode, START, batches, batches(0), head=finetune.Head(2), recipe=RECIPE
    )
    assert len(history) == 25 and history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert test["top1"] > 0.9 and "top5" not in test
    assert test["confusion"].sum() == 48
    assert abs(weights["params"]["kernel"][:2]).max() > 0.3
    np.testing.assert_array_equal(START["kernel"], before["kernel"])


def test_a_frozen_encoder_does_not_move_nor_learn_what_it_does_not_see():
    recipe = finetune.Recipe(25, head_lr=0.1, encoder_lr=9.0, freeze_encoder=True)
    weights, _, test = finetune.finetune(
        encode, START, batches, batches(0), head=finetune.Head(2), recipe=recipe
    )
    np.testing.assert_array_equal(weights["params"]["kernel"], START["kernel"])
    assert test["top1"] < 0.85
    assert abs(np.asarray(weights["head"]["classifier"]["kernel"])).max() > 0


def test_a_step_is_adamw_with_two_rates_that_fall_by_epoch():
    head = finetune.Head(2)
    recipe = finetune.Recipe(2, head_lr=0.03, encoder_lr=0.007, weight_decay=0.2)

    def quiet(params, image, train, rng):
        return encode(params, image, False, rng)

    one = [next(batches(0, 48))]
    weights, history, _ = finetune.finetune(
        quiet, START, lambda e: one, one, head=head, recipe=recipe
    )
    start = jax.jit(lambda k: head.init(k, jnp.zeros((1, 3)), train=False)["params"])
    start = start(jax.random.key(0))
    w = {"params": START, "head": start}

    def loss(w):
        x = quiet(w["params"], one[0]["image"], False, None)
        score = head.apply({"params": w["head"]}, x, train=False)
        return optax.softmax_cross_entropy_with_integer_labels(
            score, one[0]["label"]
        ).mean()

    slope = jax.jit(jax.grad(loss))
    # Epoch 1 of 2 has half the rate.
    states, losses = {}, []
    for factor in (1.0, 0.5):
        losses.append(loss(w))
        gradient = slope(w)
        for part, lr in (("params", 0.007), ("head", 0.03)):
            tx = optax.adamw(lr * factor, weight_decay=0.2)
            state = states.get(part, tx.init(w[part]))
            update, states[part] = tx.update(gradient[part], state, w[part])
            w = {**w, part: optax.apply_updates(w[part], update)}
    for got, want in zip(jax.tree.leaves(weights), jax.tree.leaves(w), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose([h["loss"] for h in history], losses, rtol=1e-5)
    assert [h["lr"] for h in history] == pytest.approx([0.03, 0.015])


def test_padding_and_unlabelled_rows_change_nothing():
    def padded(epoch):
        for batch in batches(epoch, 12):
            noise = np.zeros((4, 4, 4, 1), np.uint8)
            yield {
                "image": np.concatenate([batch["image"], noise]),
                "label": np.concatenate([batch["label"], [1, 1, 1, -1]]),
                "valid": np.array([True] * 12 + [False] * 3 + [True]),
            }

    def plain(epoch):
        return batches(epoch, 12)

    def quiet(params, image, train, rng):
        return encode(params, image, False, rng)

    a, b = (
        finetune.finetune(
            quiet,
            START,
            source,
            source(0),
            head=finetune.Head(2),
            recipe=finetune.Recipe(3),
        )
        for source in (plain, padded)
    )
    np.testing.assert_allclose(
        a[0]["params"]["kernel"], b[0]["params"]["kernel"], atol=1e-6
    )
    assert a[1] == [pytest.approx(row, rel=1e-5) for row in b[1]]
    assert a[2]["loss"] == pytest.approx(b[2]["loss"], rel=1e-5)
    assert b[2]["confusion"].sum() == 48


def test_a_head_with_hidden_layers_drops_units_in_training_only():
    head = finetune.Head(3, hidden=(50, 40), dropout=0.5)
    x = RNG.normal(size=(2, 6)).astype(np.float32)
    params = head.init(jax.random.key(0), x, train=False)["params"]
    shapes = {k: v["kernel"].shape for k, v in params.items()}
    assert shapes == {
        "hidden_0": (6, 50),
        "hidden_1": (50, 40),
        "classifier": (40, 3),
    }
    y = x
    for name in ("hidden_0", "hidden_1"):
        y = np.maximum(y @ params[name]["kernel"] + params[name]["bias"], 0)
    y = y @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    got = head.apply({"params": params}, x, train=False)
    np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-5)
    a, b = (
        head.apply(
            {"params": params}, x, train=True, rngs={"dropout": jax.random.key(i)}
        )
        for i in (0, 1)
    )
    assert (a != b).any()


def test_nothing_labelled_is_an_error():
    def empty(epoch):
        yield {"image": IMAGE[:4], "label": -np.ones(4, np.int32)}

    options = dict(head=finetune.Head(2), recipe=finetune.Recipe(1))
    with pytest.raises(ValueError, match="epoch 0 of the training images"):
        finetune.finetune(encode, START, empty, batches(0), **options)
    with pytest.raises(ValueError, match="test batches hold no labelled"):
        finetune.finetune(encode, START, batches, empty(0), **options)
    with pytest.raises(ValueError, match="epochs=0"):
        finetune.finetune(
            encode,
            START,
            batches,
            batches(0),
            head=finetune.Head(2),
            recipe=finetune.Recipe(0),
        )
