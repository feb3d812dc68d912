"""The hierarchical ViT: whole models, their parts, projection heads, rollout."""

import jax
import jax.numpy as jnp
import numpy as np

from tests import whole_hvit
from tests.golden import reading
from vitssl import convert
from vitssl.convert import Rule, Table, family, hvit_names, vit_names
from vitssl.methods.simclr import method as simclr
from vitssl.models import hvit, layers, posemb, pyramid
from vitssl.pictures import attention

QUICK = {"xla_backend_optimization_level": 0}
EPS = 1e-5


def image(case, name):
    return jnp.asarray(case.inputs[name]).transpose(0, 2, 3, 1)  # [B, H, W, C]


def _size(config):
    """(height, width) of the images a model is built for."""
    size = config["img_size"]
    return (size, size) if isinstance(size, int) else tuple(size)


def backbone(config):
    """The backbone that the configuration of a case describes."""
    c = config["hvt_params"]
    height, width = _size(config)
    widths = c.get("embed_dim_rgb", 96), c.get("embed_dim_spectral", 96)
    fusion = "concat" if widths[0] == widths[1] else "none"
    return hvit.HViT(
        width=widths[0],
        depths=tuple(c.get("depths", (2, 2, 6, 2))),
        heads=tuple(c.get("num_heads", (3, 6, 12, 24))),
        patch=c.get("patch_size", 16),
        image_size=height,
        image_width=width,
        mlp_ratio=c.get("mlp_ratio", 4.0),
        qkv_bias=c.get("qkv_bias", True),
        drop_path=c.get("drop_path_rate", 0.1),
        remat=c.get("use_gradient_checkpointing", False),
        spectral_channels=c.get("spectral_channels", 0),
        spectral_width=widths[1],
        fusion="dfca" if c.get("use_dfca", True) else fusion,
        dfca_width="rgb" if c.get("dfca_embed_dim_match_rgb", True) else "spectral",
        dfca_heads=c.get("dfca_num_heads", 12),
        disease_mask=c.get("dfca_use_disease_mask", True),
    )


def model(config):
    """The same with its heads."""
    c = config["hvt_params"]
    width = c.get("ssl_contrastive_projector_dim", 128)
    depth = c.get("ssl_contrastive_projector_depth", 2)
    return whole_hvit.HViTModel(
        backbone(config),
        config["num_classes"],
        consistency=c.get("enable_consistency_loss_heads", False),
        projector=(width,) * depth if c.get("ssl_enable_contrastive") else (),
        mae=c.get("ssl_mae_decoder_dim", 64) if c.get("ssl_enable_mae") else 0,
        mae_hides=False,
    )


def original(state, like):
    """Parameters like those of `HViTModel` with an original's weights."""
    return convert.convert(state, like, hvit_names.table(hvit_names.depths(state)))


def projections(batchnorm):
    """The table of `simclr.method.Projector`, into {"params", "stats"}.

    With batchnorm that of the logged runs, phase3_pretraining/models; else that of
    scripts/pretrain.py.
    """
    if not batchnorm:
        one = vit_names.linear("0", "params/fc1")
        return Table((*one, *vit_names.linear("2", "params/fc2")))
    rules = (
        *vit_names.linear("head.0", "params/fc1"),
        *vit_names.norm("head.1", "params/norm"),
        Rule("head.1.running_mean", "stats/mean"),
        Rule("head.1.running_var", "stats/var"),
        *vit_names.linear("head.3", "params/fc2"),
    )
    return Table(rules, ("head.1.num_batches_tracked",))


def load(case):
    """(model, its variables, its images) through the table a user's weights take."""
    net = model(case.config)
    images = {"spectral": None} | {
        k: image(case, k) for k in case.inputs if k != "mask"
    }
    built = jnp.zeros((1, *_size(case.config), images["rgb"].shape[-1]))
    channels = net.backbone.spectral_channels
    like = {"spectral": jnp.zeros((*built.shape[:3], channels))} if channels else {}
    like = jax.eval_shape(net.init, jax.random.key(0), built, **like)["params"]
    return net, {"params": original(case.param, like)}, images


def _forward(case):
    net, variables, images = load(case)
    rgb, spectral = images["rgb"], images["spectral"]
    config, (height, width) = case.config, rgb.shape[1:3]
    reading.agree(config, run_img_size=[height, width])

    def run(variables):
        out = net.apply(variables, rgb, spectral=spectral)
        first, _ = net.apply(variables, rgb, method=lambda m, x: m.backbone.embed(x))
        positions = net.apply(
            variables, method=lambda m: m.backbone.position_table(out["grids"][0])
        )
        return out | {"first": first, "positions": positions}

    out = jax.jit(run, compiler_options=QUICK)(variables)
    odd = any(side % 2 for grid in out["grids"][:-1] for side in grid)
    assert config.get("pad_odd", False) or not odd, "an odd grid needs pad_odd"
    found = {
        "rgb_patch_embed": out["first"],
        "rgb_pos_embed_used": out["positions"],
        "rgb_encoded": out["rgb"],
        "spectral_encoded": out.get("spectral"),
        "emb_fused_pooled": out["pooled"],
        "emb_rgb_pooled": out["rgb_pooled"],
        "emb_spectral_pooled": out.get("spectral_pooled"),
        "contrastive": out.get("projection"),
        **{k: v for k, v in out.items() if k.startswith("logits")},
    }
    for name, prefix in (("rgb", ""), ("spectral", "spectral_")):
        last = out.get(f"{prefix}stages", [])[-1:]
        # What a stage hands on, which of the last one is no smaller grid.
        handed = out.get(f"{prefix}merged", []) + [_flat(x) for x in last]
        found |= {f"{name}_stage{s}": x for s, x in enumerate(handed)}
    for name in case.out:
        case.close(name, found[name])


def _flat(x):
    return x.reshape(len(x), -1, x.shape[-1])


def _mae(case):
    net, variables, images = load(case)
    spectral, mask = images["spectral"], np.asarray(case.inputs["mask"])
    out = net.apply(variables, images["rgb"], spectral=spectral, mask=mask)
    for name, prefix in (("rgb", ""), ("spectral", "spectral_")):
        if images[name] is None:
            continue
        squares = whole_hvit.square_pixels(images[name], net.square)
        case.close(f"pred_{name}", np.asarray(out[f"{prefix}pixels"])[mask])
        case.close(f"target_{name}", np.asarray(squares)[mask])
        grid = out["grids"][0]
        case.close(f"mask_{name}", mask.reshape(-1, *grid))
        if f"patchified_{name}" in case.out:
            case.close(f"patchified_{name}", squares)


def _part(case, net, rules, name, *args):
    """Variables of a part whose weights are named after it."""
    like = jax.eval_shape(lambda rng: net.init(rng, *args), jax.random.key(0))
    before = f"{name}." if name else ""
    state = {k: v for k, v in case.param.items() if k.startswith(before)}
    table_ = convert.Table(rules).under(before)
    return {"params": convert.convert(state, like["params"], table_)}


def _blocks(case):
    c = case.config
    x = jnp.asarray(case.inputs["x"])  # [B, N, D]
    hidden, grid = int(c["dim"] * c["mlp_ratio"]), tuple(c["grid"])
    shape = dict(heads=c["num_heads"], qkv_bias=c["qkv_bias"])

    attn = layers.Attention(**shape)
    weights = _part(case, attn, hvit_names.ATTENTION, "attention", x)
    y, sown = attn.apply(weights, x, mutable=["intermediates"])
    case.close("attention_probs", sown["intermediates"]["attention"][0])
    case.close("attention", attn.apply(weights, x))

    mlp = layers.MLP(hidden)
    case.close("mlp", mlp.apply(_part(case, mlp, hvit_names.MLP, "mlp", x), x))

    block = layers.Block(hidden=hidden, eps=EPS, **shape)
    merge = pyramid.PatchMerging(EPS)
    for name, net, rules, args in (
        ("block", block, hvit_names.BLOCK, ()),
        ("merging", merge, hvit_names.MERGE, (grid,)),
    ):
        weights = _part(case, net, rules, name, x, *args)
        for suffix, scale in (("", 1.0), ("_small", 0.01)):
            if name + suffix in case.out:
                y = net.apply(weights, scale * x, *args)
                case.close(name + suffix, y[0] if args else y)
    y = x
    for i in range(family.depth(case.param, "stage.blocks.{i}.")):
        y = block.apply(_part(case, block, hvit_names.BLOCK, f"stage.blocks.{i}", x), y)
    weights = _part(case, merge, hvit_names.MERGE, "stage.downsample_layer", x, grid)
    case.close("stage", merge.apply(weights, y, grid)[0])

    hidden, size = (case.param[f"mae_head.decoder_pred.{i}.bias"].size for i in (0, 2))
    head = whole_hvit.Projections((hidden, size))
    case.close(
        "mae_head",
        head.apply(_part(case, head, hvit_names.mae_head(), "mae_head", x), x),
    )


def _dfca(case):
    c = case.config
    rgb, spectral = (
        jnp.asarray(case.inputs[k]).swapaxes(0, 1) for k in ("rgb", "spectral")
    )
    reading.agree(c, embed_dim=rgb.shape[-1])
    net = hvit.DFCA(
        heads=c.get("num_heads", 12), disease_mask=c.get("use_disease_mask", True)
    )
    weights = _part(case, net, hvit_names.DFCA, "", rgb, spectral)
    case.close("fused", net.apply(weights, rgb, spectral).swapaxes(0, 1))
    attn = hvit.CrossAttention(c["num_heads"])
    inner = {"params": weights["params"]["attn"]}
    mask = weights["params"].get("disease_mask", 0.0)
    case.close("attn_out", attn.apply(inner, rgb, spectral + mask).swapaxes(0, 1))
    for name, keys in (
        ("attn_weights", spectral + mask),
        ("attn_weights_without_mask", spectral),
    ):
        if name in case.out:
            _, sown = attn.apply(inner, rgb, keys, mutable=["intermediates"])
            case.close(name, sown["intermediates"]["attention"][0].mean(1))


def _drop_path(case):
    c = case.config
    x, u = case.inputs["x"], case.inputs["u"]
    case.close("y", x * layers.gain_of(u, c["drop_prob"]))
    shape = dict(width=8, heads=(1,) * len(c["depths"]), patch=4, image_size=8)
    for name in case.out:
        if name.startswith("rates_"):
            rate = float(name.removeprefix("rates_"))
            net = hvit.HViT(depths=tuple(c["depths"]), drop_path=rate, **shape)
            case.close(name, net.rates)
    block = layers.Block(heads=1, hidden=8, drop_path=0.0)
    weights = block.init(jax.random.key(0), x)
    # A rate of 0 draws nothing: there is no stream to draw from.
    same = block.apply(weights, x, None, None, True)
    np.testing.assert_array_equal(same, block.apply(weights, x))


def _positions(case):
    c = case.config
    old, table_ = tuple(c["base_grid"]), case.inputs["pos_embed"]
    reading.agree(c, dim=table_.shape[-1])
    for h, w in c["targets"]:
        got = posemb.resample(table_, old, (h, w), "plain")
        case.close(f"to_{h}x{w}", got)


def _projectors(case):
    c, x = case.config, jnp.asarray(case.inputs["x"])
    heads = {
        "relu": simclr.Projector(c["out_dim"], 0),
        "bn": simclr.Projector(c["out_dim"], c["hidden_dim"], batchnorm=True),
    }
    for name, head in heads.items():
        rng = jax.random.key(0)
        like = jax.eval_shape(lambda: head.init(rng, c["in_dim"]))  # noqa: B023
        like = {k: v for k, v in zip(("params", "stats"), like, strict=True) if v}
        state = {k: v for k, v in case.param.items() if k.startswith(f"{name}.")}
        rules = projections(head.batchnorm).under(f"{name}.")
        found = convert.convert(state, like, rules)
        params, stats = found["params"], found.get("stats", {})
        y, _ = head(params, stats, x)
        case.close("bn_eval" if stats else "relu", y)
        if stats:
            y, after = head(params, stats, x, train=True)
            case.close("bn_train", y)
            case.close("bn_running_mean_after", after["mean"])
            case.close("bn_running_var_after", after["var"])


def _rollout(case):
    matrices = case.inputs["attn"]  # [layers, B, heads, N, N]
    layers, _, heads, tokens, _ = matrices.shape
    reading.agree(case.config, layers=layers, heads=heads, tokens=tokens)
    rolled = [attention.rollout(m) for m in matrices.swapaxes(0, 1)]
    case.close("rollout", np.stack(rolled))
    maps = [attention.on_patches(r, matrices.shape[-1]) for r in rolled]
    case.close("map", np.stack(maps))


CHECKS = {
    "DiseaseAwareHVT.forward": _forward,
    "DiseaseAwareHVT.forward (odd grids padded)": _forward,
    "DiseaseFocusedCrossAttention": _dfca,
    "building blocks": _blocks,
    "drop_path": _drop_path,
    "MAE mode": _mae,
    "position-embedding interpolation": _positions,
    "SimCLR projection heads": _projectors,
    "attention rollout": _rollout,
}
