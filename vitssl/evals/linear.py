"""Linear probe: how far a linear classifier gets on frozen features.

Two ways to train it: SGD, the protocol of the papers, with its learning rate and
epochs; and logistic regression solved to the end, which has no such numbers to choose
and is what to compare networks by when the features are small enough.
"""

import dataclasses
import functools
import math
import warnings
from typing import Literal

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vitssl.evals import accuracy, evaluator, metrics, ranking
from vitssl.optim import schedules

Pooling = Literal["mean", "max", "attention", "cls"]


class LinearProbe(nn.Module):
    """Pool tokens, then one linear layer.

    Attributes:
        classes: C.
        pooling: of [B, N, D]; features [B, D] are taken as they are. attention: one
            softmax over the tokens, its logits from D -> D/4, ReLU, -> 1. cls: the
            features hold patches only, so that it is the mean (with a warning); probe
            the entry "cls" of the features instead.
        normalise: scale the pooled features to length one.

    Source: jonwiggins/H-JEPA src/evaluation/linear_probe.py.
    """

    classes: int
    pooling: Pooling = "mean"
    normalise: bool = False

    @nn.compact
    def __call__(self, features):
        """Return logits [B, C] of features [B, N, D] or [B, D]."""
        x = features
        if x.ndim == 3:
            x = self._pool(x)  # [B, D]
        if self.normalise:
            # The square is clamped before the root: a zero row keeps its gradient.
            x = x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))
        start = nn.initializers.normal(0.01)
        return nn.Dense(self.classes, kernel_init=start, name="classifier")(x)

    def _pool(self, x):
        if self.pooling == "max":
            return x.max(1)
        if self.pooling == "attention":
            d = x.shape[-1]
            hidden = nn.relu(_torch_linear(d, d // 4, "attention_fc1")(x))
            score = _torch_linear(d // 4, 1, "attention_fc2")(hidden)  # [B, N, 1]
            return (x * nn.softmax(score, axis=1)).sum(1)
        if self.pooling == "cls":
            warnings.warn(
                "LinearProbe: pooling='cls' has no class token among the patches; "
                "taking their mean",
                stacklevel=2,
            )
        return x.mean(1)


def _torch_linear(fan_in, width, name):
    """A dense layer that starts as torch's: weight and bias uniform +-1/sqrt(in)."""
    bound = fan_in**-0.5

    def uniform(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(width, kernel_init=uniform, bias_init=uniform, name=name)


@dataclasses.dataclass(frozen=True)
class SGD:
    """How the probe is trained.

    Attributes:
        lr: of the first epoch; constant within one.
        schedule: cosine: half a cosine over the epochs, towards 0. step: a tenth after
            every third of them. constant: none.
        momentum, weight_decay: torch's; the decay is added to the gradient.
        batch_size: the last batch of an epoch is smaller.
        shuffle: a new order in every epoch; False keeps that of the samples.
    """

    epochs: int
    lr: float = 0.1
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 256
    shuffle: bool = True

    def rate(self, epoch):
        """Return the learning rate of 0-based `epoch`."""
        if self.schedule == "constant":
            return self.lr + 0.0 * epoch
        if self.schedule == "step":
            return self.lr * 0.1 ** (epoch // max(1, self.epochs // 3))
        return schedules.cosine(epoch, base=self.lr, final=0.0, total_steps=self.epochs)


def init(probe: LinearProbe, features, seed: int = 0):
    """Return fresh parameters of the probe for such features."""
    seed = jax.device_put(np.uint32(seed))
    return _init(seed, probe=probe, shape=features.shape[1:])


@functools.partial(jax.jit, static_argnames=("probe", "shape"))
def _init(seed, *, probe, shape):
    return probe.init(jax.random.key(seed), jnp.zeros((1, *shape)))["params"]


def train(probe: LinearProbe, params, features, label, *, recipe: SGD, seed: int = 0):
    """Train a probe by SGD on the cross-entropy; all of it is one compiled loop.

    Args:
        features: [M, D] or [M, N, D], on the device as a whole.
        label: int [M] in 0..C-1, or 0 and 1 in [M, C]: a sigmoid each.
        seed: of the order of the samples.

    Returns:
        params: trained.
        history: float32 [epochs, 2]: mean loss of the samples as they were met, and
            the learning rate.
    """
    features = jax.device_put(np.asarray(features, np.float32))
    label = jax.device_put(np.asarray(label, np.int32))
    key = jax.device_put(np.uint32(seed))
    params, history, _ = _train(probe, params, features, label, key, recipe=recipe)
    return params, np.asarray(jax.device_get(history))


@functools.partial(jax.jit, static_argnames=("probe", "recipe"))
def _train(probe, params, features, label, seed, *, recipe):
    m = len(label)
    size = min(m, recipe.batch_size)
    steps = math.ceil(m / size)
    momentum = optax.chain(
        optax.add_decayed_weights(recipe.weight_decay), optax.trace(recipe.momentum)
    )

    def loss_of(params, taken):
        logits = probe.apply({"params": params}, features[taken])  # [b, C]
        loss = _cross_entropy(logits, label[taken])
        real = taken < m  # Indices from m on fill up the last batch.
        return (loss * real).sum() / real.sum(), real.sum()

    def epoch(carry, e):
        lr = recipe.rate(e)
        order = jnp.arange(m)
        if recipe.shuffle:
            key = jax.random.fold_in(jax.random.key(seed), e)
            order = jax.random.permutation(key, m)
        order = jnp.pad(order, (0, steps * size - m), constant_values=m)

        def step(carry, taken):
            params, velocity = carry
            (loss, count), gradient = jax.value_and_grad(loss_of, has_aux=True)(
                params, taken
            )
            update, velocity = momentum.update(gradient, velocity, params)
            params = jax.tree.map(lambda p, u: p - lr * u, params, update)
            return (params, velocity), (loss, count)

        batches = einops.rearrange(order, "(s b) -> s b", s=steps)
        carry, (losses, counts) = jax.lax.scan(step, carry, batches)
        row = jnp.stack([(losses * counts).sum() / m, lr])
        return carry, (row, losses)

    carry = (params, momentum.init(params))
    (params, _), (history, losses) = jax.lax.scan(
        epoch, carry, jnp.arange(recipe.epochs)
    )
    return params, history, losses


def _cross_entropy(logits, label):  # [B, C], int [B] or [B, C] -> [B]
    """Return the cross-entropy of every row: of one label, or of a sigmoid each."""
    if label.ndim == 2:
        return optax.sigmoid_binary_cross_entropy(logits, label).sum(-1)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def _measure(logits, label) -> dict:
    """Return what logits [M, C] are worth: see `accuracy.measure`, or `ranking`'s."""
    return (ranking if np.ndim(label) == 2 else accuracy).measure(logits, label)


@functools.partial(jax.jit, static_argnames="probe")
def _logits(probe, params, features):
    return probe.apply({"params": params}, features)


def logits(probe: LinearProbe, params, features, *, rows: int = 4096):
    """Return logits float32 [M, C] on the host, computed `rows` at a time."""
    parts = []
    for start in range(0, len(features), rows):
        part = np.asarray(features[start : start + rows], np.float32)
        pad = min(rows, len(features)) - len(part)
        part = np.pad(part, [(0, pad)] + [(0, 0)] * (part.ndim - 1))
        found = jax.device_get(_logits(probe, params, jax.device_put(part)))
        parts.append(found[: len(found) - pad])
    return np.concatenate(parts)


def cross_validate(
    probe: LinearProbe, features, label, *, recipe: SGD, parts: int = 5, seed: int = 42
):
    """Return the top-1 [parts] of a fresh probe trained and tested on every fold.

    Of several labels the mAP.
    """
    from sklearn.model_selection import KFold  # It takes a second to import.

    split = KFold(parts, shuffle=True, random_state=seed).split(label)
    found = []
    for rows, held in split:
        params = init(probe, features, seed)
        params, _ = train(
            probe, params, features[rows], label[rows], recipe=recipe, seed=seed
        )
        score = logits(probe, params, features[held])
        one = _measure(score, label[held])
        found.append(one["map" if label.ndim == 2 else "top1"])
    return np.array(found)


# Weights of the penalty that `logistic` chooses from, strongest first.
PENALTIES = tuple(10.0**e for e in range(0, -7, -1))


def logistic(
    features,
    label,
    classes: int,
    *,
    penalties: tuple[float, ...] = PENALTIES,
    held_out: float = 0.2,
    iterations: int = 100,
    seed: int = 0,
):
    """Fit logistic regression by L-BFGS, penalty chosen on a part.

    Multinomial of one label an image; of several, one against the rest for each label,
    all with one penalty.

    Features are standardised by their own mean and deviation. The penalty
    lambda / 2 |W|^2, added to the mean cross-entropy, is the one with the smallest
    cross-entropy on `held_out` of the samples; then all of them are fitted with it.

    Args:
        features, label: [M, D], on the device as a whole, and int [M], or 0 and 1 in
            [M, C].
        penalties: values of lambda to try; each starts from the solution of the last.
        held_out: share of the samples that chooses, if there are several penalties.
        iterations: of L-BFGS for each penalty, at most.
        seed: of the split.

    Returns:
        params: {"classifier": {"kernel": [D, C], "bias": [C]}} of a `LinearProbe`, for
            features as they were given.
        penalty: the one chosen.
    """
    features = np.asarray(features, np.float32)
    label = np.asarray(label, np.int32)
    mean, scale = standards(features)
    features = (features - mean) * scale
    chosen = penalties
    if len(penalties) > 1:
        order = np.random.default_rng(seed).permutation(len(label))
        cut = max(1, round(held_out * len(label)))
        held, rest = order[:cut], order[cut:]
        path = _path(features[rest], label[rest], classes, penalties, iterations)
        # By cross-entropy: the accuracy of a few samples is too coarse to choose by.
        losses = [
            _measure(features[held] @ w["kernel"] + w["bias"], label[held])
            for w in path
        ]
        best = int(np.argmin([found["loss"] for found in losses]))
        chosen = penalties[: best + 1]
    w = _path(features, label, classes, chosen, iterations)[-1]
    kernel = w["kernel"] * scale[:, None]
    bias = w["bias"] - mean @ kernel
    return {"classifier": {"kernel": kernel, "bias": bias}}, chosen[-1]


def standards(features):
    """Return (mean, 1 / deviation) of the last axis, [D]; 0 where it never varies."""
    # Its weight would be noise.
    axes = tuple(range(features.ndim - 1))
    mean, std = features.mean(axes), features.std(axes)
    return mean, np.where(std > 1e-6 * np.abs(mean), 1 / np.maximum(std, 1e-30), 0)


def _path(features, label, classes, penalties, iterations):
    """Return the solutions [{"kernel", "bias"}] for falling penalties."""
    shape = (features.shape[1] + 1, classes)
    return solutions(_objective, (features, label), shape, penalties, iterations)


def solutions(objective, rows, shape, penalties, iterations, start=None):
    """Minimise by L-BFGS, for falling penalties, each from where the last one ended.

    Args:
        objective: compiled; returns (value, gradient) for (w float32 [D + 1, C], *rows,
            penalty).
        rows: arrays, put on the device once.
        shape: (D + 1, C).
        start: of the first, {"kernel", "bias"}; None = 0.

    Returns:
        [{"kernel": [D, C], "bias": [C]}], one for each penalty.
    """
    from scipy import optimize

    rows = jax.device_put(rows)

    def value(flat, penalty):
        w = flat.astype(np.float32).reshape(shape)
        w, strength = jax.device_put((w, np.float32(penalty)))
        loss, slope = jax.device_get(objective(w, *rows, strength))
        return float(loss), slope.astype(np.float64).ravel()

    flat, found = np.zeros(math.prod(shape)), []
    if start:
        flat = np.concatenate([start["kernel"], start["bias"][None]]).ravel()
    options = {"maxiter": iterations, "ftol": 1e-7, "gtol": 1e-5}
    for penalty in penalties:
        result = optimize.minimize(
            value, flat, penalty, jac=True, method="L-BFGS-B", options=options
        )
        flat = result.x
        w = flat.astype(np.float32).reshape(shape)
        found.append({"kernel": w[:-1], "bias": w[-1]})
    return found


@jax.jit
@jax.value_and_grad
def _objective(w, features, label, penalty):
    """Return mean cross-entropy + penalty / 2 |kernel|^2 of w [D + 1, C]."""
    kernel, bias = w[:-1], w[-1]
    score = jnp.matmul(features, kernel, precision="highest") + bias  # [M, C]
    fit = _cross_entropy(score, label).mean()
    return fit + 0.5 * penalty * (kernel**2).sum()


@dataclasses.dataclass(frozen=True)
class Linear(evaluator.Evaluator):
    """A linear classifier of the frozen features.

    Attributes:
        solver: lbfgs: `logistic`; sgd: `train` by `recipe`.
        recipe: of sgd, and of the folds.
        pooling: of the tokens; "" takes one vector per image.
        normalise: see `LinearProbe`; of sgd.
        folds: parts of the bank in `cross_validate`; 0 = none.
    """

    solver: Literal["lbfgs", "sgd"]
    recipe: SGD
    pooling: Literal["", "mean", "max", "attention"] = ""
    normalise: bool = False
    folds: int = 0

    several = True
    columns = {"top1": ("linear top-1", "{:.1%}"), "map": ("linear mAP", "{:.1%}")}

    @classmethod
    def of(cls, section) -> "Linear":
        """Return the probe of the keys `probe` and `probe_...`."""
        recipe = SGD(
            section.probe_epochs,
            lr=section.probe_lr,
            schedule=section.probe_schedule,
            batch_size=section.probe_batch,
        )
        return cls(
            section.probe,
            recipe,
            section.probe_pooling,
            section.probe_normalise,
            section.probe_folds,
        )

    def __str__(self) -> str:
        """Return "linear of max tokens: sgd, 90 epochs, lr 0.1", "linear: lbfgs"."""
        what = f" of {self.pooling} tokens" if self.pooling else ""
        sgd = f"sgd, {self.recipe.epochs} epochs, lr {self.recipe.lr:g}"
        return f"linear{what}: {'lbfgs' if self.solver == 'lbfgs' else sgd}"

    def __call__(self, bank, query, classes) -> dict[str, float]:
        """Return "top1", "top5", "loss", "images", "confusion"; lbfgs "penalty".

        Of images of several labels "map", "f1_macro", "f1_micro", "loss" and those.
        """
        train, test = self._labelled(bank), self._labelled(query)
        values = getattr(self, f"_{self.solver}")(train, test, classes)
        if self.folds:
            probe = self._probe(classes)
            each = cross_validate(probe, *train, recipe=self.recipe, parts=self.folds)
            key = "folds_top1" if "top1" in values else "folds_map"
            values |= {key: float(each.mean())}
            values |= {f"{key}_std": float(each.std())}  # Of the population.
        if "confusion" not in values:
            return {k: v for k, v in values.items() if not np.ndim(v)}
        counts = values["confusion"]
        values["images"] = float(counts.sum())
        return values | {"f1_macro": metrics.summary(counts)["f1_macro"]}

    def _probe(self, classes):
        return LinearProbe(classes, self.pooling or "mean", self.normalise)

    def _labelled(self, images):
        """Return (features, labels) of the images that have a label."""
        has = images["label"] >= 0
        pooled = self.pooling and "tokens" in images
        x = images["tokens" if pooled else "vector"]
        if "labels" in images:
            return x, images["labels"]
        return x[has], images["label"][has]

    def _sgd(self, train_on, test, classes):
        probe = self._probe(classes)
        start = init(probe, train_on[0])
        params, _ = train(probe, start, *train_on, recipe=self.recipe)
        return _measure(logits(probe, params, test[0]), test[1])

    def _lbfgs(self, train_on, test, classes):
        def pooled(x):
            if x.ndim == 2:
                return x
            return x.max(1) if self.pooling == "max" else x.mean(1)

        params, penalty = logistic(pooled(train_on[0]), train_on[1], classes)
        score = logits(LinearProbe(classes), params, pooled(test[0]))
        return _measure(score, test[1]) | {"penalty": penalty}
