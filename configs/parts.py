r"""Part discovery: find the parts of a thing, then classify from them alone (iFAM).

    python -m vitssl.main --config=configs/parts.py

Arguments (`--config=configs/parts.py:NAME`, or `NAME,OPTION,OPTION=VALUE`):
    (none)          demo: drawn birds whose background misleads, minutes on two cores
    smoke           two steps, seconds
    demo_baseline   the demo's ViT without parts
    evidence        hard and soft masks, true ones, another bird's, and the same ViT
                    without masks at equal compute, all of a seed from one
                    self-supervised checkpoint (configs/hjepa.py:birds); five seeds,
                    about 70 minutes on two cores
    evidence_rates  the search of its rates and loss weights, in another world
    evidence_run    one run of it with hard masks; --config.init.from=DIR of a run of
                    configs/hjepa.py:birds
    folder          the demo's network on your own folder of images in classes
                    (data.root), 96 px
    cub_k8, cub_k4  CUB-200-2011, ViT-B/14 at 518 px, 8 x 16 images a step
    waterbirds      Waterbirds, K=8; waterbirds_k4
    siim_acr_rad_dino
                    chest X-rays with RAD-DINO's layout of DINOv2
    metashift       cats and dogs at 224 px, K=2; metashift_k1, metashift_k8
    pdiscoformer_cub
                    the single-stage predecessor, K=8
    pdisconet_cub   the same head on a ResNet-101 at 448 px
    baseline_waterbirds, late_mask, given_mask
                    one ViT without parts; with masks of the data set
Options, joined by commas: soft_masks, straight_through, no_gumbel, as_coded (evaluation
noise and orthogonality over channels as released), train_backbone, freeze_tokens_1,
freeze_second_stage, freeze_tokens_2, and the rates scratch=1e4, modulation=1e4,
finer=1e3, second=1.0.

What the final evaluation can measure besides (a finished run does only that):
    --config.measures.thresholds="(0.01, 0.03, 0.05, 0.1)"   without each part's least
                    confident patches, thresholds found in the training set
    --config.measures.leave_one_out=True    without each part, beside parts.removed
    --config.measures.backgrounds=DIR --config.measures.challenge=20
                    ImageNet-9, its gap, and the challenge; measures.mapping=FILE
    --config.measures.maps=0.8              share of the test batches to draw

All published recipes need --config.data.root=DIR and pretrained weights, the file
model.safetensors of a model hub, converted by `vitssl convert import FILE --to=WEIGHTS`
(--config.init.from=WEIGHTS):
    timm/vit_base_patch14_reg4_dinov2.lvd142m   all but two:
    microsoft/rad-dino                          siim_acr_rad_dino
    timm/resnet101.tv_in1k                      pdisconet_cub, torchvision's ResNet-101
lr = 1e-6 sqrt(batch / 16), decay = 0.05 sqrt(1 / steps).

The demo (4,000 drawn birds, half of them before their class's background), seed 0:
99.4 % top-1 and 97.9 % in the worst group, NMI 0.81 and ARI 0.66 against the true
parts; the same ViT without parts (demo_baseline) 56 % and 23 %.

Published results (third-party table of arXiv:2506.08915): Waterbirds 99.0 average,
CUB-trained on Waterbirds 86.2, MetaShift 88.7; PDiscoFormer CUB 89.1.
"""

from vitssl import config

base = config.beside(__file__, "base")

FLAGS = {  # option: (section, key, value)
    "soft_masks": ("parts", "masks", "soft"),
    "straight_through": ("parts", "masks", "straight_through"),
    "no_gumbel": ("parts", "gumbel", False),
}
FREEZES = ("freeze_tokens_1", "freeze_second_stage", "freeze_tokens_2")
RATES = ("scratch", "modulation", "finer", "second")

_TOKENS = "backbone/(cls|registers|pos_embed)"
_BODY = "backbone/(patch_embed|block_[0-9]+|norm)/.*"


def groups(
    kind="two_stage",
    *,
    modulation_type="layer_norm",
    scratch=1e4,
    modulation=1e4,
    finer=1e3,
    second=1.0,
    freeze_backbone=True,
    freeze_tokens_1=False,
    freeze_second_stage=False,
    freeze_tokens_2=False,
):
    """Return the optimizer's lr_rules, wd_rules and freeze of the paper's groups.

    Layers that start from nothing learn `scratch` times as fast as the pretrained ones,
    the modulation `modulation` times, the prototypes `finer` times, all of the second
    stage's backbone `second` times. Prototypes, modulation, tokens, positions and
    vectors do not decay.
    """
    one, two = kind in ("two_stage", "single_stage"), kind != "single_stage"
    lr, wd, freeze = [], [], []
    if one:
        lr += [("stage_1/head/classifier/.*", scratch)]
        wd += [("stage_1/head/prototypes", 0.0)]
        lr += [("stage_1/head/prototypes", finer)]
        if modulation_type != "none":
            lr += [("stage_1/head/modulation/.*", modulation)]
            wd += [("stage_1/head/modulation/.*", 0.0)]
        freeze += [(f"stage_1/{_BODY}", 0.0)] * freeze_backbone
        freeze += [(f"stage_1/{_TOKENS}", 0.0)] * freeze_tokens_1
    if two:
        lr += [("stage_2/(head|fc_norm|pool)/.*", scratch)]
        lr += [("stage_2/.*", second)] if one else []
        freeze += [(f"stage_2/{_BODY}", 0.0)] * freeze_second_stage
        freeze += [(f"stage_2/{_TOKENS}", 0.0)] * freeze_tokens_2
    # Learned queries of a pooling and vectors do not decay either; in the original's
    # baselines tokens and positions do.
    names = "bias|scale|ls1|ls2|query|gamma" + "|cls|registers|pos_embed" * one
    wd += [(f".*/({names})", 0.0), (".*", 1.0)]
    lr += [(".*", 1.0)]
    return dict(lr_rules=tuple(lr), wd_rules=tuple(wd), freeze=tuple(freeze))


def _demo():
    """Return the demo: a small two-stage model on drawn birds, from random weights."""
    c = base.run("parts", batch_size=16, epochs=5.0)
    c.data = base.data("birds", options=dict(count=0, purity=0.5), **base.RGB)
    c.model = base.bird_vit()
    # The modulation would make any features orthogonal: its bias is free to.
    c.parts = dict(count=4, modulated_orthogonality=False, rooms=(0.5, 1.0))
    # Every bird shows all its parts, so every image must (a group of one); from random
    # weights only a pull on all of the background, and compact parts, keep the
    # background out of the parts.
    c.objective = dict(
        presence=2.0,
        presence_group=1,
        background=1.0,
        background_type="log",
        concentration=20.0,
    )
    c.augment = dict(
        size=48, planckian=0.0, degrees=20.0, translate=(0.1, 0.1), scale=(0.9, 1.1)
    )
    c.measures = dict(leave_one_out=True)
    rules = groups(scratch=20.0, modulation=20.0, finer=3.0, freeze_backbone=False)
    c.optim = base.adamw(1e-3, 1.0, clip_norm=2.0, **rules)
    c.evals = base.evals(
        1,
        batch_size=100,
        online_samples_train=400,
        online_samples_test=400,
        online=False,
        final=(),
        probe_epochs=10,
    )
    c.log = dict(every_steps=50, pictures=True)
    c.checkpoint = dict(every_epochs=1.0, keep_best=1, best="test/worst_group")
    return c


def _demo_baseline():
    """Return the demo's ViT without parts: what the background costs it."""
    c = _demo()
    c.parts.kind, c.measures.leave_one_out = "baseline", False
    c.optim.update(**groups("baseline", scratch=20.0, freeze_backbone=False))
    return c


# Both stages from one network, whatever wrote it; heads start from nothing.
BOTH = (("stage_[12]/backbone/(.*)", r"encoder/\1"),)
HEADS = ("stage_1/head/.*", "stage_2/(head|fc_norm|pool)/.*")


def _init(weights):
    return {"from": "", "weights": weights, "rename": BOTH, "skip": HEADS}


WORST = "final/test/worst_group"
OWN_BIRDS = dict(
    seeded=("data.options.seed",),
    first=("configs/hjepa.py:birds",),
    first_each_seed=True,
)
EQUAL = "epochs=15.0"  # A step of two ViTs costs three times as much.


def _one_vit(kind, *words):
    """Return the overrides of an arm with one ViT in place of two."""
    rules = groups("baseline", scratch=20.0, freeze_backbone=False)
    return (f"parts.kind={kind}", f"init.skip={HEADS[1:]!r}", *_optim(rules), *words)


def _optim(rules) -> tuple:
    """Return the overrides that set keys of `optim`."""
    return tuple(f"optim.{key}={value!r}" for key, value in rules.items())


def _evidence():
    """Return iFAM (hard, soft), an oracle, a placebo and no masks at equal compute.

    All arms of a seed start from one self-supervised checkpoint of its own images.
    `evidence_rates` found half of the demo's rate best, with masks and without, and for
    parts three times the demo's pull on the background.
    """
    c = _evidence_run()
    c.optim.lr, c.objective.background = 5e-4, 3.0
    c.init["from"] = "@first"
    given = _one_vit("given_mask", EQUAL)
    arms = dict(
        hard=(),
        soft=("parts.masks=soft",),
        true_masks=given,
        other_masks=(*given, "data.options.masks=other"),
        no_masks=_one_vit("baseline", EQUAL),
        no_masks_short=_one_vit("baseline"),
    )
    against = dict(
        no_masks=("hard", "no_masks"),
        placebo=("hard", "other_masks"),
        oracle=("true_masks", "hard"),
        hard_masks=("hard", "soft"),
        equal_steps=("hard", "no_masks_short"),
        soft_masks=("soft", "no_masks"),
        more_steps=("no_masks", "no_masks_short"),
    )
    c.study = dict(
        seeds=(0, 1, 2, 3, 4),
        arms=arms,
        columns=(
            WORST,
            *(
                f"final/test/{name}"
                for name in "top1 swap_same swap_random nmi ari keypoint_error "
                "miou".split()
            ),
            "compute/tflop",
            "time/train_seconds",
        ),
        gate=(("true_masks", WORST), ("no_masks", WORST), 0.1),
        claims={k: ((a, WORST), (b, WORST), 0.05) for k, (a, b) in against.items()},
        **OWN_BIRDS,
    )
    return c


def _evidence_rates():
    """Return the search of rates and loss weights for `evidence`, in another world.

    By accuracy in a test balanced over backgrounds; labels of parts are not used.
    """
    c = _evidence_run()
    c.init["from"] = "@first"
    rates = dict(base.RATES, lowest=2.5e-4)
    arms = {}
    for name, rate in rates.items():
        own = f"optim.lr={rate}"
        arms[f"hard_{name}"] = (own,)
        arms[f"no_masks_{name}"] = _one_vit("baseline", own)
    # The rest at half of the demo's rate, the best of the first three.
    c.optim.lr = 5e-4
    # As published: parts are looked for in features that stay what they were.
    still = _optim(groups(scratch=20.0, modulation=20.0, finer=3.0))
    arms["hard_frozen"] = still
    for weight in (3.0, 6.0, 12.0):
        arms[f"hard_background_{weight:g}"] = (f"objective.background={weight}",)
    arms["hard_frozen_background"] = (*still, "objective.background=3.0")
    arms["hard_compact"] = ("objective.concentration=60.0",)
    arms["no_masks_decay"] = _one_vit("baseline", "optim.wd=0.5")
    arms["no_masks_drop_path"] = _one_vit("baseline", "model.drop_path=0.1")
    columns = (WORST, "final/test/top1", "final/test/miou")
    c.study = dict(seeds=(100,), arms=arms, columns=columns, **OWN_BIRDS)
    return c


def _evidence_run():
    """Return one run of `evidence`: the demo before misleading backgrounds."""
    c = _demo()
    c.data.options.purity = 0.95
    c.init = _init("configs/hjepa.py:birds")
    c.evals.every_epochs = 0
    c.log.update(every_steps=200, pictures=False)
    c.measures.leave_one_out = False
    c.checkpoint.update(every_epochs=2.5, keep_best=0)
    return c


def _smoke():
    c = base.smoke(_demo(), 16)
    c.model.update(width=32, depth=1)
    c.data.options = dict(count=64)
    return c


def _folder():
    c = base.folder(_demo(), epochs=30.0)
    c.model.patch, c.augment.size = 8, 96
    c.measures.leave_one_out = False
    c.checkpoint.best = "test/top1"
    return c


def _published(source, count=8, batch=128, image=518):
    """Return what the published recipes share: ViT-B/14 with four registers."""
    c = _demo()
    c.precision, c.seed, c.batch_size, c.epochs = "bfloat16", 42, batch, 90.0
    c.data.source, c.data.options = source, {}  # update() would merge the options.
    c.model.update(patch=14, mlp_ratio=4.0, registers=4, layerscale=1e-5, remat=True)
    c.model.update(**base.VIT["b"])
    c.parts = dict(count=count)
    c.objective = dict(presence_group=16)
    c.augment = dict(size=image)
    c.optim.update(
        lr=1e-6,
        lr_batch=16,
        lr_batch_power=0.5,
        warmup_epochs=0.0,
        per_epoch=True,
        floors="absolute",
        wd_normalised=True,
        **groups(),
    )
    c.evals.update(batch_size=32, online_samples_train=0, online_samples_test=0)
    c.evals.final_of = "best"  # As the paper: the best validation accuracy.
    c.measures = dict(maps=0.05)
    c.init = _init("timm/vit_base_patch14_reg4_dinov2.lvd142m")
    c.log.every_steps = 10
    c.checkpoint.best = "test/top1"
    return c


def _waterbirds(count=8):
    c = _published("waterbirds", count)
    c.checkpoint.best = "test/worst_group"
    return c


def _siim_acr_rad_dino():
    c = _published("siim_acr")
    c.init.weights = "microsoft/rad-dino"
    c.data.update(mean=(0.48865,) * 3, std=(0.24621,) * 3)
    c.model.update(registers=0, class_position=True, resampling="plain")
    c.augment.update(recipe="siim_acr", planckian=0.0)
    c.checkpoint.best = "test/auroc"
    return c


def _metashift(count=2):
    c = _published("metashift", count, image=224)
    c.checkpoint.best = "test/worst_class"
    return c


def _pdiscoformer_cub():
    """Return PDiscoFormer's recipe, arXiv:2407.04538: one stage, Adam, stairs."""
    c = _published("cub", batch=32)
    c.epochs = 28.0
    c.parts.update(kind="single_stage", mask_dropout=0.0)
    c.augment.planckian = 0.0
    c.optim.update(
        name="adam",
        schedule="stairs",
        stair_epochs=4.0,
        gamma=0.5,
        wd=0.0,
        wd_normalised=False,
        **groups("single_stage"),
    )
    return c


def _pdisconet_cub():
    """Return PDiscoNet: the same head on a ResNet-101, nothing frozen."""
    c = _pdiscoformer_cub()
    c.model = dict(name="resnet", depths=(3, 4, 23, 3))
    c.init.weights = "timm/resnet101.tv_in1k"
    c.precision, c.augment.size, c.optim.lr = "float32", 448, 1e-4
    rates = dict(scratch=100.0, modulation=100.0, finer=10.0)
    c.optim.update(**groups("single_stage", freeze_backbone=False, **rates))
    return c


def _baseline(source="waterbirds", **keys):
    """Return one ViT without parts, fine-tuned as the originals' baselines are."""
    c = _published(source)
    c.parts.update(**dict(kind="baseline", pooling="cls") | keys)
    c.measures.maps = 0.0  # There are none.
    c.optim.update(
        lr=1e-4,
        lr_batch=0,
        clip_norm=0.0,
        **groups("baseline", scratch=100.0, freeze_backbone=False),
    )
    return c


def _given_mask(kind, **keys):
    c = _baseline("cub", kind=kind, **keys)
    c.data.options = dict(masks=True)
    c.augment.recipe = "given_mask"
    return c


RECIPES = {
    "": _demo,
    "smoke": _smoke,
    "evidence": _evidence,
    "evidence_run": _evidence_run,
    "evidence_rates": _evidence_rates,
    "demo_baseline": _demo_baseline,
    "folder": _folder,
    "cub_k8": lambda: _published("cub"),
    "cub_k4": lambda: _published("cub", 4),
    "waterbirds": _waterbirds,
    "waterbirds_k4": lambda: _waterbirds(4),
    "siim_acr_rad_dino": _siim_acr_rad_dino,
    "metashift": _metashift,
    "metashift_k1": lambda: _metashift(1),
    "metashift_k8": lambda: _metashift(8),
    "pdiscoformer_cub": _pdiscoformer_cub,
    "pdisconet_cub": _pdisconet_cub,
    "baseline_waterbirds": _baseline,
    "late_mask": lambda: _given_mask("baseline", pooling="late_mask"),
    "given_mask": lambda: _given_mask("given_mask"),
}


def _options(c, words):
    """Change a recipe by its options; rates and freezes belong together."""
    rates = {}
    for word in words:
        key, _, value = word.partition("=")
        if key in FLAGS:
            section, field, given = FLAGS[key]
            c[section][field] = given
        elif key == "as_coded":
            c.parts.eval_noise = True
            c.objective.orthogonality_axis = "channels"
        elif key == "train_backbone":
            rates["freeze_backbone"] = False
        elif key in FREEZES:
            rates[key] = True
        elif key in RATES and value:
            rates[key] = float(value)
        else:
            known = ", ".join((*FLAGS, "as_coded", "train_backbone", *FREEZES, *RATES))
            raise ValueError(f"no option {word!r}; there is: {known}")
    if rates:
        c.optim.update(**groups(c.parts.get("kind", "two_stage"), **rates))


get_config = base.recipes(RECIPES, _options)
