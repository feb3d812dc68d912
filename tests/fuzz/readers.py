"""Readers: each makes sound files, and reads them when they are damaged."""

import dataclasses
import functools
import io
import json
import pathlib
import pickle
import tempfile
from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.fuzz import damage


@dataclasses.dataclass(frozen=True)
class Reader:
    """Something to be fuzzed.

    Attributes:
        made: () -> sound files, as bytes.
        damaged: (rng, bytes of a sound file) -> bytes.
        read: (path of a damaged file) -> None, or an error.
        name: of the file.
    """

    made: Callable
    damaged: Callable
    read: Callable
    name: str


def _used(tree) -> None:
    """Touch every array of a tree, within reason."""
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        if isinstance(tree, np.ndarray) and tree.nbytes < 2**26:
            np.array(tree)
        return
    for value in tree:
        _used(value)


def _read_weights(path):
    from vitssl.convert import reader

    found = reader.read(path)
    reader.state_dicts(found.tree)
    _used(found.tree)


def _torch_files() -> list[bytes]:
    from tests.convert import pth

    arrays = {f"blocks.{i}.w": np.full((2, 3), i, np.float32) for i in range(3)}
    size = pth.call("torch.Size", pth.value([2, 3], []))
    space = pth.call("argparse.Namespace") + pth.value({"lr": 0.5}, []) + b"b"
    ordered = pth.call("collections.OrderedDict", pth.value([("a", 1)], []))
    more = {"size": pth.Raw(size), "args": pth.Raw(space), "o": pth.Raw(ordered)}
    trees = ({"model": arrays, "epoch": 3}, {"model": arrays, **more, (0, "a"): [None]})
    out = []
    for tree in trees:
        file = io.BytesIO()
        pth.write(file, tree)
        out.append(file.getvalue())
    # What Python writes: memos, frames, and opcodes of protocol 4.
    tree = {"a": [1, 2.5, {"b": (None, True)}], "c": np.arange(3.0), "d": {1, 2}}
    for protocol in (2, 4, 5):
        program = {"archive/data.pkl": pickle.dumps(tree, protocol)}
        out.append(damage.zipped(program | {"archive/byteorder": b"little"}))
    return out


def _batches() -> list[bytes]:
    from tests.layouts import binaries

    data = np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072)
    newer = [pickle.dumps({b"data": data, b"labels": [3, 4]}, p) for p in (2, 4)]
    return [binaries.python2(data, [3, 4], b"labels"), *newer]


def _read_batch(path):
    from vitssl.data.sources import cifar

    cifar._batch("cifar10", path)


def _tensors() -> list[bytes]:
    from safetensors import numpy as saved

    arrays = {f"w{i}": np.full((2, 3), i, np.float32) for i in range(3)}
    return [saved.save(arrays, {"k": "v"}), saved.save({"h": np.ones(5, np.float16)})]


def _arrays() -> list[bytes]:
    tree = {"a": np.ones((2, 3), np.float32), "b/c": np.arange(7), "s": np.bool_(1)}
    out = []
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, **tree)
        out.append(file.getvalue())
    return out


def _picture(mode, size=(20, 12)):
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, size, np.uint16))
    return colour.convert(mode)


def _pictures(kind, modes, *options) -> list[bytes]:
    out = []
    for mode in modes:
        for option in options or ({},):
            file = io.BytesIO()
            _picture(mode).save(file, kind, **option)
            out.append(file.getvalue())
    return out


def _jpegs():
    exif = Image.Exif()
    exif[0x0112] = 6
    return _pictures(
        "JPEG", ("RGB", "L", "CMYK"), {}, dict(progressive=1), {"exif": exif}
    )


def _tiffs():
    packed = (dict(compression=c) for c in ("raw", "tiff_lzw", "tiff_adobe_deflate"))
    return _pictures("TIFF", ("RGB", "L", "I;16", "F", "1", "P"), *packed)


def _moving(kind):
    more = dict(save_all=True, append_images=[_picture("RGB")])
    return _pictures(kind, ("RGB", "L"), {}, more)


def _dicoms() -> list[bytes]:
    from tests.layouts import radiographs

    rng = np.random.default_rng(0)
    made = [radiographs.dicom(rng.integers(0, 256, (8, 8), np.uint8), "raw")]
    made.append(radiographs.dicom(rng.integers(0, 256, (8, 8), np.uint8), "jpeg"))
    deep = rng.integers(0, 4096, (8, 8)).astype("<u2")
    made.append(radiographs.values(deep, centre=100, width=40, slope=2, intercept=-9))
    made.append(radiographs.values(deep, signed=1, centre=5, width=4, curve="SIGMOID"))
    made.append(radiographs.jpeg2000(deep))
    tables = dict(VOILUTSequence=radiographs.lut(range(9)), NumberOfFrames=1)
    made.append(radiographs.written(deep, **tables))
    return made


def _read_picture(path):
    from vitssl.data import decode

    try:
        decode.read(path, channels=3)
    finally:
        decode.read(path, channels=1, bounds=(0, 4095))


def _samples() -> list[bytes]:
    from tests.layouts import earth

    out = []
    with tempfile.TemporaryDirectory() as folder:
        for compression in ("gzip", "lzf"):
            root = pathlib.Path(folder) / compression
            root.mkdir()
            names = ("sentinel1", "worldcover")
            made = earth.sample(0, names=names, side=4)
            written = earth.write(root, [made], compression=compression)
            out.append((written / "sample_0.h5").read_bytes())
    return out


def _read_sample(path):
    from vitssl.data.sources import olmoearth

    olmoearth.read(path, ("sentinel1", "worldcover", "latlon", "srtm"))


@functools.cache
def _workdir() -> pathlib.Path:
    """Return the workdir of a run, beside which damaged ones are written."""
    from tests.tools import made

    folder = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-"))
    run = made.run(folder / "whole", steps=4, error="E: x")
    np.savez(run / "scores.npz", **{"val/confusion": np.eye(3, dtype=int)})
    return run


def _workdir_files() -> list[bytes]:
    names = ("config.json", "status.json", "metrics.jsonl", "versions.json")
    names += ("scores.npz", "pictures/neighbours.png")
    files = {name: (_workdir() / name).read_bytes().hex() for name in names}
    return [json.dumps(files).encode()]


def _read_workdir(path):
    from vitssl.tools import compare, listing, page, workdir

    run = path.parent / "run"
    (run / "pictures").mkdir(parents=True, exist_ok=True)
    for name, text in json.loads(path.read_text()).items():
        (run / name).write_bytes(bytes.fromhex(text))
    found = workdir.workdir(run)
    for one in workdir.below(run):
        listing.text(*listing.rows([one])).encode()
        listing.as_json([one])
    both = [found, workdir.workdir(_workdir())]
    compare.text(both).encode()
    compare.page(both).encode()
    page.page(found).encode()


READERS = {
    "pickle": Reader(_torch_files, damage.pickle, _read_weights, "x.pth"),
    "zip": Reader(_torch_files, damage.mutate, _read_weights, "x.pth"),
    "CIFAR": Reader(_batches, damage.batch, _read_batch, "data_batch_1"),
    "safetensors": Reader(_tensors, damage.tensors, _read_weights, "x.safetensors"),
    "npz": Reader(_arrays, damage.arrays, _read_weights, "x.npz"),
    "JPEG": Reader(_jpegs, damage.mutate, _read_picture, "x.jpg"),
    "PNG": Reader(
        lambda: _pictures("PNG", ("RGB", "L", "P", "LA", "1", "I;16", "RGBA")),
        damage.png,
        _read_picture,
        "x.png",
    ),
    "TIFF": Reader(_tiffs, damage.mutate, _read_picture, "x.tif"),
    "GIF": Reader(lambda: _moving("GIF"), damage.mutate, _read_picture, "x.gif"),
    "WebP": Reader(lambda: _moving("WEBP"), damage.mutate, _read_picture, "x.webp"),
    "DICOM": Reader(_dicoms, damage.mutate, _read_picture, "x.dcm"),
    "HDF5": Reader(_samples, damage.mutate, _read_sample, "x.h5"),
    "workdir": Reader(_workdir_files, damage.workdir, _read_workdir, "x.json"),
}


def file(reader: str, seed: int, i: int, sound) -> bytes:
    """Return the i-th damaged file of a reader; `sound` is what it `made`."""
    rng = np.random.default_rng((seed, sorted(READERS).index(reader), i))
    return READERS[reader].damaged(rng, sound[rng.integers(len(sound))])
