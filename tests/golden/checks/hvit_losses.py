"""HViT's losses, metrics, averages, stopping, mixing and splits."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import reading
from vitssl import tree
from vitssl.data import orders
from vitssl.data.sources import sarcld
from vitssl.evals import accuracy, linear, metrics
from vitssl.losses import contrastive
from vitssl.methods.classify import mix, objective
from vitssl.optim import schedules
from vitssl.run import checkpoint


def _contrastive(case):
    a, b = (jnp.asarray(case.inputs[f"features{i}"]) for i in (1, 2))
    given = {float(k.split("_t")[1]) for k in case.out if "_grad" not in k}
    reading.agree(case.config, temperatures=sorted(given))
    for name in case.out:
        if name.endswith(("_grad1", "_grad2")):
            continue
        kind, t = re.fullmatch(r"(infonce|ntxent)_t([\d.]+)", name).groups()
        one = {"infonce": contrastive.infonce, "ntxent": contrastive.nt_xent}[kind]

        def loss(a, b, one=one, t=float(t)):
            return one(a, b, temperature=t)[0]

        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(a, b)
        case.close(name, value)
        case.close(f"{name}_grad1", grads[0])
        case.close(f"{name}_grad2", grads[1])


def _class_losses(case):
    c, i = case.config, case.inputs
    label, other = i["y"].astype(np.int32), i["y_b"].astype(np.int32)
    weight, vector = i["class_weights"], i["alpha_vector"]
    reading.agree(c, num_classes=i["logits"].shape[-1])

    def focal(x, y, alpha=c["focal_alpha"], reduction="mean"):
        return objective.focal(
            x, y, gamma=c["focal_gamma"], alpha=alpha, reduction=reduction
        )

    def smooth(x, y, weight=None, smoothing=c["label_smoothing"]):
        return objective.labelled(x, y, smoothing=smoothing, weight=weight)

    def combined(x, y, weight=None):
        return c["ce_weight"] * smooth(x, y, weight) + c["focal_weight"] * focal(x, y)

    def mixed(x, y):
        one = lambda label: combined(x, label, weight)  # noqa: E731
        return objective.mixed(one, y, other, c["lam"])

    losses = {
        "focal_mean": focal,
        "focal_sum": lambda x, y: focal(x, y, reduction="sum"),
        "focal_alpha1_mean": lambda x, y: focal(x, y, 1.0),
        "focal_alpha_vector_mean": lambda x, y: focal(x, y, vector),
        "ce": lambda x, y: smooth(x, y, smoothing=0.0),
        "ce_smooth": smooth,
        "ce_smooth_weighted": lambda x, y: smooth(x, y, weight),
        "ce_weighted": lambda x, y: smooth(x, y, weight, 0.0),
        "combined": combined,
        "combined_weighted": lambda x, y: combined(x, y, weight),
        "combined_weighted_mixed": mixed,
    }
    logits = jnp.asarray(i["logits"])
    case.close("focal_none", focal(logits, label, reduction="none"))
    for name, loss in losses.items():
        value, grad = jax.value_and_grad(loss)(logits, label)
        case.close(name, value)
        case.close(f"{name}_grad", grad)


def _metrics(case):
    logits, label = case.inputs["logits"], case.inputs["labels"]
    classes = case.config["num_classes"]
    confusion = accuracy.confusion(label, logits.argmax(1), classes)
    case.close("confusion", confusion)
    for key, value in metrics.summary(confusion).items():
        case.close(key, value)
    for name, f1 in zip(
        case.config["class_names"], metrics.per_class(confusion)["f1"], strict=True
    ):
        case.close(f"f1_{name.replace(' ', '_')}", f1)


def _mixing(case):
    c = case.config
    h, w = c["image_hw"]
    image = jnp.moveaxis(jnp.asarray(case.inputs["x"]), 1, -1)
    other = image[case.inputs["perm"]]
    back = lambda x: jnp.moveaxis(x, -1, 1)  # noqa: E731
    case.close("mixup", back(mix.mixup(image, c["lams"][0], other)))
    rows = []
    for lam in c["lams"]:
        for x, y in c["centres"]:
            y0, y1, x0, x1 = (int(v) for v in mix.box(jnp.float32(lam), (y, x), (h, w)))
            _, share = mix.cutmix(image, (y0, y1, x0, x1), other)
            rows.append((lam, x, y, x0, y0, x1, y1, float(share)))
    case.close("boxes", np.array(rows, np.float32))
    _, x, y, *_ = rows[len(c["centres"])]
    edges = mix.box(jnp.float32(c["lams"][1]), (y, x), (h, w))
    case.close("cutmix", back(mix.cutmix(image, edges, other)[0]))


def _ema(case):
    decay = case.config["decay"]
    reading.agree(case.config, steps=len(case.inputs["live"]))
    for name, rule in (
        ("ema", lambda n: decay),
        ("ema_adaptive", lambda n: schedules.averaging_counted(n, decay=decay)),
    ):
        shadow, found = case.inputs["initial"], []
        for n, live in enumerate(case.inputs["live"], 1):
            shadow = tree.ema(jnp.asarray(shadow), jnp.asarray(live), rule(n))
            found.append(shadow)
        case.close(name, np.stack(found))


def _stopping(case):
    c = case.config
    spec = checkpoint.Checkpoint(
        every_epochs=1.0,
        best="f1_macro" if c["mode"] == "max" else "loss",
        patience=c["patience"],
        min_delta=c["min_delta"],
    )
    patience, improved, stop, best = checkpoint.Best(spec, {}), [], 0, None
    for epoch, value in enumerate(case.inputs["metric"], 1):
        patience.look(1, {spec.best: float(value)})
        state = patience.state()
        if state["since"] == 0:
            improved.append(epoch)
        best = state["best"]
        if patience.over:
            stop = epoch
            break
    case.close("improved_epochs", improved)
    case.close("stop_epoch", stop)
    case.close("best", np.float32(best))


def _probe(case):
    c, i = case.config, case.inputs
    recipe = linear.SGD(
        epochs=c["epochs"],
        lr=c["lr"],
        schedule="constant",
        momentum=c["momentum"],
        batch_size=c["batch"],
        shuffle=False,
    )
    probe = linear.LinearProbe(c["num_classes"])
    params = {
        "classifier": {"kernel": case.param["weight"].T, "bias": case.param["bias"]}
    }
    given = jax.device_put((i["x"], i["y"].astype(np.int32)))
    params, _, losses = linear._train(
        probe, params, *given, np.uint32(0), recipe=recipe
    )
    case.close("loss", np.ravel(losses))
    case.close("weight_after", params["classifier"]["kernel"].T)
    case.close("bias_after", params["classifier"]["bias"])
    logits = linear.logits(probe, params, i["x_val"])
    case.close("val_logits", logits)
    found = accuracy.measure(logits, i["y_val"])
    case.close("val_accuracy_percent", 100 * found["top1"])


def _split(case):
    c, label = case.config, case.inputs["labels"]
    train, val = sarcld.legacy_split(c["N"], c["train_ratio"], c["seed"])
    case.close("train_indices", train)
    case.close("val_indices", val)
    own = label[train].astype(np.int32)
    counts = np.bincount(own, minlength=c["num_classes"])
    case.close("class_weights", objective.class_weights(counts))
    case.close("sample_weights", orders.class_weight(own))


CHECKS = {
    "contrastive losses": _contrastive,
    "classification losses": _class_losses,
    "metrics": _metrics,
    "MixUp and CutMix": _mixing,
    "EMA": _ema,
    "best checkpoint and early stopping": _stopping,
    "linear probe": _probe,
    "split, class weights, sampler weights": _split,
}
