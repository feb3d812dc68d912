"""HViT's rates, Adam's beta1 and when the backbone is frozen, through the optimizer."""

import jax.numpy as jnp
import numpy as np

from vitssl import tree
from vitssl.optim import optimizer


def _optimizer(total, per_epoch=1, **spec):
    values = dict(
        name="adamw",
        lr=1.0,
        schedule="cosine",
        warmup_epochs=0.0,
        min_lr=0.0,
        wd=0.0,
        clip_norm=0.0,
    )
    params = {"backbone/w": jnp.zeros(1), "head/w": jnp.zeros(1)}
    return optimizer.make(
        optimizer.Optim(**values | spec),
        tree.nest(params),
        total_steps=total,
        steps_per_epoch=per_epoch,
        batch_size=1,
    )


def _schedules(case):
    c = case.config
    epochs, batches, warm = c["epochs"], c["batches_per_epoch"], c["warmup_epochs"]
    accumulate = c["accumulation_steps"]
    updates = -(-batches // accumulate)  # An epoch's last group may be smaller.
    for name, total, warmup in (
        ("warmup_cosine_lr", epochs * batches, warm * batches),
        # The original counts batches, and steps the schedule once per update.
        ("warmup_cosine_lr_accum_original", epochs * batches, warm * batches),
        ("warmup_cosine_lr_accum_corrected", epochs * updates, warm * updates),
    ):
        made = _optimizer(total, lr=c["base_lr"], warmup_epochs=float(warmup))
        case.close(name, made.lr(np.arange(len(case.out[name]))))
    made = _optimizer(
        epochs, lr=c["base_lr"], warmup_epochs=float(warm), min_lr=c["eta_min"]
    )
    case.close("cosine_epoch_lr", made.lr(np.arange(1, epochs + 1)))

    one = c["onecycle"]
    backbone, head = one["max_lrs"]
    made = _optimizer(
        one["total_steps"],
        one["total_steps"] // epochs,
        lr=head,
        lr_rules=(("backbone/.*", backbone / head), (".*", 1.0)),
        schedule="onecycle",
        cycle_rise=one["pct_start"],
        cycle_div=one["div_factor"],
        cycle_final_div=one["final_div_factor"],
        cycle_b1=(0.85, 0.95),
        thaw=(("backbone/.*", float(one["freeze_backbone_epochs"])),),
    )
    steps = np.arange(one["total_steps"])
    factors = [made.lr_factor[f"{k}/w"] for k in ("backbone", "head")]
    rates = np.stack([made.lr(steps, f) for f in factors], -1)
    case.close("onecycle_lr", rates)
    # Rates are small: the case asks for a relative comparison too.
    np.testing.assert_allclose(rates, case.out["onecycle_lr"], rtol=1e-5, atol=1e-9)
    case.close("onecycle_beta1", made.b1(steps))
    per_epoch = one["total_steps"] // epochs
    frozen = [int("backbone/w" in made.frozen(e * per_epoch)) for e in range(epochs)]
    case.close("backbone_frozen_by_epoch", frozen)


CHECKS = {"learning-rate and freeze schedules": _schedules}
