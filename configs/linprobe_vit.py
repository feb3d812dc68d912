r"""Linear probe: one linear layer on a frozen pre-trained ViT, as MAE does it.

    python -m vitssl.main --config=configs/linprobe_vit.py --config.init.from=WORKDIR

Batch normalisation without gain, LARS, no weight decay. (Pre-training runs report a
faster probe of their own; this is the protocol of the papers.)

Arguments (`--config=configs/linprobe_vit.py:NAME`):
    (none)          demo size, for a checkpoint of the demo of configs/localmim.py
    smoke           two steps on random weights
    lp_vitb_cubic080, lp_vitb_cubic065
                    ViT-B/16 on ImageNet, effective batch 16384; from runs of
                    configs/localmim.py:freeze_cubic080_8gpu, and
                    configs/localmim.py:freeze_cubic065_1gpu

Published (pooled patch tokens): 49.4 % (cubic 0.8), 37.1 % (cubic 0.65).
"""

from vitssl import config

base = config.beside(__file__, "base")
finetune_vit = config.beside(__file__, "finetune_vit")


def _probe(name=""):
    """Turn a fine-tuning config into a probe."""
    c = finetune_vit.get_config(name)
    c.head.update(batchnorm=True, init_std=0.01)
    c.model.drop_path = 0.0
    c.objective.smoothing = 0.0
    c.mix = {}
    c.augment.update(randaugment="", erase=0.0, crop="clipped")
    c.optim.update(
        name="lars",
        lr=0.1,
        lr_batch=256,
        min_lr=0.0,
        wd=0.0,
        layer_decay=0.0,
        wd_rules=((".*", 0.0),),
    )
    # The LayerNorm before the probe stays what it is: plain.
    c.optim.freeze = (("backbone/.*|head/(block_.*/)?norm/.*", 0.0),)
    return c


def _demo():
    c = _probe()
    c.batch_size, c.epochs = 256, 60.0
    c.optim.update(lr=2.0, warmup_epochs=6.0)
    c.evals.every_epochs = 20.0
    c.checkpoint.every_epochs = 20.0
    return c


def _smoke():
    c = _probe("smoke")
    c.objective.ema = 0.0
    return c


def _imagenet(weights):
    c = _probe("ft_vitb_from100_1gpu")
    c.init["weights"] = f"configs/localmim.py:{weights}"
    c.batch_size, c.per_device, c.epochs = 16384, 2048, 90.0
    c.optim.warmup_epochs = 10.0
    c.checkpoint.every_epochs = 1.0
    return c


RECIPES = {
    "": _demo,
    "smoke": _smoke,
    "lp_vitb_cubic080": lambda: _imagenet("freeze_cubic080_8gpu"),
    "lp_vitb_cubic065": lambda: _imagenet("freeze_cubic065_1gpu"),
}
get_config = base.recipes(RECIPES)
