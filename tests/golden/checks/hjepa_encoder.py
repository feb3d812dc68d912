"""H-JEPA's encoder: masking, LayerScale, other input sizes, rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import reading
from vitssl import convert
from vitssl.convert import vit_names
from vitssl.models import patches, posemb, vit


def build(config):
    """The encoder that the configuration of a case describes."""
    size = config["encoder"]
    reading.agree(config, embed_dim=size["embed_dim"])
    scaled = config.get("use_layerscale", False)
    return vit.ViT(
        width=size["embed_dim"],
        depth=size["depth"],
        heads=size["num_heads"],
        patch=size["patch_size"],
        image_size=config["img_size"],
        mlp_ratio=size.get("mlp_ratio", 4.0),
        drop_path=config.get("drop_path_rate", 0.0),
        layerscale=config.get("layerscale_init", 1e-5) if scaled else 0.0,
        rope=config.get("use_rope", False),
        rope_theta=config.get("rope_theta", 10000.0),
    )


def _load(case):
    """(encoder, its variables) with the case's weights, through the users' table."""
    net = build(case.config)
    channels = case.inputs["images"].shape[1]
    image = jnp.zeros((1, net.image_size, net.image_size, channels))
    like = jax.eval_shape(net.init, jax.random.key(0), image)["params"]
    before = next(iter(case.param)).split("vit.")[0]
    params = convert.convert(case.param, like, vit_names.table(f"{before}vit."))
    return net, {"params": params}


def _image(case, name="images"):
    return jnp.asarray(case.inputs[name]).transpose(0, 2, 3, 1)  # [B, H, W, C]


def _context(case):
    net, variables = _load(case)
    case.close("tokens_full", net.apply(variables, _image(case))[0])
    image, hide = _image(case, "images_masked"), case.inputs["mask"] > 0
    tokens, _ = net.apply(variables, image, hide=jnp.asarray(hide))
    case.close("tokens_zero", tokens)
    # The original stores zeros in the rows of hidden tokens; so does this.
    room = int((~hide).sum(-1).max())
    keep, count = patches.pack(jnp.asarray(~hide), room)
    tokens, _ = net.apply(variables, image, keep=keep, count=count)
    cls, tokens = tokens[:, :1], tokens[:, 1:]
    empty = jnp.zeros((*hide.shape, net.width))
    full = patches.put(tokens, keep, count, into=empty)
    case.close("tokens_drop", jnp.concatenate([cls, full], axis=1))


def _layerscale(case):
    net, variables = _load(case)
    assert net.layerscale > 0
    case.close("tokens", net.apply(variables, _image(case))[0])


def _local_crop(case):
    net, variables = _load(case)
    image = _image(case)
    assert image.shape[1] == case.config["local_size"] != net.image_size
    tokens, out = net.apply(variables, image)
    table = net.apply(variables, out["grid"], method="position_table")[None]
    cls = variables["params"]["pos_embed"][:, :1]
    case.close("pos_embed", np.concatenate([cls, table], axis=1))
    case.close("tokens", tokens)


def _rope(case):
    c = case.config
    net, variables = _load(case)
    case.close("tokens", net.apply(variables, _image(case))[0])
    full, small = (c["grid"],) * 2, (c["dynamic_grid"],) * 2
    angles = posemb.rope_angles(full, c["head_dim"], c["rope_theta"])
    rows, columns = np.split(angles, 2, axis=-1)
    case.close("freqs_h", rows)
    case.close("freqs_w", columns)
    q = jnp.asarray(case.inputs["q"]).transpose(0, 2, 1, 3)  # [B, N, heads, c]
    k = jnp.asarray(case.inputs["k"]).transpose(0, 2, 1, 3)
    case.close("q_rot", _turn(q, angles))
    case.close("k_rot", _turn(k, angles))
    angles = posemb.rope_angles(small, c["head_dim"], c["rope_theta"])
    case.close("q_rot_small_grid", _turn(q[:, : len(angles)], angles))


def _turn(x, angles):
    """Rotated [B, heads, N, c] of x [B, N, heads, c]."""
    return posemb.rotate(x, *posemb.rotation(angles[None])).transpose(0, 2, 1, 3)


CHECKS = {
    "context encoder": _context,
    "context encoder with LayerScale": _layerscale,
    "context encoder on local crops": _local_crop,
    "2-D rotary position embedding": _rope,
}
