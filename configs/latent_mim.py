r"""Hybrid patch size: several sensors processed at 8 pixels, features put out at 1.

    python -m vitssl.main --config=configs/latent_mim.py

Arguments (`--config=configs/latent_mim.py:NAME`):
    (none)          demo: drawn farmland under clouds, minutes on two cores; ends with
                    the land cover of every pixel (mIoU), untrained at step 0
    smoke           two steps, seconds
    evidence        p=8 upsampled, hybrids with q=4 and everything at 4 pixels, at equal
                    compute, each untrained too, and with the truth as a target: classes
                    that texture and shape tell, three seeds, an hour on two cores
    evidence_rates  the search of its learning rates, in another world
    evidence_lengths
                    the four ways at a quarter, a half and twice the compute
    nano_ps8_ps1    OlmoEarth nano, p=8 and q=1; needs --config.data.root=DIR
    base_ps8_ps1    the same at base size
    nano, tiny, base, large
                    OlmoEarth as published: patches of 1 to 8 pixels, no hybrid
    rgb_vitb_p16_q4
                    photographs as one sensor, ViT-B/16 with features at 4 pixels
    eurosat         nothing is trained: k-NN and probe on EuroSAT's 13 bands; needs
                    --config.init.from=WEIGHTS as well, and network.size as theirs is
    geotiff         the same on one's own GeoTIFF files; a probe of every pixel with
                    data.options.masks=DIR and measures.classes=N
    pastis          crops in PASTIS-R, Sentinel-2 and 1: a probe of every pixel, taught
                    by the training folds; data.options.impute=True as the original
    mados           marine debris in MADOS: a probe of every pixel

DIR holds OlmoEarth's HDF5 samples; the published ones are compressed by zstd and need
the extra `olmoearth`. Learning rates and decays of nano to large are those of the
released weights; 300 epochs of 1 138 828 samples at a batch of 512.

One override away:
    --config.hybrid.output_patch_size=2
    --config.hybrid.upsampler=bilinear --config.hybrid.visible_loss_weight=0.0
    --config.hybrid.decoder=output              (all of the decoder at q: dear)
    --config.hybrid.sampled_keys=True           (trains an upsampler, too)
    --config.hybrid.loss_tokens_per_modality=256
    --config.mask.type=random_with_decode --config.mask.encode_ratio=0.4
    --config.objective.same_target_threshold=0.999
    --config.target.start=0.996                 (the target follows the encoder)
    --config.target.centre=False                (as the original)
    --config.readout.mode=decoder               (read the predictor's answers)
    --config.network.anchor=corner --config.network.frequencies=legacy

The demo, seed 0: land cover of every pixel, mIoU 0.84 after 400 steps (0.82 after
200), 0.57 untrained, the pixels themselves 0.68. Masked Sentinel-1 at 1 px is speckle:
its loss stays at chance.
Published (linear probe, m-eurosat, nano / tiny / base): 93.1, 95.3, 97.5 %; of the
hybrid nothing is: the original's step raises before the first update.
"""

from vitssl import config

base = config.beside(__file__, "base")

MAPS = (
    "worldcover",
    "srtm",
    "openstreetmap_raster",
    "wri_canopy_height_map",
    "cdl",
    "worldcereal",
)
ALL = ("sentinel2_l2a", "sentinel1", "landsat", *MAPS)
FEW = ("sentinel2_l2a", "sentinel1", "worldcover", "srtm")
RATES = {  # size: learning rate and decay of the released weights
    "nano": (1e-3, 2e-3),
    "tiny": (2e-4, 2e-2),
    "base": (1e-4, 2e-2),
    "large": (1e-4, 2e-3),
}


def _sections():
    """Return every section, at the size of two cores."""
    c = base.run("latent_mim", batch_size=16, epochs=20.0)
    # Every sensor has a table of its own; channels, mean and std are for photographs.
    c.data = base.data("fields", mean=(0.0,), std=(1.0,))
    c.data["options"] = dict(modalities=FEW, size=48)
    c.inputs = dict(modalities=FEW)
    c.network = dict(
        size="", width=64, heads=4, depth=3, decoder_depth=1, drop_path=0.0
    )
    c.hybrid = dict(
        processing_patch_size=(8,),
        output_patch_size=1,
        upsampler="skip",
        loss_tokens_per_modality=64,
        visible_loss_weight=1.0,
    )
    c.sampling = dict(token_budget=300, min_side=4, max_side=4, tile=48, times=4)
    c.objective = dict(same_target_threshold=0.999)
    c.target = dict(centre=True)
    c.readout = dict(times=4, pool="times")
    c.measures = dict(classes=6, taught="test", epochs=20, lr=0.05, batch_size=8)
    c.optim = base.adamw(2e-3, 2.0, min_lr=2e-4, wd=0.02, clip_norm=1.0)
    c.evals = base.evals(
        0,
        batch_size=16,
        online_samples_train=128,
        online_samples_test=128,
        final=("knn", "linear", "quality"),
        probe_epochs=50,
    )
    c.log = dict(every_steps=50)
    c.checkpoint = dict(every_epochs=10.0, best="test/miou")
    return c


def _demo():
    """Return the demo."""
    c = _sections()
    # Noise that makes a pixel hard to tell by itself, so that its surroundings help.
    c.data.options.update(count=320, held=320, noise=0.35)
    c.evals.update(every_epochs=10, online_samples_test=160, final_samples_test=160)
    return c


def _smoke():
    c = base.smoke(_sections(), 4)
    c.data.options.update(size=16, count=8)
    c.network.update(width=16, heads=2, depth=1)
    c.sampling.update(min_side=2, max_side=2, tile=16, times=2)
    c.hybrid.loss_tokens_per_modality = 16
    c.readout.times, c.measures.epochs = 2, 2
    c.evals.update(batch_size=4, final=("knn",), knn_k=(3,))
    return c


# Equal compute by XLA's count: 0.140, 0.173, 0.199 and 0.599 GFLOP per image.
STEPS = dict(p8_upsampled=3420, hybrid_bilinear=2760, hybrid_skip=2400, all_at_q=800)


def _evidence():
    """Return four ways to features of 4 pixels, at equal compute, with controls.

    A pixel's colours name no class here: what surrounds it does.
    """
    c = _sections()
    few = ("sentinel2_l2a", "srtm")
    c.data.options.update(told_by="texture", clouds=0.0, gaps=0.0, noise=0.2)
    known = (*few, "worldcereal")  # Its bands are the classes.
    c.data.options.update(modalities=known, count=640, test_count=240, held=880)
    c.inputs.modalities, c.mask = few, dict(type="random")
    c.hybrid.update(output_patch_size=4, loss_tokens_per_modality=96)
    c.sampling.update(times=1, token_budget=800, min_side=6, max_side=6)
    # One view: the term that compares two doubles the step and tells scenes apart.
    c.augment, c.objective.contrast_weight = dict(views=1), 0.0
    c.readout.update(q=4, times=1)
    c.measures.update(classes=8, probe="lbfgs", beside=True)
    c.steps, c.optim.lr = STEPS["hybrid_skip"], 4e-3
    c.evals.update(every_epochs=0, final=(), final_samples_test=240)
    c.log.update(every_steps=100, tensorboard=False, pictures=False)
    c.checkpoint.update(every_epochs=5.0, best="loss")
    coarse = ("hybrid.output_patch_size=8", "hybrid.upsampler=bilinear")
    bilinear = ("hybrid.upsampler=bilinear",)
    fine = ("hybrid.processing_patch_size=(4,)", "sampling.min_side=12")
    fine += ("sampling.max_side=12",)
    none = ("steps=1", "optim.warmup_epochs=0.0", "optim.lr=1e-9")
    truth = (f"inputs.modalities={known}",)
    alone = "objective.modality_weights=(('sentinel2_l2a',0.0),('srtm',0.0))"
    alone = (*truth, alone, *bilinear, "hybrid.visible_loss_weight=0.0", "steps=2760")
    miou, beside = "final/test/miou", "final/test/miou_beside"
    pairs = dict(  # Claim: the arm and score that are ahead, of which.
        as_good_as_all_at_q=("hybrid_skip", miou, "all_at_q", miou),
        training_beats_handing_on=("hybrid_skip", miou, "untrained_p8", beside),
        hybrid_adds=("hybrid_skip", beside, "untrained_p8", beside),
        bilinear_adds=("hybrid_bilinear", beside, "untrained_p8", beside),
        coarse_adds=("p8_upsampled", beside, "untrained_p8", beside),
        fine_adds=("all_at_q", beside, "untrained_q", beside),
        bilinear_beats_all_at_q=("hybrid_bilinear", beside, "all_at_q", beside),
        fine_loss_helps=("hybrid_bilinear", miou, "p8_upsampled", miou),
        skip_helps=("hybrid_skip", miou, "hybrid_bilinear", miou),
    )
    c.study = dict(
        seeds=(0, 1, 2),
        seeded=("data.options.seed",),
        arms=dict(
            p8_upsampled=(*coarse, f"steps={STEPS['p8_upsampled']}"),
            hybrid_bilinear=(*bilinear, f"steps={STEPS['hybrid_bilinear']}"),
            hybrid_skip=(),
            all_at_q=(*fine, f"steps={STEPS['all_at_q']}"),
            truth_skip=truth,
            truth_alone=alone,
            untrained_p8=(*coarse, *none),
            untrained_skip=none,
            untrained_q=(*fine, *none),
        ),
        gate=(("truth_alone", beside), ("untrained_p8", beside), 0.1),
        claims={k: ((a, x), (b, y), 0.02) for k, (a, x, b, y) in pairs.items()},
        columns=(beside, miou, f"{miou}_blocks", f"{miou}_pixels", "compute/tflop"),
    )
    return c


def _evidence_rates():
    """Return the search of the learning rates for `evidence`, in another world."""
    c = _evidence()
    rates = dict(half=2e-3, own=4e-3, double=8e-3)
    c.study.arms = {
        f"{way}_{name}": (*c.study.arms[way], f"optim.lr={rate}")
        for way in STEPS
        for name, rate in rates.items()
    }
    c.study.seeds = (100,)
    del c.study.gate, c.study.claims
    return c


def _evidence_lengths():
    """Return `evidence` at a quarter, a half and twice the compute."""
    c = _evidence()
    c.study.arms = {
        f"{way}_{name}": (*c.study.arms[way], f"steps={int(share * steps)}")
        for way, steps in STEPS.items()
        for name, share in dict(quarter=0.25, half=0.5, twice=2.0).items()
    }
    del c.study.gate, c.study.claims
    return c


def _published(size="nano", *, lr=None, wd=None):
    """Return OlmoEarth's recipe: patches of 1 to 8 pixels, the weights' conventions."""
    rate, decay = RATES[size]
    rate, decay = lr or rate, wd or decay
    c = _sections()
    c.precision = "bfloat16"
    c.batch_size, c.epochs, c.per_device = 512, 300.0, 32
    # Not by update(), which would keep the options of the demo.
    c.data.source, c.data.options = "olmoearth", dict(modalities=ALL)
    c.inputs.modalities = ALL
    c.network = dict(
        size=size, patch_resize="input", frequencies="legacy", anchor="corner"
    )
    c.hybrid = dict(
        processing_patch_size=(), output_patch_size=0, loss_tokens_per_modality=16384
    )
    c.sampling = dict(hold=8)
    c.objective.same_target_threshold = 0.0
    c.target.centre, c.measures.classes = False, 0
    # 8000 steps of 2224 an epoch; the rate ends at a tenth of its peak.
    c.optim.update(lr=rate, wd=decay, warmup_epochs=3.597, min_lr=0.1 * rate)
    c.evals.update(image_size=64, batch_size=64, final=("quality",))
    c.readout.update(p=4, times=12, pool="mean")
    c.checkpoint.update(every_epochs=0.25, keep_every_epochs=2.25, best="loss")
    return c


def _ps8_ps1(size="nano"):
    """Return the hybrid at p=8, q=1, as it was meant to be."""
    c = _published(size, lr=1e-4, wd=0.02)
    c.network = dict(size=size)
    c.hybrid = dict(processing_patch_size=(8,), output_patch_size=1)
    c.objective.same_target_threshold = 0.999
    c.readout.update(p=8, q=1)
    return c


def _rgb():
    """Return a ViT-B/16 on photographs, features at 4 pixels."""
    c = _ps8_ps1("base")
    c.batch_size, c.per_device = 1024, 64
    c.data = base.data("imagenet", **base.RGB | dict(test_split="val"))
    c.inputs.modalities = ("rgb",)
    c.network.base_patch = 16
    c.hybrid.update(processing_patch_size=(16,), output_patch_size=4)
    c.mask = dict(type="random", decode_only=())
    c.sampling.update(token_budget=196, min_side=14, max_side=14, tile=224, times=1)
    c.augment = dict(turns="flip")
    c.objective.same_target_modalities = ()
    c.optim.warmup_epochs = 10.0
    c.evals.update(image_size=0, final=("knn", "linear", "quality"))
    c.readout.update(p=16, q=4, times=1)
    c.checkpoint.update(every_epochs=1.0, keep_every_epochs=50.0)
    return c


def _labelled(source, read=("sentinel2_l2a",), **options):
    """Return what only evaluates, at patches of 4 pixels, as OlmoEarth is evaluated."""
    c = _published()
    c.epochs, c.optim.warmup_epochs = 0.0, 0.0
    c.precision, c.batch_size, c.per_device = "float32", 16, 0
    # All that the weights know, so that they load as a whole; what is absent is masked.
    c.data.source, c.data.options = source, dict(modalities=ALL, **options)
    c.sampling.update(tile=64, min_patch=4, max_patch=4, min_side=8, max_side=8)
    c.readout.update(modalities=read, p=4, times=1)
    c.evals.update(image_size=64, batch_size=32, online=False, final=("knn", "linear"))
    c.measures.taught = "bank"
    c.checkpoint.best = ""
    return c


def _per_pixel(source, classes, lr, batch_size, **options):
    """Return a probe of every pixel, taught by the training split."""
    c = _labelled(source, **options)
    c.measures.update(classes=classes, epochs=50, lr=lr, batch_size=batch_size)
    c.evals.final = ()
    return c


def _pastis():
    c = _per_pixel("pastis", 19, 0.1, 8, read=("sentinel2_l2a", "sentinel1"))
    c.readout.times = 12
    # Pixels of all dates of the training split would be 8 GB.
    c.measures.pixels = False
    return c


def _mados():
    c = _per_pixel("mados", 15, 0.01, 128)
    c.evals.image_size = 80
    return c


RECIPES = {
    "": _demo,
    "smoke": _smoke,
    "evidence": _evidence,
    "evidence_rates": _evidence_rates,
    "evidence_lengths": _evidence_lengths,
    "nano_ps8_ps1": _ps8_ps1,
    "base_ps8_ps1": lambda: _ps8_ps1("base"),
    "nano": _published,
    "tiny": lambda: _published("tiny"),
    "base": lambda: _published("base"),
    "large": lambda: _published("large"),
    "rgb_vitb_p16_q4": _rgb,
    "eurosat": lambda: _labelled("eurosat"),
    "pastis": _pastis,
    "mados": _mados,
    "geotiff": lambda: _labelled("geotiff"),
}
get_config = base.recipes(RECIPES)
