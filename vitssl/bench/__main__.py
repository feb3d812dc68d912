"""Benchmarks: `python -m vitssl.bench NAME [--KEY=VALUE ...]`, one JSON line each.

step    a whole training step of a config, or of a plain ViT, on synthetic batches
data    the input pipeline, samples per second and core
freeze  every phase of a run with FreezeOut, against its cost formula
parts   the training step of iFAM at its published size, with and without remat
knn     exact nearest neighbours
aot     a step compiled for devices that are not here: what it needs, no times
hybrid  hybrid patch sizes: every mode on every case, against its cost formula
growth  how costs grow: a step, a folder, the order of a billion images
"""

import importlib
import json
import sys

NAMES = ("aot", "step", "data", "freeze", "parts", "knn", "hybrid", "growth")


def main(argv: list[str]) -> int:
    """Run the benchmark argv[0] with the other arguments; return the exit code."""
    from vitssl import errors

    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__, end="")
        return 0
    if not argv or argv[0] not in NAMES:
        print(__doc__, file=sys.stderr)
        return errors.UsageError.code
    return errors.exit_code(_run, argv)


def _run(argv) -> int:
    if argv[0] == "aot":
        from vitssl.bench import aot

        return aot.main(argv[1:])
    found = importlib.import_module(f"vitssl.bench.{argv[0]}_time").run(argv[1:])
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
