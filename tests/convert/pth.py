"""Writes what torch.save writes, without torch: opcodes and raw bytes by hand."""

import struct
import zipfile

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
}


class Raw(bytes):
    """Opcodes that stand for themselves."""


def name(path: str) -> bytes:
    """Return the opcode that imports "module.attribute"."""
    module, _, attribute = path.rpartition(".")
    return b"c" + f"{module}\n{attribute}\n".encode()


def call(path: str, *arguments: bytes) -> Raw:
    """Return opcodes that call an imported name with pickled arguments."""
    return Raw(name(path) + b"(" + b"".join(arguments) + b"tR")


def value(x, storages: list) -> bytes:
    """Return the opcodes of a value; arrays are appended to `storages`."""
    if isinstance(x, Raw):
        return bytes(x)
    if x is None:
        return b"N"
    if isinstance(x, bool):
        return b"\x88" if x else b"\x89"
    if isinstance(x, int):
        return b"J" + struct.pack("<i", x)
    if isinstance(x, float):
        return b"G" + struct.pack(">d", x)
    if isinstance(x, str):
        data = x.encode()
        return b"X" + struct.pack("<I", len(data)) + data
    if isinstance(x, tuple):
        return b"(" + b"".join(value(v, storages) for v in x) + b"t"
    if isinstance(x, list):
        return b"](" + b"".join(value(v, storages) for v in x) + b"e"
    if isinstance(x, dict):
        pairs = (value(k, storages) + value(v, storages) for k, v in x.items())
        return b"}(" + b"".join(pairs) + b"u"
    return _tensor(np.asarray(x), storages)


def _tensor(x, storages):
    key = str(len(storages))
    storages.append(np.ascontiguousarray(x))
    stride = tuple(np.cumprod((1, *x.shape[:0:-1]))[::-1].tolist()) if x.ndim else ()
    storage = b"(" + value("storage", storages)
    storage += name(f"torch.{STORAGES[x.dtype]}")
    storage += value(key, storages) + value("cpu", storages)
    storage += value(int(x.size), storages) + b"tQ"
    hooks = call("collections.OrderedDict")
    return call(
        "torch._utils._rebuild_tensor_v2",
        storage,
        value(0, storages),
        value(tuple(map(int, x.shape)), storages),
        value(stride, storages),
        value(False, storages),
        hooks,
    )


def write(path, tree, *, records=None, root="archive") -> None:
    """Write nested containers of arrays as a `.pth`.

    Args:
        path: file.
        tree: what to save.
        records: {name: bytes} to add or to replace.
        root: folder of all records.
    """
    storages = []
    program = b"\x80\x02" + value(tree, storages) + b"."
    files = {f"{root}/data.pkl": program, f"{root}/byteorder": b"little"}
    for i, x in enumerate(storages):
        files[f"{root}/data/{i}"] = x.tobytes()
    files |= records or {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, data in files.items():
            archive.writestr(key, data)
