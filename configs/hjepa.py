r"""H-JEPA: predict features of hidden patches, at several levels, from several crops.

    python -m vitssl.main --config=configs/hjepa.py

Arguments (`--config=configs/hjepa.py:NAME`):
    (none)          demo: drawn leaves in seven conditions, a small ViT, one large and
                    two small crops, minutes on two cores
    digits          scanned digits, large crops alone
    scenes          composed scenes, 2 + 6 crops: a world where nothing learns, labels
                    or not, and why a study needs a gate
    smoke           two steps, seconds
    evidence        small crops against none, other view terms, masks and methods, at
                    equal compute, three seeds, drawn leaves, an hour on two cores
    evidence_rates  the search of its rates, in another world
    evidence_run    one run of it: the demo with more test images
    rival_dino, rival_mae, rival_localmim, rival_simclr, rival_labels
                    its other methods, with the same network
    cifar10_vitb, cifar10_vits, cifar10_vitti
                    the system's flagship: ViT-B/16, CIFAR-10 at 224 px, and smaller
                    ones; need --config.data.root=DIR
    imagenet_vitb, imagenet_vitl, imagenet_vits, imagenet_vitti, ijepa_vith14
                    ImageNet recipes; need --config.data.root=DIR
    folder          your own folder of images (data.root), labels or none: ViT-Ti/8 at
                    96 px, half as deep
    continue        the same from trained weights of a ViT-B/16 at 224 px (init.from,
                    such as timm/vit_base_patch16_224.dino)
                    and low rates
    end_to_end      no EMA target, SIGReg instead; demo size
    birds           drawn birds at 48 px, for configs/parts.py:evidence

One override away:
    --config.masking.strategy=cross_crop_prediction
    --config.multicrop.num_local_crops=0            (single resolution)
    --config.multicrop.local_crop_size=18
    --config.objective.type=combined --config.accumulate=4  (VICReg of the whole batch)
    --config.multicrop.adaptive=True --config.multicrop.max_local_crops=10
    --config.objective.weights='(1.0, 0.0, 0.0)'    (the finest level alone)

The demo, 1,980 steps, seed 0, 420 test images: k-NN 52.6, linear probe 78.6 %;
untrained 19.3, 26.0; raw pixels 42.4, 69.0; tokens in place 59.0, untrained
33.8 (k-NN). Cut to 13 epochs (--config.epochs=13 --config.optim.warmup_epochs=1), 858
steps, seed 0: k-NN 43.3, linear probe 76.4 %; untrained 19.3, 26.0; raw pixels 42.4,
69.3; pixels averaged over patches 16.2, 20.7. Cut to 9 epochs: 38.8, 72.9. One crop of
the same compute as that (--config.epochs=13 --config.multicrop.num_local_crops=0
--config.objective.view_weight=0), 858 steps: 35.7, 63.1.

Published results: none (the original reports targets only).
"""

from vitssl import config

base = config.beside(__file__, "base")

PREDICTOR_DEPTH = {"ti": 4, "s": 6, "b": 6, "l": 6, "h": 12}  # By size of the ViT.


# Epochs of the arms of `evidence`: 4 TFLOP each, by XLA's count of a step.
LENGTHS = dict(
    multi=11.3,
    two_large=6.5,
    single=15.6,
    centred=10.1,
    plain=10.1,
    small_blocks=12.1,
    no_target=8.1,
    dino=6.4,
    mae=51.3,
    localmim=36.2,
    simclr=10.1,
    labels=20.2,
)
RIVALS = ("dino", "mae", "localmim", "simclr", "labels")


def _demo():
    """Return the demo: drawn leaves, a large crop and two small ones that join in."""
    c = _digits()
    c.epochs = 30.0
    c.data = base.data("leaves", **base.LEAVES)
    c.model.update(patch=6, positions="sincos")
    c.masking.update(base_scale=(0.15, 0.2), context_scale=(0.85, 1.0))
    c.multicrop.update(
        base.crops(
            48,
            24,
            num_global_crops=1,
            num_local_crops=2,
            global_crop_scale=(0.3, 1.0),
            local_crop_scale=(0.1, 0.4),
            color_jitter_prob=1.0,
        )
    )
    # Of the loss, the term between crops is 45 %.
    c.objective.update(view_target="lejepa", view_weight=0.1)
    c.evals.update(batch_size=210, in_place=True, scales=(0.5, 0.71, 1.4))
    return c


def _digits():
    """Return the smallest recipe: scanned digits, large crops alone."""
    c = base.run("hjepa", batch_size=32, epochs=45.0)
    c.data = base.data("digits")
    c.model = base.vit(width=64, depth=4, heads=4, patch=4)
    c.predictor = dict(depth=2, heads=4)
    c.levels = dict(pooling="spatial", target="ema")
    c.masking = dict(
        strategy="global_only",
        sampler="original",
        num_hierarchies=3,
        num_target_masks=4,
        scale_progression="geometric",
        base_scale=(0.05, 0.15),
        aspect_ratio_range=(0.75, 1.5),
        max_attempts=10,
        min_keep=4,
        targets_per_level="constant",
        levels="finest",
        mode="drop",
    )
    c.multicrop = base.crops(
        24,
        12,
        global_crop_scale=(0.6, 1.0),
        local_crop_scale=(0.2, 0.6),
        global_color_jitter=0.0,
        local_color_jitter=0.0,
        color_jitter_prob=1.0,
        horizontal_flip_prob=0.0,
        min_local_crops=2,
        max_local_crops=10,
    )
    c.objective = dict(type="mse", normalize=False, weights=(1.0, 0.5, 0.25))
    c.ema = dict(start=0.9, end=0.999)
    # I-JEPA's rule: biases and vectors do not decay.
    rules = base.decaying_but(".*/(bias|scale|ls1|ls2)")
    c.optim = base.adamw(3e-3, 2.0, min_lr=1e-6, clip_norm=3.0, b2=0.95, wd_rules=rules)
    c.evals = base.evals(
        9,
        online_samples_train=1000,
        online_samples_test=360,
        final=("knn", "linear", "quality"),
    )
    c.log = dict(every_steps=100, pictures=True)
    c.checkpoint = dict(every_epochs=9.0, keep_best=1)
    return c


def _published(size, data, image=224, patch=16):
    """Return the original's numbers for a ViT of `size` on 224 px images.

    But for the number of target blocks, which shrinks with the level: four large ones
    find no room, and the original's coarse levels fall back to its smallest blocks.
    """
    c = _digits()
    c.precision = "bfloat16"
    c.data.update(source=data, test_split="val", **base.RGB)
    c.model.update(patch=patch, **base.VIT[size])
    c.predictor.update(depth=PREDICTOR_DEPTH[size], heads=c.model.heads)
    c.masking.update(levels="per_level", targets_per_level="shrink")
    c.levels.target = "shared"
    c.multicrop.update(
        num_local_crops=6,
        global_crop_size=image,
        local_crop_size=96 // patch * patch,
        global_crop_scale=(0.4, 1.0),
        local_crop_scale=(0.05, 0.4),
        global_color_jitter=0.4,
        local_color_jitter=0.4,
        horizontal_flip_prob=0.5,
        interpolation="bicubic",
        adaptive_warmup_epochs=30,
    )
    c.ema.update(start=0.996, end=1.0, warmup_steps=1000)
    c.evals.every_epochs = 10
    c.checkpoint.update(every_epochs=10.0, keep_best=3)
    return c


def _cifar10(size):
    c = _published(size, "cifar10")
    c.seed, c.batch_size, c.epochs = 42, 64, 100.0
    c.data.test_split = "test"
    # The recipe decays every parameter.
    c.optim.update(lr=1e-4, warmup_epochs=10.0, wd_rules=((".*", 1.0),))
    c.multicrop.update(global_crop_scale=(0.6, 1.0), local_crop_scale=(0.2, 0.6))
    return c


def _imagenet(size):
    c = _published(size, "imagenet")
    c.seed, c.batch_size, c.epochs = 42, 128, 300.0
    c.masking.base_scale = (0.15, 0.2)
    c.optim.update(lr=1.5e-4, warmup_epochs=40.0)
    c.model.remat = size == "l"
    return c


def _ijepa_vith14():
    """Return I-JEPA's recipe (arXiv:2301.08243, appendix A): one crop, one level."""
    c = _published("h", "imagenet", patch=14)
    c.batch_size, c.epochs = 2048, 300.0
    c.model.update(remat=True, positions="sincos", cls=False)
    c.predictor.update(width=384, positions="sincos")
    c.masking.update(
        sampler="ijepa",
        num_hierarchies=1,
        base_scale=(0.15, 0.2),
        context_scale=(0.85, 1.0),
        min_keep=10,
        levels="finest",
        targets_per_level="constant",
        together=False,
    )
    c.levels.norm = "targets"
    c.multicrop.update(
        num_global_crops=1,
        num_local_crops=0,
        global_crop_scale=(0.3, 1.0),
        global_color_jitter=0.0,
        horizontal_flip_prob=0.0,
    )
    c.objective.update(type="smoothl1", weights=(1.0,), view_weight=0.0)
    c.ema.warmup_steps = 0
    c.optim.update(
        lr=1e-3,
        start_lr=2e-4,
        warmup_epochs=40.0,
        stretch=1.25,
        wd=0.04,
        wd_end=0.4,
        wd_schedule="cosine",
        b2=0.999,
        clip_norm=0.0,
    )
    return c


def _folder():
    c = base.folder(_digits(), epochs=100.0)
    c.batch_size = 64
    c.model.update(**base.VIT["ti"] | dict(depth=6, patch=8))
    c.predictor.update(depth=3, heads=3)
    c.multicrop.update(
        num_local_crops=2,
        global_crop_size=96,
        local_crop_size=48,
        global_crop_scale=(0.4, 1.0),
        local_crop_scale=(0.1, 0.4),
        global_color_jitter=0.4,
        local_color_jitter=0.4,
        horizontal_flip_prob=0.5,
    )
    c.ema.update(start=0.99, end=1.0)
    c.optim.update(lr=1e-3, warmup_epochs=5.0)
    return c


def _continue():
    """Return what goes on from a ViT-B/16; the target is as slow as at the end."""
    c = base.continued(_folder(), lr=2e-4)
    c.init["weights"] = "timm/vit_base_patch16_224.dino"
    c.precision, c.epochs = "bfloat16", 30.0
    c.model.update(patch=16, positions="learned_sincos", **base.VIT["b"])
    c.predictor.update(depth=6, heads=12, width=384)
    c.multicrop.update(global_crop_size=224, local_crop_size=96)
    c.ema.start = 0.999
    return c


def _end_to_end():
    c = _digits()
    c.ema.target_encoder, c.levels.target = False, "shared"
    c.objective.type = "hjepa_sigreg"
    return c


def _arms():
    """Return the arms of `evidence`, all of the same compute."""
    view = "objective.view_target"
    arms = dict(
        multi=(),
        two_large=("multicrop.num_global_crops=2",),
        single=("multicrop.num_local_crops=0", "objective.view_weight=0.0"),
        centred=(f"{view}=centred", "objective.view_weight=0.05"),
        plain=(f"{view}=plain", "objective.view_weight=0.25"),
        small_blocks=(
            "masking.base_scale=(0.05, 0.15)",
            "masking.context_scale=(0.0, 0.0)",
        ),
        no_target=("ema.target_encoder=False", "levels.target=shared"),
    )
    arms |= {arm: (f"configs/hjepa.py:rival_{arm}",) for arm in RIVALS}
    return {arm: (*own, f"epochs={LENGTHS[arm]}") for arm, own in arms.items()}


def _evidence():
    """Return who learns most from leaves without labels, at equal compute.

    `labels` is the gate: the same network with labels must get far above the pixels.
    Rates are the demos': what `evidence_rates` found better in one run (no_target at
    1.5e-3, simclr at 4e-3, labels at 2e-3) was not surely better on these seeds.
    """
    c = _evidence_run()
    knn, linear = (f"final/trained/{metric}/top1" for metric in ("knn", "linear"))
    c.study = dict(
        seeds=(0, 1, 2),
        seeded=("data.options.seed",),
        arms=_arms(),
        columns=(
            linear,
            knn,
            "final/trained/knn/standardised_top1",
            "final/trained_in_place/knn/standardised_top1",
            "final/untrained/linear/top1",
            "final/untrained/knn/top1",
            "final/raw_pixels/linear/top1",
            "final/raw_pixels/knn/top1",
            "final/averaged_pixels/linear/top1",
            "compute/tflop",
        ),
        gate=(("labels", linear), ("labels", "final/raw_pixels/linear/top1"), 0.1),
        claims=dict(
            more_crops=(("multi", linear), ("single", linear), 0.03),
            crops_that_agree=(("multi", linear), ("plain", linear), 0.03),
            two_large_crops=(("two_large", linear), ("multi", linear), 0.03),
            lejepa_for_centring=(("multi", linear), ("centred", linear), 0.03),
            larger_blocks=(("multi", linear), ("small_blocks", linear), 0.03),
            sigreg_for_ema=(("no_target", linear), ("multi", linear), 0.03),
            learns=(("multi", knn), ("multi", "final/untrained/knn/top1"), 0.15),
            beats_pixels=(("multi", knn), ("multi", "final/raw_pixels/knn/top1"), 0.03),
            ahead_of_dino=(("multi", linear), ("dino", linear), 0.03),
            ahead_of_mae=(("multi", linear), ("mae", linear), 0.03),
            ahead_of_localmim=(("multi", linear), ("localmim", linear), 0.03),
            ahead_of_simclr=(("multi", linear), ("simclr", linear), 0.03),
        ),
    )
    return c


def _evidence_rates():
    """Return the search of the learning rates for `evidence`, in another world."""
    c = _evidence_run()
    c.evals.update(in_place=False, baselines=())
    whole, arms = _arms(), {}
    for arm in ("multi", "single", "no_target", *RIVALS):
        rate = (RECIPES[f"rival_{arm}"]() if arm in RIVALS else c).optim.lr
        for name, factor in (("half", 0.5), ("own", 1.0), ("double", 2.0)):
            arms[f"{arm}_{name}"] = (*whole[arm], f"optim.lr={factor * rate:g}")
    columns = tuple(f"final/trained/{metric}/top1" for metric in ("linear", "knn"))
    seeded = ("data.options.seed",)
    c.study = dict(seeds=(100,), seeded=seeded, arms=arms, columns=columns)
    return c


def _evidence_run():
    """Return one run of `evidence`: the demo with more images to test."""
    return base.leaf_arm(_demo())


def _scenes():
    """Return 2 + 6 crops of composed scenes, where labels teach no ViT of this size."""
    c = _digits()
    c.epochs = 4.0
    options = dict(size=24, count=0, fragments=1, shapes=0, contrast=0.5, noise=4)
    options |= dict(scale_min=0.6, scale_max=0.85)
    c.data = base.data("scenes", mean=(0.4,), std=(0.3,), options=options)
    c.multicrop.update(
        num_local_crops=6, global_crop_scale=(0.4, 1.0), local_crop_scale=(0.1, 0.4)
    )
    c.optim.warmup_epochs = 0.5
    c.evals.every_epochs = 0
    c.log.update(every_steps=200, pictures=False)
    c.checkpoint.update(every_epochs=1.0, keep_best=0)
    return c


def _rival(name, recipe="", **sections):
    """Return the demo of another method as an arm, with this one's network."""
    c = base.leaf_arm(config.beside(__file__, name).get_config(recipe))
    c.optim.warmup_epochs = 1.0
    c.model = _demo().model
    c.freeze = dict(schedule="none")
    for section, keys in sections.items():
        c[section].update(keys)
    return c


def _birds():
    """Return the pre-training that configs/parts.py:evidence starts from."""
    c = _digits()
    c.epochs = 12.0
    c.data = base.data("birds", options=dict(count=0, purity=0.95), **base.RGB)
    c.model = base.bird_vit()
    c.multicrop.update(
        num_global_crops=1,
        global_crop_size=48,
        global_crop_scale=(0.5, 1.0),
        horizontal_flip_prob=0.5,
    )
    c.objective.view_weight = 0.0
    c.evals.update(every_epochs=0, final=("knn", "linear"))
    c.log.pictures = False
    c.checkpoint.update(every_epochs=2.0, keep_best=0)
    return c


def _smoke():
    c = base.smoke(_digits(), 16)
    c.model.update(width=32, depth=2)
    c.predictor.depth = 1
    c.masking.strategy = "cross_crop_prediction"
    c.multicrop.num_local_crops = 2
    return c


RECIPES = {
    "": _demo,
    "digits": _digits,
    "evidence": _evidence,
    "evidence_rates": _evidence_rates,
    "evidence_run": _evidence_run,
    "rival_dino": lambda: _rival("dino"),
    "rival_mae": lambda: _rival("mae"),
    "rival_localmim": lambda: _rival("localmim", stages=dict(blocks=(0, 1, 2, 3))),
    "rival_simclr": lambda: _rival("simclr_hvit", "vit"),
    "rival_labels": lambda: _rival("finetune_vit", "scratch"),
    "smoke": _smoke,
    "scenes": _scenes,
    "birds": _birds,
    "cifar10_vitti": lambda: _cifar10("ti"),
    "cifar10_vits": lambda: _cifar10("s"),
    "cifar10_vitb": lambda: _cifar10("b"),
    "imagenet_vitti": lambda: _imagenet("ti"),
    "imagenet_vits": lambda: _imagenet("s"),
    "imagenet_vitb": lambda: _imagenet("b"),
    "imagenet_vitl": lambda: _imagenet("l"),
    "ijepa_vith14": _ijepa_vith14,
    "folder": _folder,
    "continue": _continue,
    "end_to_end": _end_to_end,
}
get_config = base.recipes(RECIPES)
