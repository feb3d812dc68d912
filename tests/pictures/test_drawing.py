import json

import numpy as np
from PIL import Image

from vitssl.methods.hjepa import masks
from vitssl.pictures import drawing


def material(tmp_path):
    """Return material for every picture, of tiny arrays."""
    rng = np.random.default_rng(0)
    spec = masks.Masking(
        strategy="global_with_local_context",
        sampler="original",
        num_hierarchies=2,
        num_target_masks=2,
        scale_progression="geometric",
        base_scale=(0.1, 0.2),
        aspect_ratio_range=(0.75, 1.5),
        max_attempts=10,
        min_keep=2,
        targets_per_level="constant",
        levels="per_level",
        mode="drop",
    )
    found = [masks.multicrop(rng, spec, (4, 4), (2, 2), (2, 2)) for _ in range(2)]
    batch = {k: np.stack([f[k] for f in found]) for k in found[0]}
    batch["global"] = rng.integers(0, 256, (2, 2, 16, 16, 3), np.uint8)
    batch["local"] = rng.integers(0, 256, (2, 2, 8, 8, 3), np.uint8)
    draws = masks.hierarchical(rng, spec, (4, 4), 20)
    attention = rng.random((2, 3, 2, 17, 17))
    lines = [
        {"step": s, "loss": 1 / s, "loss_h0": 1 / s, "grad_norm": 1.0, "momentum": 0.99}
        for s in range(1, 9)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokens = rng.normal(size=(2, 16, 5))
    return drawing.Material(
        images=rng.integers(0, 256, (2, 16, 16, 3), np.uint8),
        attention=attention / attention.sum(-1, keepdims=True),
        tokens=tokens,
        batch=batch,
        crop_masks=(draws[0][0], draws[1][0]),
        draws=draws,
        samplers={"original": (draws[0][0, 0], draws[1][0, 0])},
        prediction=(
            np.zeros((2, 16, 16, 3), np.uint8),
            [tokens],
            [tokens + 1],
            [np.ones((2, 16), bool)],
        ),
        reconstruction=(
            np.zeros((2, 16, 16, 3), np.uint8),
            rng.random((2, 4, 4)) < 0.75,
            {"stage 0: hog": {"hog": rng.random((2, 2, 8, 8, 9))}},
        ),
        features={"trained": rng.normal(size=(20, 6))},
        labels=np.arange(20) % 3,
        neighbours=dict(
            queries=rng.integers(0, 256, (2, 8, 8, 3), np.uint8),
            bank=rng.integers(0, 256, (6, 8, 8, 3), np.uint8),
            features=(rng.normal(size=(2, 6)), rng.normal(size=(6, 6))),
            labels=(np.arange(2), np.arange(6)),
            total=100,
        ),
        scores={"knn_confusion": np.array([[3, 1], [0, 2]])},
        metrics_path=tmp_path / "metrics.jsonl",
        plane=(np.linspace(-1, 1, 5), rng.random((5, 5))),
    )


def test_every_picture_is_written_and_can_be_read(tmp_path):
    written = drawing.write_all(tmp_path / "out", material(tmp_path))
    assert sorted(written) == sorted((tmp_path / "out").iterdir())
    names = {p.stem for p in written}
    assert names == {
        "attention_heads",
        "attention_layers",
        "attention_patch",
        "confusion",
        "crops",
        "feature_space",
        "features",
        "landscape",
        "masks",
        "masks_animation",
        "masks_combined",
        "masks_multicrop",
        "masks_samplers",
        "masks_single",
        "masks_statistics",
        "neighbours",
        "prediction",
        "prediction_levels",
        "reconstruction",
        "tokens_pca",
        "training",
        "training_gradients",
        "training_levels",
        "training_momentum",
    }
    for path in written:
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 1, path.name
            assert max(image.size) <= 2000, path.name


def test_without_material_nothing_is_written(tmp_path):
    assert drawing.write_all(tmp_path / "out", drawing.Material()) == []
    nothing = drawing.Material(metrics_path=tmp_path / "missing.jsonl")
    assert drawing.write_all(tmp_path / "out", nothing) == []
    assert not (tmp_path / "out").exists()


def test_only_the_pictures_with_material_are_written(tmp_path):
    full = material(tmp_path)
    some = drawing.Material(images=full.images, tokens=full.tokens)
    (path,) = drawing.write_all(tmp_path / "out", some)
    assert path.name == "tokens_pca.png"
