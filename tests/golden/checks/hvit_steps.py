"""HViT in training: whole steps, test-time augmentation, parameter groups."""

import re

import einops
import jax
import jax.numpy as jnp
import numpy as np

from vitssl import convert, tree
from vitssl.convert import hvit_names
from vitssl.evals import accuracy
from vitssl.methods import base
from vitssl.methods.classify import method as classify
from vitssl.methods.classify import objective as classification
from vitssl.methods.classify import views as classify_views
from vitssl.methods.simclr import method as simclr
from vitssl.methods.simclr import views
from vitssl.models import head
from vitssl.optim import optimizer as optim
from vitssl.run import step

from . import hvit_model

# The rules of configs/finetune_hvit.py and configs/simclr_hvit.py.
HEAD = r"(head|aux_\w+)/.*"
NO_DECAY = r".*/(bias|scale|pos_embed|disease_mask)"


def _run(classes=0, batch_size=1, total=1, counts=()):
    return base.Run(
        total_steps=total,
        steps_per_epoch=1,
        batch_size=batch_size,
        classes=classes,
        channels=3,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        counts=counts,
    )


def _classifier(case, objective=None, batch_size=2, **own):
    """Return (method, parameters, extra) of a classifier with the case's weights."""
    c = case.config
    made = classify.Classify(
        run=_run(c["num_classes"], batch_size, c.get("steps", 1)),
        model=hvit_model.backbone(c),
        augment=classify_views.Augment(size=c["img_size"][0]),
        head=head.Head(pool="mean_norm", norm_eps=1e-5),
        objective=objective or classification.Objective(),
        **own,
    )
    image = jax.ShapeDtypeStruct((1, *c["img_size"], 3), jnp.float32)
    like, _ = jax.eval_shape(made.init, jax.random.key(0), {"image": image})
    names = hvit_names.table(made.model.depths)
    params = convert.convert(case.param, like, names)
    return made, jax.tree.map(jnp.asarray, params)


def _channels_last(image):
    return jnp.moveaxis(jnp.asarray(image), -3, -1)


def _tta(case):
    image, label = _channels_last(case.inputs["rgb"]), case.inputs["y"]
    six = classify.Scoring(tta="six")
    method, params = _classifier(case, scoring=six)
    one = jax.jit(lambda x: method.logits(params, {}, x))
    turned = (classify.TURNS[k](image) for k in case.config["views6"])
    found = [jax.nn.softmax(one(x)) for x in turned]
    case.close("view_probs", jnp.stack(found))
    logs = {}
    for name, kind in (("tta2_probs", "flip"), ("tta6_probs", "six")):
        logs[kind] = classify.Scoring(tta=kind).averaged(one, image)
        case.close(name, jnp.exp(logs[kind]))
    batch = {"image": image, "label": label}
    got = method.outputs(params, {}, batch)["tta_logits"]
    np.testing.assert_allclose(got, logs["six"], rtol=1e-5, atol=1e-6)
    # Ours is the negative log of the averaged probability.
    loss = accuracy.measure(logs["flip"], label)["loss"]
    case.close("val_loss_correct", np.float32(loss))
    wrong = accuracy.measure(np.exp(logs["flip"]), label)["loss"]
    case.close("val_loss_original_bug", np.float32(wrong))


def _optimizer(params, total, **spec):
    values = dict(
        name="adamw",
        schedule="cosine",
        warmup_epochs=0.0,
        min_lr=0.0,
    )
    return optim.make(
        optim.Optim(**values | spec),
        params,
        total_steps=total,
        steps_per_epoch=1,
        batch_size=1,
    )


def _train(method, optimizer, params, extra, batches, accumulate=1):
    """Yield the state before, and the metrics of, every step; then the last state."""
    phase = step.phase_at(method, optimizer, 0)
    state = step._state(0, params, extra, optimizer, jax.random.key(0), phase)
    run = jax.jit(step.make(method, optimizer, accumulate), static_argnums=2)
    for i, batch in enumerate(batches):
        phase = step.phase_at(method, optimizer, i)
        before = step.enter(state, phase, optimizer)
        state, metrics = run(before, batch, phase)
        yield before, metrics, state


def _finetune(case):
    c, loss = case.config, case.config["loss"]
    objective = classification.Objective(
        loss=loss["type"],
        smoothing=loss["label_smoothing"],
        focal_alpha=(loss["focal_alpha"],),
        focal_gamma=loss["focal_gamma"],
        ce_weight=loss["ce"],
        focal_weight=loss["focal"],
        class_weights=tuple(c["class_weights"]),
        ema=c["ema_decay"],
    )
    method, params = _classifier(case, objective)
    extra = method.adopt(params, {"ema": params})
    cycle, steps = c["onecycle"], c["steps"]
    optimizer = _optimizer(
        params,
        steps,
        lr=c["lr_head"],
        lr_rules=(("backbone/.*", c["lr_backbone"] / c["lr_head"]), (".*", 1.0)),
        schedule="onecycle",
        cycle_rise=cycle["pct_start"],
        cycle_div=cycle["div_factor"],
        cycle_final_div=cycle["final_div_factor"],
        cycle_b1=(0.85, 0.95),
        wd=c["weight_decay"],
        clip_norm=c["clip_grad_norm"],
        thaw=(("backbone/.*", float(c["freeze_backbone_steps"])),),
    )
    images = _channels_last(case.inputs["images"])  # [steps, accumulate, B, H, W, C]
    labels = case.inputs["labels"].astype(np.int32)

    def whole(i):
        # Row r of a batch goes to micro-batch r modulo their number.
        image = einops.rearrange(images[i], "k b h w c -> (b k) h w c")
        label = einops.rearrange(labels[i], "k b -> (b k)")
        return {"image": image, "label": label}

    one = jax.jit(method.loss, static_argnames="phase")
    losses, norms = [], []
    run = _train(
        method,
        optimizer,
        params,
        extra,
        map(whole, range(steps)),
        c["accumulation_steps"],
    )
    for i, (before, metrics, after) in enumerate(run):
        state = after
        phase = step.phase_at(method, optimizer, i)
        parts = [
            {"image": x, "label": y} for x, y in zip(images[i], labels[i], strict=True)
        ]
        key = jax.random.key(0)
        each = [one(before.params, extra, part, key, phase=phase)[0] for part in parts]
        np.testing.assert_allclose(metrics["loss"], np.mean(each), rtol=1e-5)
        losses.append(each)
        norms.append(metrics["grad_norm"])
    case.close("loss", np.array(losses))
    case.close("grad_norm", np.array(norms))
    factors = [optimizer.lr_factor[f"{k}"] for k in ("backbone/pos_embed", "head/bias")]
    rates = [optimizer.lr(np.arange(steps), f) for f in factors]
    case.close("lr", np.stack(rates, -1))
    shown = {"image": images[0, 0]}
    found = method.outputs(state.params, state.extra, shown)
    case.close("logits_live", found["logits"])
    case.close("logits_ema", found["ema_logits"])
    case.close("classifier_head.weight_after", state.params["head"]["kernel"].T)


def _pretrain(case):
    c = case.config
    method = simclr.SimCLR(
        run=_run(batch_size=c["batch"], total=c["total_steps"]),
        model=hvit_model.backbone(c),
        augment=views.Views(size=c["img_size"][0]),
        projector=simclr.Projector(width=c["projection_dim"]),
        objective=simclr.Objective(
            loss={"ntxent": "nt_xent"}.get(c["loss"], c["loss"]),
            temperature=c["temperature"],
        ),
    )
    pairs = zip(case.inputs["view1"], case.inputs["view2"], strict=True)
    batches = [{"global": jnp.stack([*map(_channels_last, p)], 1)} for p in pairs]
    like, _ = jax.eval_shape(method.init, jax.random.key(0), batches[0])
    names = hvit_names.encoder(method.model.depths).under("backbone.", "encoder/")
    head_names = hvit_model.projections(False).under("projection_head.", "")
    # The classifier is not on the path: it is no parameter of this method.
    mine = {k: v for k, v in case.param.items() if ".classifier_head" not in k}
    flat = {"encoder": like["encoder"], "params": like["projector"]}
    found = convert.convert(mine, flat, names + head_names)
    params = {"encoder": found["encoder"], "projector": found["params"]}
    params = jax.tree.map(jnp.asarray, params)
    ours = [(names + head_names).forward(name)[1] for name in c.get("wd_excluded", ())]
    still = ((name.replace("params/", "projector/"), 0.0) for name in ours)
    optimizer = _optimizer(
        params,
        c["total_steps"],
        name=c.get("optimizer", "adamw"),
        lr=c["lr"],
        wd_rules=(*still, (".*", 1.0)),
        warmup_epochs=float(c["warmup_steps"]),
        wd=c["weight_decay"],
        b1=c["betas"][0],
        b2=c["betas"][1],
        eps=c["eps"],
        clip_norm=c["clip_grad_norm"],
    )
    rows = []
    for _, metrics, after in _train(method, optimizer, params, {}, batches):
        state = after
        rows.append(metrics)
    for name in ("loss", "grad_norm", "lr"):
        case.close(name, np.array([row[name] for row in rows]))
    kernel = state.params["projector"]["fc2"]["kernel"]
    case.close("projection_head.2.weight_after", kernel.T)
    case.close("backbone.rgb_pos_embed_after", state.params["encoder"]["pos_embed"])


def _groups(case):
    model = hvit_model.model(case.config)
    channels = 3 + model.backbone.spectral_channels
    image = jnp.zeros((1, *case.config["img_size"], channels))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    sizes = {k: v.size for k, v in tree.flat(shapes).items()}
    case.close("num_params_total", sum(sizes.values()))
    table = hvit_names.table(model.backbone.depths)
    ours = {name: table.forward(name)[1] for name in case.meta["all_names"]}
    assert set(ours.values()) == set(sizes)
    # By module, not by a piece of its name, which also finds every mlp.fc1.
    found = {k for k in ours if re.fullmatch(HEAD, ours[k])}
    assert found == set(case.meta["head_correct"])
    case.close("num_params_head_correct", sum(sizes[ours[k]] for k in found))
    pieces = {k for k in ours if any(p in k for p in ("head", "fc", "classifier"))}
    assert pieces == set(case.meta["head_original"])
    case.close("num_params_head_original", sum(sizes[ours[k]] for k in pieces))
    still = {k for k in ours if re.fullmatch(NO_DECAY, ours[k])}
    assert still == set(case.meta["no_weight_decay_corrected"])


CHECKS = {
    "test-time augmentation": _tta,
    "fine-tuning steps": _finetune,
    "SimCLR optimisation steps": _pretrain,
    "parameter groups": _groups,
}
