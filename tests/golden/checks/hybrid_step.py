"""Hybrid patch size: upsamplers, training steps, any ViT, counts of FLOPs."""

import einops
import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import reading
from vitssl import convert
from vitssl.bench import flops, hybrid_flops
from vitssl.convert import vit_names
from vitssl.data import modalities
from vitssl.data.states import MISSING, ONLINE
from vitssl.losses import contrastive
from vitssl.methods.latent_mim import embed, objective, target
from vitssl.methods.latent_mim import hybrid as hybrid_mim
from vitssl.methods.latent_mim import names as olmoearth
from vitssl.methods.latent_mim.objective import Pair
from vitssl.models import hybrid_vit, upsample, vit

from . import hybrid_model as parts


def _upsampler(case):
    c, mods = case.config, parts.fields_of(case.config)
    x = {m.name: jnp.asarray(case.inputs[m.name]) for m in mods}
    mask = {m.name: jnp.asarray(case.inputs[f"{m.name}_mask"]) for m in mods}
    p, q = c["processing_patch_size"], c["output_patch_size"]
    reading.agree(c, factor=p // q, D=x[mods[0].name].shape[-1])
    fine, states = upsample.Upsampler(mods, p, q).apply({}, x, mask, {})
    for m in mods:
        case.close(m.name, fine[m.name])
        case.close(f"{m.name}_mask", states[m.name])
        wave = jnp.sin(jnp.arange(x[m.name].size, dtype=jnp.float32))
        wave = wave.reshape(x[m.name].shape)
        got = upsample.upsample(wave, None, p // q)
        case.close(f"unmasked/{m.name}", got)
        # What the original's tokens came to: zeros of hidden tokens are data. Ours
        # times the share of visible weight is that, where anything is visible.
        seen = (mask[m.name] == ONLINE)[..., None]
        plain = upsample.upsample(jnp.where(seen, x[m.name], 0), None, p // q)
        case.close(f"original/{m.name}", plain)
    shuffle = {"kernel": case.param["W"], "bias": case.param["b"]}
    for name in case.out:
        if name.startswith("pixel_shuffle/"):
            z = x[name.removeprefix("pixel_shuffle/")]
            case.close(
                name, upsample.PixelShuffle(p // q).apply({"params": shuffle}, z)
            )


def _skip(case):
    c = case.config
    names = tuple(f"band{i}" for i in range(c["C"]))
    groups = tuple(tuple(names[i] for i in g) for g in c["band_groups"])
    field = modalities.Modality("field", groups, time=True)
    assert field.channels == tuple(map(tuple, c["band_groups"]))
    params = {
        "norm": {k: case.param[f"ln.{k}"] for k in ("scale", "bias")},
        "mlp": {
            f"fc{i + 1}": {k: case.param[f"mlp.{i}.{k}"] for k in ("kernel", "bias")}
            for i in range(2)
        },
    }
    for g in range(len(groups)):
        params[f"field_{g}"] = {
            k: case.param[f"fine_embed.{g}.{k}"] for k in ("kernel", "bias")
        }
    p, q = c["processing_patch_size"], c["output_patch_size"]
    d, hidden = case.param["mlp.0.kernel"].shape
    reading.agree(c, D=d, mlp_ratio=hidden / d)
    module = upsample.Upsampler((field,), p, q, "skip")
    x, mask, pixels = (jnp.asarray(case.inputs[k]) for k in ("tokens", "mask", "x"))
    fine, states = module.apply(
        {"params": {"skip": params}}, {"field": x}, {"field": mask}, {"field": pixels}
    )
    case.close("tokens", fine["field"])
    case.close("mask", states["field"])


def system_of(c, mods, **own):
    """The system that the configuration of a case describes."""
    mode = c["mode"]
    return hybrid_mim.HybridMIM(
        encoder=parts.encoder_of(c, mods),
        predictor=parts.predictor_of(c, mods),
        p=c["processing_patch_size"],
        q=c["output_patch_size"],
        decoder="mixed" if mode == "plain" else mode,
        pool_at=c.get("pool_at", "processing"),
        **own,
    )


def _views(case):
    """The two views of a case as batches."""
    a = parts.split_masks(case, "data/")
    b = a | parts.split_masks(case, "mask_b/")
    return a, b


def total_of(module, c, frozen, a, b):
    """The function {"encoder", "predictor"} -> (loss, everything on the way)."""
    projection = target.projection(module.encoder)

    def view(params, batch):
        seen = module.apply({"params": params}, batch)
        goal = target.projected(
            projection, frozen, parts.unmask(batch), seen.asked, module.target_patch
        )
        both = {k: Pair(v.prediction, goal[k], v.valid) for k, v in seen.asked.items()}
        loss, _ = objective.patch_discrimination(
            both, kind=c["loss"], tau=c.get("tau", 0.1)
        )
        return loss, seen, goal

    def total(params):
        la, va, goal = view(params, a)
        lb, vb, _ = view(params, b)
        pull = contrastive.infonce_one_way(
            va.pooled, vb.pooled, temperature=c.get("infonce_tau", 0.1)
        )
        pull = c.get("infonce_weight", 0.1) * pull
        return (la + lb) / 2 + pull, (la, lb, pull, va, vb, goal)

    return total


def _step(case):
    c, mods = case.config, parts.fields_of(case.config)
    reading.agree(c, token_exit_cfg=0)  # The target is the projection alone.
    module = system_of(c, mods)
    a, b = _views(case)
    like = {
        "encoder": parts.encoder_like(module.encoder),
        "predictor": parts.predictor_like(module.predictor, c["embedding_size"]),
    }
    like["target"] = like["encoder"]["patch_embed"]
    params = parts.load(case.param, like, mods)
    frozen = params.pop("target")
    step = jax.value_and_grad(total_of(module, c, frozen, a, b), has_aux=True)
    (total, found), grads = parts.quick(step)(params)
    la, lb, pull, va, vb, goal = found
    scalars = {"a/loss": la, "b/loss": lb, "infonce_weighted": pull, "total": total}
    for name, value in scalars.items():
        case.close(name, value)
    case.close("a/pooled", va.pooled)
    case.close("b/pooled", vb.pooled)
    _close_tokens(case, module, mods, (a, b), va, goal)
    if any(k.startswith("a/latent/") for k in case.out):
        _close_latents(case, module, params, a)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    case.close("grad_norm_all", norm)
    named = convert.export(grads, olmoearth.table(mods))
    for name in case.out:
        if name.startswith("grad/"):
            case.close(name, named[name.removeprefix("grad/")])


def _close_tokens(case, module, mods, views, va, goal):
    """Masks, predictions and targets on the grid of the loss."""
    for m in mods:
        r = module.p // module.target_patch if m.space else 1
        for name, batch in zip("ab", views, strict=True):
            mask = embed.token_mask(batch, m, module.p)
            states = upsample.upsample_mask(mask, r)
            case.close(f"{name}/mask/{m.name}", states)
            if name == "a":
                asked, shape = va.asked[m.name], (*states.shape, -1)
                kept = jnp.where(asked.valid[..., None], asked.prediction, 0)
                case.close(f"a/pred/{m.name}", kept.reshape(shape))
                there = (states != MISSING)[..., None]
                got = jnp.where(there, goal[m.name].reshape(shape), 0)
                case.close(f"a/target/{m.name}", got)


def _close_latents(case, module, params, batch):
    """The encoder's tokens, upsampled where the decoder works at q."""
    seen = module.encoder.apply({"params": params["encoder"]}, batch, module.p)
    fine = seen.tokens
    if module.decoder == "output":
        fine, _ = module.clone(parent=None).apply(
            {"params": params}, seen.tokens, seen.mask, batch, method=_up
        )
    for name, x in fine.items():
        case.close(f"a/latent/{name}", x)


def _up(module, *args):
    return module.up(*args)


def _folded(state, prefix):
    """The state with the positions of its registers added to them: the same network.

    `models.vit.ViT` knows positions of patches and a class token; here all `prefix`
    tokens have a row.
    """
    first, table = int("cls_token" in state), state["pos_embed"]
    if prefix == first:
        return state
    registers = state["reg_token"] + table[:, first:prefix]
    rest = np.delete(table, slice(first, prefix), axis=1)
    return dict(state) | {"reg_token": registers, "pos_embed": rest}


def _vit(case):
    c = case.config
    reading.agree(c, qkv_bias=True)
    # Whether the position table has rows for what precedes the patches.
    rows = c["pos_embed_tokens"] > (c["img_size"] // c["base_patch"]) ** 2
    net = vit.ViT(
        width=c["embed_dim"],
        depth=c["depth"],
        heads=c["num_heads"],
        patch=c["base_patch"],
        image_size=c["img_size"],
        mlp_ratio=c["mlp_ratio"],
        cls=c["class_token"],
        registers=c["reg_tokens"],
        class_position=rows,
        norm_eps=c["layer_norm_eps"],
    )
    image = jnp.moveaxis(jnp.asarray(case.inputs["x"]), 1, -1)
    like = jax.eval_shape(net.init, jax.random.key(0), image)["params"]
    state = _folded(case.param, net.prefix) if rows else case.param
    params = convert.convert(state, like, vit_names.table())

    def run(p, q, mode="bilinear"):
        system = hybrid_vit.HybridViT(net, p, q, mode)
        apply = parts.quick(lambda params, x: system.apply({"vit": params}, x))
        return system, apply(params, image)

    base = c["base_patch"]
    for q in c["output_patches"]:
        _, found = run(base, q)
        case.close(f"features_q{q}", found.features_q)
    case.close("prefix", found.prefix)
    case.close("tokens_p", found.tokens_p)
    p, q = c["flexi_processing_patch"], c["flexi_output_patch"]
    system, found = run(p, q)
    case.close("flexi_prefix", found.prefix)
    case.close("flexi_tokens_p", found.tokens_p)
    case.close(f"flexi_features_q{q}", found.features_q)
    kernel = system.fitted(params)["patch_embed"]["kernel"]
    case.close("flexi_kernel", einops.rearrange(kernel, "p q c d -> d c p q"))
    table = system.network.apply(
        {"params": system.fitted(params)},
        (c["img_size"] // p,) * 2,
        method="position_table",
    )
    own = case.param["pos_embed"][0, : net.prefix if rows else 0]
    case.close("flexi_pos_embed", np.concatenate([own, table])[None])
    q = c["shift_output_patch"]
    case.close(f"shift_features_q{q}", run(base, q, "shift")[1].features_q)


def _flops(case):
    for c in case.config:
        n, q, every = (c[f"{k}_tokens"] for k in ("visible", "decode", "all"))
        d, grow, depth = c["D"], c["r"] ** 2, c["encoder_depth"]
        given = dict(width=d, depth=c["decoder_depth"])
        coarse, fine = depth * flops.block(n, d), depth * flops.block(n * grow, d)
        assert coarse == c["encoder_p"] and fine == c["encoder_q"]
        cost = hybrid_flops.predictor
        assert cost(q, n, every, every, **given) == c["decoder_p"]
        found = cost(q * grow, n * grow, every * grow, every * grow, **given)
        assert found == c["decoder_output"]
        assert cost(q * grow, n, every, q * grow, **given) == c["decoder_mixed"]
        assert grow**2 == c["encoder_attention_score_ratio"]
        assert fine / coarse == c["encoder_total_ratio"]


CHECKS = {
    "FLOP model": _flops,
    "RGB ViT with hybrid patch size": _vit,
    "PatchUpsampler (mask-aware)": _upsampler,
    'Upsampler mode "skip"': _skip,
    "training step": _step,
    "training step (hybrid, mixed)": _step,
    "training step (hybrid, output)": _step,
}
