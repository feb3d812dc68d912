"""Damaged files through every reader: python -m tests.fuzz --count=5000.

    --count=N      mutated files for each reader
    --seed=N       of the mutations: the same seed makes the same files
    --readers=A,B  only these
    --keep=DIR     write every file that failed there

A reader may read a file or refuse it with one line of `vitssl.errors`. It fails by any
other exception, a line that is none, a crash, more than `SECONDS` or `MEMORY`, or by
running anything. Files are read in child processes, which the system ends where they
pass their bounds; a child that is ended is started again behind the file that did it.
"""

import argparse
import copy
import dataclasses
import functools
import io
import json
import os
import pathlib
import pickle
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
SECONDS = 10.0  # Of work for one file; of time, on a busy machine, six times as many.
CHILD = ["-m", "tests.fuzz"]  # What Python runs.
UNBOUNDED = resource.RLIM_INFINITY
MEMORY = 2**31 + 2**30  # Bytes of addresses, above what the imports have.
# What nothing but a program that was run would do.
FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn")
FORBIDDEN += (
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
    "ctypes.dlopen",
)


# Mutations.

NUMBERS = tuple(
    struct.pack(form, value)
    for form, values in {
        "<B": (0, 1, 0x7F, 0x80, 0xFF),
        "<H": (0, 1, 0x7FFF, 0xFFFF),
        ">H": (1, 0x7FFF),
        "<I": (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF),
        ">I": (1, 0x7FFFFFFF, 0x80000000),
        "<Q": (1, 2**31, 2**62, 2**63, 2**64 - 1),
    }.items()
    for value in values
)


def mutate(rng, data: bytes, words=()) -> bytes:
    """Return data with one to three faults: bits, numbers, cuts, copies and words."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(data) + 1))
        size = int(rng.integers(1, 2 + min(8, len(data))))
        if rng.random() < 0.2:
            size += int(rng.integers(1 + len(data) // 4))
        kind = rng.integers(7 if words else 6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            number = NUMBERS[rng.integers(len(NUMBERS))]
            data[at : at + len(number)] = number
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            other = int(rng.integers(len(data) + 1))
            data[at:at] = data[other : other + size]
        elif kind == 4 and rng.random() < 0.3:
            del data[at:]
        elif kind == 5:
            data[at : at + size] = rng.bytes(min(size, 64))
        elif kind == 6:
            word = words[rng.integers(len(words))]
            data[at : at + (len(word) if rng.random() < 0.5 else 0)] = word
    return bytes(data)


# Readers: each makes sound files, damages them and reads them.


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


def _zipped(records: dict, method=zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return out.getvalue()


def _records(data: bytes) -> dict:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


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
        out.append(_zipped(program | {"archive/byteorder": b"little"}))
    return out


def _batches() -> list[bytes]:
    from tests.layouts import binaries

    data = np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072)
    newer = [pickle.dumps({b"data": data, b"labels": [3, 4]}, p) for p in (2, 4)]
    return [binaries.python2(data, [3, 4], b"labels"), *newer]


def _damaged_batch(rng, data):
    """Damage what is around the pixels."""
    at = int(rng.choice((0, max(0, len(data) - 100))))
    return data[:at] + mutate(rng, data[at : at + 250], OPCODES) + data[at + 250 :]


def _read_batch(path):
    from vitssl.data.sources import cifar

    cifar._batch("cifar10", path)


OPCODES = tuple(
    bytes([op]) for op in b"()]}0123.NQRKJMbaeustlqhrj\x85\x86\x87\x88\x93\x94"
)
OPCODES += (
    b"ctorch\nSize\n",
    b"c_codecs\nencode\n",
    b"cos\nsystem\n",
    b"h\x00h\x00\x86",
)


def _damaged_pickle(rng, data):
    records = _records(data)
    records["archive/data.pkl"] = mutate(rng, records["archive/data.pkl"], OPCODES)
    return _zipped(records)


def _tensors() -> list[bytes]:
    from safetensors import numpy as saved

    arrays = {f"w{i}": np.full((2, 3), i, np.float32) for i in range(3)}
    return [saved.save(arrays, {"k": "v"}), saved.save({"h": np.ones(5, np.float16)})]


JSON = tuple(
    b'{ } [ ] , : "" -1 0 1e999 null true 9223372036854775807 18446744073709551616 '
    b'99999999999999999999999999 "\\ud800" [[[[ {"a":{"a": [1,1,1,1,1,1,1,1,1,1] '
    b'"F64" "BF16" "F8_E4M3" "BOOL" "\\u001b[2J" 1e-320 0.5 "step": "dtype":'.split()
)
JSON += (b"[" + b"1," * 65 + b"1]", b"[" * 3000, b"9" * 5000, b"\xff\xfe", b"\n")


def _damaged_tensors(rng, data):
    if rng.random() < 0.3:
        return mutate(rng, data)
    (size,) = struct.unpack("<Q", data[:8])
    header = mutate(rng, data[8 : 8 + size], JSON)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def _arrays() -> list[bytes]:
    tree = {"a": np.ones((2, 3), np.float32), "b/c": np.arange(7), "s": np.bool_(1)}
    out = []
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, **tree)
        out.append(file.getvalue())
    return out


SHAPES = (b"(65535, 65535)", b"(-1,)", b"(2, 99999999999999999999)", b"(0, 1)", b"True")
SHAPES += (b"'|O'", b"'>f8'", b"'<f8'", b"'|V2'", b"'<U9'", b"(((((", b"[('a','<f4')]")


def _damaged_arrays(rng, data):
    if rng.random() < 0.4:
        return mutate(rng, data)
    records = _records(data)
    name = sorted(records)[rng.integers(len(records))]
    records[name] = mutate(rng, records[name], SHAPES)
    method = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[rng.integers(2)]
    return _zipped(records, method)


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


def _damaged_png(rng, data):
    """Damage one chunk, and have its checksum agree."""
    if rng.random() < 0.3:
        return mutate(rng, data)
    chunks, at = [], 8
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    i = rng.integers(len(chunks))
    kind, inner = chunks[i]
    if kind == b"IDAT" and rng.random() < 0.5:
        inner = zlib.compress(mutate(rng, zlib.decompress(inner)))
    else:
        inner = mutate(rng, inner)
    chunks[i] = kind, inner
    out = data[:8]
    for kind, inner in chunks:
        check = zlib.crc32(kind + inner)
        out += struct.pack(">I", len(inner)) + kind + inner + struct.pack(">I", check)
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


ODD = (
    None,
    True,
    -1,
    0,
    1e999,
    -1e308,
    1e-320,
    10**400,
    "",
    "\ud800",
    "\x1b[2J\n",
    "x",
)
ODD += ([], {}, [[]], {"a": []}, ["a"] * 70, {"step": {}}, float("nan"), 2**63)


def _damaged_workdir(rng, data):
    files = json.loads(data)
    name = sorted(files)[rng.integers(len(files))]
    text = bytes.fromhex(files[name])
    if name.endswith((".json", ".jsonl")) and rng.random() < 0.6:
        lines = [json.loads(line) for line in text.splitlines()]
        for _ in range(rng.integers(1, 4)):
            _odd(rng, lines[rng.integers(len(lines))])
        text = "\n".join(map(json.dumps, lines)).encode()
    else:
        text = mutate(rng, text, JSON)
    return json.dumps(files | {name: text.hex()}).encode()


def _odd(rng, node):
    """Put an odd value, or an odd key, somewhere into a nested dict."""
    while isinstance(node, dict) and node:
        key = list(node)[rng.integers(len(node))]
        if not isinstance(node[key], dict) or rng.random() < 0.3:
            value = copy.deepcopy(ODD[rng.integers(len(ODD))])
            if rng.random() < 0.2:
                key = ("final/x", "final/a/b/c", "\ud800", "a\nb", "")[rng.integers(5)]
            node[key] = value
            return
        node = node[key]


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
    "pickle": Reader(_torch_files, _damaged_pickle, _read_weights, "x.pth"),
    "zip": Reader(_torch_files, mutate, _read_weights, "x.pth"),
    "CIFAR": Reader(_batches, _damaged_batch, _read_batch, "data_batch_1"),
    "safetensors": Reader(_tensors, _damaged_tensors, _read_weights, "x.safetensors"),
    "npz": Reader(_arrays, _damaged_arrays, _read_weights, "x.npz"),
    "JPEG": Reader(_jpegs, mutate, _read_picture, "x.jpg"),
    "PNG": Reader(
        lambda: _pictures("PNG", ("RGB", "L", "P", "LA", "1", "I;16", "RGBA")),
        _damaged_png,
        _read_picture,
        "x.png",
    ),
    "TIFF": Reader(_tiffs, mutate, _read_picture, "x.tif"),
    "GIF": Reader(lambda: _moving("GIF"), mutate, _read_picture, "x.gif"),
    "WebP": Reader(lambda: _moving("WEBP"), mutate, _read_picture, "x.webp"),
    "DICOM": Reader(_dicoms, mutate, _read_picture, "x.dcm"),
    "HDF5": Reader(_samples, mutate, _read_sample, "x.h5"),
    "workdir": Reader(_workdir_files, _damaged_workdir, _read_workdir, "x.json"),
}


def file(reader: str, seed: int, i: int, sound) -> bytes:
    """Return the i-th damaged file of a reader; `sound` is what it `made`."""
    rng = np.random.default_rng((seed, sorted(READERS).index(reader), i))
    return READERS[reader].damaged(rng, sound[rng.integers(len(sound))])


# The child: reads files, and writes a line about each.


def _bounded():
    """Let the system end this process where it passes its bounds."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, UNBOUNDED))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _peak() -> float:
    """Return the most MiB that this process has held; `getrusage` counts its parent."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _verdict(read, path, ran) -> str:
    """Return "read", "refused", or how a reader failed."""
    from vitssl import errors

    ran.clear()
    try:
        read(path)
        told = "read"
    except errors.VitsslError as e:
        line, told = str(e), "refused"
        if isinstance(e.__cause__, MemoryError):
            told = "memory"
        elif not line.isprintable() or not 0 < len(line) < 1000:
            told = f"no line: {line[:200]!r}"
    except Exception as e:  # noqa: BLE001 - this is what is looked for.
        told = f"traceback: {type(e).__name__}: {str(e)[:200]}"
    return f"ran {ran[0]}" if ran else told


def child(names, count: int, seed: int, first: int) -> None:
    """Read the files of some readers, from the file `first` of the first of them."""
    ran, armed = [], []

    def hook(event, arguments):
        if armed and event in FORBIDDEN:
            ran.append(f"{event} {arguments!r}"[:200])

    sys.addaudithook(hook)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            resource.setrlimit(resource.RLIMIT_AS, (UNBOUNDED, UNBOUNDED))
            reader = READERS[name]
            sound, path = reader.made(), pathlib.Path(folder) / reader.name
            for data in sound:  # Whatever is imported late is imported now.
                path.write_bytes(data)
                _verdict(reader.read, path, ran)
            _bounded()
            for i in range(first, count):
                path.write_bytes(file(name, seed, i, sound))
                start = time.process_time()
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)
                armed.append(True)
                told = _verdict(reader.read, path, ran)
                armed.clear()
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.setitimer(signal.ITIMER_REAL, 0)
                took = time.process_time() - start
                print(json.dumps([name, i, told, took, _peak()]), flush=True)
            first = 0


# The parent: starts children, and counts.


@dataclasses.dataclass
class Found:
    """What became of a reader's files."""

    read: int = 0
    refused: int = 0
    slowest: float = 0.0  # Seconds of work.
    peak: float = 0.0  # MiB, of the whole process.
    failed: list = dataclasses.field(default_factory=list)  # (number, how)

    def add(self, i, told, took, peak):
        """Count one file."""
        self.slowest, self.peak = max(self.slowest, took), max(self.peak, peak)
        if told in ("read", "refused"):
            setattr(self, told, getattr(self, told) + 1)
        else:
            self.failed.append((i, told))


def run(names, count: int, seed: int) -> dict[str, Found]:
    """Return {reader: what became of its files}."""
    found, left, first = {name: Found() for name in names}, list(names), 0
    while left:
        words = [",".join(left), count, seed, first]
        command = [sys.executable, *CHILD, "--child", *map(str, words)]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            code = subprocess.run(command, cwd=ROOT, stdout=out, stderr=err).returncode
            out.seek(0)
            for line in out:
                name, i, *rest = json.loads(line)
                found[name].add(i, *rest)
                left, first = left[left.index(name) :], i + 1
            if code == 0:
                break
            err.seek(0)
            if code > 0:
                raise RuntimeError(f"the child itself failed: {err.read()[-3000:]}")
        if first >= count:
            left, first = left[1:], 0
        hang = code in (-signal.SIGALRM, -signal.SIGPROF)
        how = "hang" if hang else f"crash by signal {-code}"
        found[left[0]].add(first, how, 0.0, 0.0)
        first += 1
    return found


def table(found: dict[str, Found]) -> str:
    """Return what was found as a Markdown table."""
    lines = ["| reader | files | read | refused | failed | slowest | peak of all |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, f in found.items():
        files = f.read + f.refused + len(f.failed)
        times = f"{1e3 * f.slowest:.0f} ms | {f.peak:.0f} MiB"
        lines.append(
            f"| {name} | {files} | {f.read} | {f.refused} | {len(f.failed)} | {times} |"
        )
    return "\n".join(lines)


def main(argv) -> int:
    """Fuzz, print the table and every failure; return 1 if there is one."""
    parser = argparse.ArgumentParser(
        "tests.fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", default=",".join(READERS))
    parser.add_argument("--keep", default="")
    flags = parser.parse_args(argv)
    found = run(flags.readers.split(","), flags.count, flags.seed)
    print(table(found))
    for name, one in found.items():
        for i, how in one.failed:
            print(f"{name} {i}: {how}")
            if flags.keep:
                os.makedirs(flags.keep, exist_ok=True)
                data = file(name, flags.seed, i, READERS[name].made())
                kept = pathlib.Path(flags.keep, f"{i}-{READERS[name].name}")
                kept.write_bytes(data)
    return int(any(one.failed for one in found.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2].split(","), *map(int, sys.argv[3:6]))
    else:
        sys.exit(main(sys.argv[1:]))
