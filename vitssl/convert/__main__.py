"""Weights in and out on the command line.

    python -m vitssl.convert import FILE --to=FOLDER [--family=auto] [--part=teacher]
        [--prefix=model.backbone.] [--ignore=NAME,GLOB] [--image_size=N] [--channels=N]
        [--mean=R,G,B] [--std=R,G,B] [--heads=N] [--eps=1e-6] [--activation=gelu]
    python -m vitssl.convert export WEIGHTS --to=FILE.safetensors
        [--layout=timm|hf|onnx|vitssl|bigvision|hvit|parts|parts_hf|olmoearth]
        [--part=target|encoder|ema] [--dtype=float32|float16]
    python -m vitssl.convert families

FILE is a .safetensors, .npz, .pth, .pt or .bin, a folder of a hub, or the index of a
file in shards; nothing in it is ever executed. What neither tensors nor the files
beside them tell is a line that begins with GUESSED and names the flag that says it.
WEIGHTS is a run's workdir, one checkpoint of it, a FOLDER of an import, or demo:NAME.
With --to=FOLDER the layouts hf and timm make a folder of a hub: model.safetensors,
config.json, preprocessor_config.json (hf) and README.md, the card. --to=FILE.onnx, or
--to=onnx, writes a graph of a ViT that runs without this package (extra [onnx]).
--dtype=float16 halves a file of the layout vitssl.
"""

import argparse
import dataclasses
import sys
from concurrent import futures

from vitssl import errors


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    top = errors.Parser("vitssl convert", __doc__)
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("import", help="published weights to ours")
    one.add_argument("file")
    one.add_argument("--to", required=True, help="folder, made if need be")
    one.add_argument("--family", default="auto", help="see the command families")
    one.add_argument("--part", default="", help="which dict of a training checkpoint")
    one.add_argument("--heads", type=int, default=0, help="of an unpublished width")
    one.add_argument("--image_size", type=int, default=0, help="resample positions")
    one.add_argument("--channels", type=int, default=0, help="of the images to come")
    one.add_argument("--mean", type=_numbers, default=(), help="of pixels in [0, 1]")
    one.add_argument("--std", type=_numbers, default=(), help="of pixels in [0, 1]")
    one.add_argument("--eps", type=float, default=0.0, help="of every LayerNorm")
    one.add_argument("--activation", default="", help="gelu, which is the exact one")
    one.add_argument("--prefix", default=None, help="of the keys to read")
    one.add_argument("--ignore", type=_names, default=(), help="keys to leave aside")
    two = commands.add_parser("export", help="ours to timm, transformers, ...")
    two.add_argument("weights")
    two.add_argument("--to", required=True, help="file, or a folder")
    two.add_argument("--layout", default="", help="see above; timm")
    two.add_argument("--part", default="", help="of a run: target, encoder or ema")
    two.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    commands.add_parser("families", help="list what an import knows")
    return top


def _numbers(text) -> tuple[float, ...]:
    """Return "0.5,0.5,0.5" as numbers; argparse says what is wrong."""
    return tuple(map(float, text.split(",")))


def _names(text) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def main(argv: list[str]) -> int:
    """Run one command; return the exit code."""
    return errors.exit_code(_main, argv)


def _main(argv) -> int:
    from vitssl.convert import place

    flags = parser().parse_args(argv)
    commands = {"import": _import, "export": _export, "families": _families}
    with place.reading(errors.CheckpointError):
        return commands[flags.command](flags)


def _import(flags) -> int:
    from vitssl.convert import (
        backbone,
        beside,
        exporter,
        family,
        importer,
        place,
        shards,
    )

    keys = {f.name for f in dataclasses.fields(family.Options)}
    options = family.Options(**{k: v for k, v in vars(flags).items() if k in keys})
    file = place.file_in(flags.to, backbone.FILE)
    source = shards.file_of(flags.file)
    found = importer.read(source, name=flags.family, part=flags.part, options=options)
    place.check(file, "--to", 4 * found.size)
    with place.writing("--to", file), futures.ThreadPoolExecutor(1) as pool:
        # Both take a while.
        digest = pool.submit(backbone.digest, *shards.files(source))
        backbone.write(file, found, digest.result)
        signed = dataclasses.replace(found.about, sha256=digest.result())
        found = dataclasses.replace(found, about=signed)
        backbone.write_card(file, found, "vitssl", exporter.OURS, digested=False)
    about = found.about
    print(f"{flags.file}: {about.family}, {found.size:,} parameters")
    print("  " + ", ".join(f"{k}={v}" for k, v in about.model.items()))
    print(f"  mean={about.mean} std={about.std} pool={about.pool}")
    for note in about.notes:
        print(note if beside.is_guess(note) else f"  {note}")
    print(f"  every other key has its place; written to {file}")
    print(f"  start a run from it: --config.init.from={flags.to}")
    return 0


def _export(flags) -> int:
    from vitssl.convert import backbone, exporter, place
    from vitssl.run import opened

    graph = flags.to == "onnx" or flags.to.lower().endswith(".onnx")
    layout = flags.layout or ("onnx" if graph else "timm")
    file = exporter.file_of(flags.to, layout)
    place.check(file, "--to")
    if flags.dtype != "float32" and layout != "vitssl":
        raise errors.UsageError(f"--dtype={flags.dtype}: of --layout=vitssl alone")
    found = opened.past(flags.weights).network(flags.part)
    place.check(file, "--to", 4 * found.size)
    with place.writing("--to", file):
        exporter.write(found, flags.to, layout, flags.dtype)
    path = backbone.card_of(file)
    print(f"{file}: layout {layout}, card {path}")
    card = path.read_text("utf-8")
    print(card.split("```python\n")[1].split("```")[0])
    return 0


def _families(flags) -> int:
    del flags
    from vitssl.convert import families

    for one in families.ORDER:
        print(f"{one.name:<10} {one.about}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
