"""What freezing saves: every phase of a LocalMIM run, compiled, timed and counted.

    python -m vitssl.bench freeze [--config=FILE] [--config.KEY=VALUE ...] [--count]

One row per phase: the layers that are frozen; XLA's FLOPs of a step, and the bytes it
moves; step time against the unfrozen step, both measured in turns (ABAB) because
machines are noisy; the ratio that the cost formula predicts; the share of the predicted
saving that is realised; the peak memory of the compiled step; the bytes of optimizer
state. Layers without a decoder of their own change the cost of a step by a few per
cent, less than the noise of most machines, so the figure to read is `whole`: the share
of the predicted saving of all phases, each weighted with its steps, that is realised.

With freeze.store.views what follows an event starts from stored tokens: these rows are
of a full store. They say as well how long the event held training up, in steps, from
the end of a step to its next batch (what makes the tokens of it included); what a view
takes on disk; and the most memory that batches and store took on the host.

The last line is a `freeze.grow_batch` that leaves the FLOPs of a step, and its memory,
below those of the first one. `--count` compiles and times nothing, for sizes that do
not run here: FLOPs, bytes, memory and the formula.
"""

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import errors
from vitssl.bench import case, clock, flops
from vitssl.optim import freezeout
from vitssl.run import feed
from vitssl.tools import listing


def run(argv: list[str]) -> dict:
    """Parse the options, measure every phase, return the figures."""
    parser = errors.Parser("vitssl bench freeze", __doc__)
    parser.add_argument("--config", default="configs/localmim.py")
    parser.add_argument("--batch", type=int, default=0, help="0: the config's")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", action="store_true")
    o, overrides = case.words(parser, argv)
    of = case.of_config(o.config, overrides, o.batch, o.seed)
    optimizer, method = of.optimizer, of.method
    if optimizer.plan is None or not hasattr(method, "stages"):
        raise errors.UsageError(
            "bench freeze: wants a LocalMIM config with freeze.schedule set"
        )
    first = None if o.count else of.prepare()
    figures = first.figures if first else of.compile()[1]
    rows = [_row(of, figures, 0, 0, None if o.count else 1.0, 1.0)]
    events = sorted(set(optimizer.frozen_from.values()))
    for at in events:
        rows.append(_phase(of, at, first, o.turns, o.steps))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    ends = [*events, method.run.total_steps]
    for row, start, end in zip(rows, [0, *events], ends, strict=True):
        row["steps"] = end - start
    found = {
        "bench": "freeze",
        "name": of.name,
        "batch": of.rows,
        "device": figures["device"],
        "whole": whole(rows),
        "grow_batch": grown(rows, of.rows, jax.device_count() * of.accumulate),
        "phases": rows,
    }
    print(_text(found), file=sys.stderr, flush=True)
    return found


def _phase(of, at, first, turns, steps) -> dict:
    """Return the row of the phase of step `at`; counted only where `first` is None."""
    now, whole_step = stored(of, at), cost(of.method, 0)
    frozen = {of.optimizer.layers[k] for k in of.optimizer.frozen(at)}
    count = len(frozen - {freezeout.NEVER})
    kept = of.phase(at).boundary if "tokens" in now.batch else 0
    predicted, own = cost(of.method, count, kept) / whole_step, {}
    if first is None:
        row = _row(of, now.compile(at)[1], at, count, None, predicted)
    else:
        one = now.prepare(at)
        both = {"one": one, "first": first}
        spent = clock.in_turns(both, turns, steps, warmup=3)
        ratio = float(np.median(clock.times_faster(spent["first"], spent["one"])))
        row = _row(of, one.figures, at, count, ratio, predicted)
        if kept:
            seconds = float(np.median(spent["first"]))
            own = beside(of.parts, at, one.params, seconds)
    return row | {"stored_bytes_per_view": _view_bytes(now)} | own


def beside(parts, at: int, params, step: float) -> dict:
    """Return what a store is beside the steps of an event.

    "stall_steps": how long the event takes, in steps of `step` seconds, once it is
    prepared. "host_bytes": the most that it and the next two batches take on the host,
    pixels included.
    """
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.closing(feed.Feed(parts, folder)) as stream:
            stream.open(max(0, at - 1), params, lambda cost: None)
            stream.take(params)
            stream.prepare(at, at)
            stream.settled()
            tracemalloc.start()
            start = time.perf_counter()
            if stream.over(at):  # Else nothing is opened: the store stays as it is.
                stream.open(at, params, lambda cost: None)
            jax.block_until_ready(stream.take(params))
            spent = time.perf_counter() - start
            for _ in range(min(2, parts.run.total_steps - at - 1)):
                stream.take(params)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    return {"stall_steps": round(spent / step, 2), "host_bytes": peak}


def grown(rows, batch: int, unit: int) -> tuple[int, ...]:
    """Return `freeze.grow_batch`: sizes with which no step is dearer than the first.

    By the formula's FLOPs and the compiled step's peak memory; multiples of `unit`.
    """
    found = []
    for row in rows[1:]:
        factor = 1 / row["formula_ratio"]
        if row["peak_bytes"] and rows[0]["peak_bytes"]:
            factor = min(factor, rows[0]["peak_bytes"] / row["peak_bytes"])
        found.append(max(batch, int(batch * factor) // unit * unit))
    return tuple(found)


def _view_bytes(of: case.Case) -> int:
    """Return the bytes of a stored view; 0 without."""
    tokens = of.batch.get("tokens")
    return 0 if tokens is None else tokens[0].nbytes


def whole(rows) -> dict[str, float]:
    """Return the figures of a run from those of its phases, weighted with their steps.

    Args:
        rows: one dict per phase with steps, time_ratio and formula_ratio.

    Returns:
        time and formula: cost of the run against the same run unfrozen; realised:
        share of the predicted saving that the clock shows.
    """
    steps = sum(r["steps"] for r in rows)
    formula = sum(r["steps"] * r["formula_ratio"] for r in rows) / steps
    found = {"formula": round(formula, 3)}
    if rows[0]["time_ratio"] is None:  # Counted only.
        return found
    spent = sum(r["steps"] * r["time_ratio"] for r in rows) / steps
    realised = (1 - spent) / (1 - formula) if formula < 1 else float("nan")
    return {"time": round(spent, 3), **found, "realised": round(realised, 2)}


def _text(found) -> str:
    """Return the phases as a Markdown table."""
    names = {
        "frozen_layers": "layers frozen",
        "steps": "steps",
        "xla_gflop_per_image": "GFLOP/image",
        "formula_ratio": "formula",
        "time_ratio": "time",
        "realised": "realised",
        "xla_gbyte": "GB moved",
        "peak_bytes": "peak MB",
        "optimizer_bytes": "optimizer MB",
        "stall_steps": "stall/steps",
        "stored_bytes_per_view": "disk MB/view",
        "host_bytes": "host MB",
    }
    cells = [[_cell(k, row.get(k)) for k in names] for row in found["phases"]]
    lines, total = [listing.text(list(names.values()), cells)], found["whole"]
    if "time" in total:
        lines.append(
            f"whole run: {total['time']:.1%} of the unfrozen time, formula "
            f"{total['formula']:.1%}, realised {total['realised']:.0%} of the saving"
        )
    else:
        lines.append(f"whole run: formula {total['formula']:.1%} of the unfrozen cost")
    lines.append(f'--config.freeze.grow_batch="{found["grow_batch"]}"')
    return "\n".join(lines)


def _cell(key, value) -> str:
    if not value and key != "frozen_layers":
        return "-"
    if key.startswith("xla"):
        return f"{value:.4g}"
    return f"{value / 1e6:.3g}" if "bytes" in key else str(value)


def _row(of, figures, at, frozen, ratio, predicted):
    saved, timed = 1 - predicted, ratio is not None
    return {
        "frozen_layers": frozen,
        "xla_gflop_per_image": round(figures["xla_gflop_per_image"], 6),
        "xla_gbyte": round(figures["xla_gbyte"], 6),
        "time_ratio": round(ratio, 3) if timed else None,
        "formula_ratio": round(predicted, 3),
        # A quotient of two numbers near nothing says nothing.
        "realised": round((1 - ratio) / saved, 2) if timed and saved > 0.05 else None,
        "peak_bytes": figures["compiled_peak_bytes"],
        "optimizer_bytes": case.moments(of, at),
    }


def cost(method, frozen: int, kept: int = 0) -> float:
    """Return the formula's FLOPs per image of a LocalMIM step with frozen layers.

    Args:
        method: `methods.localmim.method.LocalMIM`.
        frozen: layers 0 .. frozen - 1 are frozen.
        kept: blocks whose output is read from a store.
    """
    net, n = method.model, method.grid[0] * method.grid[1]
    visible = method.phase(0).visible
    tokens, channels = visible + net.prefix, method.run.channels
    block = flops.block(tokens, net.width, net.mlp_ratio)
    attention = 4 * tokens**2 * net.width
    decoders = tuple(
        flops.stage_decoder(
            n,
            visible,
            inner=net.width,
            width=method.decoder.width,
            scale=scale,
            out=method.decoder_module(k).out,
        )
        for k, scale in enumerate(method.stages.scales)
    )
    blocks = method.stages.blocks_at(0.0, net.depth)
    return sum(
        flops.localmim(
            frozen,
            embed=2 * visible * net.width * channels * net.patch**2,
            linear=block - attention,
            attention=attention,
            decoders=decoders,
            stage_layers=tuple(b + 1 for b in blocks),
            depth=net.depth,
            kept=kept,
        )
    )


def stored(of: case.Case, at: int) -> case.Case:
    """Return the case of a step behind a freeze event, with tokens from `freeze.store`.

    They are random ones of the right shape.
    """
    phase, rng = of.phase(at), np.random.default_rng(0)
    if not phase.boundary:
        return of
    key = {"view_seed": rng.integers(2**32, size=(of.rows, 2), dtype=np.uint32)}
    batch = of.batch | key
    if of.optimizer.store.on:
        found = jax.eval_shape(
            lambda params, batch: of.method.frozen_tokens(
                params, batch, phase, 0, phase.boundary
            ),
            of.compiled.abstract(phase).params,
            case.shapes(batch),
        )
        dtype = of.optimizer.store.dtype
        dtype = found.dtype if dtype == "auto" else np.dtype(jnp.dtype(dtype))
        batch |= {"tokens": rng.normal(size=found.shape).astype(dtype)}
    return dataclasses.replace(of, batch=batch)
