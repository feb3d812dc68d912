"""What freezing saves: every phase of a LocalMIM run, compiled, timed and counted.

    python -m vitssl.bench freeze [--config=FILE] [--config.KEY=VALUE ...]

One row per phase: the layers that are frozen; XLA's FLOPs of a step; step time against
the unfrozen step, both measured in turns (ABAB) because machines are noisy; the ratio
that the cost formula predicts; the share of the predicted saving that is realised; the
peak memory of the compiled step; the bytes of optimizer state. Layers without a decoder
of their own change the cost of a step by a few per cent, less than the noise of most
machines, so the figure to read is `whole`: the share of the predicted saving of all
phases, each weighted with its steps, that is realised.

With freeze.store.views what follows an event starts from stored tokens. Filling the
store is not in these figures: it is a forward pass of the new blocks for every view, a
row of the table that a run prints at its end.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from vitssl import errors
from vitssl.bench import case, clock, flops
from vitssl.optim import freezeout
from vitssl.tools import listing


def run(argv: list[str]) -> dict:
    """Parse the options, measure every phase, return the figures."""
    parser = errors.Parser("vitssl.bench freeze", __doc__)
    parser.add_argument("--config", default="configs/localmim.py")
    parser.add_argument("--batch", type=int, default=0, help="0: the config's")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    o, overrides = case.words(parser, argv)
    of = case.of_config(o.config, overrides, o.batch, o.seed)
    optimizer, method = of.optimizer, of.method
    if optimizer.plan is None or not hasattr(method, "stages"):
        raise errors.UsageError(
            "bench freeze: wants a LocalMIM config with freeze.schedule set"
        )
    first = of.prepare()
    whole_step = cost(method, 0)
    rows = [_row(of, first, 0, 0, 1.0, 1.0)]
    events = sorted(set(optimizer.frozen_from.values()))
    for at in events:
        frozen = {optimizer.layers[k] for k in optimizer.frozen(at)}
        count = len(frozen - {freezeout.NEVER})
        now, kept = stored(of, at), 0
        if "tokens" in now.batch:
            kept = of.phase(at).boundary
        one = now.prepare(at)
        both = {"one": one, "first": first}
        spent = clock.in_turns(both, o.turns, o.steps, warmup=3)
        ratios = clock.times_faster(spent["first"], spent["one"])
        ratio = float(np.median(ratios))
        predicted = cost(method, count, kept) / whole_step
        rows.append(_row(of, one, at, count, ratio, predicted))
        rows[-1]["stored_bytes_per_view"] = _view_bytes(now)
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    ends = [*events, method.run.total_steps]
    for row, start, end in zip(rows, [0, *events], ends, strict=True):
        row["steps"] = end - start
    found = {
        "bench": "freeze",
        "name": of.name,
        "batch": of.rows,
        "device": first.figures["device"],
        "whole": whole(rows),
        "phases": rows,
    }
    print(_text(found), file=sys.stderr, flush=True)
    return found


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
    time, formula = (
        sum(r["steps"] * r[key] for r in rows) / steps
        for key in ("time_ratio", "formula_ratio")
    )
    realised = (1 - time) / (1 - formula) if formula < 1 else float("nan")
    return {
        "time": round(time, 3),
        "formula": round(formula, 3),
        "realised": round(realised, 2),
    }


def _text(found) -> str:
    """Return the phases as a Markdown table."""
    names = {
        "frozen_layers": "layers frozen",
        "steps": "steps",
        "xla_gflop_per_image": "GFLOP/image",
        "formula_ratio": "formula",
        "time_ratio": "time",
        "realised": "realised",
        "peak_bytes": "peak MB",
        "optimizer_bytes": "optimizer MB",
    }
    cells = [
        [
            f"{row[k] / 1e6:.2f}" if k.endswith("bytes") else str(row[k] or "-")
            for k in names
        ]
        for row in found["phases"]
    ]
    total = found["whole"]
    return listing.text(list(names.values()), cells) + (
        f"\nwhole run: {total['time']:.1%} of the unfrozen time, formula "
        f"{total['formula']:.1%}, realised {total['realised']:.0%} of the saving"
    )


def _row(of, ready, at, frozen, ratio, predicted):
    saved = 1 - predicted
    return {
        "frozen_layers": frozen,
        "xla_gflop_per_image": round(ready.figures["xla_gflop_per_image"], 4),
        "time_ratio": round(ratio, 3),
        "formula_ratio": round(predicted, 3),
        # A quotient of two numbers near nothing says nothing.
        "realised": round((1 - ratio) / saved, 2) if saved > 0.05 else None,
        "peak_bytes": ready.figures["compiled_peak_bytes"],
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
