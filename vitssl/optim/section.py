"""The config section `optim`."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

EVERYTHING = ((".*", 1.0),)


@dataclasses.dataclass(frozen=True)
class Optim:
    """Config section `optim`.

    Attributes:
        name: adamw decouples weight decay (Loshchilov & Hutter 2019); adam, nadam and
            sgd add it to the gradient, as torch does; lars is You et al. 2017 as MAE
            codes it. lamb is You et al. 2019, arXiv:1904.00962, as timm codes it: a
            step has decay inside and, of leaves that decay, the length of the weights
            (timm's also has clip_norm=1.0 and eps=1e-6).
        lr: peak learning rate; for `lr_batch` images if that is not 0.
        lr_batch: 0, or the batch for which `lr` is meant: the rate used is
            lr * batch_size / lr_batch (MAE's `blr` has 256).
        lr_batch_power: of that quotient; 0.5 is the square-root rule.
        schedule: shape after the warm-up; ends at `min_lr`. "stairs" multiplies by
            `gamma` every `stair_epochs` instead. "onecycle" has no warm-up and no
            `min_lr`: it rises from lr / `cycle_div` over `cycle_rise` of the run and
            falls to lr / (`cycle_div` `cycle_final_div`).
        cycle_b1: with "onecycle", Adam's b1 goes from the second to the first value
            while the rate rises, and back; () leaves b1 alone. PyTorch's default is
            (0.85, 0.95).
        per_epoch: the rate changes at the start of an epoch only.
        warmup_epochs, start_lr: linear warm-up from start_lr.
        warmup_over: the warm-up covers the beginning of the schedule, which does not
            wait for it (timm).
        floors: "scaled": min_lr and start_lr are multiplied by a leaf's factor like
            the rate; "absolute": they hold for every leaf.
        stretch: the schedules are laid over `stretch` times the run and cut off
            (I-JEPA's ipe_scale of 1.25); 1.0 is none.
        wd: weight decay; with wd_schedule "cosine" it ends at `wd_end`.
        wd_normalised: the decay used is wd * sqrt(1 / steps of the run), Loshchilov &
            Hutter 2019, arXiv:1711.05101, appendix B.1.
        clip_norm: largest global gradient norm over trainable leaves; 0.0 is off.
        lr_rules: ((pattern, factor), ...), first match wins; factor 0.0 freezes.
        layer_decay: rates shrink by this factor from layer to layer towards the input,
            on top of lr_rules, by the table of `freeze.layers`; 0.0 or 1.0 is off.
        wd_rules: ((pattern, factor), ...) of the decay.
        freeze: ((pattern, fraction), ...): leaves matching are frozen from that
            fraction of the run on; 0.0 freezes them from the start.
        thaw: ((pattern, epochs), ...): leaves matching are frozen until that epoch;
            their moments, and Adam's count of updates, begin then.
    """

    name: Literal["adamw", "adam", "sgd", "lars", "nadam", "lamb"]
    lr: float
    schedule: Literal["cosine", "linear", "constant", "stairs", "onecycle"]
    warmup_epochs: float
    min_lr: float
    wd: float
    clip_norm: float
    start_lr: float = 0.0
    lr_batch: int = 0
    lr_batch_power: float = 1.0
    per_epoch: bool = False
    stair_epochs: float = 0.0
    gamma: float = 0.1
    warmup_over: bool = False
    floors: Literal["scaled", "absolute"] = "scaled"
    stretch: float = 1.0
    wd_schedule: Literal["constant", "cosine"] = "constant"
    wd_end: float = 0.0
    wd_normalised: bool = False
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9
    trust: float = 0.001
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    lr_rules: tuple[tuple[str, float], ...] = EVERYTHING
    layer_decay: float = 0.0
    wd_rules: tuple[tuple[str, float], ...] = EVERYTHING
    freeze: tuple[tuple[str, float], ...] = ()
    thaw: tuple[tuple[str, float], ...] = ()
    cycle_rise: float = 0.1
    cycle_div: float = 25.0
    cycle_final_div: float = 1e4
    cycle_b1: tuple[float, ...] = ()

    def check(self) -> Iterator[str]:
        """Yield what is out of range."""
        if self.lr <= 0:
            yield f"lr={self.lr}: must be above 0"
        if self.lr_batch < 0:
            yield f"lr_batch={self.lr_batch}: 0 (lr as it is) or a batch size"
        for key in ("min_lr", "start_lr", "wd", "wd_end", "clip_norm"):
            if getattr(self, key) < 0:
                yield f"{key}={getattr(self, key)}: must not be negative"
        for key in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, key) < 1:
                yield f"{key}={getattr(self, key)}: must be in [0, 1)"
        if not 0 <= self.layer_decay <= 1:
            yield f"layer_decay={self.layer_decay}: in (0, 1], or 0.0 (off)"
        if self.warmup_epochs < 0:
            yield f"warmup_epochs={self.warmup_epochs}: must not be negative"
        if self.schedule == "stairs" and self.stair_epochs <= 0:
            yield f"stair_epochs={self.stair_epochs}: schedule=stairs needs its length"
        if self.schedule == "onecycle":
            yield from self._check_cycle()
        elif self.cycle_b1:
            yield f"cycle_b1={self.cycle_b1}: needs schedule=onecycle"
        for pattern, epochs in self.thaw:
            if epochs < 0:
                yield f"thaw: {pattern!r} at {epochs}: 0.0 or more epochs"
        if self.stretch < 1:
            yield f"stretch={self.stretch}: must be 1.0 or more"
        for pattern, fraction in self.freeze:
            if not 0 <= fraction <= 1:
                yield f"freeze: {pattern!r} at {fraction}: a fraction in [0, 1]"

    def _check_cycle(self):
        if self.warmup_epochs:
            yield (
                f"warmup_epochs={self.warmup_epochs}: schedule=onecycle rises by "
                "itself (cycle_rise); set it to 0.0"
            )
        if not 0 < self.cycle_rise < 1:
            yield f"cycle_rise={self.cycle_rise}: a share of the run, in (0, 1)"
        for key in ("cycle_div", "cycle_final_div"):
            if getattr(self, key) < 1:
                yield f"{key}={getattr(self, key)}: 1.0 or more"
        b1 = self.cycle_b1
        if b1 and (len(b1) != 2 or not 0 <= b1[0] <= b1[1] < 1):
            yield f"cycle_b1={b1}: (), or (lowest, highest) in [0, 1)"
