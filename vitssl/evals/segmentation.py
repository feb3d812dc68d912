"""Segmentation from frozen features: a linear layer on each token, and its measures.

Each token predicts the pixels it covers. Numbers are fractions. `fit` is the protocol
of the original; `solve` goes on until nothing changes and has no rate to choose.

Source: allenai/olmoearth_pretrain@5411573 olmoearth_pretrain/evals/linear_probe.py and
metrics.py.
"""

import dataclasses
import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vitssl.evals import linear
from vitssl.optim import schedules

IGNORE = -1  # Label of pixels that do not count.
FLOOR = 1e-5  # Learning rate at the end.


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the probe is trained: AdamW, a warm-up, then half a cosine."""

    epochs: int = 50
    lr: float = 0.1  # After the warm-up of a tenth of the epochs.
    decay: float = 0.01
    batch_size: int = 8

    def rate(self, step, steps_per_epoch: int):
        """Return the learning rate of a 0-based step."""
        return schedules.cosine(
            step,
            base=self.lr,
            final=FLOOR,
            total_steps=self.epochs * steps_per_epoch,
            warmup_steps=self.epochs // 10 * steps_per_epoch,
        )


def logits(params, features, pixels: int, size: tuple[int, int] | None = None):
    """Return the classes' scores of every pixel: [B, H, W, C] float32.

    Args:
        params: {"kernel": [D, C s s], "bias": [C s s]}, ordered (class, row, column).
        features: [B, h, w, D].
        pixels: s, side of the pixels that a token predicts.
        size: (H, W) of the labels; where h s, w s differ from it, scores are
            interpolated (corners on corners).
    """
    x = features.astype(jnp.float32) @ params["kernel"] + params["bias"]
    x = einops.rearrange(x, "b h w (c i j) -> b (h i) (w j) c", i=pixels, j=pixels)
    if size is None or x.shape[1:3] == tuple(size):
        return x
    rows, columns = (_between(n, m) for n, m in zip(x.shape[1:3], size, strict=True))
    return jnp.einsum("bhwc,Hh,Ww->bHWc", x, rows, columns)


def _between(n, m):
    """Return the matrix [m, n] of linear interpolation with corners on corners."""
    at = np.linspace(0, n - 1, m)
    weight = 1 - np.abs(at[:, None] - np.arange(n)[None])
    return np.maximum(weight, 0).astype(np.float32)


def fit(features, labels, *, classes: int, pixels: int, recipe: Recipe, seed: int = 0):
    """Return the parameters of `logits`, trained on images held on the device.

    Args:
        features: [M, h, w, D].
        labels: int [M, H, W], `IGNORE` where a pixel does not count.
        pixels: see `logits`.
        seed: of the start and of the order of the images.
    """
    m, d = len(features), features.shape[-1]
    batch = min(recipe.batch_size, m)
    rng = np.random.default_rng(seed)
    order = [rng.permutation(m)[: m // batch * batch] for _ in range(recipe.epochs)]
    order = np.concatenate(order).reshape(-1, batch)
    width = classes * pixels * pixels
    bound = d**-0.5
    start = {
        "kernel": rng.uniform(-bound, bound, (d, width)).astype(np.float32),
        "bias": rng.uniform(-bound, bound, width).astype(np.float32),
    }
    # Features of very different widths would need different rates.
    mean = features.astype(np.float32).mean((0, 1, 2))
    std = features.astype(np.float32).std((0, 1, 2)) + 1e-6
    params = _fit(
        start,
        jnp.asarray((features - mean) / std, jnp.float32),
        jnp.asarray(labels, jnp.int32),
        jnp.asarray(order, jnp.int32),
        pixels=pixels,
        recipe=recipe,
    )
    params = jax.tree.map(np.asarray, params)
    kernel = params["kernel"] / std[:, None]
    return {"kernel": kernel, "bias": params["bias"] - mean @ kernel}


@functools.partial(jax.jit, static_argnames=("pixels", "recipe"))
def _fit(params, features, labels, order, *, pixels, recipe):
    """Run all steps of a training in one loop."""
    per_epoch = max(1, len(order) // recipe.epochs)

    def rate(step):
        return recipe.rate(step, per_epoch)

    optimizer = optax.adamw(rate, weight_decay=recipe.decay)

    def loss(params, rows):
        return _cross_entropy(params, features[rows], labels[rows], pixels=pixels)

    def step(carry, rows):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), order)
    return params


def solve(
    features,
    labels,
    *,
    classes: int,
    pixels: int,
    held_out: float = 0.2,
    iterations: int = 100,
    seed: int = 0,
):
    """Return the parameters of `logits`, found by L-BFGS on standardised features.

    The penalty is chosen as in `linear.logistic`, on `held_out` of the images.

    Args:
        features, labels, pixels: see `fit`.
        iterations: for each penalty, at most.
        seed: of the images that are held out.
    """
    features = np.asarray(features, np.float32)
    mean, scale = linear.standards(features)
    features = (features - mean) * scale
    labels = np.asarray(labels, np.int32)
    shape = (features.shape[-1] + 1, classes * pixels * pixels)
    objective = functools.partial(_objective, pixels=pixels)

    def path(images, penalties, start=None):
        rows = features[images], labels[images]
        return linear.solutions(objective, rows, shape, penalties, iterations, start)

    order = np.random.default_rng(seed).permutation(len(labels))
    cut = max(1, round(held_out * len(labels)))
    held = jax.device_put((features[order[:cut]], labels[order[:cut]]))
    tried = path(order[cut:], linear.PENALTIES[:-1])
    losses = [float(_cross_entropy(w, *held, pixels=pixels)) for w in tried]
    best = int(np.argmin(losses))
    (found,) = path(order, linear.PENALTIES[best : best + 1], start=tried[best])
    kernel = found["kernel"] * scale[:, None]
    return {"kernel": kernel, "bias": found["bias"] - mean @ kernel}


@functools.partial(jax.jit, static_argnames="pixels")
def _cross_entropy(params, features, labels, *, pixels):
    """Return the mean over all pixels that count."""
    score = logits(params, features, pixels, labels.shape[1:])
    each = optax.softmax_cross_entropy_with_integer_labels(
        score, jnp.maximum(labels, 0)
    )
    counted = labels != IGNORE
    return (each * counted).sum() / jnp.maximum(1, counted.sum())


@functools.partial(jax.jit, static_argnames="pixels")
def _objective(w, features, labels, penalty, *, pixels):
    """Return (loss, gradient) of w [D + 1, C s s]."""

    def loss(w):
        params = {"kernel": w[:-1], "bias": w[-1]}
        fit = _cross_entropy(params, features, labels, pixels=pixels)
        return fit + 0.5 * penalty * (w[:-1] ** 2).sum()

    return jax.value_and_grad(loss)(w)


@functools.partial(jax.jit, static_argnames=("pixels", "size"))
def _classify(params, features, *, pixels, size):
    return logits(params, features, pixels, size).argmax(-1)


def predict(params, features, pixels: int, size: tuple[int, int], batch: int = 64):
    """Return the classes int [M, H, W] of features [M, h, w, D], in batches."""
    found = []
    for start in range(0, len(features), batch):
        part = jnp.asarray(features[start : start + batch])
        found.append(np.asarray(_classify(params, part, pixels=pixels, size=size)))
    return np.concatenate(found)


def measure(predicted, labels, classes: int) -> dict:
    """Return how well pixels were classified; labels may be `IGNORE`.

    Returns:
        "miou": mean over the classes that occur at all; "accuracy" over pixels;
        "macro_accuracy" and "macro_f1" over the classes that occur as label; "iou" [C],
        nan where a class never occurs.
    """
    keep = labels != IGNORE
    cell = labels[keep].astype(np.int64) * classes + predicted[keep]
    table = np.bincount(cell.ravel(), minlength=classes**2).reshape(classes, classes)
    hit = np.diag(table).astype(np.float64)
    is_, said = table.sum(1), table.sum(0)
    there = is_ > 0
    with np.errstate(invalid="ignore"):
        iou = hit / (is_ + said - hit)
        recall = hit / is_
        f1 = 2 * hit / (is_ + said)
    return {
        "miou": float(np.nanmean(iou)),
        "accuracy": float(hit.sum() / max(1, table.sum())),
        "macro_accuracy": float(recall[there].mean()),
        "macro_f1": float(f1[there].mean()),
        "iou": iou,
    }
