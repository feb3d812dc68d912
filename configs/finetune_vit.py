r"""Fine-tune a pre-trained ViT, or train one from scratch on labels.

    python -m vitssl.main --config=configs/finetune_vit.py --config.init.from=WORKDIR
    python -m vitssl.main --config=configs/finetune_vit.py:scratch

WORKDIR is that of a pre-training run (configs/localmim.py, configs/hjepa.py).

Arguments (`--config=configs/finetune_vit.py:NAME`):
    (none)          demo size, for a checkpoint of the demo of configs/localmim.py
    scratch         the same from random weights
    smoke           two steps from random weights
    ft_vitb_from1600
                    ViT-B/16 on ImageNet from 1600 epochs of pre-training
    ft_vitb_from100_{1,2,4,8}gpu
                    from 100 epochs; the device count does not matter
    ft_vitb_resume_1gpu
                    the same: every run resumes when it is started again
    ft_vitl         ViT-L/16

One override away:
    --config.head.pool=cls
    --config.optim.layer_decay=0.65
    --config.freeze.schedule=cubic --config.freeze.t_0=0.8    (FreezeOut)
    --config.optim.freeze='((("backbone/.*", 0.0),))'         (head only)

Published (ImageNet-1k, 100 epochs): 83.24 % from LocalMIM without freezing, 82.53 %
with cubic 0.8, 82.85 % unscaled.
"""

import ml_collections

RGB = dict(channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SIZES = {"b": (768, 12, 12), "l": (1024, 24, 16)}
# Vectors do not decay, nor do the class token and the position table.
DECAY = ((".*/(bias|scale|cls|pos_embed|ls1|ls2)|head/bias", 0.0), (".*", 1.0))


def _demo():
    """Return the demo: every section, at the size of two cores."""
    c = ml_collections.ConfigDict()
    c.method, c.seed = "classify", 0
    c.batch_size, c.epochs, c.steps, c.accumulate = 64, 15.0, 0, 1
    c.precision = "float32"
    # What pre-training calls "encoder" is the backbone here.
    c.init = {
        "from": "",
        "skip": ("head/.*",),
        "rename": (("backbone/(.*)", r"encoder/\1"),),
        # A fixed position table was no parameter; it starts from its formula.
        "absent": ("backbone/pos_embed",),
    }
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
        drop_path=0.05,
        positions="learned_sincos",
        remat=False,
    )
    c.head = dict(pool="gap", batchnorm=False, init_std=2e-5, dropout=0.0)
    c.augment = dict(
        size=24,
        scale=(0.5, 1.0),
        flip=0.0,
        randaugment="",
        erase=0.0,
        crop="sampled",
        interpolation="fast",
    )
    c.mix = dict(mixup=0.0, cutmix=0.0, prob=1.0, switch=0.5)
    c.objective = dict(smoothing=0.1, balanced=False, ema=0.0)
    c.optim = dict(
        name="adamw",
        lr=1e-3,
        lr_batch=0,
        schedule="cosine",
        warmup_epochs=2.0,
        start_lr=0.0,
        min_lr=1e-6,
        stretch=1.0,
        wd=0.05,
        clip_norm=0.0,
        b1=0.9,
        b2=0.999,
        layer_decay=0.75,
        wd_rules=DECAY,
    )
    c.evals = dict(
        image_size=0,  # That of training.
        batch_size=256,
        every_epochs=5.0,
        online=False,
        online_samples_train=0,
        online_samples_test=0,
        final=(),
        knn_k=(20,),
        knn_temperature=(0.07,),
        probe="lbfgs",
        probe_epochs=90,
        features="pooled",
    )
    c.log = dict(
        every_steps=100,
        tensorboard=True,
        wandb="",
        pictures=False,
        stall_seconds=1800.0,
    )
    c.checkpoint = dict(every_epochs=5.0, keep_last=2, keep_best=1, best="test/top1")
    return c


def _scratch():
    c = _demo()
    c.optim.layer_decay = 0.0
    return c


def _smoke():
    c = _scratch()
    c.steps, c.batch_size, c.optim.warmup_epochs = 2, 16, 0.0
    c.model.update(width=32, depth=2)
    c.augment.update(randaugment="rand-m9-mstd0.5-inc1", erase=0.25)
    c.mix.update(mixup=0.8, cutmix=1.0)
    c.objective.ema = 0.9
    c.log.every_steps = 1
    return c


def _imagenet(lr=4e-3, min_lr=1e-6, decay=0.75, size="b", epochs=100.0, warmup=20.0):
    """Return the original's recipe: an effective batch of 1024, absolute rates."""
    width, depth, heads = SIZES[size]
    c = _demo()
    c.precision = "bfloat16"
    c.batch_size, c.per_device, c.epochs = 1024, 128, epochs
    c.data.update(source="imagenet", test_split="val", **RGB)
    c.model.update(width=width, depth=depth, heads=heads, patch=16)
    c.model.drop_path = 0.1
    c.augment.update(
        size=224,
        scale=(0.08, 1.0),
        flip=0.5,
        randaugment="rand-m9-mstd0.5-inc1",
        erase=0.25,
        interpolation="bicubic",
    )
    c.mix.update(mixup=0.8, cutmix=1.0)
    c.optim.update(lr=lr, min_lr=min_lr, warmup_epochs=warmup)
    c.optim.layer_decay = decay
    c.evals.every_epochs = 1.0
    c.checkpoint.update(every_epochs=5.0, keep_every_epochs=20.0)
    return c


def _vitl():
    c = _imagenet(lr=3e-3, size="l", epochs=50.0, warmup=5.0)
    c.model.drop_path = 0.2
    return c


RECIPES = {
    "": _demo,
    "scratch": _scratch,
    "smoke": _smoke,
    "ft_vitb_from1600": lambda: _imagenet(2e-3, 1e-5, 0.65),
    "ft_vitb_from100_1gpu": _imagenet,
    "ft_vitb_from100_2gpu": _imagenet,
    "ft_vitb_from100_4gpu": _imagenet,
    "ft_vitb_from100_8gpu": _imagenet,
    "ft_vitb_resume_1gpu": _imagenet,
    "ft_vitl": _vitl,
}


def get_config(name=""):
    """Return the recipe `name`."""
    if name not in RECIPES:
        known = ", ".join(k for k in RECIPES if k)
        raise ValueError(f"no recipe {name!r}; there is: (none), {known}")
    return RECIPES[name]()
