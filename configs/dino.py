r"""DINO: crops of an image are sorted alike, by an averaged copy's judgement.

    python -m vitssl.main --config=configs/dino.py

Arguments (`--config=configs/dino.py:NAME`):
    (none)          demo: drawn leaves in seven conditions, minutes on two cores
    smoke           two steps, seconds
    folder          your own folder of images (data.root), labels or none: ViT-Ti/8 at
                    96 px, half as deep
    imagenet_vits_100
                    ViT-S/16, the original's default command
    imagenet_vits, imagenet_vitb
                    ViT-S/16 and ViT-B/16 as published
    dinov2_vitl     DINOv2's short recipe for ViT-L/16: KoLeo and hidden patches
All but the first three need --config.data.root=DIR.

One override away:
    --config.objective.compares=cls         (sort class tokens, as published)
    --config.objective.patch=1.0            (sort hidden patches, too: iBOT)
    --config.objective.shared=False         (by a head of their own)
    --config.objective.centring=ema         (a running centre, as published)
    --config.multicrop.num_local_crops=8
    --config.multicrop.colour=device        (jitter, grey and blur on the accelerator)
    --config.evals.features=cls             (instead of what is sorted)

The recipes differ from the originals in this: the norm of the whole gradient is
clipped, not that of each parameter; temperatures rise by the step, not by the epoch;
hidden patches are single ones, not blocks; drop_path grows with depth.

The demo cut to 8 epochs, 264 steps (--config.epochs=8 --config.optim.warmup_epochs=1),
seed 0: k-NN 55.2, linear probe 66.4 %; untrained 24.8, 53.1; raw pixels 42.4, 69.0;
pixels averaged over patches 16.2, 21.0.

Published (k-NN, linear probe, ImageNet): 69.3, 73.8 for the default command; 74.5,
77.0 for ViT-S/16; 76.1, 78.2 for ViT-B/16; 81.6, 82.9 for DINOv2's ViT-L/16.
"""

from vitssl import config

base = config.beside(__file__, "base")


def _demo():
    """Return the demo."""
    c = base.run("dino", batch_size=64, epochs=25.0)
    c.data = base.data("leaves", **base.LEAVES)
    c.model = base.vit(width=64, depth=4, heads=4, patch=6, positions="sincos")
    c.multicrop = base.crops(
        48,
        24,
        num_local_crops=2,
        global_crop_scale=(0.4, 1.0),
        local_crop_scale=(0.1, 0.4),
        global_color_jitter=0.5,
        local_color_jitter=0.5,
    )
    c.start = dict(encoder="xavier")
    c.head = dict(outputs=64, hidden=128, bottleneck=64)
    c.teacher = dict(start=0.98, end=1.0)
    # At 0.04 the targets of so small a network end up even: log K, the same for all.
    c.objective = dict(
        compares="mean",
        centring="sinkhorn",
        koleo=0.1,
        teacher_temperature=0.02,
        first_temperature=0.02,
    )
    # Vectors do not decay.
    rules = base.decaying_but(".*(bias|scale|mask_token)")
    thaw = (("head/last", 1.0),)
    c.optim = base.adamw(2e-3, 3.0, clip_norm=3.0, wd_rules=rules, thaw=thaw)
    c.evals = base.evals(5.0, batch_size=210, online_samples_train=1000)
    c.log = dict(every_steps=50, pictures=True)
    c.checkpoint = dict(every_epochs=5.0, keep_best=1)
    return c


def _folder():
    c = base.folder(_demo(), epochs=100.0)
    c.model.update(**base.VIT["ti"] | dict(depth=6, patch=8))
    c.multicrop.update(global_crop_size=96, local_crop_size=48)
    # No more outputs than global crops in a batch, among which Sinkhorn shares them.
    c.head = dict(outputs=128, hidden=512, bottleneck=128)
    c.optim.update(lr=1e-3, warmup_epochs=5.0)
    return c


def _vits_100(size="s"):
    """Return the original's default command; 224 px, 2 + 8 crops."""
    c = _demo()
    c.precision = "bfloat16"
    c.batch_size, c.epochs = 512, 100.0
    c.data.update(source="imagenet", test_split="val", **base.RGB)
    c.model.update(patch=16, positions="learned", drop_path=0.1, **base.VIT[size])
    c.start.encoder = "normal"
    c.multicrop.update(
        num_local_crops=8,
        global_crop_size=224,
        local_crop_size=96,
        local_crop_scale=(0.05, 0.4),
        global_color_jitter=1.0,
        local_color_jitter=1.0,
        grayscale_prob=0.2,
        blur_prob=(1.0, 0.1, 0.5),
        solarize_prob=0.2,
        interpolation="bicubic",
    )
    c.head = dict(outputs=65536, hidden=2048, bottleneck=256)
    c.teacher.start = 0.996
    c.objective = dict(teacher_temperature=0.04, first_temperature=0.04)
    c.optim.update(
        lr=5e-4,
        lr_batch=256,
        min_lr=1e-6,
        warmup_epochs=10.0,
        wd=0.04,
        wd_end=0.4,
        wd_schedule="cosine",
    )
    c.evals.update(every_epochs=10.0, online_samples_train=0)
    c.log.every_steps = 100
    c.checkpoint.every_epochs = 10.0
    return c


def _published(size="s", epochs=800.0, warm=30.0):
    """Return what the published weights were trained by, but for what differs."""
    c = _vits_100(size)
    c.batch_size, c.epochs = 1024, epochs
    c.multicrop.update(
        num_local_crops=10,
        global_crop_scale=(0.25, 1.0),
        local_crop_scale=(0.05, 0.25),
    )
    c.objective.update(teacher_temperature=0.07, warmup_epochs=warm)
    return c


def _vits():
    c = _published()
    c.head.lengths = True
    c.optim.update(min_lr=1e-5, clip_norm=0.0)
    return c


def _vitb():
    c = _published("b", 400.0, 50.0)
    c.optim.update(lr=7.5e-4, min_lr=2e-6, clip_norm=0.3, thaw=(("head/last", 3.0),))
    return c


def _dinov2_vitl():
    """Return DINOv2's short recipe for ViT-L/16; an epoch was 1,250 steps."""
    c = _vits_100("l")
    c.batch_size, c.epochs = 2048, 100.0
    c.model.update(drop_path=0.3, layerscale=1e-5, remat=True)
    c.multicrop.update(global_crop_scale=(0.32, 1.0), local_crop_scale=(0.05, 0.32))
    c.teacher.start = 0.992
    c.objective.update(
        teacher_temperature=0.07, warmup_epochs=30.0, koleo=0.1, patch=1.0
    )
    c.optim.update(lr=4e-3, lr_batch=1024, lr_batch_power=0.5, layer_decay=0.9)
    c.optim.lr_rules = (("encoder/patch_embed/.*", 0.2), (".*", 1.0))
    return c


RECIPES = {
    "": _demo,
    "smoke": lambda: base.smoke(_demo(), 16),
    "folder": _folder,
    "imagenet_vits_100": _vits_100,
    "imagenet_vits": _vits,
    "imagenet_vitb": _vitb,
    "dinov2_vitl": _dinov2_vitl,
}
get_config = base.recipes(RECIPES)
