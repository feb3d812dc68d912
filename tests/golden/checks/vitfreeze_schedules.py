"""Schedules of FreezeOut, the plain ones of LocalMIM, and what freezing saves."""

import numpy as np

from tests.golden import reading
from vitssl.bench import flops
from vitssl.optim import freezeout
from vitssl.optim import optimizer as optim


def _plan(run, last, total, warmup):
    spec = freezeout.FreezeOut(
        schedule=run["how"],
        t_0=run["t0"],
        scale_lr=run["scale_lr"],
        layerwise_lr=run.get("layerwise", True),
    )
    return freezeout.Schedule(spec, last, total, warmup)


def _optimizer(run, wd=0.0):
    spec = optim.Optim(
        name="adamw",
        lr=run["lr"],
        schedule="cosine",
        warmup_epochs=float(run["W"]),
        min_lr=run["min_lr"],
        wd=wd,
        clip_norm=0.0,
    )
    return optim.make(
        spec,
        {"x": np.zeros(1)},
        total_steps=run["E"] * run["ipe"],
        steps_per_epoch=run["ipe"],
        batch_size=1,
    )


def _windows(run):
    """Position at which each micro-iteration's schedule was evaluated."""
    epoch, inside = np.divmod(np.arange(run["E"] * run["ipe"]), run["ipe"])
    return epoch * run["ipe"] + inside // run["acc"] * run["acc"]


def _freeze(case):
    for run in case.config["runs"]:
        key, ipe = run["key"], run["ipe"]
        layers = case.out[f"{key}/lr"].shape[1]
        assert layers == run["depth"] + run["pe_frozen"]
        plan = _plan(run, layers - 1, run["E"] * ipe, run["W"] * ipe)
        at = _windows(run)
        flat = np.asarray(_optimizer(run).lr(at))
        events = [plan.frozen_from(i) for i in range(layers)]
        frozen = np.stack(
            [np.zeros(len(at), bool) if e is None else at >= e for e in events], axis=1
        )
        rates = [np.asarray(plan.lr(i, at, run["lr"], flat)) for i in range(layers)]
        case.close(f"{key}/lr", np.where(frozen, 0.0, np.stack(rates, axis=1)))
        case.close(f"{key}/active", ~frozen)
        least = frozen.sum(1)
        case.close(f"{key}/min_active_layer", least)
        case.close(f"{key}/lr_unfrozen_params", flat)
        stages = np.asarray(run["stage_layer_index"])
        reading.agree(run, all_stages=len(stages) == run["depth"])
        case.close(f"{key}/stage_active", stages[None] >= least[:, None])
        inside = np.arange(len(at)) % ipe
        case.close(f"{key}/optimizer_step", inside % run["acc"] == run["acc"] - 1)
        every = range(layers)
        case.close(f"{key}/lr_ratio", [plan.ratio(i) for i in every])
        case.close(f"{key}/max_iter", [plan.span(i) for i in every])
        first = [np.argmax(frozen[:, i]) if frozen[:, i].any() else -1 for i in every]
        case.close(f"{key}/freeze_microstep", first)


# The networks of the FreezeOut paper: which module belongs to which layer.


def _wrn_layers(depth: int) -> tuple[tuple[str, int], ...]:
    """Return ((module, layer), ...) of a wide residual network of 6 n + 4 layers.

    The final normalisation and the classifier share the last index.
    """
    n = (depth - 4) // 6
    names = ["conv1", *(f"block{s}.{i}" for s in (1, 2, 3) for i in range(n))]
    last = len(names)
    return (*((m, i) for i, m in enumerate(names)), ("bn1", last), ("fc", last))


def _densenet_layers(depth: int) -> tuple[tuple[str, int], ...]:
    """Return ((module, layer), ...) of a DenseNet-BC; transitions count as layers."""
    n = (depth - 4) // 6
    names = ["conv1"]
    for stage in (1, 2, 3):
        names += [f"dense{stage}.{i}" for i in range(n)]
        names += [f"trans{stage}"] if stage < 3 else []
    last = len(names)
    return (*((m, i) for i, m in enumerate(names)), ("bn1", last), ("fc", last))


def _vgg_layers() -> tuple[tuple[str, int], ...]:
    """Return ((module, layer), ...) of VGG-16: 13 convolutions and the classifier.

    Places 2, 5, 9 and 13 of the list of features are pooling.
    """
    convolutions = [i for i in range(17) if i not in (2, 5, 9, 13)]
    names = [*(f"features.{i}" for i in convolutions), "classifier"]
    return tuple((m, i) for i, m in enumerate(names))


_LAYERS = {
    "wrn": lambda run: _wrn_layers(run["depth"]),
    "densenet": lambda run: _densenet_layers(run["depth"]),
    "vgg": lambda run: _vgg_layers(),
}


def _original(case):
    c = case.config
    for run in c["runs"]:
        key, last = run["key"], run["num_layers"]
        total = run["epochs"] * c["iters_per_epoch_assumed"]
        plan = _plan(run, last, total, 0)
        j = case.out[f"{key}/j"]
        case.close(f"{key}/j", np.arange(len(j)) * run["stride"])
        rates = np.stack(
            [np.asarray(plan.lr(i, j, c["base_lr"], 0.0)) for i in range(last + 1)], 1
        )
        events = [plan.frozen_from(i) for i in range(last + 1)]
        for i, e in enumerate(events):
            if e is not None:
                rates[j >= e, i] = 0.0
        case.close(f"{key}/lr", rates)
        case.close(f"{key}/lr_ratio", [plan.ratio(i) for i in range(last + 1)])
        case.close(f"{key}/freeze_iter", [-1 if e is None else e for e in events])
        want = [(m["module"], m["layer_index"]) for m in run["modules"]]
        assert list(_LAYERS[run["model"]](run)) == want


def _densenet_saving(
    growth_rate: int, blocks_per_stage: int, t_0: float, how_scale: str
) -> float:
    """Return the paper's estimate of the compute saved on a DenseNet-BC of 32 px.

    Forward and backward count one unit each and the first removes nothing; the linear
    schedule gets a factor of 1.3 that its authors measured; layer i has the ratio of
    i / (number of layers), as their code has it.

    Args:
        growth_rate: channels k added by every block.

    Source: ajbrock/FreezeOut@73beea1 utils.py:calc_speedup.
    """
    k, n = growth_rate, 2
    cost = [3 * 2 * k * 32**2 * 9]
    for side in (32, 16, 8):
        for _ in range(blocks_per_stage):
            cost.append(side**2 * (4 * n * k**2 + 36 * k**2))
            n += 1
        n //= 2
    count = len(cost)
    trained = sum(
        c * freezeout.ratio(how_scale, t_0, i, count) for i, c in enumerate(cost)
    )
    saving = 1 - (sum(cost) + trained) / (2 * sum(cost))
    return saving * (1.3 if how_scale == "linear" else 1.0)


def _speedup(case):
    names, rows = case.config["args"], case.config["cases"]
    got = [_densenet_saving(**dict(zip(names, row, strict=True))) for row in rows]
    case.close("speedup", got)


def _saving(case):
    c = case.config
    g, stages = c["per_image_GFLOP"], tuple(c["stage_layer_index"])
    depth = max(stages)
    # Linear layers 24 N D^2, attention 4 N^2 D.
    n = c["tokens_encoder"]
    width = np.sqrt(1e9 * g["block_linear"] / (24 * n))
    np.testing.assert_allclose(1e9 * g["block_attention"], 4 * n**2 * width, rtol=1e-6)
    tables = {}
    for mode in ("as_coded", "prefix_stop"):
        want = case.inputs[f"fwd_bwd_GFLOP_{mode}"]
        # The target is what the forward pass has beside the parts that are listed.
        parts = g["patch_embed"] + sum(g["decoder"])
        blocks = depth * (g["block_linear"] + g["block_attention"])
        target = (want[0, 0] - parts - blocks) / len(stages)
        rows = [
            flops.localmim(
                n,
                embed=g["patch_embed"],
                linear=g["block_linear"],
                attention=g["block_attention"],
                decoders=tuple(g["decoder"]),
                stage_layers=stages,
                depth=depth,
                target=target,
                as_coded=mode == "as_coded",
            )
            for n in range(depth + 1)
        ]
        np.testing.assert_allclose(rows, want, rtol=1e-4)
        tables[mode] = np.asarray(rows)
    for run in c["cases"]:
        key, warm = run["key"], run["warmup_epochs"] / run["epochs"]
        r = [
            freezeout.ratio(run["how_scale"], run["t_0"], i, depth)
            for i in range(depth + 1)
        ]
        active = warm + (1 - warm) * np.asarray(r)
        case.close(f"{key}/active_fraction", active)
        got = [
            [flops.saving(x, active) for x in (t[:, 0], t[:, 1], t.sum(1))]
            for t in tables.values()
        ]
        case.close(f"{key}/saving", got)


def _cosine(case):
    for run in case.config["cases"]:
        optimizer = _optimizer(run)
        at = _windows(run)
        rates = [optimizer.lr(at, run["lr_scale"]), optimizer.lr(at)]
        case.close(f"{run['key']}/lr", np.stack(rates, axis=1))


CHECKS = {
    "freeze schedule": _freeze,
    "FreezeOut original schedules": _original,
    "theoretical speed-up (FreezeOut)": _speedup,
    "theoretical compute saving, ViT-B/16 LocalMIM, 224 px, mask .75": _saving,
    "learning-rate schedule": _cosine,
}
