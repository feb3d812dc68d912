"""A recipe's real step, compiled for devices that are not here; nothing is run.

    python -m vitssl.bench aot --on=h200:8 --config=configs/hjepa.py:imagenet_vitb
    python -m vitssl.bench aot --on=v5e:4x4 --vit=b16 --batch=1024 --depth=2

Prints what the lowered step is made of (FLOPs, attention, precisions), then what the
compiler makes of it: memory traffic of its kernels, peak memory, what devices exchange,
the largest copies, converts and transposes, and a time that is a MODEL: arithmetic on
published figures, no measurement. Kinds of device: vitssl/run/accelerators/*.json.
Compilers are extras, [aot-cuda] and [aot-tpu]; without them the first part is printed.

GPUs are compiled for without autotuning and without Triton's matrix products, both of
which need the device: what is fused around a product will differ there. Exit code 6: it
does not fit.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time

import jax
import numpy as np

from vitssl import errors, tree
from vitssl.bench import case, compiled, elsewhere, hlo, plain
from vitssl.run import build, chips, devices, experiment, memory, notes

# Of the peak that products reach, in the model of the time.
_REACHED = 0.8
# How often the bytes of a collective pass a device's links, over a ring of many.
_PASSES = {"all-reduce": 2}
_LAYOUTS = {"cuda": r"S\(5\)", "tpu": r"S\([1-9]"}


@dataclasses.dataclass(frozen=True)
class Step:
    """A step to compile: the jitted function, the shapes of its state and batch.

    Attributes:
        said: what a reader must know of it.
    """

    name: str
    program: object
    state: object
    batch: dict
    accumulate: int
    said: str = ""

    @property
    def rows(self) -> int:
        """Return the images of a step, over all devices."""
        return jax.tree.leaves(self.batch)[0].shape[0]


def main(argv: list[str]) -> int:
    """Parse the options, compile, print; return the exit code."""
    parser = errors.Parser("vitssl bench aot", __doc__)
    parser.add_argument("--on", required=True, help="h200, h200:8, v5e:4x4, ...")
    parser.add_argument("--config", default="")
    parser.add_argument("--vit", default="", help="instead: ti16, s16, b16, l16")
    parser.add_argument("--image", type=_count, default=224)
    parser.add_argument("--batch", type=_count, default=0, help="0: the config's; 64")
    parser.add_argument("--depth", type=_count, default=0, help="blocks of --vit")
    parser.add_argument("--dtype", default="bfloat16", choices=case.DTYPES)
    parser.add_argument("--scan", action="store_true", help="model.scan of --vit")
    parser.add_argument("--attention", default="auto", choices=("auto", "xla", "cudnn"))
    parser.add_argument("--fsdp", type=_count, default=0, help="mesh.fsdp")
    parser.add_argument("--lower", action="store_true", help="do not compile")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    o, overrides = case.words(parser, argv)
    if bool(o.config) == bool(o.vit):
        raise errors.UsageError("bench aot: give --config=FILE or --vit=NAME")
    there = reach(o.on, o.lower)
    if o.vit:
        make = functools.partial(_of_vit, o)
    else:
        more = {"mesh.fsdp": o.fsdp, "batch_size": o.batch}
        overrides = [*overrides, *(f"{k}={v}" for k, v in more.items() if v)]
        c = experiment.load(o.config, overrides)
        if "study" in c:
            raise errors.UsageError(f"bench aot: {o.config} is a study; name a recipe")
        make = functools.partial(of_experiment, experiment.read(c), o.config)
    return report(make, there, as_json=o.json)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return int(text)


def reach(on: str, lower: bool = False) -> elsewhere.Elsewhere:
    """Return devices by name, to compile for if their compiler is installed.

    Raises:
        UsageError: there are none of this name and shape.
    """
    # The device at hand, if there is one, has no part in this.
    jax.config.update("jax_platforms", "cpu")
    kind, _ = chips.named(on)
    extra = "" if lower else elsewhere.missing(kind)
    if extra:
        text = f"not compiled, only lowered: pip install 'vitssl[{extra}]' compiles"
        print(text, file=sys.stderr, flush=True)
    return elsewhere.Elsewhere(on, compiles=not (lower or extra))


def of_experiment(checked, name: str) -> Step:
    """Return the first step of a checked config; noise stands in for missing data."""
    parts, said = build.anyhow(checked)
    phase, accumulate = parts.phase(0), parts.experiment.settings.accumulate
    state, batch = parts.compiled.abstract(phase), parts.shapes(0)
    return Step(name, parts.compiled.program(phase), state, batch, accumulate, said)


def _of_vit(o) -> Step:
    shape = (o.batch or 64, o.image, o.image, 3)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, np.uint8),
        "label": jax.ShapeDtypeStruct(shape[:1], np.int32),
    }
    own = {"dtype": o.dtype, "scan": o.scan, "attention": o.attention}
    own |= {"depth": o.depth} if o.depth else {}
    found = plain.case_of(o.vit, batch, mesh=devices.Mesh(fsdp=o.fsdp or 1), **own)
    phase = found.phase()
    state, program = found.compiled.abstract(phase), found.compiled.program(phase)
    return Step(found.name, program, state, found.shapes, 1)


def report(make, there: elsewhere.Elsewhere, as_json: bool = False) -> int:
    """Print what a step is on devices that are not here; return the exit code.

    Args:
        make: returns the `Step`; called while they are seen.
        there: the devices.
        as_json: print one line.
    """
    # Split over devices, attention is a call without a name until it is compiled.
    step, lowered = _lowered(make, there if there.count == 1 else there.alone())
    if step.said:
        print(step.said, file=sys.stderr, flush=True)
    counts = hlo.count(lowered.compiler_ir("stablehlo"))
    found = of_lowered(step, there, counts)
    if not as_json:
        print(_lowered_text(found), flush=True)
    if there.compiles:
        if there.count > 1:
            _, lowered = _lowered(make, there)
        start = time.process_time()
        executable = there.compile(lowered)
        found["compile_cpu_seconds"] = time.process_time() - start
        found |= of_compiled(executable, there, found)
        if not as_json:
            print(_compiled_text(found), flush=True)
    if as_json:
        print(json.dumps(found), flush=True)
    return 0 if found.get("fits", True) else errors.OutOfMemoryError.code


def _lowered(make, there):
    """Return (step, lowered for these devices)."""
    with there.seen():
        step = make()
    return step, there.lower(step.program, step.state, step.batch)


def of_lowered(step: Step, there, counts: hlo.Counts) -> dict:
    """Return the figures of a lowered step, per device."""
    calls = counts.forward + counts.backward
    attention = counts.fused + counts.unfused
    made = counts.products | {"fused attention": counts.fused}
    return {
        "bench": "aot",
        "name": step.name,
        "device": there.kind.name,
        "devices": there.count,
        "compiles": there.compiles,
        "batch": step.rows,
        "accumulate": step.accumulate,
        "parameters": tree.size(step.state.params),
        "flop": counts.flops / there.count,
        "flop_by_kind": {k: v / there.count for k, v in made.items() if v},
        "fused_calls": calls,
        "fused_share": counts.fused / attention if attention else None,
        "float32_share": counts.float32,
        "literal_bytes": counts.literal,
        "model_product_seconds": sum(
            v / there.count / _rate(there.kind, k) for k, v in made.items()
        ),
        "versions": notes.versions(),
    }


def _rate(kind: chips.Kind, made: str) -> float:
    """Return the FLOP/s that products made in some type are taken to reach."""
    of, _, parts = made.partition(" as ")
    times, _, of = parts.partition(" ") if parts else ("1", "", of)
    of = {"f16": "bf16", "fused attention": "bf16"}.get(of, of)
    peak = kind.products.get(of, kind.products["f32"])
    return _REACHED * peak / int(times)


def of_compiled(executable, there, lowered: dict) -> dict:
    """Return the figures of a compiled step, per device."""
    kind = there.kind
    text = executable.as_text()
    found = compiled.kernels(text, inside=_LAYOUTS[kind.platform])
    traffic, exchanged = compiled.by_kind(found), compiled.collectives(found)
    peak = peak_bytes(executable.memory_analysis())
    fast = not kind.per_host or there.count <= kind.per_host
    passed = sum(_PASSES.get(k, 1) * size for k, (_, size) in exchanged.items())
    parts = {
        "products": lowered["model_product_seconds"],
        "memory": (sum(traffic.values()) - traffic.get("product", 0)) / kind.bandwidth,
        "exchange": passed / (kind.link if fast else kind.network),
    }
    return {
        "program_bytes": len(text),
        "traffic_bytes": sum(traffic.values()),
        "traffic_by_kind": traffic,
        "peak_bytes": peak,
        "memory_bytes": kind.memory,
        "fits": peak <= memory.USABLE * kind.memory,
        "collectives": {k: [n, size] for k, (n, size) in exchanged.items()},
        "model_seconds": parts | {"together": sum(parts.values())},
        "moves": [
            {"bytes": k.bytes, "result": k.result, "source": k.source, "name": k.name}
            for k in compiled.moves(found)
        ],
    }


def peak_bytes(analysis) -> int:
    """Return the peak of a step from what XLA says of its memory."""
    peak = getattr(analysis, "peak_memory_in_bytes", 0)
    # What is passed on in place is an argument and an output.
    parts = ("argument", "temp", "output")
    total = sum(getattr(analysis, f"{p}_size_in_bytes") for p in parts)
    return peak or total - analysis.alias_size_in_bytes


def _lowered_text(f: dict) -> str:
    made = ", ".join(
        f"{k} {100 * v / f['flop']:.2f} %" for k, v in f["flop_by_kind"].items()
    )
    share, each = f["fused_share"], f["batch"] // f["devices"] // f["accumulate"]
    rows = [
        ("step", f"{f['name']}, {f['parameters'] / 1e6:.1f} M parameters"),
        ("batch", f"{f['batch']}, {each} on a device at a time, x {f['accumulate']}"),
        ("products", f"{f['flop'] / 1e12:.3f} TFLOP on a device: {made}"),
        ("true float32", f"{100 * f['float32_share']:.2f} % of the products"),
        ("fused attention", _fused_text(share, f["fused_calls"])),
        ("largest literal", memory.size(f["literal_bytes"])),
    ]
    done = "compiled" if f["compiles"] else "lowered"
    head = f"{done} for, not run on, {f['devices']} x {f['device']}"
    return "\n".join([head, *(f"  {name:<17}{text}" for name, text in rows)])


def _fused_text(share, calls) -> str:
    if share is None:
        return "none there is"
    return f"{100 * share:.0f} % of attention, {calls:.0f} calls of a kernel"


def _compiled_text(f: dict) -> str:
    traffic = ", ".join(
        f"{kind} {size / 1e9:.2f}" for kind, size in f["traffic_by_kind"].items()
    )
    exchanged = ", ".join(
        f"{n} {kind} {size / 1e6:.1f} MB"
        for kind, (n, size) in f["collectives"].items()
    )
    model = {k: f"{1e3 * v:.2f}" for k, v in f["model_seconds"].items()}
    peak, most = memory.size(f["peak_bytes"]), memory.size(f["memory_bytes"])
    share = 100 * f["peak_bytes"] / f["memory_bytes"]
    rate = f["batch"] / f["devices"] / f["model_seconds"]["together"]
    rows = [
        (
            "compiled in",
            f"{f['compile_cpu_seconds']:.0f} CPU seconds, "
            f"{f['program_bytes'] / 1e6:.1f} MB of text",
        ),
        ("kernel traffic", f"{f['traffic_bytes'] / 1e9:.2f} GB: {traffic}"),
        ("peak memory", f"{peak}, {share:.1f} % of {most}: {_fits(f['fits'])}"),
        ("collectives", exchanged or "none"),
        (
            "time, a MODEL",
            f"{model['together']} ms = products {model['products']} + memory "
            f"{model['memory']} + exchange {model['exchange']}: {rate:.0f} images/s "
            "of a device",
        ),
    ]
    lines = [f"  {name:<17}{text}" for name, text in rows]
    if f["moves"]:
        lines.append("  largest copies, converts and transposes:")
    for move in f["moves"]:
        size = f"{move['bytes'] / 1e6:.1f} MB"
        lines.append(f"    {size:>10}  {move['result'][:48]}  {move['source'][-60:]}")
    return "\n".join(lines)


def _fits(yes: bool) -> str:
    share = f"{100 * memory.USABLE:.0f} % can be filled"
    return "it fits" if yes else f"it does NOT fit ({share})"
