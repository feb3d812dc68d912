"""What part discovery costs at its published size, with and without remat.

    python -m vitssl.bench parts [--config=FILE] [--batch=N] [--config.KEY=VALUE ...]

The default is ViT-B/14 with four registers at 518 px and K = 8, both stages. The whole
training step is compiled ahead of time and not run, so that it needs neither the
weights nor the memory of it: XLA's FLOPs (recomputation is in them), the formula's, and
the compiler's plan of memory. Plans differ between backends: a GPU's attention kernel
keeps no [N, N] weights, a CPU's does, and a CPU's default schedule is made for
concurrency: it recomputes early and saves nothing. To see what remat saves, set
XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false.
"""

import json
import sys

import jax

from vitssl import config, errors, tree
from vitssl.bench import case, flops


def run(argv: list[str]) -> dict:
    """Parse the options, compile with and without remat, return the figures."""
    parser = errors.Parser("vitssl bench parts", __doc__)
    parser.add_argument("--config", default="configs/parts.py:waterbirds")
    parser.add_argument("--batch", type=int, default=2)
    o, overrides = case.words(parser, argv)
    rows = []
    for remat in (False, True):
        of = case.of_config(o.config, [*overrides, f"model.remat={remat}"], o.batch)
        rows.append({"remat": remat} | planned(of))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    plain, saving = rows
    return {
        "bench": "parts",
        "name": config.name_of(o.config),
        "device": jax.devices()[0].device_kind,
        "batch": o.batch,
        "steps": rows,
        "flops_ratio": saving["xla_gflop_per_image"] / plain["xla_gflop_per_image"],
        "peak_ratio": saving["peak_bytes"] / plain["peak_bytes"],
    }


def planned(of: case.Case) -> dict:
    """Compile a training step for its shapes alone; return what the compiler says."""
    executable, figures = of.compile()
    memory, phase = executable.memory_analysis(), of.phase()
    params = of.compiled.abstract(phase).params
    frozen = any(k.startswith("stage_1/backbone/block") for k in phase.frozen)
    return {
        "parameters": tree.size(params),
        "trained": tree.size(tree.split(params, phase.frozen)[0]),
        "compile_seconds": round(figures["compile_seconds"], 1),
        "xla_gflop_per_image": figures["xla_gflop_per_image"],
        "formula_gflop_per_image": cost(of.method, frozen=frozen) / 1e9,
        "peak_bytes": figures["needed_bytes"],
        "temporary_bytes": memory.temp_size_in_bytes,
        "state_bytes": memory.argument_size_in_bytes,
    }


def cost(method, *, frozen: bool) -> float:
    """Return the formula's FLOPs per image of a two-stage step, no recomputation.

    The first stage sees the image and its warped copy, the second the image. Backward
    is two products per weight matrix, one of them for the weights, and twice the
    attention.

    Args:
        method: Parts with a ViT.
        frozen: the first backbone's weights do not train, but gradients cross them to
            the tokens that do.
    """
    net, size = method.model, method.augment.size
    n = (size // net.patch) ** 2
    forward = flops.vit(
        n + net.prefix,
        n,
        width=net.width,
        depth=net.depth,
        patch=net.patch,
        channels=method.run.channels,
        mlp_ratio=net.mlp_ratio,
    )
    attention = net.depth * 4 * (n + net.prefix) ** 2 * net.width
    first = 2 * forward + attention if frozen else 3 * forward
    return 2 * first + 3 * forward
