"""iFAM's losses with their gradients, the warp, and the masks."""

import typing

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import reading
from tests.golden.checks.ifam_model import first, last
from vitssl.methods.classify import objective as classify
from vitssl.methods.parts import affine, objective
from vitssl.methods.parts import maps as partmaps


def _on_maps(case, loss):
    """Compare a loss of maps, and its gradient, on every set of maps of a case."""
    reading.agree(case.config, weight_applied=False, reduction="mean")
    i = 0
    while f"maps{i}" in case.inputs:
        value, grad = jax.value_and_grad(loss)(last(case.inputs[f"maps{i}"]))
        case.close(f"loss{i}", value)
        case.close(f"grad{i}", first(grad))
        i += 1


def _with_background(loss):
    """A loss of K parts as one of K + 1 channels; the case holds the parts alone."""

    def of_parts(maps):
        rest = jnp.zeros((*maps.shape[:-1], 1))
        return loss(jnp.concatenate([maps, rest], axis=-1))

    return of_parts


def _classification(case):
    logits, labels = (jnp.asarray(case.inputs[k]) for k in ("logits", "targets"))
    labels, s = labels.astype(jnp.int32), case.config["smoothing"]
    case.close("ce", objective.cross_entropy(logits, labels))
    case.close("ls", objective.cross_entropy(logits, labels, smoothing=s))
    soft = jnp.asarray(case.inputs["soft_targets"])
    case.close("soft", classify.cross_entropy(logits, soft))


def _orthogonality(case):
    x = jnp.asarray(case.inputs["features"]).transpose(0, 2, 1)  # [B, K+1, D]
    for axis, end in (("parts", ""), ("channels", "_as_shipped")):
        value, grad = jax.value_and_grad(objective.orthogonality)(x, axis)
        case.close(f"loss{end}", value)
        case.close(f"grad{end}", grad.transpose(0, 2, 1))


def warp(config):
    """The warp of a configuration."""
    x, y = config["translate_px"]
    return affine.Warp(config["angle"], x, y, config["scale"])


def _equivariance(case):
    maps, moved = last(case.inputs["maps"]), last(case.inputs["equiv_maps"])
    for name, c in case.config.items():
        w, size = warp(c), c["image_size"]
        reading.agree(c, map_size=maps.shape[1])
        image = affine.bilinear(last(case.inputs["img"]), w)
        case.close(f"forward_{name}", first(image))
        case.close(f"backward_maps_{name}", first(affine.undo(moved, w, size)))

        def loss(a, b, w=w, size=size):
            return objective.equivariance(a, affine.undo(b, w, size))

        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(maps, moved)
        case.close(f"loss_{name}", value)
        case.close(f"grad_maps_{name}", first(grads[0]))
        case.close(f"grad_equiv_{name}", first(grads[1]))


def _loss(case):
    c, kind = case.config, case.config.get("loss_type")
    name = case.meta["case"]
    known = typing.get_args(objective.Background) + typing.get_args(objective.Presence)
    assert kind in (None, *known), f"loss_type {kind!r}: there is {known}"
    if name.startswith("loss_enforced_presence"):
        _on_maps(case, lambda m: objective.background_presence(m, kind))
    elif name.startswith("loss_presence"):
        loss = lambda m: objective.presence(m, kind, beta=c["beta"])  # noqa: E731
        _on_maps(case, _with_background(loss))
    elif "logits" in case.inputs:
        _classification(case)
    elif "features" in case.inputs:
        _orthogonality(case)
    elif "equiv_maps" in case.inputs:
        _equivariance(case)
    else:
        _on_maps(case, _PLAIN[name])


_PLAIN = {
    "loss_concentration": objective.concentration,
    "loss_pixel_entropy": objective.pixel_entropy,
    "loss_total_variation": objective.total_variation,
}


def _masks(case):
    c = case.config
    if "degrees" in c:
        return _ranges(case)
    noise, keep = last(case.inputs["gumbel"]), case.inputs.get("keep")
    keep = None if keep is None else jnp.asarray(keep) > 0

    def both(logits):
        return partmaps.masks(partmaps.assign(logits, noise, c["tau"]), keep)

    (hard, soft), pull = jax.vjp(both, last(case.inputs["logits"]))
    case.close("hard", first(hard))
    case.close("soft", first(soft))
    wanted = {k: last(case.inputs[f"cotangent_{k}"]) for k in ("hard", "soft")}
    zero = jnp.zeros_like(hard)
    case.close("grad_from_hard", first(pull((wanted["hard"], zero))[0]))
    case.close("grad_from_soft", first(pull((zero, wanted["soft"]))[0]))


def _ranges(case):
    """Compare the extremes of 4000 warps with those the original drew."""
    c, want = case.config, case.meta["expected"]
    drawn = affine.Affine(c["degrees"][1], tuple(c["translate"]), tuple(c["scale"]))
    keys = jax.random.split(jax.random.key(0), 4000)
    warps = jax.vmap(lambda k: drawn.draw(k, c["image"]))(keys)
    for name, found in (("angle", warps.angle), ("scale", warps.scale)):
        spread = want[f"{name}_max"] - want[f"{name}_min"]
        for kind in ("min", "max"):
            got = float(getattr(np, kind)(found))
            assert abs(got - want[f"{name}_{kind}"]) < 0.01 * spread
        # The mean of 4000 uniform draws errs by spread / sqrt(12 * 4000).
        assert abs(float(found.mean()) - want[f"{name}_mean"]) < 0.02 * spread
    shifts = np.concatenate([warps.x, warps.y])
    assert (shifts == np.round(shifts)).all() == want["translate_integer"]
    assert shifts.min() == want["translate_min"]
    assert shifts.max() == want["translate_max"]


CHECKS = {"loss": _loss, "mask_generator": _masks}
