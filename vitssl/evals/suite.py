"""What frozen features are worth: during training at low cost, and at the end.

An evaluator gets features and never sees a method. `online` gives a few numbers every
few epochs, from subsets; `final` compares the trained network with the same network
untrained and with the raw pixels, which is what makes its numbers mean something.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Literal

import numpy as np

from vitssl import progress, ranges
from vitssl.evals import accuracy, extraction, fewshot, knn, linear, quality

# All evaluators, in the order of the table's columns.
EVALS = {
    "knn": knn.KNN,
    "linear": linear.Linear,
    "fewshot": fewshot.FewShot,
    "quality": quality.Quality,
}
# What networks are compared with: (row of the table, function of a patch's side). Raw
# pixels are compared at no more than 32 x 32: 3072 numbers in colour.
BASELINES = {
    "pixels": ("raw pixels", lambda side: extraction.Pixels(32)),
    "averaged": ("averaged pixels", extraction.Patches),
    "colours": ("colour histogram", lambda side: extraction.Colours()),
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
        final_of: whether that is of the last state, or of the best by `checkpoint.best`
            (with checkpoint.keep_best).
        final_split: the split it is scored on; "" is data.test_split, which the online
            evaluations look at and a best state was chosen by.
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
        knn_standardised: k-NN of standardised features beside that of plain ones, at
            the end.
        online_probe_epochs: epochs of an online probe by sgd; 0 = none.
        probe_pooling: "" probes `features` themselves; otherwise the "tokens", pooled
            so (attention is learned, by sgd only).
        probe_normalise: scale what is probed to length one (sgd only).
        probe_lr, probe_schedule, probe_batch: of sgd.
        baselines: what the networks are compared with at the end: raw pixels, the same
            averaged over patches as tokens are, and the histogram of colours.
        in_place: measure the tokens, too, by k-NN (a probe of so many numbers takes
            long): side by side in one vector of N D; an average over them says nothing
            about where things are.
        scales: measure the test images at these scales, too, against a bank at 1.
        probe_folds: cross-validation of the probe on the bank in so many parts, by
            sgd; 0 = none.
        fewshot_ways, fewshot_shots, fewshot_queries, fewshot_episodes: see
            `fewshot.FewShot`.
    """

    image_size: ranges.Count | tuple[ranges.Count, ranges.Count] = 0
    batch_size: ranges.Count
    every_epochs: ranges.NotNegative
    online_samples_train: ranges.OrNone
    online_samples_test: ranges.OrNone
    final: tuple[Literal[tuple(EVALS)], ...]
    knn_k: tuple[ranges.Count, ...]
    knn_temperature: tuple[ranges.Positive, ...]
    probe: Literal["lbfgs", "sgd"]
    probe_epochs: ranges.Count
    features: str = "pooled"
    final_of: Literal["last", "best"] = "last"
    final_split: str = ""
    online: bool = True
    final_samples_train: ranges.OrNone = 0
    final_samples_test: ranges.OrNone = 0
    cache_bytes: ranges.OrNone = 2**28
    knn_metric: knn.Metric = "cosine"
    knn_max_bytes: int = 2**28
    knn_standardised: bool = True
    online_probe_epochs: ranges.OrNone = 0
    probe_pooling: Literal["", "mean", "max", "attention"] = ""
    probe_normalise: bool = False
    probe_lr: ranges.Positive = 0.1
    probe_schedule: Literal["cosine", "step", "constant"] = "cosine"
    probe_batch: ranges.Count = 256
    baselines: tuple[Literal[tuple(BASELINES)], ...] = ("pixels", "averaged")
    in_place: bool = False
    scales: tuple[ranges.Positive, ...] = ()
    probe_folds: ranges.OrNone = 0
    fewshot_ways: Annotated[int, ranges.Range(2)] = 5
    fewshot_shots: tuple[ranges.Count, ...] = (1, 5, 10)
    fewshot_queries: ranges.Count = 15
    fewshot_episodes: ranges.Count = 100

    def check(self) -> Iterator[str]:
        """Yield what is out of range or cannot be combined."""
        for key in ("knn_k", "knn_temperature", "fewshot_shots"):
            if not getattr(self, key):
                yield f"{key}=(): one value or more"
        if self.knn_max_bytes < 2**20:
            yield f"knn_max_bytes={self.knn_max_bytes}: {2**20} or more"
        if self.probe_folds == 1:
            yield "probe_folds=1: 0 (none), or 2 or more"
        if self.probe == "lbfgs" and self.probe_pooling == "attention":
            yield "probe_pooling=attention: is learned; set probe=sgd"
        if self.probe == "lbfgs" and self.probe_normalise:
            yield "probe_normalise=True: lbfgs standardises features; set probe=sgd"

    @property
    def names(self) -> tuple[str, ...]:
        """Entries of the method's features that the final evaluation needs."""
        also = ("tokens",) if self.probe_pooling or self.in_place else ()
        return tuple(dict.fromkeys((self.features, *also)))

    @property
    def chosen(self) -> dict:
        """The evaluators of `final` by their names."""
        return {n: cls.of(self) for n, cls in EVALS.items() if n in self.final}

    def protocol(self) -> str:
        """Return one line: what the numbers of the final table were measured with."""
        parts = [f"features: {self.features}", *map(str, self.chosen.values())]
        if any("top1" in e.columns for e in self.chosen.values()):
            parts.append("in brackets: 95 % by Wilson's interval")
        return "; ".join(filter(None, parts))


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
        network: features(*state, image) -> dict; see `extraction.extract`.
        state: such as (params, extra).
        bank, query: evaluation batches of the subsets (`extraction.subset`), best held
            by an `extraction.Cached`; the classifiers learn from the first.
        classes: number of classes; 0 leaves out what needs labels.
        sharding: of a batch over devices.

    Returns:
        "knn/top1", "knn/top5", "knn/images" that they are of (of several labels
        "knn/map"); "quality/..." of `quality.spread`; "probe/top1" or "probe/map" with
        online_probe_epochs.
    """

    def extract(batches):
        names = (section.features,)
        found = extraction.extract(
            network, state, batches, names=names, sharding=sharding
        )
        return _inputs(found, section)

    test = extract(query)
    found = quality.spread(test["vector"])
    values = {f"quality/{key}": value for key, value in found.items()}
    if not _has_labels(test, classes):
        return values
    train = extract(bank)
    if not _has_labels(train, classes):
        return values
    first = dict(k=section.knn_k[:1], temperature=section.knn_temperature[:1])
    near = dataclasses.replace(knn.KNN.of(section), **first, standardised=False)
    found = near(train, test, classes)
    values |= {f"knn/{k}": value for k, value in found.items() if not np.ndim(value)}
    if section.online_probe_epochs:
        probe = linear.Linear.of(section)
        recipe = dataclasses.replace(probe.recipe, epochs=section.online_probe_epochs)
        probe = dataclasses.replace(probe, solver="sgd", recipe=recipe, folds=0)
        found = probe(train, test, classes)
        values |= {f"probe/{k}": found[k] for k in ("top1", "map") if k in found}
    return values


def final(
    section: Evals,
    network: Callable,
    states: dict[str, tuple],
    bank: Iterable[dict],
    query: Iterable[dict],
    *,
    classes: int,
    side: int = 0,
    sharding=None,
) -> list[dict]:
    """Measure several states of one network, and raw pixels, on the same images.

    Args:
        section: `section.final` says what is measured.
        network, classes, sharding: as in `online`.
        states: {"trained": state, "untrained": state}: one row each, and one more for
            tokens in place and for every scale.
        bank, query: evaluation batches, each read once per state and for the baselines.
        side: of a patch, in pixels; 0: unknown, and no averaged pixels.

    Returns:
        Rows for `format_table` and `flat`: {"features": name, "dim": D, "knn/top1",
        "knn/k20_t0.07/top1", "linear/top1", "fewshot/5/top1", "quality/rankme", ...};
        the last are the baselines and, with labels, what always naming the most
        frequent class would score. "knn/images" labelled images are what an accuracy
        is of, "knn/confusion" is an array.
    """

    def extract(function, state, names, parts=(bank, query)):
        options = dict(names=names, sharding=sharding)
        return [extraction.extract(function, state, p, **options) for p in parts]

    pictures = "image" in next(iter(query))
    rows, placed, at_scale = [], [], []
    for name, state in progress.each([*states.items()], "final evaluation"):
        pair = extract(network, state, section.names)
        if section.in_place:
            both = [_vectors(part, _flat(part["tokens"])) for part in pair]
            placed.append(_row(section, f"{name} in place", *both, classes, "knn"))
        pair = [_inputs(found, section) for found in pair]
        rows.append(_row(section, name, *pair, classes))
        for scale in section.scales if pictures else ():
            scaled = extraction.Scaled(network, scale, max(1, side))
            found = extract(scaled, state, (section.features,), (query,))[0]
            found = _inputs(found, section)
            row = _row(section, f"{name} at {scale:g}", pair[0], found, classes, "knn")
            at_scale.append(row | {"scale/cosine": _alike(found, *pair)})
    rows += placed + at_scale
    keys = [k for k in section.baselines if pictures and (side or k != "averaged")]
    parts = tuple((BASELINES[k][0], BASELINES[k][1](side)) for k in keys)
    if parts:
        found = extract(
            extraction.Together(parts), (), tuple(name for name, _ in parts)
        )
        for name, _ in parts:
            both = [_vectors(part, part[name]) for part in found]
            rows.append(_row(section, name, *both, classes))
    label, several = pair[1]["label"], pair[1].get("labels")
    if several is not None and several.any():
        # Without looking, the share of its images is the precision of a label.
        share = several.mean(0)[several.any(0)].mean()
        over_all = [k for k, e in section.chosen.items() if "map" in e.columns]
        guess = {f"{k}/map": float(share) for k in over_all}
        rows.append({"features": "shares of labels", **guess})
    elif _has_labels(pair[1], classes):
        share = float(np.bincount(label[label >= 0]).max() / (label >= 0).sum())
        over_all = [k for k, e in section.chosen.items() if "top1" in e.columns]
        guess = {f"{k}/top1": share for k in over_all}
        rows.append({"features": "largest class", **guess})
    return rows


def _vectors(found, x) -> dict:
    """Return what evaluators get where there are no tokens to pool."""
    return {"vector": x} | {k: found[k] for k in ("label", "labels") if k in found}


def _flat(tokens):  # [M, N, D] -> [M, N D]
    return tokens.reshape(len(tokens), -1)


def _alike(found, bank, query) -> float:
    """Return the mean cosine of images at two scales, about the mean of the bank."""
    centre = bank["vector"].mean(0)
    a, b = (part["vector"] - centre for part in (found, query))
    size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / np.maximum(size, 1e-12)).mean())


def _row(section, name, train, test, classes, *only) -> dict:
    """Return all numbers of one row, or those of the evaluators `only`."""
    row = {"features": name, "dim": train["vector"].shape[1]}
    row |= {"bank": len(train["label"]), "query": len(test["label"])}
    labelled = _has_labels(train, classes) and _has_labels(test, classes)
    for key, evaluator in section.chosen.items():
        fits = evaluator.several or "labels" not in train
        wanted = key in (only or section.chosen)
        if wanted and (labelled and fits or not evaluator.labelled):
            found = evaluator(train, test, classes)
            row |= {f"{key}/{part}": value for part, value in found.items()}
    return row


def _inputs(found, section):
    """Return what evaluators get: with one vector per image, of tokens their mean."""
    x = found.get(section.features, found.get("pooled"))
    return found | {"vector": x.mean(1) if x.ndim == 3 else x}


def _has_labels(found, classes) -> bool:
    return classes > 1 and ("labels" in found or bool((found["label"] >= 0).any()))


def cells(rows: list[dict]) -> list[list[str]]:
    """Return the table of the rows of `final` as text, its headings first.

    A number that a row lacks is a dash, and one of no known column is left out.
    """
    known = {"dim": ("dim", "{:.0f}")}
    last = {"scale/cosine": ("cosine to 1", "{:.2f}")}
    for name, cls in EVALS.items():
        known |= {f"{name}/{key}": column for key, column in cls.columns.items()}
    keys = list(dict.fromkeys(key for row in rows for key in row))
    columns = [("features", "features", "{}")]
    for pattern, (heading, form) in (known | last).items():
        for key in keys:
            if found := re.fullmatch(pattern, key):
                columns.append((key, found.expand(heading), form))
    lines = [[heading for _, heading, _ in columns]]
    for row in rows:
        lines.append([_cell(row, key, form) for key, _, form in columns])
    return lines


def _cell(row, key, form) -> str:
    if key not in row:
        return "-"
    head, _, name = key.rpartition("/")
    if name == "top1":
        return accuracy.written(row[key], row.get(f"{head}/images"))
    return form.format(row[key])


def format_table(rows: list[dict], note: str = "") -> str:
    """Return `cells` as a Markdown table that also reads as text, `note` below it."""
    lines = cells(rows)
    width = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * n for n in width])
    text = []
    for name, *numbers in lines:
        padded = [n.rjust(w) for n, w in zip(numbers, width[1:], strict=True)]
        text.append("| " + " | ".join([name.ljust(width[0]), *padded]) + " |")
    return "\n".join([*text, *([note] if note else [])])


def flat(rows: list[dict]) -> dict[str, float]:
    """Return {"final/trained/knn/top1": value, ...} of all numbers of the rows."""
    return {
        f"final/{row['features'].replace(' ', '_')}/{key}": float(value)
        for row in rows
        for key, value in row.items()
        if key != "features" and not np.ndim(value)
    }
