"""H-JEPA's feature quality metrics, under the original's names."""

import re

from vitssl.evals import quality

# What the original calls its metrics, where ours has another name.
NAMES = {"uniformity": "uniformity_cosine", "uniformity_wang_isola": "uniformity"}
# Off-diagonal means: the original divides by D * D, its zero diagonal included.
WITH_DIAGONAL = {
    "mean_covariance_off_diag": "mean_covariance",
    "mean_abs_correlation_off_diag": "mean_abs_correlation",
}


def _transformed(features, expression):
    """`features` after an expression of the json such as "features*0.01+3"."""
    number = r"([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)"
    match = re.fullmatch(rf"features(?:\*{number})?{number}?", expression)
    assert match, f"cannot read collapsed_input {expression!r}"
    factor, shift = match.groups()
    return features * float(factor or 1) + float(shift or 0)


def feature_quality(case):
    """The metrics of a feature matrix, of a collapsed one, and the trainer's."""
    config = case.config
    features = case.inputs["features"]
    options = dict(
        variance_threshold=config["variance_threshold"],
        rank_ratio=config["threshold_rank_ratio"],
        variance=config["threshold_variance"],
    )
    metrics = quality.feature_quality(features, **options)
    width = features.shape[1]
    for name in case.out:
        if name in WITH_DIAGONAL:
            case.close(name, metrics[WITH_DIAGONAL[name]] * (width - 1) / width)
        elif NAMES.get(name, name) in metrics:
            case.close(name, metrics[NAMES.get(name, name)])
    collapsed = _transformed(features, config["collapsed_input"])
    flags = quality.feature_quality(collapsed, **options)
    order = config["collapsed_flags_order"]
    case.close("collapsed_flags", [flags[name] for name in order])
    for side in ("context", "target"):
        tokens = case.inputs[f"trainer_{side}"]
        got = quality.collapse_metrics(tokens, centre=False)
        case.close(f"trainer_{side}_std", got["std"])
        case.close(f"trainer_{side}_norm", got["norm"])
        case.close(f"trainer_{side}_eff_rank", got["effective_rank"])


CHECKS = {"feature quality and collapse metrics": feature_quality}
