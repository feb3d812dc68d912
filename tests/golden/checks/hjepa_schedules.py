"""Schedules of H-JEPA and I-JEPA."""

import numpy as np

from vitssl.data import crops
from vitssl.optim import schedules


def _schedules(case):
    c, out = case.config, case.out
    lr = c["lr"]
    per_epoch = lr["steps_per_epoch"]
    shared = dict(
        base=lr["base_value"],
        final=lr["final_value"],
        total_steps=lr["epochs"] * per_epoch,
        warmup_steps=lr["warmup_epochs"] * per_epoch,
    )
    steps = np.arange(len(out["cosine"]))
    case.close("cosine", schedules.cosine(steps, **shared))
    case.close("linear", schedules.linear(np.arange(len(out["linear"])), **shared))
    # Defect 10 of the original: the first update at the base rate, then a step late.
    name = "original_lr_used_by_optimizer_step"
    late = np.asarray(schedules.cosine(np.arange(len(out[name])) - 1, **shared))
    case.close(name, np.where(np.arange(len(late)) == 0, lr["base_value"], late))

    ema = c["ema"]
    steps = np.arange(len(out["ema"]))
    case.close("ema", _momentum(ema, steps))

    ij = c["ijepa_lr"]
    steps = np.arange(len(out["ijepa_lr"])) + 1  # It steps before the first update.
    got = schedules.cosine(
        steps,
        base=ij["ref_lr"],
        final=ij["final_lr"],
        start=ij["start_lr"],
        warmup_steps=ij["warmup_steps"],
        total_steps=ij["T_max"],
    )
    case.close("ijepa_lr", got)
    wd = c["ijepa_wd"]
    got = schedules.cosine(
        np.arange(len(out["ijepa_wd"])) + 1,
        base=wd["ref_wd"],
        final=wd["final_wd"],
        total_steps=wd["T_max"],
    )
    case.close("ijepa_wd", got)
    span = c["ijepa_ipe_scale"] * ema["epochs"] * ema["steps_per_epoch"]
    got = schedules.momentum(
        np.arange(len(out["ijepa_ema"])),
        start=ema["base_value"],
        end=ema["final_value"],
        total_steps=span,
    )
    case.close("ijepa_ema", got)

    target = c["target_encoder"]
    got = schedules.momentum(
        np.minimum(np.arange(len(out["target_encoder_momentum"])), 10**9),
        start=target["start"],
        end=target["end"],
        total_steps=target["warmup_steps"],
    )
    case.close("target_encoder_momentum", got)

    rule = _adaptive(c["adaptive"], c["adaptive"]["warmup_epochs"])
    epochs = range(len(out["adaptive_local_crops"]))
    case.close("adaptive_local_crops", [rule.locals_at(e) for e in epochs])
    still = _adaptive(c["adaptive"], 0)
    case.close("adaptive_no_warmup", still.locals_at(99))


def _momentum(ema, steps):
    per_epoch = ema["steps_per_epoch"]
    return schedules.momentum(
        steps,
        start=ema["base_value"],
        end=ema["final_value"],
        total_steps=ema["epochs"] * per_epoch,
        warmup_steps=ema["warmup_epochs"] * per_epoch,
    )


def _adaptive(spec, warmup_epochs):
    return crops.MultiCrop(
        num_global_crops=2,
        num_local_crops=6,
        global_crop_size=32,
        local_crop_size=16,
        global_crop_scale=(0.4, 1.0),
        local_crop_scale=(0.05, 0.4),
        global_color_jitter=0.4,
        local_color_jitter=0.4,
        color_jitter_prob=1.0,
        horizontal_flip_prob=0.5,
        interpolation="bicubic",
        colour="host",
        adaptive=True,
        min_local_crops=spec["min_local_crops"],
        max_local_crops=spec["max_local_crops"],
        adaptive_warmup_epochs=warmup_epochs,
    )


CHECKS = {"schedules": _schedules}
