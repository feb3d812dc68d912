"""OlmoEarth's evaluations."""

import numpy as np

from vitssl.evals import knn, segmentation


def compress(x):
    """Return features as int8, finer near 0: a square root on each side."""
    x = np.asarray(x, np.float32)
    return (
        np.clip(127.5 * np.sign(x) * np.sqrt(np.abs(x)), -127, 127)
        .round(0)
        .astype(np.int8)
    )


def restore(x):
    """Return float32 features of `compress`."""
    x = np.asarray(x, np.float32)
    return np.sign(x) * (x / 127.5) ** 2


def _knn(case, name, query, **options):
    c, bank = case.config, case.inputs["train"]
    labels = case.inputs["train_labels"]
    score, index = knn.search(bank, query, c["k"], **options)
    weight = knn.weights(score, temperature=c["knn_temperature"])
    classes = knn.vote(weight, labels[index], c["num_classes"]).argmax(-1)
    case.close(name, classes)


def _all(case):
    c, i = case.config, case.inputs
    _knn(case, "knn_pred", i["test"], metric="cosine")
    _knn(case, "knn_pred_skip", i["train"], metric="cosine", leave_one_out=True)
    found = segmentation.measure(i["seg_pred"], i["seg_label"], c["num_classes"])
    ours = dict(
        miou="miou",
        overall_acc="accuracy",
        macro_acc="macro_accuracy",
        macro_f1="macro_f1",
    )
    for theirs, name in ours.items():
        case.close(f"seg_{theirs}", np.float32(found[name]))
        assert abs(found[name] - c["seg_metrics"][theirs]) < 1e-6
    small = compress(i["quant_in"])
    case.close("quant", small)
    case.close("dequant", restore(small))
    params = {"kernel": case.param["probe.weight"].T, "bias": case.param["probe.bias"]}
    side = c["pixels_per_patch_side"]
    for name, size in (
        ("probe_logits", None),
        ("probe_logits_resized", case.out["probe_logits_resized"].shape[2:]),
    ):
        got = segmentation.logits(params, i["probe_features"], side, size)
        case.close(name, np.moveaxis(np.asarray(got), -1, 1))


CHECKS = {"k-NN, segmentation metrics, quantisation, linear probe head": _all}
