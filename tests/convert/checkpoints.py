"""Checkpoints of every family with random weights, and what an import makes of them."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.convert import pth, published
from tests.golden import ifam_names
from tests.models import fields
from vitssl import convert
from vitssl.convert import backbone, exporter, hvit_names, vit_names
from vitssl.methods.latent_mim import names
from vitssl.methods.parts import heads, networks
from vitssl.methods.parts import names as part_names
from vitssl.models import hvit as hierarchical
from vitssl.models import vit


def noise(*shape):
    """Return random float32, the same for the same shape."""
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def timm():
    net = published.network(classes=5, layerscale=1e-5, registers=3, qk_norm=True)
    # timm's registers leave no position to the class token: it is in the token.
    tree = {"state_dict": published.timm(net), "epoch": 2}
    want = dict(net.leaves)
    want["encoder/cls"] = want["encoder/cls"] + want["encoder/pos_embed"][:, :1]
    want["encoder/pos_embed"] = want["encoder/pos_embed"][:, 1:]
    return tree, backbone.Backbone(net.about, want), "cls"


def dino():
    net = published.network()
    head = {f"head.{k}": noise(3) for k in ("mlp.0.weight", "last_layer.weight_g")}
    teacher = published.prefixed(published.timm(net) | head, "module.backbone.")
    other = published.prefixed(published.timm(published.network(9)), "module.backbone.")
    return {"student": other, "teacher": teacher, "epoch": 1}, net, "cls"


def dino_v2():
    net = published.network(layerscale=1e-5, registers=2)
    state, leaves = published.timm(net), net.leaves
    del state["reg_token"]
    state |= {
        "register_tokens": leaves["encoder/registers"],
        "cls_token": leaves["encoder/cls"],
        "pos_embed": leaves["encoder/pos_embed"],
        "mask_token": noise(1, 32),
    }
    # Blocks in groups of one, as its training code keeps them.
    state = {k.replace("blocks.1.", "blocks.1.1."): x for k, x in state.items()}
    state = {k.replace("blocks.0.", "blocks.0.0."): x for k, x in state.items()}
    return {"teacher": published.prefixed(state, "backbone.")}, net, "cls"


def mae():
    net = published.network()
    aside = {"decoder_embed.weight": noise(4, 4), "mask_token": noise(1, 1, 4)}
    aside["decoder_blocks.0.norm1.weight"] = noise(4)
    args = pth.call("argparse.Namespace") + pth.value({"lr": 0.1}, []) + b"b"
    return {"model": published.timm(net) | aside, "args": pth.Raw(args)}, net, "mean"


def ijepa():
    net = published.network(cls=False)
    state = published.prefixed(published.timm(net), "module.")
    other = published.timm(published.network(9, cls=False))
    other = published.prefixed(other, "module.")
    return {"encoder": other, "target_encoder": state, "epoch": 9}, net, "mean"


def localmim(stages):
    def make():
        net = published.network()
        state = published.timm(net)
        last = {k: state.pop(f"norm.{k}") for k in ("weight", "bias")}
        for stage in range(stages - 1):
            state |= {f"norm.{stage}.{k}": noise(32) for k in ("weight", "bias")}
        state |= {f"norm.{stages - 1}.{k}": x for k, x in last.items()}
        state |= {"decoder.0.embed.weight": noise(4), "hog_enc.0.conv": noise(4)}
        return {"model": state | {"mask_token": noise(1)}}, net, "mean"

    return make


def dino_v3():
    net = published.network(
        layerscale=1e-5, registers=2, rope=True, rope_unit=True, positions="none"
    )
    d = 32
    leaves = dict(net.leaves)
    for i in range(2):  # Keys have no bias.
        bias = leaves[f"encoder/block_{i}/attn/qkv/bias"].copy()
        bias[d : 2 * d] = 0
        leaves[f"encoder/block_{i}/attn/qkv/bias"] = bias
    net = backbone.Backbone(net.about, leaves)
    return exporter.hf(net).arrays, net, "cls"


def filled(net, *shape):
    """Return random parameters of a module for images [1, *shape]."""
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    like = jax.eval_shape(net.init, jax.random.key(0), image)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), like)


def hvit():
    net = hierarchical.HViT(8, (1, 2), (2, 4), patch=4, image_size=16)
    params = {"backbone": filled(net, 16, 16, 3)}
    state = convert.export(params, hvit_names.table(net.depths))
    state |= {"classifier_head.weight": noise(3, 16), "classifier_head.bias": noise(3)}
    norm = {f"classifier_head_norm.{k}": noise(16) for k in ("weight", "bias")}
    aside = {"aux_head_rgb.weight": noise(3, 16)}
    return {"ema_state_dict": state | norm | aside}


def h_jepa():
    target = filled(vit.ViT(**published.MODEL), 32, 32, 3)
    state = convert.export(target, vit_names.table("target_encoder.vit."))
    other = {"predictor.mask_token": noise(1, 1, 8)}
    return {"model_state_dict": state | other}


def _two_stage(hf=False):
    given = dict(width=8, depth=2, heads=2, patch=4, image_size=8, layerscale=1e-5)
    given |= {} if hf else dict(registers=4, class_position=False)
    first = networks.PartNet(vit.ViT(**given), heads.PartHead(2, 3))
    second = networks.MaskedClassifier(vit.ViT(**given), 3)
    return networks.TwoStage(first, second)


def parts(hf=False):
    state = ifam_names.export(filled(_two_stage(hf), 8, 8, 3), hf=hf)
    return {"MODEL_STATE": state | {"stage_2.prefix_attn_mask": np.ones(5, np.float32)}}


def p_disco_former():
    params = filled(_two_stage(), 8, 8, 3)["stage_1"]
    return {"model": ifam_names.export(params, part_names.part_net)}


def olmo_earth(encoder_alone=False):
    net = fields.system(fields.ALL, encoder=dict(registers=2, qk_norm=True))
    params = jax.tree.map(np.asarray, fields.params(net))
    if encoder_alone:
        return convert.export(params["encoder"], names.encoder(fields.ALL))
    params["target"] = jax.tree.map(lambda x: x + 1, params["encoder"]["patch_embed"])
    state = convert.export(params, names.table(fields.ALL))
    state["encoder.composite_encodings.pos_embed"] = noise(12, 4)
    return state | {"target_encoder.norm.weight": noise(16)}


TREES = {
    "timm": timm,
    "dino": dino,
    "dinov2": dino_v2,
    "mae": mae,
    "ijepa": ijepa,
    "localmim": localmim(4),
    "localmim of a frozen run": localmim(1),
    "dinov3": dino_v3,
}


def wrapped(prefix, **beside):
    """Return a timm state under a prefix, and what lies beside it."""
    return published.prefixed(published.timm(published.network(classes=3)), prefix) | (
        beside
    )


def _pair(better, other):
    second = published.timm(published.network(9))
    return wrapped(better) | published.prefixed(second, other)


def _compiled_blocks():
    state = published.timm(published.network(classes=3))
    return {k.replace(".attn.", "._orig_mod.attn."): x for k, x in state.items()}


# Name: (what a file holds, what was taken off, or of a refusal what it says).
WRAPPINGS = {
    "plain": (lambda: wrapped(""), ""),
    "torch.compile": (lambda: wrapped("_orig_mod."), "_orig_mod."),
    "torch.compile of blocks": (_compiled_blocks, "_orig_mod."),
    "DataParallel": (lambda: wrapped("module."), "module."),
    "Lightning": (lambda: {"state_dict": wrapped("model.")}, "model."),
    "backbone and head": (
        lambda: wrapped("backbone.", **{"projector.0.weight": noise(3, 3)}),
        "backbone.",
    ),
    "encoder": (lambda: wrapped("encoder."), "encoder."),
    "nested": (
        lambda: {"model": wrapped("module.model.backbone.")},
        "module.model.backbone.",
    ),
    "nested, compiled": (lambda: wrapped("model._orig_mod.net."), "model.net."),
    "MoCo v3": (
        lambda: {
            "state_dict": _pair("module.base_encoder.", "module.momentum_encoder.")
        },
        "module.base_encoder.",
    ),
    "teacher and student": (
        lambda: {"model": _pair("teacher.backbone.", "student.backbone.")},
        "teacher.backbone.",
    ),
    "student alone": (lambda: wrapped("student."), "student."),
    "FSDP": (lambda: wrapped("_fsdp_wrapped_module."), "_fsdp_wrapped_module."),
    "two of a kind": (lambda: _pair("left.", "right."), None),
    "of no family": (lambda: {"a.weight": noise(3), "b.weight": noise(4, 4)}, None),
}
