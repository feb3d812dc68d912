"""Optimizers over the trainable leaves only: rates, decay, clipping, freezing.

Everything that depends on time is a pure function of the step, so a resumed run
needs no state beyond the moments. Parameters are flat here: {name: leaf}
(`tree.split`), which makes "drop the state of these leaves" one dict filter.
"""

import bisect
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vitssl import errors, tree
from vitssl.optim import freezeout, schedules, section

Optim, EVERYTHING = section.Optim, section.EVERYTHING


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

    def lr(self, step, factor=1.0):
        """Return the rate of step `step` for leaves of a factor, float32 []."""
        s = self.spec
        if s.per_epoch:
            step = step // self.steps_per_epoch * self.steps_per_epoch
        least = factor if s.floors == "scaled" else 1.0
        base, start = self.peak * factor, s.start_lr * least
        given = dict(base=base, final=s.min_lr * least, total_steps=self._span)
        if s.schedule == "stairs":
            given |= dict(length=s.stair_epochs * self.steps_per_epoch, gamma=s.gamma)
        if s.schedule == "onecycle":
            given |= dict(
                rise=s.cycle_rise, div=s.cycle_div, final_div=s.cycle_final_div
            )
        curve = schedules.SCHEDULES[s.schedule]
        rise = dict(start=start, warmup_steps=self.warmup_steps)
        if not s.warmup_over:
            return curve(step, **given, **rise)
        return schedules.warmup(step, curve(step, **given), base=base, **rise)

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
        """Return the state with fresh moments for leaves that begin to train.

        Args:
            opt: the state of some of the trainable leaves.
            trainable: {name: leaf} of all of them.
        """
        if not self._releases:
            return opt
        fresh = self.init(trainable)
        parts = zip(opt, fresh, self._parts(trainable), strict=True)
        return tuple(
            new if part and not _holds(old) else old for old, new, part in parts
        )

    def update(self, grads: dict, opt, params: dict, step):
        """One update of the trainable leaves.

        Args:
            grads, params: {name: leaf} of the trainable leaves.
            opt: the state of exactly these leaves.
            step: 0-based step, traced int32.

        Returns:
            new params, new state, {"grad_norm": before clipping, "lr", "wd"}.
        """
        norm = optax.tree.norm(grads)
        if self.spec.clip_norm:
            # The epsilon is torch's clip_grad_norm_.
            factor = jnp.minimum(1.0, self.spec.clip_norm / (norm + 1e-6))
            grads = jax.tree.map(lambda g: g * factor, grads)
        wd = self.wd(step)
        decay = {k: wd * self.wd_factor[k] * p for k, p in params.items()}
        coupled = self.spec.name not in ("adamw", "lamb")
        if coupled:
            grads = {k: g + decay[k] for k, g in grads.items()}
        move, opt = self._move(grads, opt, params, step)
        kinds = {self._kind(k) for k in params}
        rates = {kind: self._rate(step, *kind) for kind in kinds}
        new = {}
        for k, p in params.items():
            m = move[k] if coupled else move[k] + decay[k]
            if self._adapts(k):
                m = m * _ratio(p, m, 1.0)
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
        return freezeout.rate_layer(name, layer), self.lr_factor[name]

    def _rate(self, step, layer, factor):
        """Return the rate of the leaves of a layer and a factor."""
        flat = self.lr(step, factor)
        if self.plan is None:
            return flat
        return self.plan.lr(layer, step, self.peak * factor, flat)

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
            return _nadam(self.b1(step), s.b2, s.eps, s.mu_dtype)
        if s.name in ("adamw", "adam", "lamb"):
            b1 = self.b1(step)
            return optax.scale_by_adam(b1, s.b2, s.eps, mu_dtype=s.mu_dtype)
        trace = optax.trace(decay=s.momentum)
        return trace if s.name == "sgd" else optax.chain(_trust(s.trust), trace)


def _trust(coefficient):
    """LARS's layer-wise trust ratio for weights; vectors pass (MAE util/lars.py)."""

    def one(g, p):
        if p.ndim < 2:
            return g
        return g * _ratio(p, g, coefficient)

    return optax.stateless(lambda u, p: jax.tree.map(one, u, p))


def _ratio(p, g, coefficient):
    """Return coefficient |p| / |g|, or 1 where either is 0, []."""
    gn, pn = jnp.linalg.norm(g.ravel()), jnp.linalg.norm(p.ravel())
    return jnp.where((gn > 0) & (pn > 0), coefficient * pn / gn, 1.0)


class NadamState(NamedTuple):
    """Adam's moments, and the product of the momenta of all updates so far."""

    count: jax.Array
    product: jax.Array
    mu: dict
    nu: dict


def _nadam(b1, b2, eps, mu_dtype):
    """Adam with Nesterov's momentum, which grows to b1 (torch.optim.NAdam).

    Source: Dozat 2016, "Incorporating Nesterov momentum into Adam"; optax's has no
    growing momentum.
    """

    def init(params):
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, mu_dtype), params)
        nu = jax.tree.map(jnp.zeros_like, params)
        return NadamState(jnp.zeros([], jnp.int32), jnp.ones([]), mu, nu)

    def momentum(t):
        return b1 * (1 - 0.5 * 0.96 ** (0.004 * t))

    def update(grads, state, params=None):
        del params
        t = state.count + 1
        now, after = momentum(t), momentum(t + 1)
        product = state.product * now
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)

        def one(g, m, v):
            ahead = (1 - now) / (1 - product) * g + after / (1 - product * after) * m
            return ahead / (jnp.sqrt(v / (1 - b2**t)) + eps)

        move = jax.tree.map(one, grads, mu, nu)
        mu = jax.tree.map(lambda m: m.astype(mu_dtype), mu)
        return move, NadamState(t, product, mu, nu)

    return optax.GradientTransformation(init, update)


def make(
    spec: Optim,
    params,
    *,
    total_steps: int,
    steps_per_epoch: int,
    batch_size: int,
    freeze: freezeout.FreezeOut | None = None,
) -> Optimizer:
    """Resolve the rules for `params` (arrays or shapes).

    Raises:
        UsageError: a rule that never wins, a leaf no rule covers, nothing left to train
            at the start or the end, a warm-up as long as the run.
    """
    names = list(tree.flat(params))
    lr_factor = tree.match(names, spec.lr_rules, what="optim.lr_rules")
    if spec.layer_decay not in (0.0, 1.0):
        wish = f"optim.layer_decay={spec.layer_decay}"
        decay = freezeout.decayed(spec.layer_decay, _layers(wish, freeze, names))
        lr_factor = {k: factor * decay[k] for k, factor in lr_factor.items()}
    wd_factor = tree.match(names, spec.wd_rules, what="optim.wd_rules")
    never = 2.0
    fraction = tree.match(names, spec.freeze, what="optim.freeze", default=never)
    frozen_from = {}
    for k in names:
        if lr_factor[k] == 0.0:
            frozen_from[k] = 0
        elif fraction[k] <= 1.0:
            frozen_from[k] = round(fraction[k] * total_steps)
    if all(frozen_from.get(k, 1) == 0 for k in names):
        raise errors.UsageError("optim: every parameter is frozen from the start")
    until = _releases(spec, names, frozen_from, total_steps, steps_per_epoch)
    warmup_steps = round(spec.warmup_epochs * steps_per_epoch)
    if warmup_steps and warmup_steps >= total_steps:
        raise errors.UsageError(
            f"optim.warmup_epochs={spec.warmup_epochs} is {warmup_steps} steps, which "
            f"leaves nothing of a run of {total_steps} steps"
        )
    layers, plan = {}, None
    if freeze is not None and freeze.schedule != "none":
        span = round(spec.stretch * total_steps)
        layers, plan = _plan(freeze, names, span, warmup_steps)
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
    return Optimizer(
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
    )


def _releases(spec, names, frozen_from, total_steps, steps_per_epoch) -> dict:
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


def _layers(wish, freeze, names) -> dict[str, int]:
    """Return {name: layer} of the table `freeze.layers`.

    Raises:
        UsageError: there is none; `wish` is the key that needs it.
    """
    if freeze is None or not freeze.layers:
        raise errors.UsageError(
            f"{wish}: this method has no table of its own; give "
            "freeze.layers=((pattern, layer), ...), for a ViT "
            "freezeout.vit_layers(depth, prefix)"
        )
    never = freezeout.NEVER
    return tree.match(names, freeze.layers, what="freeze.layers", default=never)


def _plan(freeze, names, span, warmup_steps):
    """Return ({name: layer}, schedule) of FreezeOut."""
    wish = f"freeze.schedule={freeze.schedule}"
    layers = freeze.index(_layers(wish, freeze, names))
    last = max(layers.values())
    if last < 1:
        raise errors.UsageError(
            f"freeze.layers: the largest index is {last}; FreezeOut needs two "
            "layers or more"
        )
    return layers, freezeout.Schedule(freeze, last, span, warmup_steps)


def drop(opt, names: frozenset[str]):
    """Return an optimizer state without the leaves `names` (they froze)."""

    def cut(node):
        return {k: v for k, v in node.items() if k not in names}

    def is_leaves(node):
        return isinstance(node, dict)

    return jax.tree.map(
        lambda n: cut(n) if isinstance(n, dict) else n, opt, is_leaf=is_leaves
    )


def _holds(opt) -> bool:
    """Return whether an optimizer state has any leaf's moments."""
    nodes = jax.tree.leaves(opt, is_leaf=lambda n: isinstance(n, dict))
    return any(isinstance(n, dict) and n for n in nodes)
