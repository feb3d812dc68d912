"""Schedules as pure functions of the 0-based step; python ints or traced arrays.

Golden cases: tests/golden/cases/hjepa/schedules. Steps are optimizer steps.
"""

import jax.numpy as jnp


def warmup(step, decay, *, start, base, warmup_steps):
    """Return start -> base over `warmup_steps`, then `decay` (already computed)."""
    if warmup_steps <= 0:
        return decay
    rise = start + (base - start) * step / warmup_steps
    return jnp.where(step < warmup_steps, rise, decay)


def cosine(step, *, base, final, total_steps, warmup_steps=0, start=0.0):
    """Linear warm-up start -> base, then half a cosine base -> final at `total_steps`.

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983, Eq. 5 (one period).
    """
    x = _progress(step, warmup_steps, total_steps)
    decay = final + (base - final) * 0.5 * (1 + jnp.cos(jnp.pi * x))
    return warmup(step, decay, start=start, base=base, warmup_steps=warmup_steps)


def linear(step, *, base, final, total_steps, warmup_steps=0, start=0.0):
    """Linear warm-up start -> base, then a line base -> final at `total_steps`."""
    x = _progress(step, warmup_steps, total_steps)
    decay = base + (final - base) * x
    return warmup(step, decay, start=start, base=base, warmup_steps=warmup_steps)


def constant(step, *, base, warmup_steps=0, start=0.0):
    """Linear warm-up start -> base, then base for ever."""
    flat = base + 0.0 * step
    return warmup(step, flat, start=start, base=base, warmup_steps=warmup_steps)


def stairs(step, *, base, length, gamma, warmup_steps=0, start=0.0):
    """Linear warm-up, then base times gamma for every `length` steps since its end.

    Source: timm's StepLRScheduler; with no warm-up it is torch's StepLR.
    """
    decay = base * gamma ** jnp.floor((step - warmup_steps) / length)
    return warmup(step, decay, start=start, base=base, warmup_steps=warmup_steps)


def onecycle(step, *, base, total_steps, rise=0.1, div=25.0, final_div=1e4):
    """Half a cosine base / div -> base, then half a cosine to base / (div final_div).

    The peak is at step rise * total_steps - 1, the end at the last step.

    Source: Smith & Topin 2017, arXiv:1708.07120; torch.optim.lr_scheduler.OneCycleLR.
    """
    first, last = base / div, base / (div * final_div)
    return _two_halves(step, (first, base, last), total_steps, rise)


def onecycle_momentum(step, *, low, high, total_steps, rise=0.1):
    """Adam's beta1 beside `onecycle`: high -> low -> high."""
    return _two_halves(step, (high, low, high), total_steps, rise)


def _two_halves(step, values, total_steps, rise):
    """Return half a cosine between each two of three values."""
    peak, (a, b, c) = rise * total_steps - 1, values
    up = jnp.clip(step / max(peak, 1e-9), 0.0, 1.0)
    down = jnp.clip((step - peak) / max(total_steps - 1 - peak, 1e-9), 0.0, 1.0)

    def between(x, y, t):
        return y + (x - y) * 0.5 * (1 + jnp.cos(jnp.pi * t))

    return jnp.where(step <= peak, between(a, b, up), between(b, c, down))


def averaging(step, *, decay, gamma=1.0, power=2 / 3):
    """EMA decay that grows with the updates: min(decay, 1 - (1 + t / gamma)^-power).

    t = step - 1, and the decay is 0 (a copy) until t is positive.

    Source: timm's ModelEmaV3 with use_warmup.
    """
    t = jnp.maximum(0.0, jnp.asarray(step, jnp.float32) - 1.0)
    return jnp.minimum(decay, 1.0 - (1.0 + t / gamma) ** -power)


def averaging_counted(step, *, decay):
    """EMA decay min(decay, (1 + n) / (10 + n)) of update n = 1, 2, ...

    Source: tf.train.ExponentialMovingAverage with num_updates.
    """
    n = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))


def momentum(step, *, start, end, total_steps, warmup_steps=0):
    """EMA momentum: `start` during the warm-up, then a line to `end` at the last step.

    Source: jonwiggins/H-JEPA src/utils/scheduler.py:EMAScheduler; with no warm-up it
    is I-JEPA's (facebookresearch/ijepa src/train.py).
    """
    x = _progress(step, warmup_steps, total_steps)
    return jnp.where(step < warmup_steps, start, start + (end - start) * x)


def _progress(step, warmup_steps, total_steps):
    """Return the position between the end of the warm-up and the end, in [0, 1]."""
    x = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return jnp.clip(x, 0.0, 1.0)
