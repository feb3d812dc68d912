"""Every command line of the system's document, as a recipe of a config here."""

import pathlib

from vitssl.run import experiment

CONFIGS = pathlib.Path(__file__).parents[3] / "configs"
FILES = {
    "pretrain": "localmim",
    "finetune": "finetune_vit",
    "linear_probe": "linprobe_vit",
    "knn": "knn",
}


def _read(row, data=("data.source=fake",)):
    spec = f"{CONFIGS / FILES[row['kind']]}.py:{row['name']}"
    return experiment.read(experiment.load(spec, [*data, "init.from=somewhere"]))


def _table(case):
    images = case.config["train_images"]
    for row in case.meta["configs"]:
        found = _read(row)
        s, sections = found.settings, found.sections
        if row["kind"] == "knn":
            assert s.evals.knn_k == tuple(row["k"])
            assert s.evals.knn_temperature == (row["temperature"],)
            assert s.evals.features == "cls" and row["feature"] == "cls token"
            assert s.evals.image_size == row["crop"]
            assert s.evals.batch_size == row["batch_per_gpu"]
            assert s.epochs == 0
            continue
        batch = row.get("effective_batch", row["gpus"] * row["batch_per_gpu"])
        assert s.batch_size == batch
        assert found.on(row["gpus"]).settings.accumulate == row["accum_iter"]
        assert s.per_device == row["batch_per_gpu"]
        assert s.epochs == row["epochs"]
        assert s.optim.warmup_epochs == row["warmup_epochs"]
        assert s.optim.min_lr == row["min_lr"]
        assert s.optim.wd == row["weight_decay"]
        scale = batch / s.optim.lr_batch if s.optim.lr_batch else 1.0
        assert abs(s.optim.lr * scale / row["lr"] - 1) < 1e-9
        if "optimizer_steps_per_epoch" in row:
            assert images // batch == row["optimizer_steps_per_epoch"]
        {"pretrain": _pretrain, "finetune": _finetune}.get(
            row["kind"], lambda *_: None
        )(row, s, sections)


def _pretrain(row, s, sections):
    assert sections["masking"].ratio == row["mask_ratio"]
    assert sections["target"].nbins == row["hog_nbins"]
    assert [s.optim.b1, s.optim.b2] == row.get("betas", [0.9, 0.95])
    stages = sections["stages"]
    assert stages.weighting == row["stage_weights"]
    assert (stages.count == 12) == row["all_stages"]
    freeze = row["freeze"]
    if freeze is None:
        assert s.freeze.schedule == "none"
        return
    assert s.freeze.schedule == freeze["how_scale"]
    assert s.freeze.t_0 == freeze["t_0"]
    assert s.freeze.layerwise_lr == freeze["layerwise_lr"]
    assert s.freeze.patch_embed == freeze["freeze_patch_embed"]
    if freeze["layerwise_lr"]:  # Without, scaling has no effect.
        assert s.freeze.scale_lr == freeze["scale_lr"]


def _finetune(row, s, sections):
    assert sections["model"].drop_path == row["drop_path"]
    assert sections["augment"].erase == row["reprob"]
    assert sections["augment"].randaugment == row["aa"]
    assert sections["mix"].mixup == row["mixup"]
    assert sections["mix"].cutmix == row["cutmix"]
    assert sections["objective"].smoothing == row["smoothing"]
    assert (sections["head"].pool == "gap") == row["global_pool"]
    assert s.optim.clip_norm == (row["clip_grad"] or 0.0)
    assert s.optim.layer_decay == row["layer_decay"]
    assert s.optim.lr_rules == ((".*", 1.0),)


CHECKS = {"configuration table": _table}
