r"""Fine-tune a pre-trained ViT, or train one from scratch on labels.

    python -m vitssl.main --config=configs/finetune_vit.py --config.init.from=WORKDIR
    python -m vitssl.main --config=configs/finetune_vit.py:scratch

WORKDIR is that of a pre-training run (configs/localmim.py, configs/hjepa.py), or an
import of weights like timm/vit_base_patch16_224.mae. What the recipes start from:
    (none)          a run of configs/localmim.py
    digits          a run of configs/localmim.py:digits
    ft_vitb_from1600
                    configs/localmim.py:localmim_vitb_1600
    ft_vitb_from100_*, ft_vitb_resume_1gpu
                    configs/localmim.py:localmim_vitb_100_8gpu
    ft_vitl         configs/localmim.py:vitl

Arguments (`--config=configs/finetune_vit.py:NAME`):
    (none)          demo size, for a checkpoint of the demo of configs/localmim.py
    scratch         the same from random weights
    digits, digits_scratch
                    scanned digits, the smallest
    smoke           two steps from random weights
    freezing        layers freeze as they settle, their tokens are stored (the idea of
                    Egeria, arXiv:2201.06227, and AutoFreeze, arXiv:2102.01386)
    score           what the arms of configs/localmim.py:evidence are scored by
    evidence        what LocalMIM before 140 and 2,137 labels is worth, beside as much
                    compute with labels alone; three seeds
    evidence_run    one run of it
    evidence_rates  the search of its learning rates, in another world
    folder          your own folder of images in classes (data.root), for a run of
                    configs/localmim.py:folder
    folder_multilabel
                    your own folder of images (data.root) with a table of several labels
                    an image (data.options.labels=FILE.csv), by a sigmoid each
    ft_vitb_from1600
                    ViT-B/16 on ImageNet from 1600 epochs of pre-training
    ft_vitb_from100_{1,2,4,8}gpu
                    from 100 epochs; the device count does not matter
    ft_vitb_resume_1gpu
                    the same: every run resumes when it is started again
    ft_vitl         ViT-L/16

One override away:
    --config.head.pool=cls
    --config.head.blocks='(2, 4, 7)'        (a head after each; the loss is their mean)
    --config.head.blocks='(2, 4, 7)' --config.head.predict=average  (not the last's)
    --config.optim.layer_decay=0.65
    --config.freeze.schedule=cubic --config.freeze.t_0=0.8    (FreezeOut)
    --config.optim.freeze='((("backbone/.*", 0.0),))'         (head only)

Published (ImageNet-1k, 100 epochs): 83.24 % from LocalMIM without freezing, 82.53 %
with cubic 0.8, 82.85 % unscaled.
"""

from vitssl import config

base = config.beside(__file__, "base")

AUTOAUGMENT = "rand-m9-mstd0.5-inc1"


def _demo():
    """Return the demo: drawn leaves in seven conditions."""
    c = _digits()
    c.init["weights"] = "configs/localmim.py"
    c.data = base.data("leaves", **base.LEAVES)
    c.model.patch = 6
    c.augment.update(base.LEAF_CROPS)
    c.evals.batch_size = 210
    return c


def _digits():
    """Return the smallest recipe: scanned digits."""
    c = base.run("classify", batch_size=64, epochs=15.0)
    # What pre-training calls "encoder" is the backbone here.
    c.init = {
        "from": "",
        "weights": "configs/localmim.py:digits",
        "skip": ("head/.*",),
        "rename": (("backbone/(.*)", r"encoder/\1"),),
        # A fixed position table was no parameter; it starts from its formula.
        "absent": ("backbone/pos_embed",),
    }
    c.data = base.data("digits")
    c.model = base.vit(
        width=64,
        depth=7,
        heads=4,
        patch=4,
        drop_path=0.05,
        positions="learned_sincos",
    )
    c.head = dict(pool="gap")
    c.augment = dict(size=24, scale=(0.5, 1.0), flip=0.0, interpolation="fast")
    c.objective = dict(smoothing=0.1)
    # Vectors do not decay, nor do the class token and the position table.
    rules = base.decaying_but(".*/(bias|scale|cls|pos_embed|ls1|ls2)|head/bias")
    c.optim = base.adamw(1e-3, 2.0, min_lr=1e-6, layer_decay=0.75, wd_rules=rules)
    c.evals = base.evals(5.0, online=False, final=())
    c.log = dict(every_steps=100)
    c.checkpoint = dict(every_epochs=5.0, keep_best=1, best="test/top1")
    return c


def _scratch(c):
    c.init["weights"] = ""
    c.optim.layer_decay = 0.0
    return c


def _smoke():
    c = base.smoke(_scratch(_digits()), 16)
    c.model.update(width=32, depth=2)
    c.augment.update(randaugment=AUTOAUGMENT, erase=0.25)
    c.mix = dict(mixup=0.8, cutmix=1.0)
    c.objective.ema = 0.9
    return c


def _folder():
    c = base.folder(_digits(), epochs=50.0)
    c.init["weights"] = "configs/localmim.py:folder"
    c.model.update(patch=8, **base.VIT["ti"])
    c.augment.update(size=96, scale=(0.2, 1.0), flip=0.5)
    c.optim.warmup_epochs = 5.0
    return c


def _freezing():
    """Return the demo with early layers frozen one after the other, and a store.

    Egeria and AutoFreeze decide online. Here a plain run decides for those after it:
    train the demo with checkpoint.keep_every_epochs=1.0, and `vitssl freeze-plan RUN`
    prints `optim.freeze` for the next one, in place of this schedule.
    """
    c = _demo()
    c.freeze = dict(schedule="linear", t_0=0.4, layerwise_lr=False)
    c.freeze.store = dict(views=4)
    return c


def _score():
    """Return what the arms of `localmim.py:evidence` are scored by."""
    c = _demo()
    c.init["weights"] = "configs/localmim.py:evidence"
    c.epochs = 12.0
    c.data = base.tested_leaves()
    # Of 1e-3 with a decay by layer and 2e-3, by one run of one arm (77.1 and 80.7 %).
    c.optim.update(lr=2e-3, layer_decay=0.0, warmup_epochs=1.0)
    c.evals.update(every_epochs=0, batch_size=250)
    c.checkpoint.keep_best = 0
    return c


TOP1 = "final/test/top1"
PRETRAIN = dict(
    seeded=("data.options.seed",),
    first=("configs/localmim.py:evidence_run",),
    first_each_seed=True,
)
BY_LAYER = "optim.layer_decay=0.75"  # The lower a block, the lower its rate.
# Labels per class: what a run of so many is.
LABELS = {
    "20": ("data.per_class=20", "steps=300", "optim.warmup_epochs=20.0"),
    "all": (),
}
LONGER = {"20": "steps=1135", "all": "steps=1330"}


def _evidence_run():
    """Return one run of `evidence`: all labels, from scratch."""
    c = _scratch(_demo())
    c.data = base.tested_leaves()
    c.steps, c.optim.lr = 495, 2e-3
    c.evals.update(every_epochs=0, batch_size=250, final=("linear",), probe="lbfgs")
    c.checkpoint.update(every_epochs=1000.0, keep_best=0)
    return c


def _evidence():
    """Return what LocalMIM before 140 and 2,137 labels is worth.

    Its 60 epochs are 8.8 TFLOP, as 835 steps with labels are, which `longer` has more.
    """
    arms, claims = {}, {}
    for name, own in LABELS.items():
        ours = f"pretrained_{name}"
        arms[ours] = (*own, "init.from=@first", BY_LAYER)
        arms[f"scratch_{name}"] = own
        arms[f"longer_{name}"] = (*own, LONGER[name])
        for rival in (f"scratch_{name}", f"longer_{name}"):
            claims[f"ahead_of_{rival}"] = ((ours, TOP1), (rival, TOP1), 0.03)
    pixels = "final/raw_pixels/linear/top1"
    c = _evidence_run()
    c.study = dict(
        seeds=(0, 1, 2),
        arms=arms,
        columns=(TOP1, pixels, "compute/total_tflop", "time/train_seconds"),
        gate=(("longer_all", TOP1), ("longer_all", pixels), 0.1),
        claims=claims,
        **PRETRAIN,
    )
    return c


def _evidence_rates():
    """Return the search of the learning rate for `evidence`, in another world."""
    arms = {}
    for name, rate in (("half", 1e-3), ("own", 2e-3), ("double", 4e-3)):
        own = (f"optim.lr={rate}",)
        arms[f"pretrained_{name}"] = (*own, "init.from=@first")
        arms[f"by_layer_{name}"] = (*own, "init.from=@first", BY_LAYER)
        arms[f"scratch_{name}"] = own
    c = _evidence_run()
    c.study = dict(seeds=(100,), arms=arms, columns=(TOP1,), **PRETRAIN)
    return c


def _folder_multilabel():
    c = _folder()
    c.objective = dict(loss="binary", smoothing=0.0)
    c.checkpoint.best = "test/map"
    return c


def _imagenet(
    lr=4e-3,
    min_lr=1e-6,
    decay=0.75,
    size="b",
    epochs=100.0,
    warmup=20.0,
    drop_path=0.1,
    weights="localmim_vitb_100_8gpu",
):
    """Return the original's recipe: an effective batch of 1024, absolute rates."""
    c = _digits()
    c.init["weights"] = f"configs/localmim.py:{weights}"
    c.precision = "bfloat16"
    c.batch_size, c.per_device, c.epochs = 1024, 128, epochs
    c.data.update(source="imagenet", test_split="val", **base.RGB)
    c.model.update(patch=16, drop_path=drop_path, **base.VIT[size])
    c.augment.update(
        size=224,
        scale=(0.08, 1.0),
        flip=0.5,
        randaugment=AUTOAUGMENT,
        erase=0.25,
        interpolation="bicubic",
    )
    c.mix = dict(mixup=0.8, cutmix=1.0)
    c.optim.update(lr=lr, min_lr=min_lr, warmup_epochs=warmup, layer_decay=decay)
    c.evals.every_epochs = 1.0
    c.checkpoint.keep_every_epochs = 20.0
    return c


def _vitl():
    own = dict(size="l", epochs=50.0, warmup=5.0, drop_path=0.2, weights="vitl")
    return _imagenet(3e-3, **own)


RECIPES = {
    "": _demo,
    "scratch": lambda: _scratch(_demo()),
    "digits": _digits,
    "digits_scratch": lambda: _scratch(_digits()),
    "smoke": _smoke,
    "folder": _folder,
    "freezing": _freezing,
    "score": _score,
    "evidence": _evidence,
    "evidence_run": _evidence_run,
    "evidence_rates": _evidence_rates,
    "folder_multilabel": _folder_multilabel,
    "ft_vitb_from1600": lambda: _imagenet(
        2e-3, 1e-5, 0.65, weights="localmim_vitb_1600"
    ),
    "ft_vitb_from100_1gpu": _imagenet,
    "ft_vitb_from100_2gpu": _imagenet,
    "ft_vitb_from100_4gpu": _imagenet,
    "ft_vitb_from100_8gpu": _imagenet,
    "ft_vitb_resume_1gpu": _imagenet,
    "ft_vitl": _vitl,
}
get_config = base.recipes(RECIPES)
