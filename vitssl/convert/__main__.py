"""Weights in and out on the command line.

    python -m vitssl.convert import FILE --to=FOLDER [--family=auto] [--part=teacher]
        [--heads=N] [--image_size=N] [--channels=N]
    python -m vitssl.convert export WEIGHTS --to=FILE.safetensors
        [--layout=timm|hf|vitssl|bigvision|hvit|parts|parts_hf|olmoearth]
        [--part=target|encoder|ema]
    python -m vitssl.convert families

FILE is a .safetensors, .npz, .pth, .pt or .bin; nothing in it is ever executed. WEIGHTS
is a run's workdir, one checkpoint of it, or a FOLDER of an import.
"""

import argparse
import dataclasses
import sys
from concurrent import futures

from vitssl import errors


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing its usage and leaving."""

    def error(self, message):
        raise errors.UsageError(f"{self.prog}: {message}; see --help")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    top = _Parser(
        prog="python -m vitssl.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("import", help="published weights to ours")
    one.add_argument("file")
    one.add_argument("--to", required=True, help="folder, made if need be")
    one.add_argument("--family", default="auto", help="see the command families")
    one.add_argument("--part", default="", help="which dict of a training checkpoint")
    one.add_argument("--heads", type=int, default=0, help="of an unpublished width")
    one.add_argument("--image_size", type=int, default=0, help="resample positions")
    one.add_argument("--channels", type=int, default=0, help="of the images to come")
    two = commands.add_parser("export", help="ours to timm, transformers, ...")
    two.add_argument("weights")
    two.add_argument("--to", required=True, help="file, or a folder")
    two.add_argument("--layout", default="timm")
    two.add_argument("--part", default="", help="of a run: target, encoder or ema")
    commands.add_parser("families", help="list what an import knows")
    return top


def main(argv: list[str]) -> int:
    """Run one command; return the exit code."""
    try:
        flags = parser().parse_args(argv)
        return {"import": _import, "export": _export, "families": _families}[
            flags.command
        ](flags)
    except errors.VitsslError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.code


def _import(flags) -> int:
    from vitssl.convert import backbone, exporter, family, importer

    options = family.Options(flags.heads, flags.image_size, flags.channels)
    found = importer.read(
        flags.file, name=flags.family, part=flags.part, options=options
    )
    with futures.ThreadPoolExecutor(1) as pool:  # Both take a while.
        digest = pool.submit(backbone.digest, flags.file)
        file = backbone.write(flags.to, found, digest.result)
    signed = dataclasses.replace(found.about, sha256=digest.result())
    found = dataclasses.replace(found, about=signed)
    backbone.write_card(file, found, "vitssl", exporter.OURS, digested=False)
    about = found.about
    print(f"{flags.file}: {about.family}, {found.size:,} parameters")
    print("  " + ", ".join(f"{k}={v}" for k, v in about.model.items()))
    print(f"  mean={about.mean} std={about.std} pool={about.pool}")
    for note in about.notes:
        print(f"  {note}")
    print(f"  every other key has its place; written to {file}")
    print(f"  start a run from it: --config.init.from={flags.to}")
    return 0


def _export(flags) -> int:
    from vitssl.convert import backbone, exporter
    from vitssl.run import opened

    if backbone.is_backbone(flags.weights):
        if flags.part:
            raise errors.UsageError(f"--part={flags.part}: only runs have parts")
        found = backbone.read(flags.weights)
    else:
        found = opened.past(flags.weights).encoder(flags.part)
    file = exporter.write(found, flags.to, flags.layout)
    print(f"{file}: layout {flags.layout}, card {file.with_suffix('.md')}")
    print(file.with_suffix(".md").read_text().split("```python\n")[1].split("```")[0])
    return 0


def _families(flags) -> int:
    del flags
    from vitssl.convert import families

    for one in families.ORDER:
        print(f"{one.name:<10} {one.about}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
