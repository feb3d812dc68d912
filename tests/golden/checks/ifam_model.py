"""iFAM: both stages, the predecessors and the baselines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import ifam_names, reading
from vitssl.methods.parts import heads, names, networks
from vitssl.methods.parts import maps as partmaps
from vitssl.models import convnext, layers, posemb, resnet, vit

QUICK = {"xla_backend_optimization_level": 0}


def image(case, name="x"):
    return jnp.asarray(case.inputs[name]).transpose(0, 2, 3, 1)  # [B, H, W, C]


def last(maps):
    """[B, K+1, h, w] -> [B, h, w, K+1]."""
    return None if maps is None else jnp.asarray(maps).transpose(0, 2, 3, 1)


def first(maps):
    """[B, h, w, K+1] -> [B, K+1, h, w]."""
    return np.moveaxis(np.asarray(maps), -1, 1)


def backbone(config, **options):
    """The ViT that the configuration of a case describes, timm's or Hugging Face's."""
    if "vit" in config:
        c = config["vit"]
        shape = dict(width=c["D"], depth=c["depth"], heads=c["heads"])
        shape |= dict(patch=c["patch"], image_size=c["img"], registers=c["reg"])
        shape |= dict(class_position=not c.get("no_embed_class", True))
        shape |= dict(mlp_ratio=c.get("mlp_ratio", 4))
        shape |= dict(norm_eps=c.get("block_norm_eps", config.get("norm_eps", 1e-6)))
        scaled = c.get("layer_scale", True)
        reading.agree(c, qkv_bias=True, act="gelu(erf)")
    else:
        scaled = True
        shape = dict(
            width=config["hidden_size"],
            depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            patch=config["patch_size"],
            image_size=config["image_size"],
            mlp_ratio=config.get("mlp_ratio", 4),
            norm_eps=config.get("layer_norm_eps", 1e-6),
            resampling="plain",
        )
    return vit.ViT(layerscale=1e-5 if scaled else 0.0, **shape | options)


def apply(net, variables, *args, **kwargs):
    """`net.apply`, compiled with the least effort: that is most of the time here."""
    run = jax.jit(lambda v, a: net.apply(v, *a, **kwargs), compiler_options=QUICK)
    return run(variables, args)


def head(config, modulation="layer_norm"):
    return heads.PartHead(
        parts=config["num_parts"],
        classes=config["num_classes"],
        temperature=config.get("softmax_temperature", config.get("temperature")),
        modulation=config.get("modulation_type", modulation),
        classifier=config.get("classifier_type", "linear"),
        part_dropout=config.get("part_dropout", 0.0),
    )


def two_stage(config, **options):
    return networks.TwoStage(
        networks.PartNet(backbone(config), head(config)),
        networks.MaskedClassifier(backbone(config), config["num_classes"], **options),
        "soft" if config["use_soft_masks"] else "hard",
    )


def load(case, net, rules, *args):
    """Variables of `net` with the case's weights, through the users' table."""
    like = jax.eval_shape(net.init, jax.random.key(0), *args)["params"]
    return {"params": ifam_names.load(case.param, like, rules)}


def draws(case, suffix=""):
    """The random numbers a case was made with."""

    def find(name):
        return case.inputs.get(name + suffix)

    def kept(name):
        x = find(name)
        return None if x is None else jnp.asarray(x) > 0

    # Without noise in the maps, what the original drew for them was not used.
    noisy = case.config.get("gumbel_softmax", True)
    return partmaps.Draws(
        maps=last(find("gumbel_maps")) if noisy else None,
        mask=last(find("gumbel_mask")),
        keep_mask=kept("keep_stage2_mask"),
        keep_features=kept("keep_stage1_features"),
    )


def _thresholds(config):
    found = config.get("part_logits_threshold")
    return found and jnp.asarray([found[str(k)] for k in range(config["num_parts"])])


def _found(case, found, mask):
    """Compare what the first stage says."""
    case.close("features_mod", found.modulated.transpose(0, 2, 1))
    case.close("stage1_logits", found.class_logits)
    case.close("ab", first(found.dot))
    if "maps" in case.out:
        case.close("maps", first(found.maps))
    if "stage1_scores" in case.out:
        case.close("stage1_scores", found.scores.transpose(0, 2, 1))
    hard, soft = mask
    case.close("mask_hard", hard)
    case.close("mask_soft", soft)


def _stage1(case):
    net = networks.PartNet(backbone(case.config), head(case.config))
    variables = load(case, net, names.part_net, image(case))
    found = apply(
        net, variables, image(case), draws(case), thresholds=_thresholds(case.config)
    )
    case.close("scores", found.scores.transpose(0, 2, 1))
    _found(case, found, (first(found.hard), first(found.soft)))


def _stage2(case):
    c = case.config
    masking = "soft" if c["use_soft_masks"] else "hard"
    reading.agree(c, fc_norm_eps=1e-5)
    ways = ["soft"] if c["use_soft_masks"] else ["hard", "straight_through"]
    net = networks.MaskedClassifier(
        backbone(c), c["num_classes"], rooms=(0.25, 0.5, 1.0)
    )
    side = c["vit"]["img"] // c["vit"]["patch"]
    mask = jnp.asarray(case.inputs["mask"]).reshape(-1, side, side)
    variables = load(case, net, names.masked, image(case), mask)
    for masking in ways:
        case.close("logits", apply(net, variables, image(case), mask, masking=masking))


def _two_stage(case):
    c = case.config
    net = two_stage(c, rooms=(0.5, 1.0))
    variables = load(case, net, names.two_stage, image(case))
    removed = tuple(c.get("part_ids_to_remove") or ())
    # The original does not silence removed pixels of soft masks; see `removal`.
    out = apply(
        net,
        variables,
        image(case),
        draws(case),
        removed=removed,
        removal="keep_all" if "hidden_size" in c else "keep",
        thresholds=_thresholds(c),
    )
    hard, soft = out.found.hard[..., 0], out.found.soft[..., 0]
    if removed:
        hard, soft = partmaps.without_parts(out.found.maps, removed, "keep")
    case.close("stage2_logits", out.logits)
    _found(case, out.found, (hard, soft))


def _pdiscoformer(case):
    c = case.config
    if "vit" in c:
        net = networks.PartNet(backbone(c), head(c))
        variables = load(case, net, names.part_net, image(case))
    else:
        kind = "original" if "modulation" in case.param else "layer_norm"
        net = networks.PartNet(_cnn(c), head(c, kind))
        reading.agree(c, image=image(case).shape[1])
        like = jax.eval_shape(net.init, jax.random.key(0), image(case))
        rules = functools.partial(names.part_net, cnn=_kind(c))
        variables = _variables(case, like, rules)
    found = apply(net, variables, image(case), draws(case))
    # The predecessor's modulation of what the orthogonality sees is an option.
    orth = c.get("modulation_orth", False)
    features = found.modulated if orth else found.features
    case.close("features", features.transpose(0, 2, 1))
    case.close("maps", first(found.maps))
    case.close("scores", found.scores.transpose(0, 2, 1))
    case.close("logits", found.class_logits)
    case.close("dist", first(-found.logits))


def _cnn(c):
    widths = c["dims"] if "dims" in c else c["channels"]
    reading.agree(c, feature_dim=sum(widths[-2:]))
    if "dims" in c:
        return convnext.ConvNeXt(
            tuple(c["depths"]), tuple(c["dims"]), 1e-6, c.get("output_stride", 32)
        )
    kind = {"BasicBlock": "basic", "Bottleneck": "bottleneck"}[c["block"]]
    stem = 64  # timm's stem_width concerns its deep stems alone.
    return resnet.ResNet(
        tuple(c["layers"]), tuple(c["channels"]), stem, kind, c.get("output_stride", 32)
    )


def _kind(c):
    return "convnext" if "dims" in c else "resnet"


def _variables(case, like, rules):
    """Return variables like `like`; statistics stand under "stats" in the tables."""
    tree = dict(like["params"])
    if "batch_stats" in like:
        tree["stats"] = like["batch_stats"]
    tree = ifam_names.load(case.param, tree, rules)
    return {"batch_stats": tree.pop("stats", {}), "params": tree}


def _baseline(case):
    c = case.config
    pooling = c.get("pooling_type", "cls")
    net = backbone(c)
    args = [image(case)]
    if "mask" in case.inputs:
        h, w = (s // net.patch for s in image(case).shape[1:3])
        args.append(jnp.asarray(case.inputs["mask"]).reshape(-1, h, w))
    if pooling == "decoupled":
        model = networks.MaskedClassifier(net, c["num_classes"], norm=False)
    else:
        pooling = {"late": "late_mask"}.get(pooling, pooling)
        model = networks.Baseline(net, c["num_classes"], pooling)
    like = jax.eval_shape(model.init, jax.random.key(0), *args)
    variables = _variables(case, like, names.masked)
    case.close("logits", apply(model, variables, *args))


def _positions(case):
    c = case.config
    old, new = tuple(c["old"]), tuple(c["new"])
    full = case.inputs["pos_embed_with_cls"]
    reading.agree(c, dim=full.shape[-1])
    case.close("timm", posemb.resample(case.inputs["pos_embed"], old, new))
    for name, how in (("timm_with_cls", "antialias"), ("hf", "plain")):
        rest = posemb.resample(full[:, 1:], old, new, how)
        case.close(name, np.concatenate([full[:, :1], rest], axis=1))


def _attention(case):
    q, k, v = (jnp.asarray(case.inputs[n]).transpose(0, 2, 1, 3) for n in "qkv")
    out, weights = layers.softmax_attention(q, k, v)
    case.close("weights", weights)
    case.close("out", out.transpose(0, 2, 1, 3))


CHECKS = {
    "stage1": _stage1,
    "stage2": _stage2,
    "two_stage": _two_stage,
    "two_stage_hf": _two_stage,
    "pdiscoformer": _pdiscoformer,
    "baseline": _baseline,
    "positional_embedding": _positions,
    "attention": _attention,
}
