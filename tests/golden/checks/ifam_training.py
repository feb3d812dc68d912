"""iFAM's optimisation: groups, schedules, and one complete training step."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import parts as config
from tests.golden import ifam_names, reading
from tests.golden.checks import ifam_losses, ifam_model
from vitssl import tree
from vitssl.methods import base as methods
from vitssl.methods.parts import kinds, networks, objective, views
from vitssl.methods.parts import method as parts
from vitssl.methods.parts import names as table
from vitssl.optim import optimizer, schedules

OPTIM = dict(name="adamw", schedule="cosine", warmup_epochs=0.0, min_lr=0.0)


def _optimizer(case):
    c = case.config
    groups = c["groups"]
    names = {k: g for k, g in groups.items() if k != "frozen"}
    lr = min(g["lr"] for g in names.values())
    spec = optimizer.Optim(
        lr=lr,
        wd=1.0,
        clip_norm=c["clip"],
        b1=c["betas"][0],
        b2=c["betas"][1],
        eps=c["eps"],
        lr_rules=tuple((k, g["lr"] / lr) for k, g in names.items())
        + (("frozen", 0.0),),
        wd_rules=tuple((k, g["wd"]) for k, g in names.items()) + (("frozen", 1.0),),
        **OPTIM | {"schedule": "constant"},
    )
    params = {k.split("/")[1]: v for k, v in case.inputs.items() if "init/" in k}
    made = optimizer.make(spec, params, total_steps=9, steps_per_epoch=1, batch_size=1)
    trained = {k: jnp.asarray(v) for k, v in params.items() if k not in made.frozen(0)}
    state, step = made.init(trained), 0
    while f"norm{step}" in case.out:
        grads = {k: jnp.asarray(case.inputs[f"grad{step}/{k}"]) for k in trained}
        trained, state, found = made.update(grads, state, trained, step)
        case.close(f"norm{step}", found["grad_norm"])
        for name, value in {**params, **trained}.items():
            case.close(f"param{step}/{name}", value)
        step += 1


def _rates(spec, epochs, base):
    """The rate during each epoch, and after the last: three steps to an epoch."""
    settings = dict(total_steps=3 * epochs, steps_per_epoch=3, batch_size=1)
    made = optimizer.make(spec, {"a": np.zeros(2)}, **settings)
    unit = base / spec.lr
    rates = [float(made.lr(3 * e + 2, unit)) for e in range(epochs)]
    return [*rates, float(made.lr(3 * epochs, unit))]


def _lr(case):
    kinds = {"steplr": "stairs", "linearlr": "linear"}
    for name, c in case.config.items():
        kind = kinds.get(c.get("scheduler_type"), "cosine")
        base = c["base_lrs"]
        spec = optimizer.Optim(
            name="adamw",
            lr=base[0],
            wd=0.0,
            clip_norm=0.0,
            schedule=kind,
            per_epoch=True,
            warmup_epochs=c.get("scheduler_warmup_epochs", 0),
            start_lr=c.get("warmup_lr", 0.0),
            # The line ends at one hundredth of every group's rate.
            min_lr=c.get("min_lr", 0.01 * base[0] if kind == "linear" else 0.0),
            floors="scaled" if kind == "linear" else "absolute",
            warmup_over=kind == "cosine",
            gamma=c.get("scheduler_gamma", 0.1),
            stair_epochs=c.get("scheduler_step_size", 0),
        )
        rates = np.array([_rates(spec, c["epochs"], b) for b in base]).T
        case.close(name, 1e6 * rates)


def _schedule(case):
    want = case.meta.get("expected")
    name = case.meta["case"]
    if name == "ema_decay":
        c = case.config
        reading.agree(c, use_warmup=True)
        gamma, power = c.get("warmup_gamma", 1.0), c.get("warmup_power", 2 / 3)
        rule = dict(decay=c["decay"], gamma=gamma, power=power)
        got = [schedules.averaging(s, **rule) for s in want["step"]]
        np.testing.assert_allclose(got, want["decay"], atol=case.tolerance)
    elif name == "normalised_weight_decay":
        for row in want:
            per_epoch = row["dataset_size"] // row["total_batch"]
            made = _made(
                row["normalised_wd"], per_epoch, row["epochs"], row["total_batch"]
            )
            np.testing.assert_allclose(made.wd(0), row["weight_decay"], rtol=1e-5)
    elif name == "sqrt_lr_rule":
        for row in want:
            made = _made(0.0, 1, 1, row["total_batch"], **_sqrt(case.config))
            np.testing.assert_allclose(made.peak, row["lr"], rtol=1e-6)
    else:
        _lr(case)


def _sqrt(c):
    return dict(lr=c["base_lr"], lr_batch=c["base_batch"], lr_batch_power=0.5)


def _made(wd, per_epoch, epochs, batch, **fields):
    options = OPTIM | dict(lr=1.0, wd=wd, wd_normalised=True, clip_norm=0.0) | fields
    return optimizer.make(
        optimizer.Optim(**options),
        {"a": np.zeros(2)},
        total_steps=per_epoch * epochs,
        steps_per_epoch=per_epoch,
        batch_size=batch,
    )


def freezes(flags):
    """Our names of the original's four flags, none of which is its default."""
    names = {
        "freeze_backbone": "freeze_backbone",
        "freeze_tokens_1": "freeze_params_stage_1",
        "freeze_second_stage": "freeze_second_stage",
        "freeze_tokens_2": "freeze_params_stage_2",
    }
    return {ours: flags.get(theirs, False) for ours, theirs in names.items()}


def _groups(case):
    """Every torch parameter: its rate, its decay, whether it trains."""
    c, want = case.config, case.meta["expected"]
    hf = c.get("hf", False)
    baseline = "factors" not in c
    names = [p for g in want["groups"] for p in g["params"]]
    like, rules = (_baseline if baseline else _two_stage)(names, hf)
    reading.agree(c, depth=_depth(names))
    given = freezes(c.get("flags", c))
    kind = "two_stage"
    if baseline:
        # One ViT: the flag freezes all of it, tokens and positions included.
        frozen = given["freeze_backbone"]
        given = dict(freeze_second_stage=frozen, freeze_tokens_2=frozen)
        given["scratch"], kind = c["scratch_lr_factor"], "baseline"
    else:
        given |= {k: v for k, v in c["factors"].items() if k != "stage_two"}
        given["second"] = c["factors"]["stage_two"]
    made = optimizer.make(
        optimizer.Optim(
            lr=c["lr"],
            wd=want["weight_decay"],
            clip_norm=2.0,
            **config.groups(kind, **given),
            **OPTIM,
        ),
        like,
        total_steps=10,
        steps_per_epoch=1,
        batch_size=1,
    )
    if "weight_decay_normalised" in c:
        per_epoch = c["dataset_size"] // c["total_batch"]
        decay = c["weight_decay_normalised"], per_epoch, c["epochs"], c["total_batch"]
        np.testing.assert_allclose(_made(*decay).wd(0), want["weight_decay"], rtol=1e-5)
    ours = _ours(names, rules, hf)
    assert set(ours.values()) == set(tree.flat(like))
    frozen = made.frozen(0)
    for group in want["groups"]:
        for name in group["params"]:
            leaf = ours[name]
            assert np.isclose(c["lr"] * made.lr_factor[leaf], group["lr"]), name
            decay = want["weight_decay"] * made.wd_factor[leaf]
            assert np.isclose(decay, group["weight_decay"]), name
            assert (leaf in frozen) == (name in want["frozen"]), name


def _ours(names, rules, hf):
    """{torch name: our leaf}; query, key and value are one leaf here."""
    found = {}
    for name in names:
        joined = name
        for one in ("query", "key", "value") if hf else ():
            joined = joined.replace(
                f"attention.attention.{one}", "attention.attention.qkv"
            )
        if leaf := rules.forward(joined)[1]:
            found[name] = leaf
    return found


_VIT = {"D": 8, "depth": 2, "heads": 2, "patch": 4, "img": 8}


def _depth(names):
    found = (re.search(r"(?:layer|blocks)\.(\d+)\.", n) for n in names)
    return 1 + max(int(m[1]) for m in found if m)


def _two_stage(names, hf):
    depth = _depth(names)
    if hf:
        c = dict(hidden_size=8, num_hidden_layers=depth, num_attention_heads=2)
        c |= dict(patch_size=4, image_size=8)
    else:
        c = {"vit": _VIT | {"depth": depth, "reg": 4}}
    c |= dict(num_parts=3, num_classes=5, softmax_temperature=1.0, use_soft_masks=False)
    net = ifam_model.two_stage(c)
    like = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return like["params"], table.two_stage(hf=hf)


def _baseline(names, hf):
    depth = _depth(names)
    pool = "ep" if any("efficient_pool" in n for n in names) else "cls"
    vit = ifam_model.backbone({"vit": _VIT | {"D": 32, "depth": depth, "reg": 4}})
    net = networks.Baseline(vit, 5, pool)
    like = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return {"stage_2": like["params"]}, table.masked("", "stage_2/", hf=hf)


def method(c):
    """The method that the configuration of a training step describes."""
    w = c["loss_weights"]
    return parts.PartDiscovery(
        run=methods.Run(10, 1, 3, c["num_classes"], 3, (0.5,) * 3, (0.5,) * 3),
        model=ifam_model.backbone(c),
        parts=kinds.Parts(
            count=c["num_parts"],
            masks="soft" if c["use_soft_masks"] else "hard",
            gumbel=c["gumbel_softmax"],
            temperature=c["softmax_temperature"],
            dropout=c["part_dropout"],
            mask_dropout=c["part_dropout_stage_2"],
        ),
        augment=views.Augment(c["vit"]["img"]),
        objective=objective.Objective(
            stage_2=w["classification_loss_stage_2"],
            stage_1=w["classification_loss"],
            total_variation=w["total_variation_loss"],
            concentration=w["concentration_loss"],
            presence=w["presence_loss"],
            presence_group=0,
            background=w["enforced_presence_loss"],
            entropy=w["pixel_wise_entropy_loss"],
            orthogonality=w["orthogonality_loss_landmarks"],
            equivariance=w["equivariance_loss"],
        ),
    )


_LOSSES = {
    "loss_classification_train": "loss_classification",
    "loss_conc_train": "loss_conc",
    "loss_presence_train": "loss_presence",
    "loss_orth_train": "loss_orth",
    "loss_equiv_train": "loss_equiv",
    "loss_tv": "loss_tv",
    "loss_enforced_presence": "loss_enforced_presence",
    "loss_pixel_wise_entropy": "loss_pixel_wise_entropy",
    "loss_classification_stage_1": "loss_classification_stage_1",
}


def _step(case):
    of = method(case.config)
    image = ifam_model.image(case)
    labels = jnp.asarray(case.inputs["labels"]).astype(jnp.int32)
    like = jax.eval_shape(of.init, jax.random.key(0), {"image": image})[0]
    params = ifam_names.load(case.param, like)
    rules = config.groups(**freezes(case.config.get("freeze", {})))
    spec = optimizer.Optim(lr=1.0, wd=0.0, clip_norm=2.0, **rules, **OPTIM)
    made = optimizer.make(spec, params, total_steps=9, steps_per_epoch=1, batch_size=3)
    for axis in ("parts", "channels"):
        _pass(case, of, params, made, image, labels, axis)


def _pass(case, of, params, made, image, labels, axis):
    """One forward and backward pass, with either form of the orthogonality."""
    weights = dataclasses.replace(of.objective, orthogonality_axis=axis)
    of = dataclasses.replace(of, objective=weights)
    draws = tuple(ifam_model.draws(case, end) for end in ("_a", "_b"))
    warp = ifam_losses.warp(case.config["affine"])
    trained, frozen = tree.split(params, made.frozen(0))

    def total(trained):
        merged = tree.merge(trained, frozen)
        terms, out, _ = of.terms(merged, {}, image, labels, warp, draws)
        return sum(terms.values()), (terms, out)

    run = jax.jit(
        jax.value_and_grad(total, has_aux=True), compiler_options=ifam_model.QUICK
    )
    (value, (terms, out)), grads = run(trained)
    norm = optax.tree.norm(grads)
    if axis == "channels":
        case.close("loss_as_shipped/loss_orth_train", terms["loss_orth"])
        case.close("loss_as_shipped/loss_total_train", value)
        case.close("grad_norm_before_clip_as_shipped", norm)
        return
    for theirs, ours in _LOSSES.items():
        if f"loss/{theirs}" in case.out:
            case.close(f"loss/{theirs}", terms.get(ours, 0.0))
    case.close("loss/loss_total_train", value)
    case.close("grad_norm_before_clip", norm)
    case.close("stage2_logits", out.logits)
    case.close("stage1_logits", out.found.class_logits)
    scale = min(1.0, case.config["grad_norm_clip"] / (float(norm) + 1e-6))
    zero = {k: jnp.zeros_like(v) for k, v in frozen.items()}
    state = ifam_names.export(tree.nest({**grads, **zero}))
    for name in case.out:
        if name.startswith("grad_clipped/"):
            case.close(name, scale * state[name.removeprefix("grad_clipped/")])
    for name in case.config["no_gradient"]:
        assert not np.any(state[name]), name


CHECKS = {
    "optimizer": _optimizer,
    "schedule": _schedule,
    "param_groups": _groups,
    "train_step": _step,
}
