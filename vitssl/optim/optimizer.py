"""Optimizers over the trainable leaves only: rates, decay, clipping, freezing.

Everything that depends on time is a pure function of the step, so a resumed run
needs no state beyond the moments. Parameters are flat here: {name: leaf}
(`tree.split`), which makes "drop the state of these leaves" one dict filter.
"""

import bisect
import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax

from vitssl import errors, ranges, tree
from vitssl.optim import directions, freezeout, schedules

EVERYTHING = ((".*", 1.0),)
OneOrMore = Annotated[float, ranges.Range(1)]
Inside = Annotated[float, ranges.Range(0, 1, open_low=True, open_high=True)]


@dataclasses.dataclass(frozen=True)
class Optim:
    """Config section `optim`.

    Attributes:
        name: adamw decouples weight decay (Loshchilov & Hutter 2019); adam, nadam and
            sgd add it to the gradient, as torch does; lars is You et al. 2017 as MAE
            codes it; lamb is You et al. 2019, arXiv:1904.00962, as timm codes it: a
            step has decay inside and, of leaves that decay, the length of the weights
            (timm's also has clip_norm=1.0 and eps=1e-6).
        lr: peak learning rate; for `lr_batch` images if that is not 0.
        lr_batch: 0, or the batch for which `lr` is meant: the rate used is
            lr * batch_size / lr_batch (MAE's `blr` has 256).
        lr_batch_power: of that quotient; 0.5 is the square-root rule.
        schedule: shape after the warm-up; ends at `min_lr`. "stairs" multiplies by
            `gamma` every `stair_epochs` since then instead. "onecycle" has no warm-up
            and no `min_lr`: it rises from lr / `cycle_div` over `cycle_rise` of the
            run and falls to lr / (`cycle_div` `cycle_final_div`).
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
        b1, b2: decay of Adam's averages of the gradient and of its square.
        eps: Adam's, added to the root of the second average.
        momentum: of sgd and lars.
        trust: lars' coefficient: a leaf's step over the length of the leaf.
        mu_dtype: in which the first average is kept; bfloat16 halves its memory.
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
    lr: ranges.Positive
    schedule: Literal["cosine", "linear", "constant", "stairs", "onecycle"]
    warmup_epochs: ranges.NotNegative
    min_lr: ranges.NotNegative
    wd: ranges.NotNegative
    clip_norm: ranges.NotNegative
    start_lr: ranges.NotNegative = 0.0
    lr_batch: ranges.OrNone = 0
    lr_batch_power: float = 1.0
    per_epoch: bool = False
    stair_epochs: float = 0.0
    gamma: float = 0.1
    warmup_over: bool = False
    floors: Literal["scaled", "absolute"] = "scaled"
    stretch: OneOrMore = 1.0
    wd_schedule: Literal["constant", "cosine"] = "constant"
    wd_end: ranges.NotNegative = 0.0
    wd_normalised: bool = False
    b1: ranges.BelowOne = 0.9
    b2: ranges.BelowOne = 0.999
    eps: float = 1e-8
    momentum: ranges.BelowOne = 0.9
    trust: float = 0.001
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    lr_rules: tuple[tuple[str, float], ...] = EVERYTHING
    layer_decay: ranges.Probability = 0.0
    wd_rules: tuple[tuple[str, float], ...] = EVERYTHING
    freeze: tuple[tuple[str, ranges.Probability], ...] = ()
    thaw: tuple[tuple[str, ranges.NotNegative], ...] = ()
    cycle_rise: Inside = 0.1
    cycle_div: OneOrMore = 25.0
    cycle_final_div: OneOrMore = 1e4
    cycle_b1: tuple[ranges.BelowOne, ...] = ()

    def check(self) -> Iterator[str]:
        """Yield what cannot be combined."""
        if self.schedule == "stairs" and self.stair_epochs <= 0:
            yield f"stair_epochs={self.stair_epochs}: schedule=stairs needs its length"
        if self.schedule == "onecycle" and self.warmup_epochs:
            yield (
                f"warmup_epochs={self.warmup_epochs}: schedule=onecycle rises by "
                "itself (cycle_rise); set it to 0.0"
            )
        b1 = self.cycle_b1
        if b1 and self.schedule != "onecycle":
            yield f"cycle_b1={b1}: needs schedule=onecycle"
        elif b1 and (len(b1) != 2 or b1[0] > b1[1]):
            yield f"cycle_b1={b1}: (), or (lowest, highest)"


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer of one run: rules resolved for its parameters.

    Attributes:
        spec: the config section.
        peak: learning rate at the end of the warm-up, after scaling by the batch.
        total_steps, warmup_steps, steps_per_epoch: optimizer steps.
        lr_factor, wd_factor: {name: factor}.
        frozen_from: {name: first step at which the leaf is frozen}.
        layers: {name: layer index} of FreezeOut; empty without it.
        plan: FreezeOut's schedule, or None.
        frozen_until: {name: first step at which the leaf trains}.
        store: the section `freeze.store`.
        grow_batch, batch_size: see `freezeout.FreezeOut`, and images of the first step.
    """

    spec: Optim
    peak: float
    total_steps: int
    warmup_steps: int
    lr_factor: dict
    wd_factor: dict
    frozen_from: dict
    steps_per_epoch: int = 1
    layers: dict = dataclasses.field(default_factory=dict)
    plan: freezeout.Schedule | None = None
    frozen_until: dict = dataclasses.field(default_factory=dict)
    store: freezeout.Store = freezeout.Store()
    grow_batch: tuple[int, ...] = ()
    batch_size: int = 1

    def lr(self, step, factor=1.0):
        """Return the rate of step `step` for leaves of a factor, float32 []."""
        s = self.spec
        if s.per_epoch:
            step = step // self.steps_per_epoch * self.steps_per_epoch
        least = factor if s.floors == "scaled" else 1.0
        base, own = self.peak * factor * self._growth(step), {}
        if s.schedule in ("cosine", "linear"):
            own = dict(final=s.min_lr * least, total_steps=self._span)
        elif s.schedule == "stairs":
            own = dict(length=s.stair_epochs * self.steps_per_epoch, gamma=s.gamma)
        elif s.schedule == "onecycle":
            own = dict(rise=s.cycle_rise, div=s.cycle_div, final_div=s.cycle_final_div)
            own |= dict(total_steps=self._span)
        curve = functools.partial(
            getattr(schedules, s.schedule), step, base=base, **own
        )
        start = dict(start=s.start_lr * least, warmup_steps=self.warmup_steps)
        if s.schedule == "onecycle" or s.warmup_over:
            return schedules.warmup(step, curve(), base=base, **start)
        return curve(**start)

    def wd(self, step):
        """Return the weight decay of step `step` (before the factors)."""
        s = self.spec
        unit = self.total_steps**-0.5 if s.wd_normalised else 1.0
        if s.wd_schedule == "constant":
            return jnp.float32(s.wd * unit)
        both = dict(base=s.wd * unit, final=s.wd_end * unit)
        return schedules.cosine(step, **both, total_steps=self._span)

    @property
    def _span(self):
        return round(self.spec.stretch * self.total_steps)

    @functools.cached_property
    def _events(self):
        """Steps at which the frozen set changes, and the set from each on."""
        first, until = self.frozen_from, self.frozen_until
        steps = sorted({0, *first.values(), *until.values()})
        sets = [
            frozenset(
                [k for k, v in first.items() if v <= s]
                + [k for k, v in until.items() if s < v]
            )
            for s in steps
        ]
        return steps, sets

    @property
    def events(self) -> list[int]:
        """Return the steps at which the frozen set changes, 0 first."""
        return self._events[0]

    @functools.cached_property
    def boundaries(self) -> dict:
        """Return what `step.phase_at` found of each phase, for the next time."""
        return {}

    @property
    def grown(self) -> tuple[tuple[int, int], ...]:
        """Return ((step, images from it on), ...) of `freeze.grow_batch`."""
        events = [e for e in self.events if 0 < e < self.total_steps]
        last = self.grow_batch[-1:] * len(events)
        return tuple(zip(events, self.grow_batch + last, strict=False))

    def _growth(self, step):
        """Return what the rate of a step is multiplied by, for its batch."""
        factor = 1.0
        if self.spec.lr_batch:
            for event, size in self.grown:
                ratio = (size / self.batch_size) ** self.spec.lr_batch_power
                factor = jnp.where(step < event, factor, ratio)
        return factor

    def frozen(self, step: int) -> frozenset[str]:
        """Return the names of the leaves that do not train at step `step`."""
        steps, sets = self._events
        return sets[bisect.bisect_right(steps, step) - 1]

    def init(self, trainable: dict):
        """Return the optimizer state of {name: leaf}: one per time of release."""
        direction = self._direction(0)
        if not self._releases:
            return direction.init(trainable)
        return tuple(direction.init(part) for part in self._parts(trainable))

    @functools.cached_property
    def _releases(self):
        """Steps at which leaves are released that were frozen from the start."""
        return sorted({v for v in self.frozen_until.values() if v > 0})

    def _parts(self, leaves):
        """Split {name: leaf} by the step from which it trains; each counts its own."""
        return [
            {k: v for k, v in leaves.items() if self.frozen_until.get(k, 0) == at}
            for at in (0, *self._releases)
        ]

    def release(self, opt, trainable: dict):
        """Return the state, with fresh moments for leaves that begin to train.

        `opt` is that of some of the leaves {name: leaf} that train now.
        """
        if not self._releases:
            return opt
        fresh = self.init(trainable)
        parts = zip(opt, fresh, self._parts(trainable), strict=True)
        return tuple(
            new if part and not _holds(old) else old for old, new, part in parts
        )

    def update(self, grads: dict, opt, params: dict, step):
        """Update {name: leaf} of the trainable leaves; `opt` is of exactly these.

        Returns:
            new params, new state, {"grad_norm": before clipping, "lr", "wd"}.
        """
        norm = optax.tree.norm(grads)
        if self.spec.clip_norm:
            # The epsilon is torch's clip_grad_norm_.
            factor = jnp.minimum(1.0, self.spec.clip_norm / (norm + 1e-6))
            grads = jax.tree.map(lambda g: g * factor, grads)
        wd = self.wd(step)
        factors = {k: self.wd_factor[k] for k in params if self.wd_factor[k]}
        scales = {factor: wd * factor for factor in set(factors.values())}
        decay = {k: scales[factor] * params[k] for k, factor in factors.items()}
        coupled = self.spec.name not in ("adamw", "lamb")
        if coupled:
            grads = {k: g + decay[k] if k in decay else g for k, g in grads.items()}
        move, opt = self._move(grads, opt, params, step)
        kinds = {self._kind(k) for k in params}
        rates = {kind: self._rate(step, *kind) for kind in kinds}
        new = {}
        for k, p in params.items():
            m = move[k] if coupled or k not in decay else move[k] + decay[k]
            if self._adapts(k):
                m = m * directions.ratio(p, m, 1.0)
            new[k] = (p - rates[self._kind(k)] * m).astype(p.dtype)
        found = {"grad_norm": norm, "lr": self.lr(step), "wd": wd}
        return new, opt, found | self._layer_rates(step, params)

    def _adapts(self, name) -> bool:
        """Return whether LAMB scales the step of a leaf: if it decays."""
        s = self.spec
        decays = s.wd > 0 or (s.wd_schedule == "cosine" and s.wd_end > 0)
        return s.name == "lamb" and decays and self.wd_factor[name] != 0

    def _kind(self, name):
        """Return what the rate of a leaf depends on: (layer, factor)."""
        layer = self.layers.get(name, freezeout.NEVER)
        # A class token freezes with its layer, but had none in the original.
        common = name.rsplit("/", 1)[-1] == "cls"
        return freezeout.NEVER if common else layer, self.lr_factor[name]

    def _rate(self, step, layer, factor):
        """Return the rate of the leaves of a layer and a factor."""
        flat = self.lr(step, factor)
        if self.plan is None:
            return flat
        peak = self.peak * factor * self._growth(step)
        return self.plan.lr(layer, step, peak, flat)

    def _layer_rates(self, step, params):
        """Return {"lr/layer_<i>": rate, "freeze/layers": how many are frozen}."""
        if self.plan is None:
            return {}
        every = set(self.layers.values()) - {freezeout.NEVER}
        live = {self.layers.get(k) for k in params} & every
        rates = {f"lr/layer_{i:02d}": self._rate(step, i, 1.0) for i in sorted(live)}
        return rates | {"freeze/layers": float(len(every) - len(live))}

    def _move(self, grads, opt, params, step):
        """Return ({name: direction}, new state)."""
        direction = self._direction(step)
        if not self._releases:
            return direction.update(grads, opt, params)
        move, states = {}, []
        parts = zip(self._parts(grads), opt, self._parts(params), strict=True)
        for grad, state, leaves in parts:
            if leaves:
                found, state = direction.update(grad, state, leaves)
                move |= found
            states.append(state)
        return move, tuple(states)

    def b1(self, step):
        """Return Adam's b1 of step `step`."""
        s = self.spec
        if not s.cycle_b1:
            return s.b1
        low, high = s.cycle_b1
        span = dict(total_steps=self._span, rise=s.cycle_rise)
        return schedules.onecycle_momentum(step, low=low, high=high, **span)

    def _direction(self, step):
        s = self.spec
        if s.name == "nadam":
            return directions.nadam(self.b1(step), s.b2, s.eps, s.mu_dtype)
        if s.name in ("adamw", "adam", "lamb"):
            b1 = self.b1(step)
            return optax.scale_by_adam(b1, s.b2, s.eps, mu_dtype=s.mu_dtype)
        trace = optax.trace(decay=s.momentum)
        return (
            trace if s.name == "sgd" else optax.chain(directions.trust(s.trust), trace)
        )


def make(
    spec: Optim,
    params,
    *,
    total_steps: int,
    steps_per_epoch: int,
    batch_size: int,
    freeze: freezeout.FreezeOut | None = None,
    waits: dict | None = None,
) -> Optimizer:
    """Resolve the rules for `params` (arrays or shapes).

    `waits`: {name: share of the run until which a leaf is frozen}, see
    `freeze.grow_depth`; others are by `spec`.

    Raises:
        UsageError: a rule that never wins, a leaf no rule covers, nothing left to train
            at the start or the end, a warm-up as long as the run.
    """
    names, freeze = list(tree.flat(params)), freeze or freezeout.FreezeOut()
    lr_factor = tree.match(names, spec.lr_rules, what="optim.lr_rules")
    if spec.layer_decay not in (0.0, 1.0):
        wish = f"optim.layer_decay={spec.layer_decay}"
        decay = freezeout.decayed(spec.layer_decay, freeze.table(names, wish))
        lr_factor = {k: factor * decay[k] for k, factor in lr_factor.items()}
    wd_factor = tree.match(names, spec.wd_rules, what="optim.wd_rules")
    share = tree.match(names, spec.freeze, what="optim.freeze", default=None)
    share |= {k: 0.0 for k in names if lr_factor[k] == 0.0}
    frozen_from = {k: round(v * total_steps) for k, v in share.items() if v is not None}
    if all(frozen_from.get(k, 1) == 0 for k in names):
        raise errors.UsageError("optim: every parameter is frozen from the start")
    until = _frozen_until(spec, names, frozen_from, total_steps, steps_per_epoch)
    for name, share in (waits or {}).items():
        until[name] = max(round(share * total_steps), until.get(name, 0))
    warmup_steps = round(spec.warmup_epochs * steps_per_epoch)
    if warmup_steps >= total_steps > 0 and warmup_steps:
        raise errors.UsageError(
            f"optim.warmup_epochs={spec.warmup_epochs} is {warmup_steps} steps, which "
            f"leaves nothing of a run of {total_steps} steps"
        )
    layers, plan = {}, None
    if freeze.schedule != "none":
        span = round(spec.stretch * total_steps)
        layers, plan = freeze.plan(names, span, warmup_steps)
        for k in names:
            event = plan.frozen_from(layers[k])
            if event is not None:
                frozen_from[k] = min(event, frozen_from.get(k, event))
    if all(frozen_from.get(k, total_steps) < total_steps for k in names):
        raise errors.UsageError(
            "optim.freeze and freeze together freeze every parameter before step "
            f"{total_steps}, the last; leave something to train"
        )
    ratio = batch_size / spec.lr_batch if spec.lr_batch else 1.0
    made = Optimizer(
        spec=spec,
        peak=spec.lr * ratio**spec.lr_batch_power,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        lr_factor=lr_factor,
        wd_factor=wd_factor,
        frozen_from=frozen_from,
        steps_per_epoch=steps_per_epoch,
        layers=layers,
        plan=plan,
        frozen_until=until,
        store=freeze.store,
        grow_batch=freeze.grow_batch,
        batch_size=batch_size,
    )
    sizes, events = len(freeze.grow_batch), len(made.grown)
    if sizes > events:
        raise errors.UsageError(
            f"freeze.grow_batch={freeze.grow_batch}: {sizes} sizes for {events} events "
            "within this run; name at most as many"
        )
    return made


def _frozen_until(spec, names, frozen_from, total_steps, steps_per_epoch) -> dict:
    """Return {name: first step at which it trains} of `optim.thaw`."""
    epochs = tree.match(names, spec.thaw, what="optim.thaw", default=0.0)
    until = {k: round(epochs[k] * steps_per_epoch) for k in names}
    until = {k: v for k, v in until.items() if v}
    if all(frozen_from.get(k) == 0 or k in until for k in names):
        raise errors.UsageError(
            "optim.thaw: nothing is left to train before the first release"
        )
    late = sorted(v for v in until.values() if v >= total_steps)
    if late:
        raise errors.UsageError(
            f"optim.thaw: releases leaves at step {late[0]} of a run of {total_steps}; "
            "shorten it, or freeze them with optim.freeze at 0.0"
        )
    return until


def drop(opt, names: frozenset[str]):
    """Return an optimizer state without the leaves `names` (they froze)."""

    def cut(node):
        if not _is_leaves(node):
            return node
        return {k: v for k, v in node.items() if k not in names}

    return jax.tree.map(cut, opt, is_leaf=_is_leaves)


def _holds(opt) -> bool:
    """Return whether an optimizer state has any leaf's moments."""
    nodes = jax.tree.leaves(opt, is_leaf=_is_leaves)
    return any(_is_leaves(n) and n for n in nodes)


def _is_leaves(node):
    """Return whether a node of a state is {name: leaf}."""
    return isinstance(node, dict)
