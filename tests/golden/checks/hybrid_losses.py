"""Hybrid patch size: losses, optimizer, schedules of the pre-training."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vitssl.data import modalities, states
from vitssl.losses import contrastive, regression
from vitssl.methods.latent_mim import objective, target, tokens
from vitssl.methods.latent_mim.objective import Pair
from vitssl.optim import optimizer, schedules

# Names of the original's registry that are not ours.
KINDS = {
    "modality_patch_discrimination_new": "modality_patch_discrimination",
    "patch_discrimination_new": "patch_discrimination",
    "patch_discrimination": "patch_discrimination_batch",
}


# Losses of the original that no config of ours can choose.


def adjusted(pairs: Mapping[str, Pair], *, tau=0.1, mu=0.7, sigma=1.0):
    """Patch discrimination whose negatives count by how hard they are.

    The logit of a negative is multiplied by a Gaussian of its cosine around mu, divided
    by its mean over the negatives of the anchor; no gradient flows through it.

    Source: allenai/olmoearth_pretrain train/loss.py (AdjustedPatchDiscriminationLoss).
    """
    p, t, valid = objective._clean(objective.join(pairs.values()))
    p, t = regression.unit(p, 1e-12), regression.unit(t, 1e-12)
    cosine = jnp.einsum("bnd,bmd->bnm", p, t, precision="highest")
    own = jnp.eye(p.shape[1], dtype=bool)
    negative = valid[:, None] & ~own
    weight = jnp.exp(-jnp.square(cosine - mu) / (2 * sigma**2))
    weight = jnp.where(negative, weight, 0)
    count = jnp.maximum(negative.sum(-1, keepdims=True), 1)
    mean = weight.sum(-1, keepdims=True) / count
    weight = jax.lax.stop_gradient(weight / jnp.maximum(mean, 1e-12))
    logits = cosine / tau * jnp.where(own, 1.0, weight)
    logits = jnp.where(valid[:, None], logits, objective._HIDDEN)
    positive = jnp.diagonal(logits, axis1=1, axis2=2)
    each = 2 * tau * (jax.nn.logsumexp(logits, -1) - positive)
    return objective._average(each, valid, "sample", len(valid))


def distance(pairs: Mapping[str, Pair], kind: str):
    """Mean distance of predictions from targets over all valid tokens together: [].

    Args:
        kind: "l1", "l2" (both over every number of D), or "cosine": minus the cosine.
    """
    p, t, valid = objective._clean(objective.join(pairs.values()))
    if kind == "cosine":
        each = -(regression.unit(p, 1e-12) * regression.unit(t, 1e-12)).sum(-1)
    else:
        d = p - t
        each = (jnp.abs(d) if kind == "l1" else d * d).mean(-1)
    return regression.masked_mean(each, valid)


def pixels(pairs: Mapping[str, Pair], *, kind="mse", beta=1.0):
    """Mean penalty of reconstructed values over all that are valid: [].

    Args:
        pairs: {modality: Pair} of values [B, N, C], valid [B, N, C] band by band.
        kind, beta: see `regression.distance`; also "l1".

    Source: allenai/olmoearth_pretrain train/loss.py (MAELoss).
    """
    total, count = 0.0, 0
    for p, t, valid in pairs.values():
        d = jnp.where(valid, p.astype(jnp.float32) - t.astype(jnp.float32), 0)
        each = jnp.abs(d) if kind == "l1" else regression.distance(d, kind, beta=beta)
        total, count = total + each.sum(), count + valid.sum()
    return total / jnp.maximum(count, 1)


def pairs(case):
    """{modality: Pair} of the inputs."""
    found = {}
    for name in case.config["modalities"]:
        prediction, target, mask = (
            jnp.asarray(case.inputs[f"{kind}/{name}"])
            for kind in ("pred", "target", "mask")
        )
        flat = (len(prediction), -1, prediction.shape[-1])
        valid = (mask == states.DECODER).reshape(len(mask), -1)
        found[name] = Pair(prediction.reshape(flat), target.reshape(flat), valid)
    return found


def options(s, weights):
    """Our options of a loss of the original."""
    found = {"tau": s["tau"], "standardise": s.get("pred2unit", False)}
    given = s.get("modality_weights")
    if given is not None:
        found["weights"] = weights if isinstance(given, str) else given
    return found


def discrimination(case, name, s):
    """(loss, gradients of the predictions) of one setting."""
    kind = next(k for k in sorted(KINDS | same(), key=len)[::-1] if name.startswith(k))
    kind = KINDS.get(kind, kind)
    if s.get("mask_other_samples") is False:
        kind = "all_discrimination"
    given = options(s, case.config.get("modality_weights"))
    return _graded(case, kind, given, s.get("weight", 1.0))


def same():
    """Kinds whose names are the original's."""
    return {k: k for k in objective.KINDS}


def _graded(case, kind, given, weight):
    found = pairs(case)

    @jax.value_and_grad
    def loss(predictions):
        both = {k: v._replace(prediction=predictions[k]) for k, v in found.items()}
        value, _ = objective.patch_discrimination(both, kind=kind, **given)
        return weight * value

    return jax.jit(loss)({k: v.prediction for k, v in found.items()})


def _close_grads(case, prefix, grads):
    for name, grad in grads.items():
        shape = case.inputs[f"pred/{name}"].shape
        case.close(f"{prefix}/{name}", grad.reshape(shape))


def _koleo(case, s):
    x = {k: jnp.asarray(case.inputs[f"pred/{k}"]) for k in case.config["modalities"]}
    mask = {k: jnp.asarray(case.inputs[f"mask/{k}"]) for k in x}
    if s["mode"] == "instance":
        return s["weight"] * contrastive.koleo(tokens.pool(x, mask))
    flat = jnp.concatenate([v.reshape(-1, v.shape[-1]) for v in x.values()])
    seen = jnp.concatenate([v.ravel() == states.ONLINE for v in mask.values()])
    return s["weight"] * contrastive.koleo(flat, seen)


def _losses(case):
    for name, s in case.config["settings"].items():
        if name.startswith("koleo"):
            if name != "koleo_tensor":
                case.close(name, _koleo(case, s))
                continue
            case.close(name, s["weight"] * contrastive.koleo(case.inputs["a"]))
        elif name.startswith("infonce"):
            got = contrastive.infonce_one_way(
                case.inputs["a"], case.inputs["b"], temperature=s["tau"]
            )
            case.close(name, s["weight"] * got)
        elif name.startswith("adjusted"):
            case.close(name, adjusted(pairs(case), **s))
        else:
            value, grads = discrimination(case, name, s)
            case.close(name, value)
            if f"grad_{name}/{case.config['modalities'][0]}" in case.out:
                _close_grads(case, f"grad_{name}", grads)
    for kind in ("l1", "l2"):
        if kind in case.out:
            case.close(kind, distance(pairs(case), kind))


def _masked_negatives(case):
    for name, s in case.config["settings"].items():
        given = options(s, None)
        if not name.startswith("unmasked"):
            given["same_target"] = s.get("same_target_threshold", 0.999)
            given["same_target_in"] = s.get("mask_negatives_for_modalities")
            if given["same_target_in"] is not None:
                given["same_target_in"] = tuple(given["same_target_in"])
        kind = "modality_patch_discrimination"
        value, grads = _graded(case, kind, given, s.get("weight", 1.0))
        case.close(name, value)
        if name == "loop":
            _close_grads(case, "grad", grads)
    case.close("cosine", distance(pairs(case), "cosine"))


def _mae(case):
    for name, s in case.config["settings"].items():
        found = {}
        for key in case.config["modalities"]:
            mask = case.inputs[f"mask/{key}"]
            if s.get("only_decode", True):
                chosen = mask == states.DECODER
            else:
                chosen = mask != states.MISSING
            groups = modalities.find(key).channels
            band = np.zeros(case.inputs[f"pred/{key}"].shape, bool)
            for g, channels in enumerate(groups):
                band[..., list(channels)] = chosen[..., g : g + 1]
            found[key] = Pair(
                jnp.asarray(case.inputs[f"pred/{key}"]),
                jnp.asarray(case.inputs[f"target/{key}"]),
                jnp.asarray(band),
            )
        theirs = s.get("loss_function", "MSELoss")
        kind = {"MSELoss": "mse", "L1Loss": "l1", "SmoothL1Loss": "smoothl1"}[theirs]
        got = pixels(found, kind=kind, beta=s.get("beta", 1.0))
        case.close(name, s.get("weight", 1.0) * got)


def _optimizer(case):
    c = case.config
    spec = optimizer.Optim(
        name="adamw",
        lr=c["lr"],
        schedule="constant",
        warmup_epochs=0.0,
        min_lr=0.0,
        wd=c["weight_decay"],
        clip_norm=c["max_grad_norm"],
        b1=c["betas"][0],
        b2=c["betas"][1],
        eps=c["eps"],
    )
    start = {k: jnp.asarray(case.inputs[f"p0_{k}"]) for k in ("kernel", "bias")}
    made = optimizer.make(
        spec, start, total_steps=c["steps"], steps_per_epoch=c["steps"], batch_size=1
    )
    state, values = made.init(start), start
    seen = {"kernel": [], "bias": [], "grad_norm": []}
    for i in range(c["steps"]):
        grads = {k: jnp.asarray(case.inputs[f"grads_{k}"][i]) for k in values}
        values, state, facts = made.update(grads, state, values, jnp.int32(i))
        seen["grad_norm"].append(facts["grad_norm"])
        for k, v in values.items():
            seen[k].append(v)
    for name, rows in seen.items():
        case.close(name, np.stack(rows))


def _schedules(case):
    c, at = case.config, case.inputs["steps"]
    end, lr = c["total_steps"], c["lr"]
    rise = dict(start=c["warmup_min_lr"], warmup_steps=c["warmup_steps"])
    final = c["alpha_f"] * lr
    got = schedules.cosine(at, base=lr, final=final, total_steps=end, **rise)
    case.close("lr", got)
    start, stop = c["ema"]
    # Beyond the last step the line goes on, as in the original.
    case.close("ema", target.Target(start=start, end=stop).momentum(at, end))
    p = c["probe"]
    got = schedules.cosine(
        case.inputs["probe_epochs"],
        base=p["max_lr"],
        final=p["min_lr"],
        total_steps=p["total_epochs"],
        warmup_steps=p["warmup_epochs"],
    )
    case.close("probe_lr", got)


CHECKS = {
    "lr / EMA / probe schedules": _schedules,
    "losses": _losses,
    "modality patch discrimination, masked negatives": _masked_negatives,
    "MAELoss": _mae,
    "optimizer step": _optimizer,
}
