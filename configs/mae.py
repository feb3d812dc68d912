r"""MAE: hide most patches, draw them from the others. SimMIM as an option.

    python -m vitssl.main --config=configs/mae.py

Arguments (`--config=configs/mae.py:NAME`):
    (none)          demo: drawn leaves in seven conditions, minutes on two cores
    smoke           two steps, seconds
    folder          your own folder of images (data.root), labels or none: ViT-Ti/8 at
                    96 px
    simmim          the demo by SimMIM
    imagenet_vitb, imagenet_vitl, imagenet_vith14
                    MAE's recipe: 800 epochs, 75 % hidden, normalised pixels
    simmim_vitb     SimMIM's: 800 epochs, 60 % hidden in squares of 32 px
The last four need --config.data.root=DIR.

One override away:
    --config.objective.normalise=False      (pixels as they are)
    --config.masking.ratio=0.5
    --config.masking.schedule='((20.0, 0.9),)'  (another ratio from an epoch on)
    --config.decoder.depth=1
    --config.evals.features=cls             (instead of the mean of the patches)

The demo cut to 12 epochs (--config.epochs=12 --config.optim.warmup_epochs=1), seed 0:
k-NN 35.5, linear probe 68.3 %; untrained 21.7, 54.8; raw pixels 42.4, 69.3.

SimMIM's ViT has relative positions that all blocks share; here positions are learned.

Published (ImageNet, fine-tuned, 1,600 epochs): 83.6 for ViT-B, 85.9 for ViT-L, 86.9 for
ViT-H; 85.5 for ViT-L after these 800. SimMIM's ViT-B: 83.8.
"""

from vitssl import config

base = config.beside(__file__, "base")


def _demo():
    """Return the demo."""
    c = base.run("mae", batch_size=64, epochs=45.0)
    c.data = base.data("leaves", **base.LEAVES)
    c.model = base.vit(width=64, depth=4, heads=4, patch=6, positions="sincos")
    c.decoder = dict(width=32, depth=2, heads=4)
    c.masking = dict(ratio=0.75)
    c.objective = dict(hidden="drop", loss="mse", normalise=True)
    c.augment = dict(size=48, scale=(0.3, 1.0), flip=0.5, interpolation="fast")
    # Vectors do not decay; class and mask tokens, which are matrices, do.
    rules = base.decaying_but(".*/(bias|scale)")
    c.optim = base.adamw(2e-3, 3.0, b2=0.95, wd_rules=rules)
    c.evals = base.evals(9.0, batch_size=210, online_samples_train=1000)
    c.log = dict(every_steps=50, pictures=True)
    c.checkpoint = dict(every_epochs=9.0, keep_best=1)
    return c


def _folder():
    c = base.folder(_demo(), epochs=200.0)
    c.model.update(patch=8, **base.VIT["ti"])
    c.decoder.width = 64
    c.augment.update(size=96, scale=(0.2, 1.0))
    c.optim.update(lr=1e-3, warmup_epochs=10.0)
    return c


def _simmim(c):
    """Return a config by SimMIM: mask tokens, raw pixels, their absolute error."""
    c.objective = dict(hidden="token", loss="l1", normalise=False)
    c.masking = dict(ratio=0.6, block=2)
    c.optim.wd_rules = base.decaying_but(".*(bias|scale|mask_token)")
    return c


def _imagenet(size, patch=16):
    """Return MAE's recipe for ImageNet-1k at 224 px."""
    c = _demo()
    c.precision = "bfloat16"
    c.batch_size, c.epochs = 4096, 800.0
    c.data.update(source="imagenet", test_split="val", **base.RGB)
    c.model.update(patch=patch, remat=size != "b", **base.VIT[size])
    c.decoder = dict(width=512, depth=8, heads=16)
    c.augment.update(size=224, scale=(0.2, 1.0), interpolation="bicubic")
    c.optim.update(lr=1.5e-4, lr_batch=256, warmup_epochs=40.0)
    c.evals.update(every_epochs=20.0, online_samples_train=0)
    c.log.every_steps = 100
    c.checkpoint.update(every_epochs=20.0)
    return c


def _simmim_vitb():
    c = _simmim(_imagenet("b"))
    c.batch_size = 2048
    c.model.update(positions="learned", drop_path=0.1, layerscale=0.1)
    c.augment.update(scale=(0.67, 1.0), interpolation="bilinear")
    c.optim.update(
        lr=1e-4,
        lr_batch=512,
        start_lr=2e-6,
        b2=0.999,
        clip_norm=5.0,
        warmup_epochs=10.0,
        schedule="stairs",
        stair_epochs=690.0,
    )
    return c


RECIPES = {
    "": _demo,
    "smoke": lambda: base.smoke(_demo(), 16),
    "folder": _folder,
    "simmim": lambda: _simmim(_demo()),
    "imagenet_vitb": lambda: _imagenet("b"),
    "imagenet_vitl": lambda: _imagenet("l"),
    "imagenet_vith14": lambda: _imagenet("h", 14),
    "simmim_vitb": _simmim_vitb,
}
get_config = base.recipes(RECIPES)
