"""Fine-tune a network with a small head on labelled images, and test it.

A self-contained loop for a number at the end of a run; long fine-tuning with
augmentation, layer-wise rates and checkpoints is training, and the trainer's.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vitssl.evals import accuracy
from vitssl.optim import schedules


class Head(nn.Module):
    """Linear layers with ReLU and dropout between, onto the classes.

    Attributes:
        classes: C.
        hidden: widths of the layers before the last; () is a linear classifier.
        dropout: rate after each ReLU.
    """

    classes: int
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, *, train: bool):
        """Return logits [B, C] of pooled features [B, D]."""
        for i, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, name=f"hidden_{i}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, name="classifier")(x)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How `finetune` trains.

    Attributes:
        epochs: passes over the training batches.
        head_lr, encoder_lr: learning rates of the first epoch; both fall as half a
            cosine, constant within an epoch.
        weight_decay: decoupled (AdamW), on everything that trains.
        freeze_encoder: train the head alone; the encoder is not differentiated.

    Source of the numbers: jonwiggins/H-JEPA src/evaluation/transfer.py.
    """

    epochs: int = 50
    head_lr: float = 1e-3
    encoder_lr: float = 1e-4
    weight_decay: float = 1e-4
    freeze_encoder: bool = False


def finetune(
    apply: Callable,
    params,
    train: Callable[[int], Iterable[dict]],
    test: Iterable[dict],
    *,
    head: Head,
    recipe: Recipe,
    seed: int = 0,
):
    """Train `params` and a new head, then measure.

    Args:
        apply: hashable; apply(params, image [B, H, W, C] uint8, train, rng) -> pooled
            features [B, D]. `train` says whether drop-path and the like act.
        params: of the network; a copy is trained, the given arrays stay.
        train: epoch -> batches {"image", "label"} and, where padded, "valid"; all of
            one shape. Labels below 0 do not count.
        test: batches of the same kind.
        head: the classifier; see `Head`.
        recipe: see `Recipe`.
        seed: of the head's weights and of dropout.

    Returns:
        {"params", "head"}: trained.
        [{"loss", "top1", "lr"} for each epoch], over the training images as met, lr of
            the head.
        {"loss", "top1", "top5", "confusion"} on the test images.

    Raises:
        ValueError: an epoch, or the test, holds no labelled image.
    """
    weights, state, key = None, None, jax.random.key(seed)
    history, at = [], 0
    for epoch in range(recipe.epochs):
        factor = schedules.cosine(
            np.float32(epoch), base=1.0, final=0.0, total_steps=recipe.epochs
        )
        sums = []
        for batch in train(epoch):
            batch = jax.device_put(_labelled(batch))
            if weights is None:
                weights = _start(params, batch, key, apply=apply, head=head)
                trained = _trained(weights, recipe)
                state = _direction(recipe).init(trained)
            weights, state, seen = _step(
                weights,
                state,
                batch,
                jax.random.fold_in(key, at),
                factor,
                apply=apply,
                head=head,
                recipe=recipe,
            )
            sums.append(seen)
            at += 1
        row = _means(sums, f"epoch {epoch} of the training images")
        history.append({**row, "lr": float(recipe.head_lr * factor)})
    if weights is None:
        raise ValueError(f"finetune: epochs={recipe.epochs}; 1 or more")
    return weights, history, measure(apply, weights, test, head=head)


def measure(apply: Callable, weights, batches: Iterable[dict], *, head: Head) -> dict:
    """Return `accuracy.measure` of {"params", "head"} on labelled batches."""
    scores, labels = [], []
    for batch in batches:
        rows = _labelled(batch)
        image = jax.device_put(rows["image"])
        score = jax.device_get(_predict(weights, image, apply=apply, head=head))
        scores.append(score[rows["real"]])
        labels.append(rows["label"][rows["real"]])
    if not sum(map(len, labels)):
        raise ValueError("finetune: the test batches hold no labelled image")
    return accuracy.measure(np.concatenate(scores), np.concatenate(labels))


def _labelled(batch) -> dict:
    """Return image, label and which rows count ("real")."""
    label = np.asarray(batch["label"])
    real = label >= 0
    if "valid" in batch:
        real &= np.asarray(batch["valid"])
    return {"image": batch["image"], "label": np.maximum(label, 0), "real": real}


@functools.partial(jax.jit, static_argnames=("apply", "head"))
def _start(params, batch, key, *, apply, head):
    """Return {"params": a copy, "head": fresh}."""
    pooled = jax.eval_shape(lambda: apply(params, batch["image"], False, key))
    fresh = head.init(key, jnp.zeros(pooled.shape, pooled.dtype), train=False)
    return {"params": jax.tree.map(jnp.copy, params), "head": fresh["params"]}


def _trained(weights, recipe):
    """Return the part of the weights that trains."""
    return {"head": weights["head"]} if recipe.freeze_encoder else weights


def _direction(recipe):
    """AdamW before the learning rate, which differs between the parts."""
    return optax.chain(
        optax.scale_by_adam(), optax.add_decayed_weights(recipe.weight_decay)
    )


@functools.partial(
    jax.jit,
    static_argnames=("apply", "head", "recipe"),
    donate_argnames=("weights", "state"),
)
def _step(weights, state, batch, key, factor, *, apply, head, recipe):
    encoder_key, head_key = jax.random.split(key)
    real = batch["real"]
    count = real.sum()

    def loss_of(trained):
        w = {**weights, **trained}
        acts = not recipe.freeze_encoder
        pooled = apply(w["params"], batch["image"], acts, encoder_key)
        rngs = {"dropout": head_key}
        score = head.apply({"params": w["head"]}, pooled, train=True, rngs=rngs)
        score = score.astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(score, batch["label"])
        right = (score.argmax(1) == batch["label"]) & real
        return (loss * real).sum() / jnp.maximum(count, 1), right.sum()

    trained = _trained(weights, recipe)
    (loss, right), gradient = jax.value_and_grad(loss_of, has_aux=True)(trained)
    update, state = _direction(recipe).update(gradient, state, trained)
    lr = {"params": recipe.encoder_lr * factor, "head": recipe.head_lr * factor}
    trained = {
        part: jax.tree.map(lambda p, u, r=lr[part]: p - r * u, trained[part], u)
        for part, u in update.items()
    }
    seen = {"loss": loss * count, "right": right, "count": count}
    return {**weights, **trained}, state, seen


@functools.partial(jax.jit, static_argnames=("apply", "head"))
def _predict(weights, image, *, apply, head):
    pooled = apply(weights["params"], image, False, None)
    return head.apply({"params": weights["head"]}, pooled, train=False)


def _means(sums, what) -> dict:
    """Return mean loss and top-1 of the steps of an epoch."""
    sums = jax.device_get(sums)
    count = sum(int(s["count"]) for s in sums)
    if not count:
        raise ValueError(f"finetune: {what} holds no labelled image")
    return {
        "loss": float(sum(s["loss"] for s in sums) / count),
        "top1": float(sum(s["right"] for s in sums) / count),
    }
