r"""LocalMIM with FreezeOut: masked HOG at four scales, early layers frozen first.

    python -m vitssl.main --config=configs/localmim.py

Arguments (`--config=configs/localmim.py:NAME`):
    (none)          demo: drawn leaves in seven conditions, freezing on, minutes on
                    two cores
    digits          scanned digits, the smallest
    smoke           two steps, seconds
    evidence        what several targets and freezing are worth, scored by fine-tuning:
                    one target, shorter runs, a flat rate, stored tokens, saved steps
                    reinvested in steps or in larger batches, mask ratios by schedule,
                    decoders dropped, growing depth; an hour on two cores
    evidence_run    one run of it
    localmim_vitb_1600, localmim_vitb_100_{1,4,8}gpu
                    the baseline recipes on ImageNet; need --config.data.root=DIR
    freeze_*        ViT-B/16 with FreezeOut, see RECIPES
    vits, vitl, vith14
                    other sizes of the baseline
    folder          your own folder of images (data.root), labels or none: ViT-Ti/8 at
                    96 px
    continue        the same from trained weights of a ViT-B/16 at 224 px (init.from,
                    such as timm/vit_base_patch16_224.mae)
                    and low rates
    debug           nine epochs at a batch of 256

The recipes name the machines that the original ran on. The number of devices does not
matter here: `batch_size` is global, and the micro-batches of a step follow from the
images that a device takes at a time, --config.per_device=N.

One override away:
    --config.freeze.schedule=cubic --config.freeze.t_0=0.65
    --config.freeze.layerwise_lr=False          (flat rate, layers still freeze)
    --config.freeze.store.views=4               (a frozen prefix is stored, not run)
    --config.freeze.store.fill=pass             (all at once, at the event)
    --config.freeze.grow_batch="(72, 80, 96)"   (images of a step, event by event)
    --config.freeze.grow_depth="((0.0, 4), (0.5, 7))"   (trained blocks are stacked)
    --config.masking.schedule="((0.0, 0.9), (50.0, 0.75))"
    --config.optim.freeze="(('(norm|decoder)_0/.*', 0.6),)"  (a decoder goes, alone)
    --config.freeze.scale_lr=False
    --config.freeze.patch_embed=False           (never freezes)
    --config.freeze.cls_token=False             (as the original: it never freezes)
    --config.stages.weighting=n_minus_k         (4 3 2 1; one_over_k; ...)
    --config.stages.targets="('pixel',)"
    --config.masking.ratio=0.9
    --config.transitive.weight=0.1              (each block learns from the next one)
    --config.prefix.boundary=4                  (four blocks see all tokens once frozen)
    --config.optim.schedule=constant
    --config.optim.wd=1e-5                      (what the published freeze runs had)
    --config.epochs=60 --config.optim.stretch=1.6667   (stop a schedule of 100 at 60)

Published: 100 epochs of ViT-B, fine-tuned: 83.24 % without freezing, 82.53 % with cubic
0.8 scaled, 82.85 % unscaled (weight decay 1e-5 by accident in all freeze runs).
"""

from vitssl import config

base = config.beside(__file__, "base")
EVERY_LAYER = dict(  # A decoder at each of the twelve blocks.
    blocks=tuple(range(12)),
    scales=(8.0, 4.0, 4.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 0.5),
)


def _demo():
    """Return the demo: drawn leaves in seven conditions, freezing on."""
    c = _digits()
    c.data = base.data("leaves", **base.LEAVES)
    c.model.patch = 6
    c.augment.update(base.LEAF_CROPS)
    c.evals.update(every_epochs=15.0, batch_size=210, in_place=True, knn_k=(20,))
    return c


def _digits():
    """Return the smallest recipe: scanned digits."""
    c = base.run("localmim", batch_size=64, epochs=60.0)
    c.data = base.data("digits")
    c.model = base.vit(width=64, depth=7, heads=4, patch=4, positions="sincos")
    c.decoder = dict(width=32, depth=1, heads=4)
    c.stages = dict(scales=(2.0, 1.0, 1.0, 0.5))
    c.augment = dict(size=24, scale=(0.5, 1.0), flip=0.0, interpolation="fast")
    c.freeze = dict(schedule="cubic", t_0=0.7)
    # Vectors do not decay; class and mask tokens, which are matrices, do.
    rules = base.decaying_but(".*/(bias|scale)")
    c.optim = base.adamw(2e-3, 6.0, min_lr=1e-6, b2=0.95, wd_rules=rules)
    c.evals = base.evals(
        20,
        online_samples_train=1000,
        online_samples_test=360,
        final=("knn", "linear", "quality"),
        knn_k=(10, 20, 100, 200),
    )
    c.log = dict(every_steps=100, pictures=True)
    c.checkpoint = dict(every_epochs=20.0)
    return c


def _pretrain(size="b", epochs=100.0, micro=256, batch=2048, blr=2e-4):
    """Return a recipe of the original on ImageNet-1k at 224 px."""
    c = _digits()
    c.precision = "bfloat16"
    c.batch_size, c.epochs, c.per_device = batch, epochs, micro
    c.data.update(source="imagenet", test_split="val", **base.RGB)
    c.model.update(patch=16, **base.VIT[size])
    c.decoder.update(width=256, heads=8)
    c.stages.scales = (4.0, 2.0, 1.0, 0.5)
    c.augment.update(size=224, scale=(0.2, 1.0), flip=0.5, interpolation="bicubic")
    c.optim.update(lr=blr, lr_batch=256, warmup_epochs=40.0 if epochs > 100 else 10.0)
    c.freeze = dict(schedule="none", t_0=0.7)
    c.evals.update(every_epochs=10, features="cls")
    c.checkpoint.update(every_epochs=5.0, keep_every_epochs=10.0)
    return c


def _freeze(t_0=0.8, schedule="cubic", micro=256, keep=10.0, **freeze):
    """Return the 100-epoch recipe with FreezeOut."""
    c = _pretrain(micro=micro)
    c.freeze = dict(schedule=schedule, t_0=t_0, **freeze)
    c.checkpoint.keep_every_epochs = keep
    return c


def _flat(**stages):
    """Return it without rates by layer; the stages may differ."""
    c = _freeze(layerwise_lr=False)
    c.stages.update(stages)
    return c


def _vitl():
    """Return LocalMIM's ViT-L recipe: 18 bins with a bias, 800 epochs."""
    c = _pretrain("l", 800.0, micro=128, batch=4096, blr=1.5e-4)
    c.target = dict(nbins=18, hog_bias=True)
    c.model.remat = True
    return c


def _vith14():
    """Return ViT-H/14, which the original cannot run; 14 px leave cells of 7 and 14."""
    c = _pretrain("h", 800.0, micro=64, blr=1.5e-4)
    c.stages.scales = (2.0, 2.0, 1.0, 0.5)
    c.model.update(patch=14, remat=True)
    return c


def _debug():
    c = _freeze(micro=32)
    c.batch_size, c.epochs, c.optim.warmup_epochs = 256, 9.0, 1.0
    return c


def _folder():
    c = base.folder(_digits(), epochs=200.0)
    c.freeze = dict(schedule="none", t_0=0.7)
    c.model.update(patch=8, **base.VIT["ti"])
    c.decoder.update(width=64)
    c.stages.scales = (4.0, 2.0, 1.0, 0.5)
    c.augment.update(size=96, scale=(0.2, 1.0), flip=0.5)
    c.optim.update(lr=1e-3, warmup_epochs=10.0)
    c.evals.knn_k = (20,)
    return c


def _continue():
    c = base.continued(_folder(), lr=2e-4)
    c.init["weights"] = "timm/vit_base_patch16_224.mae"
    c.precision, c.epochs = "bfloat16", 50.0
    c.model.update(patch=16, positions="learned_sincos", **base.VIT["b"])
    c.decoder.update(width=256, heads=8)
    c.augment.size = 224
    return c


def _evidence():
    """Return accuracy against compute: targets, freezing, and what rivals it.

    Leaves, where labels take this network far above the pixels. Scored by fine-tuning.
    By formula `none_shorter`, `store`, `mask_schedule`, `decoders` and `stacked` cost
    82 % of `none`; where the saving is reinvested, and for `one_target`, 100 %.
    """
    c, epochs = _evidence_run(), 20.0
    c.epochs = epochs
    none, cubic08 = (
        ("freeze.schedule=none",),
        ("freeze.schedule=cubic", "freeze.t_0=0.8"),
    )
    store = (*cubic08, "freeze.store.views=2", "freeze.store.every=2")
    tuned, linear = "then/final/test/top1", "final/trained/linear/top1"
    c.study = dict(
        seeds=(0, 1, 2),
        seeded=("data.options.seed",),
        then=("configs/finetune_vit.py:score",),
        arms=dict(
            # One step that moves nothing.
            untrained=(
                *none,
                "steps=1",
                "optim.warmup_epochs=0.0",
                "optim.lr=1e-9",
                "optim.min_lr=0.0",
            ),
            none=none,
            one_target=(  # MaskFeat's, arXiv:2112.09133: HOG of the last block alone.
                *none,
                "stages.blocks=(6,)",
                "stages.scales=(1.0,)",
                f"epochs={1.492 * epochs:g}",  # A step costs 67 %.
            ),
            none_shorter=(*none, f"epochs={0.82 * epochs:g}"),
            freezeout=cubic08,  # 85 %: no store.
            flat=(*cubic08, "freeze.layerwise_lr=False"),
            store=store,
            store_steps=(*store, f"epochs={1.2 * epochs:g}"),
            store_batch=(  # As `bench freeze` prints, by FLOPs.
                *store,
                "freeze.grow_batch=(64, 64, 88, 96, 140, 216, 352)",
                "optim.lr_batch=64",
                "optim.lr_batch_power=0.5",
            ),
            mask_schedule=(
                *none,
                f"masking.schedule=((0.0, 0.9), ({0.49 * epochs:g}, 0.75))",
            ),
            decoders=(*none, "optim.freeze=(('(norm|decoder)_[01]/.*', 0.14),)"),
            stacked=(*none, "freeze.grow_depth=((0.0, 4), (0.7, 7))"),
        ),
        columns=(
            tuned,
            linear,
            "final/trained/knn/top1",
            "final/raw_pixels/linear/top1",
            "compute/tflop",
            "time/train_seconds",
        ),
        gate=(("none", tuned), ("none", "final/raw_pixels/linear/top1"), 0.1),
        claims=dict(
            pretraining_helps=(("none", tuned), ("untrained", tuned), 0.03),
            several_targets=(("none", tuned), ("one_target", tuned), 0.02),
            # At equal compute, cheap and dear.
            store_for_fewer_steps=(("store", tuned), ("none_shorter", tuned), 0.02),
            store_for_a_plain_run=(("store_steps", tuned), ("none", tuned), 0.02),
            store_for_larger_batches=(("store_batch", tuned), ("none", tuned), 0.02),
            rates_by_layer=(("freezeout", tuned), ("flat", tuned), 0.02),
            masks_for_fewer_steps=(
                ("mask_schedule", tuned),
                ("none_shorter", tuned),
                0.02,
            ),
            decoders_for_fewer_steps=(
                ("decoders", tuned),
                ("none_shorter", tuned),
                0.02,
            ),
            stacking_for_fewer_steps=(
                ("stacked", tuned),
                ("none_shorter", tuned),
                0.02,
            ),
        ),
    )
    return c


def _evidence_run():
    """Return the demo's network without freezing on drawn leaves, an arm of studies."""
    c = base.leaf_arm(_demo())
    c.freeze.schedule = "none"
    c.optim.warmup_epochs = 1.0
    return c


def _smoke():
    c = base.smoke(_digits(), 16)
    c.model.width, c.decoder.width = 32, 16
    c.freeze.t_0 = 0.5
    return c


RECIPES = {
    "": _demo,
    "digits": _digits,
    "smoke": _smoke,
    "evidence": _evidence,
    "evidence_run": _evidence_run,
    "localmim_vitb_1600": lambda: _pretrain(epochs=1600.0),
    "localmim_vitb_100_8gpu": _pretrain,
    "localmim_vitb_100_4gpu": _pretrain,
    "localmim_vitb_100_1gpu": _pretrain,
    "freeze_cubic085_4gpu": lambda: _freeze(0.85),
    "freeze_cubic080_8gpu": _freeze,
    "freeze_cubic080_1gpu_save5": lambda: _freeze(keep=5.0),
    "freeze_cubic080_flat_1234loss_1gpu": lambda: _flat(weighting="n_minus_k"),
    "freeze_cubic080_flat_allstages_1overk_1gpu": lambda: _flat(
        weighting="one_over_k", **EVERY_LAYER
    ),
    "freeze_cubic080_flat_allstages_1gpu": lambda: _flat(**EVERY_LAYER),
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
    "folder": _folder,
    "continue": _continue,
    "debug": _debug,
}
get_config = base.recipes(RECIPES)
