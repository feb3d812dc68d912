"""What frozen features are worth: during training at low cost, and at the end.

An evaluator gets a callable `features(*state, image)` and never sees a method.
`online` gives a few numbers every few epochs, from subsets; `final` compares the
trained network with the same network untrained and with the raw pixels, which is what
makes its numbers mean something.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import numpy as np

from vitssl import sizes
from vitssl.evals import (
    accuracy,
    features,
    fewshot,
    knn,
    linear,
    metrics,
    quality,
    table,
)

format_table, flat = table.format_table, table.flat

# Raw pixels are compared at no more than this side: 3072 numbers in colour.
BASELINES = {
    "pixels": ("raw pixels", features.Pixels(32)),
    "colours": ("colour histogram", features.Colours()),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evals:
    """Config section `evals`.

    Attributes:
        image_size: side of the evaluation images, or (height, width); 0 = as those of
            training.
        batch_size: images per batch of feature extraction.
        every_epochs: epochs between online evaluations; 0 = only at the end.
        online_samples_train, online_samples_test: images of the bank and the test set
            that the online evaluation uses, drawn once; 0 = all.
        online: whether the online evaluation looks at the features (k-NN, spread); a
            method's own test scores are there either way.
        final: what is measured at the end.
        knn_k, knn_temperature: neighbours and temperatures to try; the first of each
            is the one reported, the others are for the logs.
        probe: how the linear probe is trained: lbfgs solves logistic regression on
            standardised features, its penalty chosen on a part of the training set;
            sgd is the papers' protocol, which needs lr and epochs that fit.
        probe_epochs: of sgd at the end.
        features: which entry of the method's features is evaluated.
        final_samples_train, final_samples_test: as for online; 0 = all.
        cache_bytes: evaluation images are kept in memory up to this size.
        knn_metric, knn_max_bytes: see `knn.search`.
        online_probe_epochs: epochs of an online probe by sgd; 0 = none.
        probe_pooling: "" probes `features` themselves; otherwise the "tokens", pooled
            so (attention is learned, by sgd only).
        probe_normalise: scale what is probed to length one (sgd only).
        probe_lr, probe_schedule, probe_batch: of sgd.
        baselines: what the networks are compared with at the end: raw pixels, and the
            histogram of their colours.
        probe_folds: cross-validation of the probe on the bank in so many parts, by
            sgd; 0 = none.
        fewshot_ways, fewshot_shots, fewshot_queries, fewshot_episodes: see
            `fewshot.evaluate`.
    """

    image_size: sizes.Size = 0
    batch_size: int
    every_epochs: float
    online_samples_train: int
    online_samples_test: int
    final: tuple[Literal["knn", "linear", "fewshot", "quality"], ...]
    knn_k: tuple[int, ...]
    knn_temperature: tuple[float, ...]
    probe: Literal["lbfgs", "sgd"]
    probe_epochs: int
    features: str = "pooled"
    online: bool = True
    final_samples_train: int = 0
    final_samples_test: int = 0
    cache_bytes: int = 2**28
    knn_metric: knn.Metric = "cosine"
    knn_max_bytes: int = 2**28
    online_probe_epochs: int = 0
    probe_pooling: Literal["", "mean", "max", "attention"] = ""
    probe_normalise: bool = False
    probe_lr: float = 0.1
    probe_schedule: Literal["cosine", "step", "constant"] = "cosine"
    probe_batch: int = 256
    baselines: tuple[Literal["pixels", "colours"], ...] = ("pixels",)
    probe_folds: int = 0
    fewshot_ways: int = 5
    fewshot_shots: tuple[int, ...] = (1, 5, 10)
    fewshot_queries: int = 15
    fewshot_episodes: int = 100

    def check(self) -> Iterator[str]:
        """Yield what is out of range or cannot be combined."""
        for key in ("image_size", "batch_size", "probe_epochs", "probe_batch"):
            if min(sizes.pair(getattr(self, key))) < 1:
                yield f"{key}={getattr(self, key)}: 1 or more"
        for key in (
            "every_epochs",
            "online_samples_train",
            "online_samples_test",
            "final_samples_train",
            "final_samples_test",
            "cache_bytes",
            "online_probe_epochs",
        ):
            if getattr(self, key) < 0:
                yield f"{key}={getattr(self, key)}: 0 or more"
        if not self.knn_k or min(self.knn_k) < 1:
            yield f"knn_k={self.knn_k}: one or more numbers of neighbours, each >= 1"
        if not self.knn_temperature or min(self.knn_temperature) <= 0:
            yield f"knn_temperature={self.knn_temperature}: one or more, above 0"
        if self.knn_max_bytes < 2**20:
            yield f"knn_max_bytes={self.knn_max_bytes}: at least {2**20}"
        if self.probe_lr <= 0:
            yield f"probe_lr={self.probe_lr}: must be above 0"
        if self.probe_folds < 0 or self.probe_folds == 1:
            yield f"probe_folds={self.probe_folds}: 0 (none), or 2 or more"
        if self.probe == "lbfgs" and self.probe_pooling == "attention":
            yield "probe_pooling=attention: is learned; set probe=sgd"
        if self.probe == "lbfgs" and self.probe_normalise:
            yield "probe_normalise=True: lbfgs standardises features; set probe=sgd"
        if self.fewshot_ways < 2:
            yield f"fewshot_ways={self.fewshot_ways}: 2 or more"
        if not self.fewshot_shots or min(self.fewshot_shots) < 1:
            yield f"fewshot_shots={self.fewshot_shots}: one or more, each >= 1"
        for key in ("fewshot_queries", "fewshot_episodes"):
            if getattr(self, key) < 1:
                yield f"{key}={getattr(self, key)}: 1 or more"

    @property
    def names(self) -> tuple[str, ...]:
        """Entries of the method's features that the final evaluation needs."""
        wanted = (self.features, "tokens") if self.probe_pooling else (self.features,)
        return tuple(dict.fromkeys(wanted))

    def protocol(self) -> str:
        """Return one line: what the numbers of the final table were measured with."""
        parts = [f"features: {self.features}"]
        if "knn" in self.final:
            parts.append(
                f"k-NN: k={self.knn_k[0]}, {self.knn_metric}, "
                f"temperature {self.knn_temperature[0]:g}"
            )
        if "linear" in self.final:
            sgd = f"sgd, {self.probe_epochs} epochs, lr {self.probe_lr:g}"
            what = f" of {self.probe_pooling} tokens" if self.probe_pooling else ""
            parts.append(f"linear{what}: {'lbfgs' if self.probe == 'lbfgs' else sgd}")
        if "fewshot" in self.final:
            parts.append(
                f"few-shot: {self.fewshot_ways}-way nearest centroid, "
                f"{self.fewshot_episodes} episodes"
            )
        return "; ".join(parts)

    def recipe(self, epochs: int) -> linear.SGD:
        """Return how the probe is trained by SGD."""
        return linear.SGD(
            epochs,
            lr=self.probe_lr,
            schedule=self.probe_schedule,
            batch_size=self.probe_batch,
        )


def online(
    section: Evals,
    network: Callable,
    state: tuple,
    bank: Iterable[dict],
    query: Iterable[dict],
    *,
    classes: int,
    sharding=None,
) -> dict[str, float]:
    """Return the few numbers that say whether a run learns, or has collapsed.

    Args:
        section: see `Evals`.
        network: features(*state, image) -> dict; see `features.extract`.
        state: such as (params, extra).
        bank, query: evaluation batches of the subsets (`features.subset`), best held
            by a `features.Cached`; the classifiers learn from the first.
        classes: number of classes; 0 leaves out what needs labels.
        sharding: of a batch over devices.

    Returns:
        "knn/top1", "knn/top5"; "quality/std" (mean over dimensions), "quality/rankme",
        "quality/effective_rank", "quality/collapsed" (1.0: see
        `quality.collapse_flags`); "probe/top1" with online_probe_epochs.
    """
    name = (section.features,)
    test = features.extract(network, state, query, names=name, sharding=sharding)
    values = _spread(_vectors(test, section))
    if not _has_labels(test, classes):
        return values
    train = features.extract(network, state, bank, names=name, sharding=sharding)
    if not _has_labels(train, classes):
        return values
    near = _neighbours(section, train, test, classes, sweep=False)
    values |= {f"knn/{key}": value for key, value in near.items()}
    if section.online_probe_epochs:
        pair = _labelled(train, section), _labelled(test, section)
        found = _sgd(section, *pair, classes, section.online_probe_epochs)
        values["probe/top1"] = found["top1"]
    return values


def final(
    section: Evals,
    network: Callable,
    states: dict[str, tuple],
    bank: Iterable[dict],
    query: Iterable[dict],
    *,
    classes: int,
    sharding=None,
) -> list[dict]:
    """Measure several states of one network, and raw pixels, on the same images.

    Args:
        section: see `Evals`; `section.final` says what is measured.
        network, classes, sharding: as in `online`.
        states: {"trained": state, "untrained": state}: one row each.
        bank, query: evaluation batches, each read once per row.

    Returns:
        Rows for `format_table` and `flat`: {"features": name, "dim": D, "knn/top1",
        "knn/k20_t0.07/top1", "linear/top1", "fewshot/5/top1", "quality/rankme", ...};
        the last two are "raw pixels" and, with labels, what always naming the most
        frequent class would score.
    """
    rows = []
    todo = [(name, network, state, section.names) for name, state in states.items()]
    if "image" in next(iter(query)):
        for name, function in (BASELINES[key] for key in section.baselines):
            todo.append((name, function, (), ("pooled",)))
    for name, function, state, names in todo:
        pair = [
            features.extract(function, state, part, names=names, sharding=sharding)
            for part in (bank, query)
        ]
        rows.append({"features": name, **_measure(section, *pair, classes)})
    label = pair[1]["label"]
    if _has_labels(pair[1], classes):
        share = float(np.bincount(label[label >= 0]).max() / (label >= 0).sum())
        guess = {f"{k}/top1": share for k in ("knn", "linear") if k in section.final}
        rows.append({"features": "largest class", **guess})
    return rows


def _measure(section, train, test, classes) -> dict[str, float]:
    """Return all numbers of one row."""
    x = _vectors(test, section)
    row = {"dim": x.shape[1], "bank": len(train["label"]), "query": len(x)}
    if "quality" in section.final:
        found = quality.feature_quality(x) | _spread(x, prefix="")
        row |= {f"quality/{key}": value for key, value in found.items()}
    if not (_has_labels(train, classes) and _has_labels(test, classes)):
        return row
    if "knn" in section.final:
        found = _neighbours(section, train, test, classes, sweep=True)
        row |= {f"knn/{key}": value for key, value in found.items()}
    if "linear" in section.final:
        found = _probe(section, train, test, classes)
        row |= {f"linear/{key}": value for key, value in found.items()}
    if "fewshot" in section.final:
        found = fewshot.evaluate(
            x,
            test["label"],
            ways=section.fewshot_ways,
            shots=section.fewshot_shots,
            queries=section.fewshot_queries,
            episodes=section.fewshot_episodes,
        )
        for shots, each in found.items():
            row |= {f"fewshot/{shots}/{key}": value for key, value in each.items()}
    return row


def _vectors(found, section):
    """Return one vector per image [M, D]; of tokens their mean."""
    x = found.get(section.features, found.get("pooled"))
    return x.mean(1) if x.ndim == 3 else x


def _has_labels(found, classes) -> bool:
    return classes > 1 and bool((found["label"] >= 0).any())


def _spread(x, prefix="quality/") -> dict[str, float]:
    """Return how far and in how many directions features [M, D] spread."""
    x = quality.subsample(np.asarray(x, np.float64))
    variance = x.var(0)
    found = quality.rank_metrics(x) | {"mean_variance": float(variance.mean())}
    # A few images cannot span many dimensions, which is no collapse.
    room = max(1, min(x.shape[1], len(x) - 1))
    shares = {"rank_ratio": found["effective_rank"] / room, "feature_dim": room}
    collapsed = quality.collapse_flags(found | shares)["any_collapse"]
    return {
        f"{prefix}std": float(np.sqrt(variance).mean()),
        f"{prefix}rankme": found["rankme"],
        f"{prefix}effective_rank": found["effective_rank"],
        f"{prefix}collapsed": collapsed,
    }


def _neighbours(section, train, test, classes, *, sweep) -> dict[str, float]:
    """Return k-NN accuracy: of the first k and temperature, then of all of them."""
    count = None if sweep else 1
    found = knn.evaluate(
        _vectors(train, section),
        train["label"],
        _vectors(test, section),
        test["label"],
        classes=classes,
        k=section.knn_k[:count],
        temperature=section.knn_temperature[:count],
        metric=section.knn_metric,
        max_bytes=section.knn_max_bytes,
    )
    values = dict(next(iter(found.values())))
    if len(found) > 1:
        for (k, t), each in found.items():
            values |= {f"k{k}_t{t:g}/{key}": value for key, value in each.items()}
    return values


def _labelled(found, section):
    """Return (features, labels) for a probe of the images that have a label."""
    has = found["label"] >= 0
    x = found["tokens"] if section.probe_pooling and "tokens" in found else None
    if x is None:
        x = _vectors(found, section)
    return x[has], found["label"][has]


def _probe(section, train, test, classes) -> dict[str, float]:
    """Return accuracy and loss of the final linear probe."""
    train, test = _labelled(train, section), _labelled(test, section)
    if section.probe == "sgd":
        values = _sgd(section, train, test, classes, section.probe_epochs)
    else:
        pool = {"max": lambda x: x.max(1)}.get(section.probe_pooling)
        pool = pool or (lambda x: x.mean(1))
        (x, label), (y, truth) = (
            (pool(a) if a.ndim == 3 else a, b) for a, b in (train, test)
        )
        params, penalty = linear.logistic(x, label, classes)
        score = linear.logits(linear.LinearProbe(classes), params, y)
        values = accuracy.measure(score, truth) | {"penalty": penalty}
    if section.probe_folds:
        recipe = section.recipe(section.probe_epochs)
        found = linear.cross_validate(
            _module(section, classes), *train, recipe=recipe, parts=section.probe_folds
        )
        values |= {f"folds_{key}": found[key] for key in ("top1", "top1_std")}
    counts = values.pop("confusion")
    return values | {"f1_macro": metrics.summary(counts)["f1_macro"]}


def _module(section, classes) -> linear.LinearProbe:
    pooling = section.probe_pooling or "mean"
    return linear.LinearProbe(classes, pooling, section.probe_normalise)


def _sgd(section, train, test, classes, epochs) -> dict:
    """Train a probe by SGD; return `accuracy.measure` of it on the test features."""
    module = _module(section, classes)
    params, _ = linear.train(
        module,
        linear.init(module, train[0]),
        *train,
        recipe=section.recipe(epochs),
    )
    return accuracy.measure(linear.logits(module, params, test[0]), test[1])
