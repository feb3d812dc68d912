r"""Distillation: a student learns the features of a trained network, without labels.

    python -m vitssl.main --config=configs/distill.py --config.teacher.from=TEACHER

TEACHER is the workdir of a run (configs/localmim.py, configs/hjepa.py, ...) or weights
of others that `vitssl convert import` wrote (DINOv2, DINOv3, timm, ...); it may have
another patch, width, pooling and normalisation. It is read once: a run that goes on
does so with the teacher that its checkpoints hold.

Arguments (`--config=configs/distill.py:NAME`):
    (none)          demo size, for a run of configs/localmim.py:digits or
                    demo:localmim
    smoke           two steps from a random teacher, seconds
    folder          your own folder of images (data.root), labels or none, by any
                    teacher of colour images; ViT-Ti/16 at 224 px
    imagenet_vits   ViT-S/16 on ImageNet, for DINOv2's ViT-B/14 or larger
    evidence        a student with 5 and 20 labels per class, from its teacher and from
                    scratch, three seeds, minutes on two cores
    evidence_teacher, evidence_student
                    what `evidence` trains before: LocalMIM's network, and the student
                    from it
All but the first two need --config.data.root=DIR or --config.teacher.from=TEACHER.

One override away:
    --config.teacher.from=untrained         (a random one, which others must beat)
    --config.objective.type=mse
    --config.objective.patches=0            (the feature of the image alone)
    --config.multicrop.num_local_crops=6
    --config.multicrop.colour=device        (jitter, grey and blur on the accelerator)
    --config.model.name=resnet

`evidence` (digits; a ViT of 32 x 3 learns from LocalMIM's of 64 x 7, then 400 steps
on labels at one untuned rate; top-1 of 359 test images, mean and spread of 3 seeds,
which are of the labels: teacher and student were trained once):
    5 labels per class      89.1 +- 2.2 distilled, 60.4 +- 2.9 from scratch
    20 labels per class     94.3 +- 1.4 distilled, 63.5 +- 3.6 from scratch

Published results: none; the recipes are ours.
"""

from vitssl import config

base = config.beside(__file__, "base")


def _demo():
    """Return the demo."""
    c = base.run("distill", batch_size=64, epochs=30.0)
    c.data = base.data("digits")
    c.model = base.vit(width=32, depth=3, heads=4, patch=4, positions="sincos")
    c.teacher = {"from": ""}
    c.multicrop = base.crops(
        24,
        12,
        num_global_crops=1,
        global_color_jitter=0.0,
        local_color_jitter=0.0,
        horizontal_flip_prob=0.0,
        global_crop_scale=(0.5, 1.0),
    )
    # Vectors do not decay.
    c.optim = base.adamw(2e-3, 3.0, wd_rules=base.decaying_but(".*/(bias|scale)"))
    c.evals = base.evals(
        10,
        online_samples_train=1000,
        online_samples_test=360,
        final=("knn", "linear", "quality"),
    )
    c.log = dict(every_steps=100, pictures=True)
    c.checkpoint = dict(every_epochs=10.0, keep_best=1)
    return c


def _smoke():
    c = base.smoke(_demo(), 16)
    c.teacher["from"] = "untrained"
    c.multicrop.num_local_crops = 2
    return c


def _folder():
    """Return the recipe for own images: two large crops and four small ones."""
    c = base.folder(_demo(), epochs=100.0)
    c.model.update(patch=16, **base.VIT["ti"])
    c.multicrop = base.crops(224, 96, num_local_crops=4, color_jitter_prob=0.5)
    c.optim.update(lr=1e-3, warmup_epochs=5.0, clip_norm=3.0)
    return c


def _imagenet_vits():
    """Return a ViT-S/16 on ImageNet, of our own making."""
    c = _folder()
    c.precision, c.batch_size, c.per_device, c.epochs = "bfloat16", 1024, 128, 100.0
    c.data.update(source="imagenet", test_split="val")
    c.model.update(drop_path=0.0, **base.VIT["s"])
    c.multicrop.interpolation = "bicubic"
    c.optim.update(lr=5e-4, lr_batch=512, warmup_epochs=5.0)
    c.evals.update(every_epochs=10.0, final=("knn",))
    return c


def _evidence_teacher():
    """Return LocalMIM on digits, without what costs time beside training."""
    c = config.beside(__file__, "localmim").get_config("digits")
    c.evals.update(every_epochs=0, final=("knn", "linear"))
    c.log.pictures = False
    return c


def _evidence_student():
    """Return the student of `evidence`; --config.teacher.from=DIR of its teacher."""
    c = _demo()
    c.epochs = 60.0
    c.evals.update(every_epochs=0, final=("knn", "linear"))
    c.log.pictures = False
    return c


def _evidence():
    """Return one small network with few labels, distilled before and from scratch."""
    c = config.beside(__file__, "finetune_vit").get_config("digits_scratch")
    c.model.update(width=32, depth=3, drop_path=0.0, positions="sincos")
    c.steps, c.batch_size, c.optim.warmup_epochs = 400, 32, 0.0
    c.evals.every_epochs, c.checkpoint.keep_best = 0, 0
    c.checkpoint.every_epochs = 1000.0
    arms = {}
    for count in (5, 20):
        labels = f"data.per_class={count}"
        arms[f"scratch_{count}"] = (labels,)
        arms[f"distilled_{count}"] = (labels, "init.from=@student")
    c.study = dict(
        seeds=(0, 1, 2),
        first=dict(
            teacher=("configs/distill.py:evidence_teacher",),
            student=("configs/distill.py:evidence_student", "teacher.from=@teacher"),
        ),
        arms=arms,
        columns=("final/test/top1",),
    )
    return c


RECIPES = {
    "": _demo,
    "smoke": _smoke,
    "folder": _folder,
    "imagenet_vits": _imagenet_vits,
    "evidence": _evidence,
    "evidence_teacher": _evidence_teacher,
    "evidence_student": _evidence_student,
}
get_config = base.recipes(RECIPES)
