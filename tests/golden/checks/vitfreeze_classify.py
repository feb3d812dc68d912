"""Fine-tuning, linear probe and k-NN of LocalMIM: views, losses, heads, groups."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import localmim_names as pretrain_table
from tests.golden import reading
from vitssl import convert, tree
from vitssl.convert import positions, vit_names
from vitssl.data import geometry, resample, views
from vitssl.evals import accuracy, knn
from vitssl.methods.classify import mix, objective
from vitssl.models import head, patches, vit
from vitssl.optim import freezeout
from vitssl.optim import optimizer as optim
from vitssl.run import warmstart

# The rules of configs/finetune_vit.py.
DECAY = ((".*/(bias|scale|cls|pos_embed|ls1|ls2)|head/bias", 0.0), (".*", 1.0))


def _losses(case):
    c, logits = case.config, jnp.asarray(case.inputs["logits"])
    label = case.inputs["labels"]
    soft = jnp.asarray(case.inputs["soft_target"])
    case.close("soft_target_ce", objective.cross_entropy(logits, soft))
    for name, s in (("label_smoothing_ce", c["smoothing"]), ("ce", 0.0)):
        target = objective.soft_targets(label, c["num_classes"], s)
        case.close(name, objective.cross_entropy(logits, target))
    found = accuracy.measure(case.inputs["logits"], label)
    case.close("acc1", 100 * found["top1"])
    case.close("acc5", 100 * found["top5"])


def _drop_path(case):
    for depth, rate in case.config["cases"]:
        net = vit.ViT(8, depth, 1, 4, 8, drop_path=rate)
        variables = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
        used = net.apply(
            variables, method=lambda m: [block.drop_path for block in m.block]
        )
        case.close(f"d{depth}_r{rate}", used)


def _images(case):
    c, image = case.config, case.inputs["image"].astype(np.uint8)
    view = views.classifier_evaluation(c["input_size"])
    reading.agree(c, resize_shorter=int(view.ratio * c["input_size"] + 1e-6))

    def standard(x):
        x = patches.normalise(jnp.asarray(x), c["mean"], c["std"])
        return jnp.moveaxis(x, -1, 0)

    case.close("eval", standard(view({"image": image})["image"]))
    size = (c["input_size"],) * 2
    crop = resample.resize(image, size, c["crop_box_top_left_h_w"], "bicubic")
    case.close("train_crop", standard(crop))


def _clipped(case):
    draws = case.inputs["area_fraction_log_ratio"]
    low, high = np.log(case.config["ratio"])
    assert (low <= draws[:, 1]).all() and (draws[:, 1] <= high).all()
    want = case.out["top_left_h_w"]
    for row, ((width, height), draw) in enumerate(
        zip(case.inputs["width_height"], draws, strict=True)
    ):
        # Drawn as float32 there, and used as a Python float.
        h, w = geometry.clipped_size((int(height), int(width)), *map(float, draw))
        top, left, *size = want[row]
        assert size == [h, w]
        assert 0 <= top <= height - h and 0 <= left <= width - w
    case.compared.add("top_left_h_w")


def _knn(case):
    c, i = case.config, case.inputs
    bank, query = (
        {"vector": i[f"{name}_features"], "label": i[f"{name}_labels"]}
        for name in ("train", "test")
    )
    for k in c["k"]:
        evaluator = knn.KNN((k,), (c["temperature"],))
        found = evaluator(bank, query, c["num_classes"])
        votes = _votes(i, k, c)
        # The original fills the five with classes that no neighbour has.
        five = accuracy.top(accuracy.rank(votes, query["label"]), c["num_classes"])
        assert found["top5"] <= five["top5"]
        case.close(f"k{k}/top1", 100 * found["top1"])
        case.close(f"k{k}/top5", 100 * five["top5"])
        case.close(f"k{k}/votes", votes[:20])


def _votes(i, k, c):
    """Votes of the test rows, through the search that `knn.KNN` uses."""
    query = i["test_features"]
    similarity, index = knn.search(i["train_features"], query, k, metric="cosine")
    weight = np.exp(np.asarray(similarity) / c["temperature"])
    votes = np.zeros((len(query), c["num_classes"]))
    rows = np.arange(len(query))[:, None]
    np.add.at(votes, (rows, i["train_labels"][np.asarray(index)]), weight)
    return votes


def _lars(case):
    c = case.config
    spec = optim.Optim(
        name="lars",
        lr=1.0,
        schedule="constant",
        warmup_epochs=0.0,
        min_lr=0.0,
        wd=c["weight_decay"],
        clip_norm=0.0,
        momentum=c["momentum"],
        trust=c["trust_coefficient"],
        wd_rules=(("b", 0.0), (".*", 1.0)),
    )
    params = {k: jnp.asarray(case.inputs[f"{k}0"]) for k in ("W", "b", "Z")}
    optimizer = optim.make(
        spec, params, total_steps=c["steps"], steps_per_epoch=1, batch_size=1
    )
    opt = optimizer.init(params)
    for t in range(c["steps"]):
        grads = {k: jnp.asarray(case.inputs[f"grad{t}/{k}"]) for k in params}
        # The rate of each step is given: it scales the step of a rate of one.
        new, opt, _ = optimizer.update(grads, opt, params, t)
        lr = case.inputs["lr"][t]
        params = {k: params[k] + lr * (new[k] - params[k]) for k in params}
        for k, value in params.items():
            case.close(f"step{t}/{k}", value)


def _probe(case):
    c = case.config
    module = head.Head(pool="mean", batchnorm=True)
    params = {
        "kernel": jnp.asarray(case.param["linear.weight"]).T,
        "bias": jnp.asarray(case.param["linear.bias"]),
    }
    reading.agree(c, batch=len(case.inputs["x0"]), classes=len(params["bias"]))
    reading.agree(c, bn_eps=head.EPS, bn_momentum=0.1)
    _, stats = module.init(jax.random.key(0), c["dim"], c["classes"])
    for t in range(sum(name.startswith("x") for name in case.inputs)):
        x = jnp.asarray(case.inputs[f"x{t}"])
        logits, stats, _ = module(params, stats, x, train=True)
        case.close(f"train{t}", logits)
    case.close("running_mean", stats["mean"])
    case.close("running_var", stats["var"])
    case.close("eval", module(params, stats, jnp.asarray(case.inputs["x0"]))[0])


def _mixed(case):
    c = case.config
    image = jnp.moveaxis(jnp.asarray(case.inputs["x"]), 1, -1)
    for one in c["cases"]:
        key, lam = one["key"], jnp.float32(one["lam_drawn"])
        edges = one["bbox_yl_yh_xl_xh"]
        assert one["use_cutmix"] == (edges is not None)
        if edges is not None:
            mixed, lam = mix.cutmix(image, edges)
        else:
            mixed = mix.mixup(image, lam)
        target = mix.targets(
            case.inputs["y"], c["num_classes"], lam, c["label_smoothing"]
        )
        case.close(f"{key}/x", jnp.moveaxis(mixed, -1, 1))
        case.close(f"{key}/target", target)
        case.close(f"{key}/lam", lam)


def _groups(case):
    c = case.config
    norm = "fc_norm" if c["global_pool"] else "norm"
    place = {"cls_token": "backbone/cls", "pos_embed": "backbone/pos_embed"}
    place |= {f"{norm}.weight": "head/norm/scale", f"{norm}.bias": "head/norm/bias"}
    place |= {"head.weight": "head/kernel", "head.bias": "head/bias"}
    place["patch_embed.proj.weight"] = "backbone/patch_embed/kernel"
    place["patch_embed.proj.bias"] = "backbone/patch_embed/bias"
    names = {}
    for group in case.meta["groups"]:
        name = group["name"]
        if name.startswith("blocks."):
            _, i, *rest = name.split(".")
            leaf = {"weight": "kernel", "bias": "bias"}[rest[-1]]
            if rest[0].startswith("norm") and leaf == "kernel":
                leaf = "scale"
            names[name] = "/".join([f"backbone/block_{i}", *rest[:-1], leaf])
        else:
            names[name] = place[name]
    layers = vit.ViT(8, c["depth"], 1, 4, 8).freeze_layers("backbone/")
    # The first is the backbone's own last norm, for which the original has the head's.
    layers = tree.match(list(names.values()), layers[1:], what="layers", default=-1)
    lr = freezeout.decayed(c["layer_decay"], layers)
    # One case has no LayerNorm of its own in the head: then a rule may be idle.
    wd = tree.match(list(names.values()), DECAY, what="wd_rules")
    for group in case.meta["groups"]:
        ours = names[group["name"]]
        np.testing.assert_allclose(lr[ours], group["lr_scale"], rtol=1e-6)
        assert wd[ours] * c["weight_decay"] == group["weight_decay"], ours
        layer = group["layer_id"]
        scale = c["layer_decay"] ** (c["depth"] + 1 - layer)
        np.testing.assert_allclose(lr[ours], scale, rtol=1e-6)


def _positions(case):
    for one in case.config["cases"]:
        table = case.inputs[f"{one['key']}/pos_embed"]
        reading.agree(one, dim=table.shape[-1])
        assert table.shape[-2] == 1 + one["old_grid"] ** 2
        got = positions.resample(table, 1, one["new_grid"], "plain")
        case.close(f"{one['key']}/pos_embed", got)


def _transfer(case):
    """A checkpoint through our names into a classifier: which parameters arrive."""
    meta, depth = case.meta, case.config["depth"]
    scales = case.config.get("decoder_scales", (4.0, 2.0, 1.0, 0.5))
    count = len(scales)
    for key, first in (
        ("pretrain_keys", 0),
        ("pretrain_keys_after_freezing_all_but_last", count - 1),
    ):
        keys = meta[key]
        assert pretrain_table.dropped({k: 0 for k in keys}, count) == first
        stored = _ours(keys, pretrain_table.table(scales, first))
        net = vit.ViT(8, depth, 1, 4, 8, positions="learned_sincos")
        variables = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
        shapes = {f"backbone/{k}": v for k, v in tree.flat(variables["params"]).items()}
        shapes |= {f"head/{k}": None for k in ("norm/scale", "kernel", "bias")}
        rules = (("backbone/(.*)", r"encoder/\1"),)
        stored.discard("encoder/pos_embed")  # Fixed in pre-training: no parameter here.
        found = set(warmstart.renamed(dict.fromkeys(stored), shapes, rules)) & set(
            shapes
        )
        # The position table is fixed there: it comes from its formula, not the file.
        carried = [k for k in meta["carried_over"] if k != "pos_embed"]
        wanted = {f"backbone/{k}" for k in _ours(carried, vit_names.table())}
        # Beyond the original, the last stage's norm arrives (its advice).
        assert found - wanted == {"backbone/norm/scale", "backbone/norm/bias"}
        assert wanted <= found


def _ours(keys, table):
    """Names here of the keys that a table knows."""
    return {table.forward(key)[1] for key in keys} - {None}


def _finetuned(case):
    c = case.config
    classes = len(case.param["head.bias"])
    reading.agree(c, qkv_bias=True, num_classes=classes)
    net = vit.ViT(
        width=c["embed_dim"],
        depth=c["depth"],
        heads=c["num_heads"],
        patch=c["patch_size"],
        image_size=c["img_size"],
        mlp_ratio=c["mlp_ratio"],
        drop_path=c["drop_path_rate_train"],
        positions="learned_sincos",
        norm_eps=c["ln_eps"],
    )
    image = jnp.moveaxis(jnp.asarray(case.inputs["imgs"]), 1, -1)
    like = jax.eval_shape(net.init, jax.random.key(0), image)["params"]
    own = {k: v for k, v in case.param.items() if not k.startswith(("fc_", "head"))}
    params = convert.convert(own, like, vit_names.table())
    kernel = jnp.asarray(case.param["head.weight"]).T
    linear = {"kernel": kernel, "bias": jnp.asarray(case.param["head.bias"])}
    for pool in ("gap", "cls"):
        x = net.apply({"params": params}, image, how=pool, method="pooled")
        given = dict(linear)
        if pool == "gap":
            given["norm"] = {
                "scale": jnp.asarray(case.param["fc_norm.weight"]),
                "bias": jnp.asarray(case.param["fc_norm.bias"]),
            }
        logits, _, features = head.Head(pool=pool)(given, {}, x)
        case.close(f"{pool}/features", features)
        case.close(f"{pool}/logits", logits)


CHECKS = {
    "losses and accuracy": _losses,
    "stochastic depth": _drop_path,
    "image transforms": _images,
    "linear-probe crop": _clipped,
    "k-NN evaluation": _knn,
    "LARS optimizer": _lars,
    "linear-probe head": _probe,
    "mixup / cutmix": _mixed,
    "parameter grouping (fine-tuning)": _groups,
    "pos-embed resize on checkpoint load": _positions,
    "pre-train -> downstream parameter transfer": _transfer,
    "fine-tune / probe ViT": _finetuned,
}
