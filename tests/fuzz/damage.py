"""Damage: bits, numbers, cuts and words, put where a format does not hide them."""

import copy
import io
import json
import struct
import zipfile
import zlib

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
OPCODES = tuple(
    bytes([op]) for op in b"()]}0123.NQRKJMbaeustlqhrj\x85\x86\x87\x88\x93\x94"
)
OPCODES += (
    b"ctorch\nSize\n",
    b"c_codecs\nencode\n",
    b"cos\nsystem\n",
    b"h\x00h\x00\x86",
)
JSON = tuple(
    b'{ } [ ] , : "" -1 0 1e999 null true 9223372036854775807 18446744073709551616 '
    b'99999999999999999999999999 "\\ud800" [[[[ {"a":{"a": [1,1,1,1,1,1,1,1,1,1] '
    b'"F64" "BF16" "F8_E4M3" "BOOL" "\\u001b[2J" 1e-320 0.5 "step": "dtype":'.split()
)
JSON += (b"[" + b"1," * 65 + b"1]", b"[" * 3000, b"9" * 5000, b"\xff\xfe", b"\n")
SHAPES = (b"(65535, 65535)", b"(-1,)", b"(2, 99999999999999999999)", b"(0, 1)", b"True")
SHAPES += (b"'|O'", b"'>f8'", b"'<f8'", b"'|V2'", b"'<U9'", b"(((((", b"[('a','<f4')]")
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


def zipped(records: dict, method=zipfile.ZIP_STORED) -> bytes:
    """Return a zip file of {name: bytes}."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return out.getvalue()


def unzipped(data: bytes) -> dict:
    """Return {name: bytes} of a zip file."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def batch(rng, data):
    """Damage what is around the pixels."""
    at = int(rng.choice((0, max(0, len(data) - 100))))
    return data[:at] + mutate(rng, data[at : at + 250], OPCODES) + data[at + 250 :]


def pickle(rng, data):
    """Damage the program of a torch file, and have its checksum agree."""
    records = unzipped(data)
    records["archive/data.pkl"] = mutate(rng, records["archive/data.pkl"], OPCODES)
    return zipped(records)


def tensors(rng, data):
    """Damage the header of a safetensors file, and have its length agree."""
    if rng.random() < 0.3:
        return mutate(rng, data)
    (size,) = struct.unpack("<Q", data[:8])
    header = mutate(rng, data[8 : 8 + size], JSON)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def arrays(rng, data):
    """Damage one array of an npz file, and have its checksum agree."""
    if rng.random() < 0.4:
        return mutate(rng, data)
    records = unzipped(data)
    name = sorted(records)[rng.integers(len(records))]
    records[name] = mutate(rng, records[name], SHAPES)
    method = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[rng.integers(2)]
    return zipped(records, method)


def png(rng, data):
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


def workdir(rng, data):
    """Damage one file of a workdir: its text, or values of its JSON."""
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
