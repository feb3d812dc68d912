"""iFAM's metrics and pictures."""

import jax.numpy as jnp
import numpy as np

from tests.golden import reading
from tests.golden.checks.ifam_model import last
from vitssl.methods.parts import maps as partmaps
from vitssl.methods.parts import measures, scores
from vitssl.pictures import overlays


def _points(case, prefix):
    """Rows of `measures.of_maps` for one split of a case, in batches of three."""
    keypoints = jnp.asarray(case.inputs[f"{prefix}keypoints"])[..., 1:]
    _, channels, side, _ = case.inputs[f"{prefix}maps"].shape
    reading.agree(
        case.config,
        map_size=side,
        num_parts=channels - 1,
        num_keypoints=keypoints.shape[1],
    )
    size = case.config["image_size"]
    batch = {
        "image": np.zeros((len(keypoints), size, size, 1)),
        "keypoints": keypoints,
    }
    if f"{prefix}boxes" in case.inputs:
        batch["box"] = jnp.asarray(case.inputs[f"{prefix}boxes"])[:, 1:]
    rows = measures.of_maps(last(case.inputs[f"{prefix}maps"]), batch)
    return {k: np.asarray(v) for k, v in rows.items()}


def _keypoints(case):
    fit, test = _points(case, "fit_"), _points(case, "eval_")
    case.close("error", scores.keypoint_error(fit, test))
    centres = case.out["first_fit_centers"]
    n = len(centres)
    case.close("first_fit_centers", fit["centres"][:n].reshape(centres.shape))
    case.close("first_fit_active", np.repeat(fit["part_there"][:n], 2, axis=1))


def _agreement(case):
    rows = _points(case, "")
    seen = rows["keypoint_seen"]
    which = np.broadcast_to(np.arange(seen.shape[1]), seen.shape)
    found = scores.agreement(rows["keypoint_part"][seen], which[seen])
    for name, value in found.items():
        case.close(name, 100 * value)


def _dense(case):
    masks = case.inputs["part_masks"]  # [B, P, H, W]
    rest = np.full_like(masks[:, :1], 0.1)
    truth = np.concatenate([masks, rest], axis=1).argmax(1)
    table = measures.contingency(last(case.inputs["maps"]), jnp.asarray(truth))
    table = np.asarray(table).sum(0)
    case.close("nmi", 100 * scores.mutual_information(table))
    case.close("ari", 100 * scores.rand_index(table))


def _overlap(case):
    masks = jnp.asarray(case.inputs["masks"])
    parts = case.inputs["maps"].shape[1] - 1
    reading.agree(case.config, image_size=masks.shape[-1], num_parts=parts)
    counts = measures.overlap(last(case.inputs["maps"]), masks)
    found = scores.intersection_over_union(np.asarray(counts))
    for name in ("iou_fg", "iou_bg"):
        case.close(name, found[name])


def _classification(case):
    logits, labels = case.inputs["logits"], case.inputs["targets"].astype(int)
    reading.agree(case.config, num_classes=logits.shape[1])
    found = scores.classification(logits, labels)
    for theirs, ours in (
        ("micro", "top1"),
        ("macro", "macro"),
        ("per_class", "per_class"),
        ("worst", "worst_class"),
        ("auroc", "auroc"),
        ("auroc_macro", "auroc"),
        ("top5_micro", "top5"),
        ("top5_macro", "macro_top5"),
    ):
        if theirs in case.out:
            case.close(theirs, found[ours])


def _waterbirds(case):
    logits = case.inputs["logits"]
    y, place = (case.inputs[k].astype(int) for k in ("y", "place"))
    case.close("average", scores.classification(logits, y)["top1"])
    for name, rows in (("worst_case", y != place), ("best_case", y == place)):
        found = scores.classification(logits[rows], y[rows])
        case.close(f"{name}_micro", found["top1"])
        case.close(f"{name}_per_class", found["per_class"])
        if name == "worst_case":
            case.close("worst_group", found["worst_class"])
    found = scores.groups(logits, y, 2 * y + place)
    case.close("worst_of_4_groups", found["worst_group"])


def _in9(case):
    mapping = case.config["mapping"]
    guesses = scores.coarse(case.inputs["logits"].argmax(-1), mapping)
    case.close("accuracy", (guesses == case.inputs["targets"].astype(int)).mean())


def _thresholds(case):
    maps, dot = (np.asarray(last(case.inputs[k])) for k in ("maps", "ab"))
    owner = maps.argmax(-1)
    own = np.take_along_axis(dot, owner[..., None], axis=-1)[..., 0]
    parts = maps.shape[-1] - 1
    reading.agree(case.config, num_parts=parts)
    found = scores.thresholds(owner, own, parts, case.config["quantiles"])
    for name, want in case.meta["expected"].items():
        got = next(v for q, v in found.items() if abs(1 - q - float(name)) < 1e-9)
        want = [want[str(k)] for k in range(len(got))]
        np.testing.assert_allclose(got, want, rtol=case.tolerance)


def _coordinates(case):
    rows, columns = partmaps.centroids(last(case.inputs["maps"]))
    case.close("row", rows)
    case.close("col", columns)


def _metric(case):
    inputs = case.inputs
    if "fit_maps" in inputs:
        _keypoints(case)
    elif "keypoints" in inputs:
        _agreement(case)
    elif "part_masks" in inputs:
        _dense(case)
    elif "masks" in inputs:
        _overlap(case)
    elif "place" in inputs:
        _waterbirds(case)
    elif "mapping" in case.config:
        _in9(case)
    elif "ab" in inputs:
        _thresholds(case)
    elif "maps" in inputs:
        _coordinates(case)
    else:
        _classification(case)


def _picture(case):
    if not case.out:
        for want in case.meta["expected"]:
            columns, rows = overlays.layout(want["batch"])
            assert (columns, rows) == (want["ncols"], want["nrows"])
        return
    reading.agree(case.config, background_label=case.inputs["maps"].shape[1] - 1)
    got = overlays.labels(last(case.inputs["maps"]), case.config["save_resolution"])
    # Ties of enlarged maps are decided by the last bit: the case asks for 99 %.
    assert (got == case.out["labels"]).mean() >= 0.99
    case.close("labels", case.out["labels"])


CHECKS = {"metric": _metric, "visualisation": _picture}
