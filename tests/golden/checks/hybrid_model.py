"""Hybrid patch size: patch embeddings, encodings, encoder, predictor, pooling."""

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tests.golden import reading
from vitssl import convert
from vitssl.data import modalities, states
from vitssl.methods.latent_mim import blocks, embed, encodings, network, tokens
from vitssl.methods.latent_mim import names as olmoearth
from vitssl.models import layers, xavier
from vitssl.ops import resize

# Compiling is most of the time of these checks: quicker without optimisation.
QUICK = {"xla_backend_optimization_level": 0}


def quick(function):
    """Jit without optimisation."""
    return jax.jit(function, compiler_options=QUICK)


class FlexiPatchReconstruction(nn.Module):
    """Pixels from tokens, in patches of any size: `embed.FlexiPatchEmbed` backwards.

    A transposed convolution makes patches of a base size, each of which is then resized
    by itself, bicubic with antialiasing.

    Source: allenai/olmoearth_pretrain nn/flexi_patch_embed.py.
    """

    channels: int
    base: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, patch):  # [..., h, w, D] -> [..., h patch, w patch, C]
        p, d = self.base, x.shape[-1]
        # What torch's transposed convolution takes for its fan-in.
        init = layers.uniform_fan_in(self.channels * p * p)
        kernel = self.param("kernel", init, (d, p, p, self.channels))
        bias = self.param("bias", init, (self.channels,))
        flat = einops.rearrange(kernel, "d p q c -> d (p q c)")
        y = layers.linear(x, flat, jnp.tile(bias, p * p), self.dtype)
        y = einops.rearrange(y, "... (p q c) -> ... p q c", p=p, q=p)
        y = resize.image(y, patch, patch)
        return einops.rearrange(y, "... h w p q c -> ... (h p) (w q) c")


def fields_of(c):
    """The modalities of a case, with its own bandsets if it names them."""
    return tuple(modalities.find(n, c.get("band_groups")) for n in c["modalities"])


def placeholder(mods, times=1):
    """A batch that parameters can be initialised on: one patch of 16 pixels."""
    found = {"timestamps": jnp.zeros((1, times, 3), jnp.int32)}
    for m in mods:
        found[m.name] = jnp.zeros((1, *m.shape(16, times)))
    return found


def encoder_of(c, mods):
    """The encoder that the configuration of a case describes."""
    return network.Encoder(
        modalities=mods,
        width=c["embedding_size"],
        depth=c.get("depth", c.get("encoder_depth")),
        heads=c["num_heads"],
        mlp_ratio=c.get("mlp_ratio", 4.0),
        base=c["base_patch_size"],
        drop_path=c.get("drop_path", 0.0),
        registers=c.get("num_register_tokens", 0),
        qk_norm=c.get("qk_norm", False),
        projections=c.get("num_projection_layers", 1),
        aggregate_first=c.get("aggregate_then_project", True),
        most_times=c.get("max_sequence_length", 12),
    )


@functools.cache
def encoder_like(module):
    """Shapes of an encoder's parameters."""
    batch = placeholder(module.modalities)
    init = functools.partial(module.init, patch=16)
    return jax.eval_shape(init, jax.random.key(0), batch)["params"]


def predictor_of(c, mods):
    """The predictor that the configuration of a case describes."""
    return network.Predictor(
        modalities=mods,
        width=c.get("output_embedding_size", c.get("embedding_size")),
        inner=c["decoder_embedding_size"],
        depth=c.get("depth", c.get("decoder_depth")),
        heads=c["num_heads"],
        mlp_ratio=c.get("mlp_ratio", 4.0),
    )


@functools.cache
def predictor_like(module, width):
    """Shapes of a predictor's parameters, for an encoder of `width`."""
    shapes = {m.name: m.tokens(1, 1) for m in module.modalities}
    dates = jnp.zeros((1, 1, 3), jnp.int32)
    count = sum(int(np.prod(s)) for s in shapes.values())

    def touch(module):
        packed = tokens.Packed(jnp.zeros((1, count, width)))
        context = module.context(packed, module.codes(shapes, dates, 16))
        name = module.modalities[0].name
        return module(context, {name: (None, shapes[name], 16)}, dates)

    init = functools.partial(module.init, method=touch)
    return jax.eval_shape(init, jax.random.key(0))["params"]


def load(state, like, mods):
    """{"encoder": ..., "predictor": ..., "target": ...} of a state dict.

    Of `like`, the parameters' shapes, any of the three may be left out.
    """
    theirs = {"encoder": "encoder", "predictor": "decoder", "target": "target_encoder"}
    aside = tuple(f"{key}.{{*}}" for k, key in theirs.items() if k not in like)
    return convert.convert(
        state, like, olmoearth.table(mods) + convert.Table((), aside)
    )


def split_masks(case, prefix=""):
    """The inputs of a case under a prefix, as a batch."""
    return {
        k.removeprefix(prefix): jnp.asarray(v)
        for k, v in case.inputs.items()
        if k.startswith(prefix)
    }


def unmask(batch):
    """Everything is ONLINE except what is MISSING."""
    return {
        k: jnp.where(v == states.MISSING, v, states.ONLINE)
        if k.endswith("_mask")
        else v
        for k, v in batch.items()
    }


def without_masks(batch):
    return {k: v for k, v in batch.items() if not k.endswith("_mask")}


def _flexi(case):
    c = case.config
    factor = c["image_tile_size_factor"]
    assert modalities.find(c["modality"]).factor == factor
    reading.agree(c, bias=True, interpolation="bicubic", antialias=True)
    module = embed.FlexiPatchEmbed(
        c["embedding_size"], c["base_patch_size"] * factor, c["in_chans"]
    )
    rules = convert.Table(
        (
            convert.Rule("proj.weight", "kernel", convert.CONV),
            convert.Rule("proj.bias", "bias"),
        )
    )
    params = convert.by_name(case.param, rules)
    x = case.inputs["x"]
    timed = x.ndim == 5
    x = jnp.asarray(np.moveaxis(x, 3, 1) if timed else x)
    sizes = {f"ps{p}": p for p in c["patch_sizes"]} | {"base": c["base_patch_size"]}
    for name, patch in sizes.items():
        image = x if patch != c["base_patch_size"] else whole(x, patch * factor)
        got = module.apply({"params": params}, image, patch * factor)
        case.close(name, jnp.moveaxis(got, 1, 3) if timed else got)
        if timed:
            _some(case, module, params, name, patch * factor)


def whole(x, patch):
    """Images [..., H, W, C] without what fills no patch, as a convolution sees them."""
    h, w = (side // patch * patch for side in x.shape[-3:-1])
    return x[..., :h, :w, :]


def _some(case, module, params, name, patch):
    """The same, for a few patches alone."""
    image = jnp.asarray(case.inputs["x"])
    if image.shape[1] % patch or image.shape[2] % patch:
        return
    b, h, w, t, _ = case.out[name].shape
    flat = np.random.default_rng(0).integers(0, h * w * t, (b, 7))
    row, column, time = jnp.unravel_index(jnp.asarray(flat), (h, w, t))
    got = module.apply({"params": params}, image, row, column, time, patch, method="at")
    want = case.out[name].reshape(b, h * w * t, -1)
    want = np.take_along_axis(want, flat[..., None], 1)
    np.testing.assert_allclose(got, want, rtol=case.tolerance, atol=case.tolerance)


def _reconstruction(case):
    c = case.config
    module = FlexiPatchReconstruction(c["out_chans"], c["max_patch_size"])
    rules = convert.Table(
        (
            convert.Rule("proj.weight", "kernel", "d c p q -> d p q c"),
            convert.Rule("proj.bias", "bias"),
        )
    )
    params = convert.by_name(case.param, rules)
    x = jnp.asarray(case.inputs["x"])
    reading.agree(c, embedding_size=x.shape[-1])
    timed = x.ndim == 5
    x = jnp.moveaxis(x, 3, 1) if timed else x
    for patch in c["patch_sizes"]:
        got = module.apply({"params": params}, x, patch)
        case.close(f"ps{patch}", jnp.moveaxis(got, 1, 3) if timed else got)


def _pi_resize(case):
    c = case.config
    kernel = einops.rearrange(case.param["weight"], "d c p q -> p q c d")
    x = einops.rearrange(case.inputs["x"], "b c h w -> b h w c")
    params = {"kernel": kernel, "bias": case.param["bias"]}
    module = embed.FlexiPatchEmbed(c["D"], c["base"], c["in_chans"], "weights")
    for n in c["sizes"]:
        got = resize.kernel(jnp.asarray(kernel), n)
        case.close(f"w{n}", einops.rearrange(got, "p q c d -> d c p q"))
        case.close(f"emb{n}", module.apply({"params": params}, whole(x, n), n))


def _triangle(x):
    """Kernel of linear interpolation at distances x >= 0."""
    return np.maximum(0.0, 1.0 - x)


def _resize(case):
    c = case.config
    for name, x in case.inputs.items():
        i = int(name.lstrip("xtok"))
        if name.startswith("tok"):
            h, w, r, d = c["token_cases_h_w_r_D"][i]
            assert x.shape[1:] == (h, w, d)
            case.close(f"tok_bilinear{i}", resize.bilinear(jnp.asarray(x), r))
            case.close(f"tok_nearest{i}", resize.nearest(jnp.asarray(x), r))
            continue
        old, new = c["sizes"][i]
        assert x.shape[-1] == old
        image = jnp.moveaxis(jnp.asarray(x), 1, -1)
        got = resize.image(image, new, new)
        case.close(f"bicubic_aa{i}", jnp.moveaxis(got, -1, 1))
        side = resize.matrix(x.shape[-1], new, _triangle)
        case.close(f"bilinear_aa{i}", np.einsum("ah,bw,nchw->ncab", side, side, x))


def _multi(case):
    c, mods = case.config, fields_of(case.config)
    module = embed.PatchEmbeddings(mods, c["embedding_size"], c["base_patch_size"])
    rules = olmoearth.patch_embeddings(mods)
    batch = split_masks(case)
    init = functools.partial(module.init, patch=16)
    like = jax.eval_shape(init, jax.random.key(0), placeholder(mods))
    params = convert.convert(case.param, like["params"], rules)
    found = module.apply({"params": params}, batch, c["patch_size"])
    for m in mods:
        mask = embed.token_mask(batch, m, c["patch_size"])
        case.close(f"{m.name}_mask", mask)
        case.close(f"fast/{m.name}", found[m.name])
        # The original leaves a bandset that is nowhere visible at zero.
        axes = tuple(range(mask.ndim - 1))
        seen = (mask == states.ONLINE).any(axes)[..., None]
        case.close(m.name, jnp.where(seen, found[m.name], 0.0))


def _tables(case):
    c = case.config
    for d in c["dims"]:
        times = np.arange(c["max_sequence_length"])
        case.close(f"sincos1d_{d}", encodings.sincos(times, d))
        case.close(f"month_{d}", encodings.months(d))
        for g, r in c["grid_res"]:
            for name, anchor in (("sincos2d", "corner"), ("center2d", "center")):
                got = encodings.space((g, g), d, r, anchor=anchor)
                case.close(f"{name}_{d}_g{g}_r{r}", got)


def _composite(case):
    c, mods = case.config, fields_of(case.config)
    module = encodings.CompositeEncodings(
        mods, c["embedding_size"], most_times=c["max_sequence_length"]
    )
    rules = olmoearth.encodings(mods)
    params = convert.by_name(case.param, rules)
    x = {m.name: case.inputs[m.name] for m in mods}
    shapes = tokens.shapes_of(x)
    dates = jnp.asarray(case.inputs["timestamps"])
    for i, resolution in enumerate(c["input_res"]):
        place = (dates, c["patch_size"], float(resolution))
        codes = module.apply({"params": params}, shapes, *place)
        for m in mods:
            end = f"_res{resolution}" if i else ""
            case.close(f"{m.name}{end}", x[m.name] + codes[m.name])
            flat = codes[m.name].reshape(len(codes[m.name]), -1, c["embedding_size"])
            index = jnp.arange(flat.shape[1])[::-1]
            index = jnp.broadcast_to(index, (len(dates), len(index)))
            some = module.apply(
                {"params": params}, m.name, index, shapes[m.name], *place, method="at"
            )
            np.testing.assert_array_equal(
                some, np.broadcast_to(flat[:, ::-1], some.shape)
            )


def _block(case):
    c = case.config
    reading.agree(c, qkv_bias=True, layer_norm_eps=xavier.EPS, gelu="exact")
    kinds = {"self": False, "cross": False, "self_qknorm": True}
    for kind, qk_norm in kinds.items():
        state = {
            k.removeprefix(f"{kind}."): v
            for k, v in case.param.items()
            if k.startswith(f"{kind}.")
        }
        params = convert.by_name(state, olmoearth.block())
        params = convert.tree.nest(params)
        module = blocks.Block(
            c["num_heads"], int(c["dim"] * c["mlp_ratio"]), qk_norm=qk_norm
        )
        x, y = (jnp.asarray(case.inputs[k]) for k in "xy")
        cross = kind == "cross"
        case.close(kind, module.apply({"params": params}, x, y if cross else None))
        # Only a prefix of the keys can be masked: the others move to the end.
        mask = case.inputs["mask_y" if cross else "mask_x"] > 0
        order = np.argsort(~mask, axis=1, kind="stable")[..., None]
        count = jnp.asarray(mask.sum(1))
        context = jnp.take_along_axis(y if cross else x, order, 1)
        if cross:
            got = module.apply({"params": params}, x, context, count)
        else:
            got = module.apply({"params": params}, context, None, count)
            got = np.take_along_axis(np.asarray(got), np.argsort(order, axis=1), 1)
        case.close(f"{kind}_masked", got)


def _embedded(module, fields, patch):
    return module.patch_embed(fields, patch)


def _encoder(case):
    c, mods = case.config, fields_of(case.config)
    module = encoder_of(c, mods)
    rules = olmoearth.encoder(mods)
    params = {"params": convert.convert(case.param, encoder_like(module), rules)}
    batch, patch = split_masks(case), c["patch_size"]
    resolution = float(c.get("input_res", 10))
    seen = max(
        sum(
            int((np.asarray(embed.token_mask(batch, m, patch))[b] == 0).sum())
            for m in mods
        )
        for b in range(len(batch["timestamps"]))
    )

    @quick
    def run(params, batch):
        apply = functools.partial(module.apply, params, resolution=resolution)
        depths = c.get("token_exit_cfg")
        exits = depths and {m.name: depths[m.name] for m in mods}
        left = apply(unmask(batch), patch, exits=exits) if exits else None
        return (
            apply(batch, patch, slots=seen),
            module.apply(params, unmask(batch), patch, method=_embedded),
            apply(without_masks(batch), patch),
            left,
        )

    masked, plain, fast, left = run(params, batch)
    for m in mods:
        found = {
            f"masked/{m.name}": masked.tokens[m.name],
            f"masked/{m.name}_mask": masked.mask[m.name],
            f"exit0/{m.name}": plain[m.name],
            f"exit0/{m.name}_mask": embed.token_mask(unmask(batch), m, patch),
            f"fast/{m.name}": fast.tokens[m.name],
            f"fast/{m.name}_mask": masked.mask[m.name],
        }
        if left is not None:
            found[f"exit/{m.name}"] = left.tokens[m.name]
            found[f"exit/{m.name}_mask"] = left.mask[m.name]
        for name, got in found.items():
            if name in case.out:
                case.close(name, got)
    case.close("project_aggregated", masked.pooled)


def _predictor(case):
    c, mods = case.config, fields_of(case.config)
    module = predictor_of(c, mods)
    like = predictor_like(module, c["encoder_embedding_size"])
    params = {"params": convert.convert(case.param, like, olmoearth.predictor(mods))}
    x = {m.name: jnp.asarray(case.inputs[m.name]) for m in mods}
    mask = {m.name: jnp.asarray(case.inputs[f"{m.name}_mask"]) for m in mods}
    dates, patch = jnp.asarray(case.inputs["timestamps"]), c["patch_size"]
    shapes, resolution = tokens.shapes_of(x), float(c.get("input_res", 10))
    whole = tokens.flatten(x, mods)
    state = tokens.flatten_mask(mask, mods)
    packed = tokens.pack(whole, state == states.ONLINE, 0)

    def run(module):
        codes = module.codes(shapes, dates, patch, resolution)
        context = module.context(packed, codes)
        queries = {m.name: (None, shapes[m.name], patch) for m in mods}
        found = module(context, queries, dates, resolution=resolution)
        seen = tokens.unpack(context, whole.shape[1])
        return found, module.output(seen)

    found, seen = module.apply(params, method=run)
    seen = tokens.split(seen, shapes, mods)
    for m in mods:
        got = jnp.where(
            (mask[m.name] == states.DECODER)[..., None],
            found[m.name].reshape(seen[m.name].shape),
            seen[m.name],
        )
        case.close(m.name, got)
        case.close(f"{m.name}_mask", mask[m.name])


# Fields of the original's TokensAndMasks: the order in which it joins modalities.
ORDER = (
    *("sentinel2_l2a", "sentinel1", "worldcover", "latlon", "openstreetmap_raster"),
    *("srtm", "landsat", "naip", "naip_10", "gse", "cdl", "worldpop", "worldcereal"),
    *("wri_canopy_height_map", "era5_10"),
)


def pool_in_place(x, mask=None, how="mean"):
    """One vector per place from what has places: [B, h, w, D] float32.

    Args:
        x: {name: [B, h, w, T, S, D]}; others are left out.
        mask: {name: [B, h, w, T, S]}; a modality is left out unless all its tokens are
            ONLINE. None = all are.
        how: "mean" or "max" over times and bandsets of each modality, then over
            modalities; "concat": [B, h, w, S of all, D], the mean over times alone.
    """
    places = {k: x[k] for k in ORDER if k in x and x[k].ndim == 6}
    if mask is not None:
        places = {k: v for k, v in places.items() if (mask[k] == states.ONLINE).all()}
    if how == "concat":
        return jnp.concatenate([v.mean(3) for v in places.values()], axis=3)
    reduce = {"mean": jnp.mean, "max": jnp.max}[how]
    each = [reduce(v, axis=(3, 4)) for v in places.values()]
    return reduce(jnp.stack(each), axis=0)


def _pooling(case):
    c, mods = case.config, fields_of(case.config)
    x = {m.name: jnp.asarray(case.inputs[m.name]) for m in mods}
    mask = {m.name: jnp.asarray(case.inputs[f"{m.name}_mask"]) for m in mods}
    reading.agree(c, D=x[mods[0].name].shape[-1])
    case.close("inst_mean", tokens.pool(x, mask))
    flat = tokens.flatten(x, mods)
    seen = tokens.flatten_mask(mask, mods)[..., None] == states.ONLINE
    case.close("inst_max", jnp.where(seen, flat, -jnp.inf).max(1))
    for how in ("mean", "max", "concat"):
        case.close(f"spatial_{how}", pool_in_place(x, None, how))
    # The order is the original's, whatever that of the dict.
    turned = dict(reversed(x.items()))
    case.close("spatial_concat", pool_in_place(turned, None, "concat"))
    kept = "worldcover" if "worldcover" in mask else mods[-1].name
    part = {k: v if k == kept else v * 0 for k, v in mask.items()}
    case.close("spatial_mean_partial", pool_in_place(x, part, "mean"))
    state = tokens.flatten_mask(mask, mods)
    packed = tokens.pack(tokens.flatten(x, mods), state == states.ONLINE, 0)
    for name, ours in (("agg_then_proj", "agg_first"), ("proj_then_agg", "proj_first")):
        module = network.Aggregate(c["num_layers"], ours == "agg_first")
        state = {
            k.removeprefix(f"{ours}."): v
            for k, v in case.param.items()
            if k.startswith(f"{ours}.")
        }
        params = convert.tree.nest(convert.by_name(state, olmoearth.aggregate()))
        case.close(name, module.apply({"params": params}, packed))


def _inventory(case):
    c, mods = case.config, fields_of(case.config)
    names = {k.removesuffix("_shallow_decoder"): v for k, v in c["sizes"].items()}
    for size, want in names.items():
        dims = want["dims"]
        if dims["encoder_depth"] == dims["decoder_depth"] and size != "nano":
            size += "_deep"
        section = network.Network(
            size, mlp_ratio=dims["mlp_ratio"], base_patch=c["base_patch_size"]
        )
        encoder, predictor = section.build(mods, "float32")
        for part, module, own in (
            ("encoder", encoder, encoder.width),
            ("decoder", predictor, predictor.inner),
        ):
            assert module.depth == dims[f"{part}_depth"]
            assert module.heads == dims[f"{part}_num_heads"]
            assert own == dims[f"{part}_embedding_size"]
        found = {
            "encoder": convert.tree.flat(encoder_like(encoder)),
            "decoder": convert.tree.flat(predictor_like(predictor, encoder.width)),
        }
        frozen = 2 * 12 * encoder.width // 4  # Tables of times and months: computed.
        for part, leaves in found.items():
            count = sum(int(np.prod(x.shape)) for x in leaves.values())
            assert count == want[f"{part}_trainable"], (size, part)
            assert count + frozen == want[f"{part}_params"], (size, part)
            rules = getattr(olmoearth, {"decoder": "predictor"}.get(part, part))(mods)
            blank = {k: np.zeros(x.shape, np.int8) for k, x in leaves.items()}
            if f"{part}_tensors" in want:
                state = convert.export(convert.tree.nest(blank), rules)
                trained = {k: s for k, (s, t) in want[f"{part}_tensors"].items() if t}
                assert {k: list(v.shape) for k, v in state.items()} == trained
        embed = sum(
            int(np.prod(x.shape))
            for k, x in found["encoder"].items()
            if k.startswith("patch_embed/")
        )
        assert embed == want["patch_embedding_params"]


CHECKS = {
    "FlexiPatchEmbed": _flexi,
    "FlexiPatchReconstruction": _reconstruction,
    "FlexiViT weight resize": _pi_resize,
    "resize primitives": _resize,
    "MultiModalPatchEmbeddings": _multi,
    "position encodings": _tables,
    "CompositeEncodings": _composite,
    "Block": _block,
    "Encoder": _encoder,
    "Predictor": _predictor,
    "TokensAndMasks pooling + ProjectAndAggregate": _pooling,
    "parameter inventory / optimizer groups": _inventory,
}
