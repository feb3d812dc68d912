"""iFAM's readers and image transforms."""

import pathlib
import tempfile

import cv2
import numpy as np

from tests.golden import reading
from tests.layouts import radiographs
from vitssl.data import sources
from vitssl.methods.parts import measures, views


def _uint8(x):
    return np.round(np.asarray(x)).astype(np.uint8)


def _write(root, files, sizes=None):
    """Write the text files of a case, and a grey image where one is named."""
    for name, text in files.items():
        path = pathlib.Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name, size in (sizes or {}).items():
        path = pathlib.Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((*size, 3), 128, np.uint8))


def _names(source):
    root = source.root + "/"
    return [source.path(i).removeprefix(root) for i in range(len(source))]


def _cub(case):
    c, want = case.config, case.meta["expected"]
    with tempfile.TemporaryDirectory() as root:
        sizes = {f"images/{k}": v for k, v in c["image_sizes_hw"].items()}
        _write(root, c["files"], sizes)
        for name, expected in want.items():
            split, _, ratio = name.partition("_ratio_")
            share = float(ratio or 1.0)
            source = sources.open("cub", root, split, train_share=share, labels="split")
            assert _names(source) == expected["filenames"]
            if "labels" in expected:
                assert source.labels.tolist() == expected["labels"]
            if "num_classes" in expected:
                assert len(source.classes) == expected["num_classes"]
        reader = c["parts_reader"]
        source = sources.open("cub", root, reader["split"])
        crops = "crop" if reader.get("center_crop", True) else "warp"
        spec = views.Augment(reader["resize"], evaluation=crops)
        view = views.Evaluation(spec, reader["resize"])
        rows = [view(source[i]) for i in range(len(source))]
    # The original puts the number of the keypoint, or of the image, in front.
    ids = np.arange(1, rows[0]["keypoints"].shape[0] + 1)
    parts = np.stack([np.column_stack([ids, r["keypoints"]]) for r in rows])
    boxes = np.stack([r["box"] for r in rows])
    case.close("parts", parts)
    case.close("boxes", np.column_stack([case.out["boxes"][:, 0], boxes]))


def _waterbirds(case):
    with tempfile.TemporaryDirectory() as root:
        _write(root, case.config["files"])
        for split, expected in case.meta["expected"].items():
            source = sources.open("waterbirds", root, split)
            assert _names(source) == expected["filenames"]
            assert source.labels.tolist() == expected["labels"]
            places = source.columns["group"] - 2 * source.labels
            assert places.tolist() == expected["places"]


def _siim(case):
    expected, files = case.meta["expected"], case.config["files"]
    pixels = np.arange(expected["pixel_max"] + 1, dtype=np.uint8).reshape(8, -1)
    sums = dict(zip(expected["order"], expected["mask_sum"], strict=True))
    with tempfile.TemporaryDirectory() as root:
        base = pathlib.Path(root)
        for name in files:
            path = base / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(radiographs.dicom(pixels))
            mask = np.zeros(pixels.shape, np.uint8)
            mask.ravel()[: sums[name]] = 255
            (base / "all_masks").mkdir(exist_ok=True)
            cv2.imwrite(str(base / "all_masks" / f"{path.stem}.png"), mask)
        source = sources.open("siim_acr", root, "train", masks=True)
        assert _names(source) == expected["order"]
        assert source.labels.tolist() == expected["labels"]
        rows = [source[i] for i in range(len(source))]
    assert [int(r["mask"].sum()) for r in rows] == expected["mask_sum"]
    assert max(int(r["image"].max()) for r in rows) == expected["pixel_max"]
    np.testing.assert_array_equal(rows[0]["image"][..., 0], pixels)


def _dataset(case):
    name = case.meta["case"].removeprefix("dataset_")
    {"cub": _cub, "waterbirds": _waterbirds, "siim_acr": _siim}[name](case)


def _crop(case):
    frame = {
        "image": np.zeros((*case.config["input"], 1), np.uint8),
        "keypoints": case.inputs["parts"][:, 1:],
        "box": case.inputs["box"][1:],
    }
    got = views.centre_crop(frame, case.config["crop"])
    ids = case.inputs["parts"][:, :1]
    case.close("parts", np.column_stack([ids, got["keypoints"]]))
    case.close("box", np.append(case.inputs["box"][:1], got["box"]))


def _planckian(case):
    reading.agree(case.config, num_illuminants=len(views.ILLUMINANTS))
    np.testing.assert_allclose(views.ILLUMINANTS, case.inputs["table"], atol=1e-6)
    image = _uint8(case.inputs["image"])
    for i, index in enumerate(case.inputs["index"].astype(int)):
        case.close(f"out{i}", views.relight(image, index).astype(np.float64))


def _affine(case):
    image = _uint8(case.inputs["image"])
    for i, p in enumerate(case.config["params"]):
        got = views.affine({"image": image}, p["angle"], p["translate"], p["scale"])[
            "image"
        ]
        # Points half way between two pixels fall to either side.
        assert (got == case.out[f"out{i}"]).all(-1).mean() >= 0.97
        case.close(f"out{i}", got.astype(np.float64))


def _runs(case):
    """Masks of the competition: "start length start length ...".

    Starts count from the end of the run before; pixels run down the columns, which the
    original reads along the rows.
    """
    c = case.config
    height, width = c["height"], c["width"]
    flat, at = np.zeros(height * width), 0
    numbers = [int(v) for v in c["rle"].split() if c["rle"].strip() != "-1"]
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        at += start
        flat[at : at + length] = 255
        at += length
    case.close("mask", flat.reshape(width, height).T)
    case.close("mask_as_shipped", flat.reshape(height, width))


def _transform(case):
    """Evaluation transforms; channels first and normalised in the case."""
    c = case.config
    size = c["image_size"]
    grey = isinstance(c.get("mean"), float)
    reading.agree(c, crop_pct=0.875)
    spec = views.Augment(
        size,
        "siim_acr" if grey else "cub_original",
        evaluation="timm" if "crop_pct" in c else "crop",
    )
    mean = np.array(c.get("mean", (0.485, 0.456, 0.406)))
    std = np.array(c.get("std", (0.229, 0.224, 0.225)))
    for name in [k for k in case.inputs if k.startswith("image")]:
        image = _uint8(case.inputs[name])
        example = {}
        if "mask" in case.out:
            # The case's own mask is its bright half; it is not stored.
            example["mask"] = (image > 128).astype(np.uint8)
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=-1)
        example["image"] = image
        got = views.Evaluation(spec, size)(example)
        pixels = (got["image"] / 255 - mean) / std
        out = "image" if name == "image" else name.replace("image", "out")
        case.close(out, pixels.transpose(2, 0, 1))
        if "mask" in case.out:
            case.close("mask", got["mask"].astype(float))


def _data(case):
    inputs, c = case.inputs, case.config
    if "box" in inputs:
        _crop(case)
    elif "table" in inputs:
        _planckian(case)
    elif "params" in c:
        _affine(case)
    elif "rle" in c:
        _runs(case)
    elif "size" in c:
        mask = measures.nearest(inputs["mask"][:, 0], tuple(c["size"]))
        case.close("mask", mask[:, None])
    else:
        _transform(case)


CHECKS = {"dataset": _dataset, "data": _data}
