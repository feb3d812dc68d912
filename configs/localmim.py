r"""LocalMIM with FreezeOut: masked HOG at four scales, early layers frozen first.

    python -m vitssl.main --config=configs/localmim.py

Arguments (`--config=configs/localmim.py:NAME`):
    (none)          demo: real handwritten digits, freezing on, minutes on two cores
    smoke           two steps, seconds
    evidence        accuracy against compute for no freezing, four schedules and
                    a shorter run, three seeds, an hour on two cores
    localmim_vitb_1600, localmim_vitb_100_{1,4,8}gpu
                    the baseline recipes on ImageNet; need --config.data.root=DIR
    freeze_*        ViT-B/16 with FreezeOut, see RECIPES
    vits, vitl, vith14
                    other sizes of the baseline
    debug           nine epochs at a batch of 256

The recipes name the machines that the original ran on. The number of devices does not
matter here: `batch_size` is global, and the micro-batches of a step follow from the
images that a device takes at a time, --config.per_device=N.

One override away:
    --config.freeze.schedule=cubic --config.freeze.t_0=0.65
    --config.freeze.layerwise_lr=False          (flat rate, layers still freeze)
    --config.freeze.scale_lr=False
    --config.freeze.patch_embed=False           (never freezes)
    --config.freeze.cls_token=False             (as the original: it never freezes)
    --config.stages.weighting=n_minus_k         (4 3 2 1; one_over_k; ...)
    --config.stages.targets="('pixel',)"
    --config.masking.ratio=0.9
    --config.prefix.boundary=4                  (four blocks see all tokens once frozen)
    --config.optim.schedule=constant
    --config.optim.wd=1e-5                      (what the published freeze runs had)
    --config.epochs=60 --config.optim.stretch=1.6667   (stop a schedule of 100 at 60)

Published: 100 epochs of ViT-B, fine-tuned: 83.24 % without freezing, 82.53 % with cubic
0.8 scaled, 82.85 % unscaled (weight decay 1e-5 by accident in all freeze runs).
"""

import ml_collections

RGB = dict(channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SIZES = {  # name: width, depth, heads, patch
    "s": (384, 12, 6, 16),
    "b": (768, 12, 12, 16),
    "l": (1024, 24, 16, 16),
    "h": (1280, 32, 16, 14),
}
# Scanned digits with random place, size and clutter: raw pixels do not solve them.
SCENES = dict(
    size=24,
    count=0,
    fragments=1,
    shapes=0,
    scale_min=0.6,
    scale_max=0.85,
    contrast=0.5,
    noise=4,
)


def _demo():
    """Return the demo: every section, at the size of two cores."""
    c = ml_collections.ConfigDict()
    c.method, c.seed = "localmim", 0
    c.batch_size, c.epochs, c.steps, c.accumulate = 64, 60.0, 0, 1
    c.precision = "float32"
    c.data = dict(
        source="digits",
        root="",
        split="train",
        bank_split="train",
        test_split="test",
        channels=1,
        mean=(0.5,),
        std=(0.5,),
        on_bad_image="skip",
        threads=-1,
        workers=-1,
        options={},
    )
    c.model = dict(
        name="vit",
        width=64,
        depth=7,
        heads=4,
        patch=4,
        image_size=0,  # That of training.
        mlp_ratio=4.0,
        drop_path=0.0,
        positions="sincos",
        remat=False,
    )
    c.decoder = dict(width=32, depth=1, heads=4, mlp_ratio=4.0)
    c.stages = dict(
        blocks=(),
        scales=(2.0, 1.0, 1.0, 0.5),
        targets=("hog",),
        weighting="uniform",
        weights=(),
        curriculum=(),
        by_remaining=False,
        moves=(),
    )
    c.masking = dict(ratio=0.75, schedule=(), distance=0.0)
    c.prefix = dict(boundary=0, store="")
    c.target = dict(nbins=9, hog_bias=False, normalise_pixels=True)
    c.augment = dict(size=24, scale=(0.5, 1.0), flip=0.0, interpolation="fast")
    c.freeze = dict(
        schedule="cubic",
        t_0=0.7,
        layerwise_lr=True,
        scale_lr=True,
        warmup_to_layer_lr=False,
        layers=(),
        patch_embed=True,
        cls_token=True,
    )
    c.optim = dict(
        name="adamw",
        lr=2e-3,
        lr_batch=0,
        schedule="cosine",
        warmup_epochs=6.0,
        start_lr=0.0,
        min_lr=1e-6,
        stretch=1.0,
        wd=0.05,
        clip_norm=0.0,
        b1=0.9,
        b2=0.95,
        lr_rules=((".*", 1.0),),
        # Vectors do not decay; class and mask tokens, which are matrices, do.
        wd_rules=((".*/(bias|scale)", 0.0), (".*", 1.0)),
    )
    c.evals = dict(
        image_size=0,  # That of training.
        batch_size=256,
        every_epochs=20,
        online_samples_train=1000,
        online_samples_test=360,
        final=("knn", "linear", "quality"),
        knn_k=(10, 20, 100, 200),
        knn_temperature=(0.07,),
        probe="lbfgs",
        probe_epochs=90,
        features="pooled",
    )
    c.log = dict(
        every_steps=100,
        tensorboard=True,
        wandb="",
        pictures=True,
        stall_seconds=1800.0,
    )
    c.checkpoint = dict(every_epochs=20.0, keep_last=2, keep_best=0, best="knn/top1")
    return c


def _pretrain(size="b", epochs=100.0, micro=256, batch=2048, blr=2e-4):
    """Return a recipe of the original on ImageNet-1k at 224 px."""
    width, depth, heads, patch = SIZES[size]
    c = _demo()
    c.precision = "bfloat16"
    c.batch_size, c.epochs = batch, float(epochs)
    c.per_device = micro
    c.data.update(source="imagenet", split="train", bank_split="train", **RGB)
    c.data.test_split = "val"
    c.model.update(width=width, depth=depth, heads=heads, patch=patch)
    c.decoder.update(width=256, depth=1, heads=8)
    c.stages.scales = (4.0, 2.0, 1.0, 0.5)
    c.augment.update(size=224, scale=(0.2, 1.0), flip=0.5, interpolation="bicubic")
    c.optim.update(lr=blr, lr_batch=256, warmup_epochs=40.0 if epochs > 100 else 10.0)
    c.freeze.schedule = "none"
    c.evals.update(every_epochs=10, features="cls")
    c.checkpoint.update(every_epochs=5.0, keep_every_epochs=10.0)
    return c


def _freeze(t_0=0.8, schedule="cubic", micro=256, **freeze):
    """Return the 100-epoch recipe with FreezeOut."""
    c = _pretrain(micro=micro)
    c.freeze.update(schedule=schedule, t_0=t_0, **freeze)
    return c


def _every_layer(c):
    """Return the recipe with a decoder at each of the twelve blocks."""
    c.stages.blocks = tuple(range(12))
    c.stages.scales = (8.0, 4.0, 4.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 0.5)
    return c


def _weighted(c, weighting):
    c.stages.weighting = weighting
    return c


def _vitl():
    """Return LocalMIM's ViT-L recipe: 18 bins with a bias, 800 epochs."""
    c = _pretrain("l", 800.0, micro=128, batch=4096, blr=1.5e-4)
    c.target.update(nbins=18, hog_bias=True)
    c.model.remat = True
    return c


def _vith14():
    """Return ViT-H/14, which the original cannot run; 14 px leave cells of 7 and 14."""
    c = _pretrain("h", 800.0, micro=64, blr=1.5e-4)
    c.stages.scales = (2.0, 2.0, 1.0, 0.5)
    c.model.remat = True
    return c


def _debug():
    c = _freeze(micro=32)
    c.batch_size, c.epochs, c.optim.warmup_epochs = 256, 9.0, 1.0
    return c


def _evidence():
    """Return accuracy against compute: no freezing, four schedules, a shorter run."""
    c = _evidence_run()
    c.study = dict(
        seeds=(0, 1, 2),
        arms=dict(
            none=("freeze.schedule=none",),
            # As cheap as cubic08, by stopping earlier: what freezing has to beat.
            none_shorter=("freeze.schedule=none", "epochs=8.47"),
            cubic08=("freeze.schedule=cubic", "freeze.t_0=0.8"),
            cubic08_unscaled=(
                "freeze.schedule=cubic",
                "freeze.t_0=0.8",
                "freeze.scale_lr=False",
            ),
            cubic065=("freeze.schedule=cubic", "freeze.t_0=0.65"),
            linear05=("freeze.schedule=linear", "freeze.t_0=0.5"),
        ),
        columns=(
            "final/trained/linear/top1",
            "final/trained/knn/top1",
            "final/untrained/linear/top1",
            "final/untrained/knn/top1",
            "final/raw_pixels/linear/top1",
            "compute/tflop",
        ),
    )
    return c


def _evidence_run():
    """Return one run of `evidence`."""
    c = _demo()
    c.epochs = 10.0
    c.data.update(source="scenes", mean=(0.4,), std=(0.3,))
    c.data.options = SCENES
    c.optim.warmup_epochs = 1.0
    c.evals.update(every_epochs=0, final=("knn", "linear"), knn_k=(20,))
    c.log.update(every_steps=200, pictures=False)
    c.checkpoint.every_epochs = 5.0
    return c


def _smoke():
    c = _demo()
    c.steps, c.batch_size, c.optim.warmup_epochs = 2, 16, 0.0
    c.model.width, c.decoder.width = 32, 16
    c.freeze.t_0 = 0.5
    c.log.update(every_steps=1, pictures=False)
    return c


RECIPES = {
    "": _demo,
    "smoke": _smoke,
    "evidence": _evidence,
    "evidence_run": _evidence_run,
    "localmim_vitb_1600": lambda: _pretrain(epochs=1600.0),
    "localmim_vitb_100_8gpu": _pretrain,
    "localmim_vitb_100_4gpu": _pretrain,
    "localmim_vitb_100_1gpu": _pretrain,
    "freeze_cubic085_4gpu": lambda: _freeze(0.85),
    "freeze_cubic080_8gpu": _freeze,
    "freeze_cubic080_1gpu_save5": _freeze,
    "freeze_cubic080_flat_1234loss_1gpu": lambda: _weighted(
        _freeze(layerwise_lr=False), "n_minus_k"
    ),
    "freeze_cubic080_flat_allstages_1overk_1gpu": lambda: _weighted(
        _every_layer(_freeze(layerwise_lr=False)), "one_over_k"
    ),
    "freeze_cubic080_flat_allstages_1gpu": lambda: _every_layer(
        _freeze(layerwise_lr=False)
    ),
    "freeze_cubic080_flat_dont_freeze_pe_2gpu": lambda: _freeze(
        micro=512, layerwise_lr=False, patch_embed=False
    ),
    "freeze_cubic080_not_scale_lr_1gpu": lambda: _freeze(scale_lr=False),
    "freeze_cubic065_1gpu": lambda: _freeze(0.65),
    "freeze_cubic070_1gpu": lambda: _freeze(0.7),
    "freeze_cubic075_1gpu": lambda: _freeze(0.75),
    "freeze_cubic090_1gpu": lambda: _freeze(0.9),
    "freeze_linear050_4gpu": lambda: _freeze(0.5, "linear"),
    "freeze_squared070_1gpu": lambda: _freeze(0.7, "squared"),
    "vits": lambda: _pretrain("s"),
    "vitl": _vitl,
    "vith14": _vith14,
    "debug": _debug,
}


def get_config(name=""):
    """Return the recipe `name`."""
    if name not in RECIPES:
        known = ", ".join(k for k in RECIPES if k)
        raise ValueError(f"no recipe {name!r}; there is: (none), {known}")
    return RECIPES[name]()
