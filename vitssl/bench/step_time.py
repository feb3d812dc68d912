"""Time a whole training step (forward, backward, optimizer) on synthetic batches.

    python -m vitssl.bench step --config=configs/hjepa.py [--config.KEY=VALUE ...]
    python -m vitssl.bench step --vit=b16 --image=224 --batch=256 --dtype=bfloat16

One JSON line: median and deciles of the step time in ms, images per second and device,
compile seconds, XLA's and the formula's FLOPs, MFU where the device's peak is known,
bytes of memory, versions. Needs neither grain nor a data set. Two steps are compared in
one process, in turns (ABAB), because machines are noisy:

    --versus=KEY=VALUE[;KEY=VALUE]   the same config with these overrides
    --torch=eager | compile          the same ViT in PyTorch (extra `[torch]`)
"""

import itertools

import jax
import numpy as np

from vitssl import errors
from vitssl.bench import case, clock, plain
from vitssl.run import devices


def run(argv: list[str]) -> dict:
    """Parse the options, measure, return the figures."""
    parser = errors.Parser("vitssl bench step", __doc__)
    parser.add_argument("--config", default="")
    parser.add_argument("--vit", default="", help="ti16, s16, b16, l16")
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--batch", type=int, default=0, help="0: the config's")
    parser.add_argument("--dtype", default="float32", choices=case.DTYPES)
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--versus", default="")
    parser.add_argument("--torch", default="", choices=("", "eager", "compile"))
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    o, overrides = case.words(parser, argv)
    if bool(o.config) == bool(o.vit):
        raise errors.UsageError("bench step: give --config=FILE or --vit=NAME")
    if o.versus and not o.config or o.torch and not o.vit:
        raise errors.UsageError("bench step: --versus needs --config, --torch --vit")
    of = (
        case.of_config(o.config, overrides, o.batch, o.seed)
        if o.config
        else plain.case_of(
            o.vit,
            case.random_images(o.batch or 8, o.image, o.seed),
            dtype=o.dtype,
            remat=o.remat,
            seed=o.seed,
        )
    )
    ours = of.prepare()
    figures = {"bench": "step"} | ours.figures
    if o.versus:
        more = [*overrides, *o.versus.split(";")]
        theirs = case.of_config(o.config, more, o.batch, o.seed).prepare()
        facts = theirs.figures
    elif o.torch:
        theirs, facts = _rival(o, of), {"batch": of.rows, "devices": 1}
    else:
        for _ in range(o.warmup):
            ours()
        return figures | _speed(figures, clock.seconds(ours, o.steps))
    both = {"ours": ours, "theirs": theirs}
    spent = clock.in_turns(both, o.turns, o.steps, o.warmup)
    ratios = clock.times_faster(spent["ours"], spent["theirs"])
    flat = {name: list(itertools.chain(*turns)) for name, turns in spent.items()}
    return figures | {
        **_speed(figures, flat["ours"]),
        "versus": o.versus or f"torch {o.torch}",
        "theirs": facts | _speed(facts, flat["theirs"]),
        "speed_ratio": float(np.median(ratios)),
        "speed_ratio_each_turn": ratios,
    }


def _rival(o, of):
    from vitssl.bench import rival

    net = of.method.model
    return rival.step(
        width=net.width,
        depth=net.depth,
        heads=net.heads,
        patch=net.patch,
        image=o.image,
        classes=of.method.run.classes,
        batch=of.batch,
        dtype=o.dtype,
        compiled=o.torch == "compile",
    )


def _speed(figures: dict, times: list[float]) -> dict:
    """Return what follows from the seconds of the steps."""
    median, rows, count = float(np.median(times)), figures["batch"], figures["devices"]
    found = {
        "ms_per_step": 1e3 * median,
        "ms_p10_p90": [1e3 * float(q) for q in np.quantile(times, (0.1, 0.9))],
        "images_per_second_per_device": rows / median / count,
    }
    if "xla_gflop_per_image" in figures:
        flop = figures["analytic_gflop_per_image"] or figures["xla_gflop_per_image"]
        rate = 1e9 * flop * rows / median
        peak = devices.peak_flops(figures["dtype"]) * count
        stats = jax.local_devices()[0].memory_stats() or {}
        found["tflops"] = rate / 1e12
        found["mfu_percent"] = 100 * rate / peak if peak else None
        found["peak_bytes"] = stats.get("peak_bytes_in_use")
    return found
