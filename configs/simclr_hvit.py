r"""Pre-train the hierarchical ViT on unlabelled leaves by SimCLR.

    python -m vitssl.main --config=configs/simclr_hvit.py --workdir=runs/simclr
    python -m vitssl.main --config=configs/finetune_hvit.py \
        --config.init.from=runs/simclr

Arguments (`--config=configs/simclr_hvit.py:NAME`):
    (none)          demo: drawn leaves in seven conditions, minutes on two cores
    smoke           two steps, seconds
    vit             the demo with a plain ViT
    evidence_run    the demo, as studies start from it
    folder          the demo's network on your own folder of images (data.root), labels
                    or none, at 96 px
    folder_vit      the same with a plain ViT
    sarcld_small    SAR-CLD-2024, HViT small, 256 px: the documented recipe
    sarcld_xl_448   the recipe of the logged runs: HViT xl, 448 px, wide projector with
                    batch normalisation
    supplement      the numbers of the supplement: temperature 0.5, weaker colours
All but the first three need --config.data.root=DIR.

One override away:
    --config.accumulate=4                   (the same loss and gradient, less memory)
    --config.per_device=16                  (the same, by what a device takes at a time)
    --config.objective.loss=infonce         (the loss of the released code)
    --config.freeze.schedule=cubic          (FreezeOut)
    --config.optim.wd_rules='((".*", 1.0),)'    (decay norms and biases, as coded)
    --config.augment.scale='(0.08, 1.0)'    (crops as coded)
    --config.augment.colour=device          (jitter, grey and blur on the accelerator)
    --config.resolution.start=24            (views grow to augment.size)
    --config.resolution.sizes='(24, 96)'    (three batches of ten at another size)

The demo, seed 0, 420 test leaves: k-NN 59.0, linear probe 77.4 %; untrained 22.1, 36.0;
raw pixels 41.0, 69.8; colour histogram 30.5, 49.8.

Published: a linear probe on the logged runs' features gets 13 to 60 % of seven classes.
"""

from vitssl import config

base = config.beside(__file__, "base")


def _demo():
    """Return the demo."""
    c = base.run("simclr", batch_size=64, epochs=50.0)
    c.data = base.data("leaves", **base.LEAVES)
    c.model = base.hvit()
    c.projector = dict(width=64, hidden=128, batchnorm=True)
    c.objective = dict(loss="nt_xent", temperature=0.1)
    c.augment = dict(
        size=48,
        scale=(0.3, 1.0),
        jitter=(0.4, 0.4, 0.4, 0.05),
        grayscale_prob=0.1,
        blur_prob=0.2,
        interpolation="fast",
    )
    # Vectors do not decay, nor do position tables.
    rules = base.decaying_but(r".*/(bias|scale|pos_embed|disease_mask|cls)")
    c.optim = base.adamw(2e-3, 3.0, clip_norm=1.0, wd_rules=rules)
    c.evals = base.evals(
        10.0,
        batch_size=210,
        online_samples_train=1000,
        online_probe_epochs=10,
        baselines=("pixels", "colours"),
        probe_epochs=10,
        probe_schedule="constant",
        probe_batch=64,
    )
    c.log = dict(every_steps=50, pictures=True)
    c.checkpoint = dict(every_epochs=10.0, keep_best=1, best="probe/top1")
    return c


def _smoke():
    c = base.smoke(_demo(), 16)
    c.model.update(depths=(1, 1), heads=(1, 2))
    c.data.options = dict(count=64)
    c.evals.update(online_samples_train=64, batch_size=32)
    return c


def _evidence_run():
    """Return what configs/finetune_hvit.py:evidence starts from."""
    return base.leaf_arm(_demo())


def _vit():
    c = _demo()
    c.model = base.vit(width=64, depth=4, heads=2, patch=6)
    return c


def _folder(c=None):
    c = base.folder(c or _demo(), epochs=100.0)
    c.augment.size = 96
    c.checkpoint.best = "knn/top1"
    return c


def _published(size="small"):
    """Return the documented recipe at a size of the model."""
    c = _demo()
    c.seed, c.precision, c.epochs = 42, "bfloat16", 100.0
    c.data.update(source="sarcld", test_split="val", **base.RGB)
    c.model.update(drop_path=0.1, **base.HVIT[size])
    c.projector = dict(width=128, hidden=0, batchnorm=False)
    c.objective.temperature = 0.07
    c.augment.update(
        size=base.HVIT_SIDE[size],
        scale=(0.2, 1.0),
        jitter=(0.8, 0.8, 0.8, 0.2),
        grayscale_prob=0.2,
        blur_prob=0.5,
        interpolation="bilinear",
    )
    c.optim.update(lr=3e-4, warmup_epochs=10.0, wd=1e-4, clip_norm=0.0)
    c.evals.update(batch_size=64, probe="sgd", online_samples_train=0)
    c.log.every_steps = 10
    c.checkpoint.every_epochs = 25.0
    return c


def _logged():
    """Return the recipe behind the logged runs; they had micro-batches of 32."""
    c = _published("xl")
    c.epochs = 80.0
    c.model.update(drop_path=0.2, remat=True)
    c.projector = dict(width=256, hidden=4096, batchnorm=True)
    c.objective.update(loss="infonce", temperature=0.1)
    c.augment.scale = (0.08, 1.0)
    c.optim.update(lr=5e-4, wd=0.05, clip_norm=1.0)
    return c


def _supplement():
    c = _published()
    c.epochs = 80.0
    c.model.drop_path = 0.3
    c.objective.temperature = 0.5
    c.augment.update(jitter=(0.4, 0.4, 0.4, 0.1), blur_kernel=23)
    c.optim.update(lr=5e-4, wd=0.05, clip_norm=1.0)
    return c


RECIPES = {
    "": _demo,
    "smoke": _smoke,
    "vit": _vit,
    "evidence_run": _evidence_run,
    "folder": _folder,
    "folder_vit": lambda: _folder(_vit()),
    "sarcld_small": _published,
    "sarcld_xl_448": _logged,
    "supplement": _supplement,
}
get_config = base.recipes(RECIPES)
