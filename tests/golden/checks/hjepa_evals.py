"""H-JEPA's evaluators on frozen features: linear probe, k-NN, few-shot."""

import re

import numpy as np

from tests.golden import reading
from vitssl.evals import fewshot, knn, linear


def _dense(params, name):
    return {"kernel": params[f"{name}.weight"].T, "bias": params[f"{name}.bias"]}


def _probe_params(case, prefix):
    """Parameters under a prefix such as "mean."; without one those of attention."""
    found = {"classifier": _dense(case.param, f"{prefix}classifier")}
    if not prefix:
        found["attention_fc1"] = _dense(case.param, "attention.0")
        found["attention_fc2"] = _dense(case.param, "attention.2")
    return found


def linear_probe(case):
    """Logits of every pooling, and some epochs of full-batch SGD."""
    config = case.config
    features, label = case.inputs["features"], case.inputs["labels"]
    classes = config["num_classes"]
    hidden = len(case.param["attention.0.bias"])
    reading.agree(config, input_dim=features.shape[-1], attention_hidden=hidden)
    for name in case.out:
        if found := re.fullmatch(r"(\w+?)_norm([01])_logits", name):
            pooling, normalise = found[1], found[2] == "1"
            probe = linear.LinearProbe(classes, pooling, normalise)
            prefix = (
                f"{pooling}." if f"{pooling}.classifier.weight" in case.param else ""
            )
            params = _probe_params(case, prefix)
            case.close(name, linear.logits(probe, params, features))
    schedule = config["schedule"].split()[0]
    recipe = linear.SGD(
        epochs=config["epochs"],
        lr=config["lr"],
        schedule=schedule,
        momentum=config["momentum"],
        weight_decay=config["weight_decay"],
        batch_size=len(label),
    )
    probe = linear.LinearProbe(classes, "mean")
    params = _probe_params(case, "train.")
    params, history = linear.train(probe, params, features, label, recipe=recipe)
    case.close("train_history", history)
    case.close("train_weight", params["classifier"]["kernel"].T)
    case.close("train_bias", params["classifier"]["bias"])


def nearest_neighbours(case):
    """Class probabilities and accuracy in per cent, for every metric and k in out/."""
    config = case.config
    classes = config["num_classes"]
    bank, query = (
        fewshot.unit(x) if config["normalize"] else x
        for x in (case.inputs["train_features"], case.inputs["test_features"])
    )
    bank_label, label = (
        case.inputs[k].astype(int) for k in ("train_labels", "test_labels")
    )
    for name in case.out:
        metric, k, what, original = re.fullmatch(
            r"(cosine|euclidean)_k(\d+)_(probs|accuracy)(_original)?", name
        ).groups()
        tau = config[f"temperature_{metric}"]
        # The original's "cosine" is 1 - euclidean distance: the votes of the latter.
        ours = "euclidean" if original else metric
        score, index = knn.search(bank, query, int(k), metric=ours)
        weight = knn.weights(score, temperature=tau)
        probs = knn.vote(weight, bank_label[index], classes)
        if what == "probs":
            case.close(name, probs)
            continue
        pair = (
            {"vector": bank, "label": bank_label},
            {"vector": query, "label": label},
        )
        found = knn.KNN((int(k),), (tau,), ours)(*pair, classes)
        case.close(name, 100 * found["top1"])


def few_shot(case):
    """Centroids of the support set and the class of every query."""
    classes = case.config["num_classes"]
    label = case.inputs["support_labels"].astype(int)
    support = fewshot.unit(case.inputs["support"])
    centre = np.stack([support[label == c].mean(0) for c in range(classes)])
    case.close("centroids", centre)
    for name in case.out:
        if name.startswith("pred_"):
            metric = name.removeprefix("pred_")
            got = fewshot.classify(case.inputs["query"], centre, metric)
            case.close(name, got.astype(np.float32))


CHECKS = {
    "linear probe": linear_probe,
    "k-NN evaluation": nearest_neighbours,
    "few-shot nearest centroid": few_shot,
}
