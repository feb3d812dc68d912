"""LocalMIM: masks, HOG, decoders, the whole model, and training with FreezeOut."""

import fractions
import functools
import re

import einops
import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import localmim_names, reading
from vitssl import convert, tree
from vitssl.data import views
from vitssl.methods import base
from vitssl.methods.localmim import method as localmim
from vitssl.methods.localmim import stages, targets
from vitssl.models import decoder, posemb, vit
from vitssl.ops import random_masking
from vitssl.optim import freezeout
from vitssl.optim import optimizer as optim

# Compiling is most of the time of these checks: quicker without optimisation.
QUICK = {"xla_backend_optimization_level": 0}

SCALES = (4.0, 2.0, 1.0, 0.5)
ALL_SCALES = (8.0, *(4.0,) * 2, *(2.0,) * 6, 1.0, 1.0, 0.5)  # Of twelve blocks.


def stages_of(c):
    """The stages of a configuration; the original's where it names none."""
    depth, every = c["depth"], c.get("all_stages", False)
    blocks = range(depth) if every else (1, 3, depth - 3, depth - 1)
    blocks = tuple(c.get("stage_block_ids", blocks))
    scales = tuple(c.get("decoder_scales", ALL_SCALES if every else SCALES))
    reading.agree(
        c,
        all_stages=len(blocks) == depth,
        hog_pools=[round(c["patch_size"] / scale) for scale in scales],
    )
    return stages.Stages(blocks=blocks, scales=scales)


def build(c, **sections):
    """The method that the configuration of a case describes."""
    channels = c.get("in_chans", 3)
    return localmim.LocalMIM(
        run=base.Run(
            total_steps=1,
            steps_per_epoch=1,
            batch_size=1,
            classes=0,
            channels=channels,
            mean=(0.5,) * channels,
            std=(0.5,) * channels,
        ),
        model=vit.ViT(
            width=c["embed_dim"],
            depth=c["depth"],
            heads=c["num_heads"],
            patch=c["patch_size"],
            image_size=c["img_size"],
            mlp_ratio=c.get("mlp_ratio", 4.0),
            positions="sincos",
            norm_eps=c.get("ln_eps", 1e-6),
        ),
        augment=views.SingleCrop(size=c["img_size"]),
        decoder=decoder.Decoder(
            width=c["decoder_embed_dim"],
            depth=c.get("decoder_depth", 1),
            heads=c["decoder_num_heads"],
            mlp_ratio=c.get("mlp_ratio", 4.0),
        ),
        stages=stages_of(c),
        target=targets.Targets(nbins=c.get("hog_nbins", 9)),
        **sections,
    )


def load(case):
    """(method, parameters of the case, table of names)."""
    method = build(case.config)
    names = localmim_names.table(method.stages.scales)
    return method, convert.convert(case.param, like(method), names), names


@functools.cache
def like(method):
    """Shapes of the method's parameters."""
    size, channels = method.augment.size, method.run.channels
    batch = {"global": jnp.zeros((1, 1, size, size, channels))}
    return jax.eval_shape(method.init, jax.random.key(0), batch)[0]


def pixels(x):
    """[..., C, H, W] -> [..., H, W, C]."""
    return jnp.moveaxis(jnp.asarray(x), -3, -1)


def norms(grads, names, table_):
    """Norm of the gradient of every parameter of the original, 0 if there is none."""
    found = convert.export(grads, table_)
    return [float(np.linalg.norm(found[n])) if n in found else 0.0 for n in names]


def _positions(case):
    for c in case.config["cases"]:
        got = posemb.sincos((c["grid_size"],) * 2, c["embed_dim"])
        if c["cls_token"]:
            got = np.pad(got, ((1, 0), (0, 0)))
        case.close(c["key"], got)


def _masks(case):
    for c in case.config["cases"]:
        key, n = c["key"], c["L"]
        visible = random_masking.Masking(ratio=c["mask_ratio"]).visible(n, 0.0)
        assert visible == c["len_keep"]
        noise = jnp.asarray(case.inputs[f"{key}/noise"])
        reading.agree(c, B=len(noise))
        found = random_masking.masks(noise, visible)
        case.close(f"{key}/mask", found.mask)
        case.close(f"{key}/ids_restore", found.restore)
        case.close(f"{key}/kept_index", found.keep)


def _rescaled(case):
    grid = (case.config["grid"],) * 2
    for scale in case.config["scales"]:
        got = random_masking.cell_weights(jnp.asarray(case.inputs["mask"]), grid, scale)
        case.close(f"scale{scale}", got)


def _flat(x):
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _hog(case):
    c, image = case.config, pixels(case.inputs["imgs"])
    reading.agree(c, image_size=image.shape[1], max_angle="pi")
    biases = None
    if c["hog_bias"]:
        biases = [case.param[f"pool{k}.conv.bias"] for k in c["pools"]]
    found = targets.hog(image, c["pools"], c["nbins"], biases)
    for cell, x in zip(c["pools"], found, strict=True):
        case.close(f"pool{cell}", _flat(x))
    if "gxy_channel0" in case.out:
        gx, gy = (g[..., 0] for g in targets.gradients(image))
        case.close("gxy_channel0", jnp.stack([gx, gy], axis=1))
        case.close("bin_channel0", targets.bins(gx, gy, c["nbins"]))


def _raster(cells, grid, scale):
    """Return cells per patch [B, N, s, s, C] as one grid [B, (h s) (w s), C]."""
    if scale < 1:  # [B, n, 1, 1, C] are a grid already.
        return cells[:, :, 0, 0]
    h, w = grid
    return einops.rearrange(cells, "b (h w) p q c -> b (h p w q) c", h=h, w=w)


def _decoder(case):
    c = case.config
    side = int(c["num_patches"] ** 0.5)
    width, bins = case.inputs["x"].shape[-1], c["out_dim"] // 3
    reading.agree(c, inp_dim=width, nbins=bins, qkv_bias=True)
    for scale in c["scales"]:
        module = decoder.StageDecoder(
            decoder.Decoder(
                width=c["embed_dim"],
                depth=c["depth"],
                heads=c["num_heads"],
                mlp_ratio=c["mlp_ratio"],
            ),
            scale=scale,
            out=c["out_dim"],
            norm_eps=c["ln_eps"],
        )
        x, restore = (jnp.asarray(case.inputs[k]) for k in ("x", "ids_restore"))
        prefix = f"scale{scale}/"
        state = {k[len(prefix) :]: v for k, v in case.param.items() if prefix in k}
        want = jax.eval_shape(
            lambda x, r, m=module: m.init(jax.random.key(0), x, r, (side, side)),
            x,
            restore,
        )["params"]
        params = convert.convert(state, want, localmim_names.decoder(scale))
        got = module.apply({"params": params}, x, restore, (side, side))
        case.close(f"scale{scale}", _raster(got, (side, side), scale))
        if scale >= 1:  # Predicting some patches only changes nothing.
            only = jnp.asarray([[2, 0, 5]] * len(x))
            some = module.apply({"params": params}, x, restore, (side, side), only)
            np.testing.assert_allclose(some, got[:, [2, 0, 5]], atol=1e-6)


def _masks_of(case, method, noise):
    n = method.grid[0] * method.grid[1]
    ratio = case.config.get("mask_ratio", 0.75)
    visible = random_masking.Masking(ratio=ratio).visible(n, 0.0)
    return random_masking.masks(jnp.asarray(noise), visible)


def _model(case):
    method, params, names = load(case)
    image = pixels(case.inputs["imgs"])
    masks = _masks_of(case, method, case.inputs["noise"])
    case.close("mask", masks.mask)
    case.close("ids_restore", masks.restore)
    every = tuple(range(method.stages.count))
    blocks = method.stages.blocks

    def loss(p):
        each = method.stage_losses(p, {}, image, masks, every, blocks)
        each = jnp.stack([each[k] for k in every])
        return each.sum(), each

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    (total, each), grads = grad(params)
    case.close("loss", total)
    case.close("per_stage_loss", each)
    case.close("grad_norm", norms(grads, case.meta["grad_norm_names"], names))
    shown = [k for k in every if {f"latent{k}", f"pred{k}", f"target{k}"} & {*case.out}]

    def inside(params):
        net = {"params": params["encoder"]}
        _, out = method.model.apply(net, image, keep=masks.keep)
        goals = method.goals(params, {}, image, shown)
        found = {}
        for k in shown:
            latent = method._stage_norm(params, k, out["blocks"][blocks[k]])
            module, scale = method.decoder_module(k), method.stages.scales[k]
            own = {"params": params[f"decoder_{k}"]}
            got = module.apply(own, latent, masks.restore, method.grid)
            found[f"latent{k}"] = latent
            found[f"pred{k}"] = _raster(got, method.grid, scale)
            found[f"target{k}"] = _raster(goals[k], method.grid, scale)
        return found

    for name, value in jax.jit(inside, compiler_options=QUICK)(params).items():
        if name in case.out:
            case.close(name, value)


def layers_of(method, params, *, as_coded=False, patch_embed=True):
    """{name: layer} of a method's parameters."""
    spec = freezeout.FreezeOut(
        layers=method.freeze_layers(),
        cls_token=not as_coded,
        patch_embed=patch_embed,
    )
    names = list(tree.flat(params))
    found = tree.match(names, spec.layers, what="freeze.layers", default=-1)
    return spec.index(found)


def _frozen(case):
    config = case.config
    method = build(config)
    names = localmim_names.table(method.stages.scales)
    params = convert.convert(case.param, like(method), names)
    image = pixels(case.inputs["imgs"])
    masks = _masks_of(case, method, case.inputs["noise"])
    known = {}
    for c in config["cases"]:
        layers = layers_of(method, params, as_coded=c["mode"] == "as_coded")
        frozen = {k for k, i in layers.items() if 0 <= i < c["frozen_layers"]}
        active = method.active(frozenset(frozen))
        assert list(active) == c["active_stages"]
        trained, constant = tree.split(params, frozen)
        key = frozenset(frozen)

        def loss(p, constant=constant, active=active):
            every = method.stage_losses(
                tree.merge(p, constant), {}, image, masks, active, method.stages.blocks
            )
            return sum(every.values())

        if key not in known:
            grad = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
            known[key] = grad(trained)
        value, grads = known[key]
        # What is frozen has no gradient at all: not 0, but absent.
        grads = tree.nest(grads)
        case.close(f"{c['key']}/loss", value)
        got = norms(grads, case.meta["grad_norm_names"], names)
        case.close(f"{c['key']}/grad_norm", got)


def _stage_weights(case):
    each = jnp.asarray(case.inputs["per_stage"])
    n = len(each)
    reading.agree(case.config, stages=n)
    for name, text in case.config["weightings"].items():
        name = {"seed_intent": "one_over_n_minus_k"}.get(name, name)
        want = [float(fractions.Fraction(x)) for x in text.split(",")]
        if len(want) not in (1, n):
            continue  # Written out for the four stages of the original.
        got = stages.Stages(scales=(1,) * n, weighting=name).loss_weights(range(n))
        np.testing.assert_allclose(got, want * (n // len(want)), rtol=1e-6)
    kinds = {
        "uniform": ("uniform", False),
        "n_minus_k_original": ("n_minus_k", True),
        "one_over_k_original": ("one_over_k", True),
        "n_minus_k_fixed": ("n_minus_k", False),
        "one_over_k_fixed": ("one_over_k", False),
        "seed_intent_1_over_n_minus_k": ("one_over_n_minus_k", False),
    }
    for drop in range(n):
        active = tuple(range(drop, n))
        for key, (weighting, by_remaining) in kinds.items():
            spec = stages.Stages(
                scales=(1,) * n, weighting=weighting, by_remaining=by_remaining
            )
            weights = spec.loss_weights(active)
            case.close(f"drop{drop}/{key}", (weights * each[drop:]).sum())


def _trace(case):
    c = case.config
    method = build(c)
    names = localmim_names.table(method.stages.scales)
    start = convert.convert(case.param, like(method), names)
    images = [pixels(x) for x in case.inputs["imgs"]]
    for run in c["runs"]:
        _one_trace(case, method, names, start, images, run)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=QUICK)
def _gradient(method, visible, active, params, rows):
    """((sum, {stage: loss}), gradient of all parameters) of one image."""

    def loss(params):
        image, order, restore = rows
        masks = random_masking.Masks(order, restore, visible)
        blocks = method.stages.blocks
        each = method.stage_losses(params, {}, image, masks, active, blocks)
        return sum(each.values()), each

    return jax.value_and_grad(loss, has_aux=True)(params)


def _one_trace(case, method, names, start, images, run):
    key, steps = run["key"], run["E"] * run["ipe"]
    spec = optim.Optim(
        name="adamw",
        lr=run["lr"],
        schedule="cosine",
        warmup_epochs=float(run["W"]),
        min_lr=run["min_lr"],
        wd=run["wd"],
        clip_norm=0.0,
        b1=0.9,
        b2=0.95,
        wd_rules=((".*/(bias|scale)", 0.0), (".*", 1.0)),
    )
    freeze = freezeout.FreezeOut(
        schedule=run["how"],
        t_0=run["t0"],
        scale_lr=run["scale_lr"],
        layerwise_lr=run["layerwise"],
        layers=method.freeze_layers(),
        cls_token=run["mode"] != "as_coded",
    )
    # Positions are micro-iterations here, as in the original.
    optimizer = optim.make(
        spec,
        start,
        total_steps=steps,
        steps_per_epoch=run["ipe"],
        batch_size=1,
        freeze=freeze,
    )

    n = method.grid[0] * method.grid[1]
    visible = random_masking.Masking(ratio=run.get("mask_ratio", 0.75)).visible(n, 0.0)
    update = jax.jit(optimizer.update, compiler_options=QUICK)
    params, frozen = start, frozenset()
    opt = optimizer.init(tree.split(params, frozen)[0])
    losses, each_stage, least, summed = [], [], [], None
    layers = optimizer.layers
    for t in range(steps):
        inside = t % run["ipe"]
        if inside % run["acc"] == 0:
            frozen, window, summed = optimizer.frozen(t), t, None
            opt = optim.drop(opt, frozen)
        trained, constant = tree.split(params, frozen)
        masks = random_masking.masks(jnp.asarray(case.inputs["noise"][t]), visible)
        active = method.active(frozen)
        rows = images[t % len(images)], masks.order, masks.restore
        (value, each), grads = _gradient(method, visible, active, params, rows)
        # That frozen leaves have none is checked beside; here it saves compilations.
        grads = tree.split(grads, frozen)[0]
        losses.append(float(value))
        each_stage.append([float(each.get(k, 0.0)) for k in range(method.stages.count)])
        least.append(min(layers[k] for k in trained if layers[k] >= 0))
        grads = jax.tree.map(lambda g: g / run["acc"], grads)
        summed = grads if summed is None else jax.tree.map(jnp.add, summed, grads)
        if inside % run["acc"] == run["acc"] - 1:
            new, opt, _ = update(summed, opt, trained, window)
            params = tree.merge(new, constant)
    case.close(f"{key}/loss", losses)
    case.close(f"{key}/per_stage_loss", each_stage)
    case.close(f"{key}/min_active_layer", least)
    end, begin = (convert.export(p, names) for p in (params, start))
    change = [np.linalg.norm(end[k] - begin[k]) for k in case.meta["param_names"]]
    # A key's bias has no gradient but rounding, which Adam turns into whole steps (the
    # case's own note); its change is bounded by them, not reproduced.
    noisy = [i for i, k in enumerate(case.meta["param_names"]) if "qkv.bias" in k]
    want = case.out[f"{key}/param_change_norm"]
    for i in noisy:
        assert abs(change[i] - want[i]) < 0.5 * want[i]
        change[i] = want[i]
    case.close(f"{key}/param_change_norm", change)
    for name in case.out:
        if name.startswith(f"{key}/final/"):
            case.close(name, end[name.removeprefix(f"{key}/final/")])


def _groups(case):
    c = case.config
    for variant in c["variants"]:
        want = case.meta["groups"][variant]
        every = variant == "all_stages"
        scales = _scales_of([g["name"] for g in want["groups"]])
        model = dict(
            img_size=32,
            patch_size=16,
            in_chans=3,
            embed_dim=8,
            depth=c["depth"],
            num_heads=2,
            mlp_ratio=4.0,
            decoder_embed_dim=8,
            decoder_depth=1,
            decoder_num_heads=2,
            hog_nbins=9,
            all_stages=every,
            decoder_scales=scales if every else SCALES,
        )
        method = build(model)
        params = like(method)
        names = localmim_names.table(method.stages.scales)
        layers = layers_of(
            method, params, as_coded=True, patch_embed=variant != "dont_freeze_pe"
        )
        assert max(layers.values()) == want["num_layers"]
        rules = ((".*/(bias|scale)", 0.0), (".*", 1.0))
        factors = tree.match(list(layers), rules, what="wd_rules")
        theirs = {ours: torch for torch, ours in _torch_names(params, names).items()}
        got = {
            theirs[k]: (None if layers[k] < 0 else layers[k], c["weight_decay"] * f)
            for k, f in factors.items()
        }
        wanted = {
            g["name"]: (g["layer_index"], g["weight_decay"]) for g in want["groups"]
        }
        assert got == wanted


def _scales_of(names):
    """The scales of the stages whose decoders have these names in the original."""
    layers = {}
    for name in names:
        if found := re.match(r"decoder\.(\d+)\.pred\.(\d+)", name):
            layers.setdefault(int(found[1]), set()).add(int(found[2]))
    # What a head is made of: 1 after a pooling alone, else a doubling every three.
    known = {frozenset({1}): 0.5, frozenset({0}): 1.0, frozenset({0, 1}): 2.0}
    known |= {frozenset({0, 1, 3, 4}): 4.0, frozenset({0, 1, 3, 4, 6, 7}): 8.0}
    return tuple(known[frozenset(layers[k])] for k in sorted(layers))


def _torch_names(params, names):
    """{name in the original: name here}."""
    leaves = tree.flat(params)
    marked = {
        k: np.full(v.shape, i, np.float32) for i, (k, v) in enumerate(leaves.items())
    }
    state = convert.export(tree.nest(marked), names)
    ours = list(leaves)
    return {k: ours[int(v.flat[0])] for k, v in state.items()}


CHECKS = {
    "positional embedding": _positions,
    "mask generator": _masks,
    "mask rescaling": _rescaled,
    "HOG target": _hog,
    "LocalMIM decoder": _decoder,
    "LocalMIM pre-training model": _model,
    "frozen forward/backward": _frozen,
    "stage loss weighting": _stage_weights,
    "training trace": _trace,
    "parameter grouping (pre-training)": _groups,
}
