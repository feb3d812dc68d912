"""H-JEPA's networks, its multi-crop step, its training step, its decay groups."""

import re

import einops
import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import hjepa_names as names
from tests.golden import reading
from tests.golden.checks import hjepa_encoder
from vitssl import convert, tree
from vitssl.data import crops
from vitssl.losses import regression
from vitssl.methods import base
from vitssl.methods.hjepa import apply, levels, masks, predictor
from vitssl.methods.hjepa import method as hjepa
from vitssl.methods.hjepa import objective as hjepa_losses
from vitssl.optim import optimizer as optim
from vitssl.run import step

# I-JEPA decays no bias and no 1-D tensor; these are all of ours.
IJEPA_WD = ((r".*/(bias|scale|ls1|ls2)", 0.0), (".*", 1.0))
MASKS = dict(
    sampler="original",
    num_target_masks=4,
    scale_progression="geometric",
    base_scale=(0.05, 0.15),
    aspect_ratio_range=(0.75, 1.5),
    max_attempts=10,
    min_keep=0,
    targets_per_level="constant",
    packed=False,  # Room for any masks whatsoever.
)


def _method(c, *, mode, pooling, objective=None, masking=None, ema=None, **run):
    """The method that a case's `config` describes."""
    size = c.get("gsize", c["img_size"])
    fpn = c.get("fpn_fusion_method", "add") if c.get("use_fpn") else ""
    cropping = dict.fromkeys(("global_crop_scale", "local_crop_scale"), (0.1, 1.0))
    return hjepa.HJEPA(
        run=base.Run(
            **dict(total_steps=1, steps_per_epoch=1, batch_size=2) | run,
            classes=0,
            channels=3,
            mean=(0.0,) * 3,
            std=(1.0,) * 3,
        ),
        model=hjepa_encoder.build(c),
        predictor=predictor.Spec(
            depth=c["predictor_depth"],
            heads=c["predictor_num_heads"],
            mlp_ratio=c.get("predictor_mlp_ratio", 4.0),
        ),
        levels=levels.Spec(
            pooling=pooling,
            norm=c.get("projection_norm", "layernorm"),
            fpn=fpn,
            fpn_width=c.get("fpn_feature_dim") or 0,
        ),
        multicrop=crops.MultiCrop(
            num_global_crops=c.get("ng", 1),
            # One at least: then the query without a position exists.
            num_local_crops=max(1, c.get("nl", 0)),
            global_crop_size=size,
            local_crop_size=c.get("lsize", size),
            global_color_jitter=0.0,
            local_color_jitter=0.0,
            color_jitter_prob=0.0,
            horizontal_flip_prob=0.0,
            interpolation="bicubic",
            colour="host",
            **cropping,
        ),
        masking=masks.Masking(
            **MASKS
            | dict(strategy="global_only", levels="finest", mode=mode)
            | dict(num_hierarchies=c.get("num_hierarchies", 3))
            | (masking or {})
        ),
        objective=hjepa_losses.Objective(
            **dict(type="mse", normalize=False, weights=(1.0,), view_weight=1.0)
            | (objective or {})
        ),
        ema=hjepa.Ema(
            **dict(start=0.0, end=0.0, target_encoder=c.get("use_target_encoder", True))
            | (ema or {})
        ),
    )


def _load(method, state):
    """Put a case's parameters in, through the table users use."""
    image = {"global": jnp.zeros((1, 1, *(method.model.image_size,) * 2, 3))}
    fresh = jax.eval_shape(lambda: method.init(jax.random.key(0), image))
    params, extra = names.load(state, *fresh)
    if "momentum" in extra:
        extra["momentum"] = jnp.float32(method.ema.start)
    roles = params["predictor"].get("roles")
    if isinstance(roles, jax.ShapeDtypeStruct):
        params["predictor"]["roles"] = jnp.zeros(roles.shape)
    return params, extra


def _image(x):
    return jnp.asarray(einops.rearrange(x, "... c h w -> ... h w c"))


def _predictor(case):
    c, x = case.config, case.inputs
    net = predictor.Predictor(
        depth=c["depth"],
        heads=c["num_heads"],
        mlp_ratio=c["mlp_ratio"],
        drop_path=c["drop_path_rate"],
        pooled=True,
    )
    row = jnp.zeros((1, 1, c["embed_dim"]))
    reading.agree(c, dropout=0.0)
    like = jax.eval_shape(net.init, jax.random.key(0), row, row)["params"]
    params = convert.convert(case.param, like, names.predictor())
    context = jnp.asarray(x["context_features"])
    where = x["mask_indices"].astype(int)[..., None]
    query = jnp.take_along_axis(jnp.asarray(x["pos_embed"]), where, 1)
    case.close("predictions", net.apply({"params": params}, context, query))
    free = jnp.broadcast_to(params["pooled_query"], query.shape)
    case.close("predictions_no_pos", net.apply({"params": params}, context, free))


def _batch_norm(case):
    c, x = case.config, jnp.asarray(case.inputs["x"])
    reading.agree(c, dim=x.shape[-1])
    net = levels.BatchNorm(eps=c["eps"], momentum=c["momentum"])
    fresh = net.init(jax.random.key(0), x)
    named = {"params": "params", "batch_stats": "stats"}
    like = {ours: {"proj_0": {"norm": fresh[flax]}} for flax, ours in named.items()}
    state = {f"hierarchy_projections.0.1.{k}": v for k, v in case.param.items()}
    found = convert.convert(state, like, names.levels("params/"))
    state = {flax: found[ours]["proj_0"]["norm"] for flax, ours in named.items()}
    y, moved = net.apply(state, x, None, True, mutable=["batch_stats"])
    case.close("y", y)
    case.close("running_mean", moved["batch_stats"]["mean"])
    case.close("running_var", moved["batch_stats"]["var"])


def _levels(case, mode, pooling):
    """Return (method, networks, images, {k: Level}) of one variant."""
    method = _method(case.config, mode=mode, pooling=pooling)
    params, extra = _load(method, case.param)
    image = _image(case.inputs["images"])
    hidden = jnp.asarray(case.inputs["mask"]) > 0
    masks = {"global_context": ~hidden, "global_targets": hidden}
    masks = {k: m[:, None, None] for k, m in masks.items()}  # [B, G, H, N]

    @jax.jit
    def run(params, extra, image):
        net = method.networks(params, extra, train=False)
        terms = method.terms(net, {"global": image[:, None]} | masks)
        return jax.tree.map(lambda x: x[:, 0], terms.near.levels)

    return method, params, extra, image, run(params, extra, image)


def _rows(x, valid):
    """Return the valid rows of each sample."""
    return [np.asarray(a)[np.asarray(v)] for a, v in zip(x, valid, strict=True)]


# Prefix of the names in a case -> (masking, pooling).
VARIANTS = {
    "": ("zero", "sequence"),
    "drop_": ("drop", "sequence"),
    "spatial_": ("drop", "spatial"),
}


def _model(case):
    """Full forward passes; samples with equal and with unequal numbers of targets."""
    ragged = any(name.startswith("sequence_") for name in case.out)
    variants = VARIANTS
    if ragged:
        variants = {"sequence_": ("drop", "sequence"), "spatial_": ("drop", "spatial")}
    for prefix, (mode, pooling) in variants.items():
        if not any(_parse(name, prefix) for name in case.out):
            continue
        method, params, extra, image, found = _levels(case, mode, pooling)
        concatenated = ragged or pooling == "spatial"
        join = np.concatenate if concatenated else np.stack
        for name in case.out:
            kind, k = _parse(name, prefix) or (None, None)
            if kind in ("prediction", "target"):
                rows = _rows(getattr(found[k], kind), found[k].valid)
                case.close(name, join(rows))
            elif kind == "count":
                case.close(name, found[k].valid.sum(-1))
            elif kind == "loss":
                case.close(name, _losses(found, *k))
        if not prefix:
            _features(case, method, params, extra, image)


def _parse(name, prefix):
    """Return (kind, level or loss) of an output of a variant, else None."""
    if not name.startswith(prefix):
        return None
    rest = name[len(prefix) :]
    if found := re.fullmatch(r"(prediction|target|count)_(\d+)", rest):
        return found[1], int(found[2])
    if found := re.fullmatch(r"loss_([a-z0-9]+)_norm([01])", rest):
        return "loss", (found[1], found[2] == "1")
    return None


def _losses(found, kind, normalize):
    return [
        regression.level_loss(*found[k], kind=kind, normalize=normalize)
        for k in sorted(found)
    ]


def _features(case, method, params, extra, image):
    """All tokens of both encoders, and the features that evaluators take."""
    net = method.networks(params, extra, train=False)
    hidden = jnp.asarray(case.inputs["mask"]) > 0
    weights = {"context": params["encoder"], "target": net.target}
    for side, hide in (("context", hidden), ("target", None)):
        name = f"{side}_features"
        if name in case.out:
            tokens, _ = net.encoder.apply({"params": weights[side]}, image, hide=hide)
            case.close(name, tokens)
    for name in case.out:
        if found := re.fullmatch(r"features_(context|target)_(\d+)", name):
            tokens, out = net.encoder.apply({"params": weights[found[1]]}, image)
            tokens = apply.split(net.encoder, tokens)[1]
            members = levels.everything(len(image), out["grid"])
            level = net.project(tokens, members, target=found[1] == "target")
            got = level[int(found[2])][0]
            case.close(name, got)


def _multicrop(case):
    """Losses and gradients of one step of any strategy."""
    c = case.config
    kind = "smoothl1" if c["loss"] in ("hjepa", "jepa") else c["loss"]
    objective = dict(
        type=kind,
        normalize=c["normalize"],
        weights=tuple(c["weights"]),
        view_weight=c["view_weight"],
        local_weight=c["local_weight"],
        huber_delta=c.get("huber_delta", 1.0),
    )
    masking = dict(strategy=c["strategy"], levels=c["mask_levels"])
    method = _method(
        c, mode=c["mode"], pooling=c["pooling"], objective=objective, masking=masking
    )
    roles = {"role_embed": case.inputs["role_embed"]}
    # Where nothing uses them, our tree has no role vectors.
    wanted = method.predictor_module.roles
    params, extra = _load(method, case.param | (roles if wanted else {}))
    batch = {}
    for side, count in (("global", c["ng"]), ("local", c["nl"])):
        if count:
            images = [case.inputs[f"{side}_{i}"] for i in range(count)]
            batch[side] = jnp.stack([_image(x) for x in images], 1)
            reading.agree(c, B=len(batch[side]))
        for mask in ("context", "targets"):
            if (key := f"{side}_{mask}") in case.inputs:
                batch[key] = jnp.asarray(case.inputs[key]).swapaxes(0, 1) > 0

    @jax.jit
    def run(params, extra, batch):
        terms = method.terms(method.networks(params, extra, train=True), batch)
        found = {"loss_levels_global": terms.near.losses}
        if terms.far is not None:
            found["loss_levels_local"] = terms.far.losses
        if terms.view is not None:
            found["loss_view"] = terms.view
        value = jax.value_and_grad(method.loss, has_aux=True)
        (loss, _), grads = value(params, extra, batch, jax.random.key(0))
        norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
        return found | {"loss": loss, "grad_global_norm": norm}, grads

    found, grads = run(params, extra, batch)
    named = convert.export({"params": grads}, names.table())
    if "role_embed" in case.out and not wanted:
        named["role_embed"] = np.zeros_like(case.inputs["role_embed"])
    for name in case.out:
        group, _, leaf = name.partition("/")
        case.close(name, named[leaf] if group == "grad" else found[name])


def _train(case):
    """Optimizer steps on single crops, with this package's own optimizer and step."""
    c, x = case.config, case.inputs
    lr, ema, steps = c["lr"], c["ema"], len(case.out["loss"])
    per_epoch, total = lr["steps_per_epoch"], lr["epochs"] * lr["steps_per_epoch"]
    reading.agree(ema, epochs=lr["epochs"], steps_per_epoch=per_epoch)
    method = _method(
        c,
        mode=c["masking"],
        pooling=c["pooling"],
        objective=dict(
            type=c["loss"]["type"],
            normalize=c["loss"]["normalize_embeddings"],
            weights=tuple(c["loss"]["hierarchy_weights"]),
        ),
        ema=dict(
            start=ema["start"],
            end=ema["end"],
            warmup_steps=ema["warmup_epochs"] * ema["steps_per_epoch"],
        ),
        total_steps=total,
        steps_per_epoch=per_epoch,
    )
    params, extra = _load(method, case.param)
    b1, b2 = c.get("betas", (0.9, 0.999))
    spec = optim.Optim(
        name=c["optimizer"],
        lr=lr["base"],
        schedule=lr["kind"],
        min_lr=lr["final"],
        start_lr=lr.get("start", 0.0),
        warmup_epochs=lr["warmup_epochs"],
        wd=c["weight_decay"],
        clip_norm=c["clip_grad_norm"],
        b1=b1,
        b2=b2,
        eps=c.get("eps", 1e-8),
        wd_rules=IJEPA_WD
        if c["weight_decay_excludes_1d_and_bias"]
        else optim.EVERYTHING,
        # No gradient reaches it, and torch then leaves a tensor alone.
        lr_rules=(("predictor/pooled_query", 0.0), (".*", 1.0)),
    )
    optimizer = optim.make(
        spec, params, total_steps=total, steps_per_epoch=per_epoch, batch_size=2
    )
    first = c["first_step_index"]
    phase = step.Phase(optimizer.frozen(first), ())
    trainable, _ = tree.split(params, phase.frozen)
    opt = optimizer.init(trainable)
    state = step.State(jnp.int32(first), params, extra, opt, jax.random.key(0))
    update = jax.jit(step.make(method, optimizer), static_argnums=2)
    seen = {"loss": [], "grad_norm": [], "lr": [], "momentum": []}
    for i in range(steps):
        hidden = jnp.asarray(x[f"mask_{i}"])[:, None, None] > 0
        batch = {"global": _image(x[f"images_{i}"])[:, None]}
        batch |= {"global_context": ~hidden, "global_targets": hidden}
        state, metrics = update(state, batch, phase)
        metrics["momentum"] = state.extra["momentum"]
        for name, values in seen.items():
            values.append(float(metrics[name]))
    after = names.export(state.params, state.extra)
    for name in case.out:
        _, slash, leaf = name.partition("after/")
        got = np.array(after[leaf] if slash else seen[name])
        if leaf.endswith("attn.in_proj_bias"):
            # The bias of the keys moves no attention: its gradient is rounding alone,
            # which Adam scales to whole steps: that third is nobody's to compare.
            keys = slice(len(got) // 3, 2 * len(got) // 3)
            got[keys] = case.out[name][keys]
        case.close(name, got)


def _groups(case):
    """Which parameters the rules of our configs let decay, by their torch names."""
    method = _method(case.config, mode="drop", pooling="spatial")
    image = {"global": jnp.zeros((1, 1, *(method.model.image_size,) * 2, 3))}
    params, _ = jax.eval_shape(lambda: method.init(jax.random.key(0), image))
    leaves = tree.flat(params)
    factor = tree.match(leaves, IJEPA_WD, what="optim.wd_rules")
    named = {}
    for name, leaf in leaves.items():
        one = tree.nest({f"params/{name}": np.zeros(leaf.shape)})
        (key,) = convert.export(one, names.table())
        named[key] = factor[name]
    groups = case.meta["groups"]
    assert set(named) == set(groups["original_all_decay"])
    assert {k for k, f in named.items() if f} == set(groups["ijepa_rule_decay"])
    assert {k for k, f in named.items() if not f} == set(groups["ijepa_rule_no_decay"])


CHECKS = {
    "predictor": _predictor,
    "BatchNorm projection norm": _batch_norm,
    "H-JEPA model": _model,
    "H-JEPA model, different mask counts per sample": _model,
    "complete multi-crop training loss": _multicrop,
    "training step (single crop)": _train,
    "parameter groups": _groups,
}
