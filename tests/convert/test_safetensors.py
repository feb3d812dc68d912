"""Our safetensors and npz readers against the formats' own packages, and bad files."""

import json
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vitssl import errors
from vitssl.convert import reader
from vitssl.convert import safetensors as ours


def _arrays():
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b": rng.normal(size=(5,)).astype(np.float16),
        "i": np.arange(3),
        "none": np.zeros((0, 4), np.float32),
        "one": np.array(2.5, np.float32),
    }


def _same(got, want):
    assert sorted(got) == sorted(want)
    for name, x in want.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape
        np.testing.assert_array_equal(got[name], x)


def test_the_package_reads_what_we_write(tmp_path):
    ours.write(tmp_path / "x.safetensors", _arrays(), {"k": "v"})
    _same(safetensors.numpy.load_file(tmp_path / "x.safetensors"), _arrays())


def test_we_read_what_the_package_writes(tmp_path):
    safetensors.numpy.save_file(_arrays(), tmp_path / "x.safetensors", {"k": "v"})
    found = reader.read(tmp_path / "x.safetensors")
    _same(found.tree, _arrays())
    assert found.metadata == {"k": "v"}


def test_bfloat16_there_and_back(tmp_path):
    arrays = {"x": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)}
    ours.write(tmp_path / "x.safetensors", arrays)
    _same(ours.read(tmp_path / "x.safetensors")[0], arrays)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.safetensors"
    ours.write(file, {"x": np.ones(2, np.float32)})
    shapes = {"x": ((2,), np.dtype(np.float32))}
    with pytest.raises(errors.CheckpointError, match="not as announced"):
        ours.write_lazily(file, shapes, [("x", np.ones(3, np.float32))])
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert ours.read(file)[0]["x"].shape == (2,)


def _with_header(path, header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def _entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"x": dict(dtype=dtype, shape=list(shape), data_offsets=list(offsets))}


@pytest.mark.parametrize(
    "header, body, told",
    [
        (_entry(), b"1234", "file not fully covered"),
        (_entry(), bytes(12), "file not fully covered"),
        (_entry(shape=(3,)), bytes(8), "invalid shape"),
        (_entry(shape=(2**40, 2**40)), bytes(8), "overflow"),
        (_entry(shape=(-2,)), bytes(8), "invalid JSON"),
        (_entry(shape=(1,) * 65 + (2,)), bytes(8), "no sound safetensors file"),
        (_entry(shape=(2**64,)), bytes(8), "no sound safetensors file"),
        (_entry(shape=(0, 2**63), offsets=(0, 0)), b"", "no sound safetensors file"),
        (_entry("F[" * 10**6), bytes(8), r"invalid JSON.{1,300} \.\.\.\)$"),
        (_entry("F\x1b[2J\n"), bytes(8), r"invalid JSON in header: .*F.x1b"),
        (_entry("F13"), bytes(8), "invalid JSON.*F13"),
        (_entry("F8_E4M3", (8,)), bytes(8), "x: dtype F8_E4M3; want F64"),
        (_entry(offsets=(8, 0)), bytes(8), "invalid offset"),
        (_entry() | {"y": _entry()["x"]}, bytes(8), "invalid offset"),
        (b"[1, 2", b"", "invalid JSON"),
        (b"[" * 100_000, b"", "invalid JSON"),
    ],
)
def test_bad_headers_are_refused(tmp_path, header, body, told):
    _with_header(tmp_path / "x.safetensors", header, body)
    with pytest.raises(errors.CheckpointError, match=told):
        ours.read(tmp_path / "x.safetensors")


def test_oversized_and_truncated_headers_are_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(errors.CheckpointError, match="header too large"):
        ours.read(file)
    file.write_bytes(struct.pack("<Q", 1000) + b"{}")
    with pytest.raises(errors.CheckpointError, match="invalid header length"):
        ours.read(file)
    file.write_bytes(b"1")
    with pytest.raises(errors.CheckpointError, match="header too small"):
        ours.read(file)


def test_npz_with_bfloat16_as_numpy_writes_it(tmp_path):
    want = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    np.savez(tmp_path / "x.npz", **{"params/x": want.view("V2"), "y": np.ones(2)})
    found = reader.read(tmp_path / "x.npz").tree
    assert found["params/x"].dtype == want.dtype
    np.testing.assert_array_equal(found["params/x"], want)


def test_bad_npz_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "x.npz"
    np.savez(file, x=np.array([{}], object))
    with pytest.raises(errors.CheckpointError, match="not a sound"):
        reader.read(file)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(errors.CheckpointError, match="not a sound"):
        reader.read(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../x.npy", b"")
    with pytest.raises(errors.CheckpointError, match="leads out"):
        reader.read(file)
    monkeypatch.setattr(reader, "SMALL", 1000)
    np.savez_compressed(file, x=np.zeros(10**7, np.float32))
    monkeypatch.setattr(reader, "MAX_RATIO", 100)
    with pytest.raises(errors.CheckpointError, match="claim to unpack"):
        reader.read(file)


@pytest.mark.parametrize(
    "header, told",
    [
        (
            b"{'descr': '<f8', 'fortran_order': False, 'shape': (9999999,), }",
            "more than",
        ),
        (b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }", "more than"),
        (b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", "no numbers"),
        (b"{'descr': '<U9', 'fortran_order': False, 'shape': (1,), }", "no numbers"),
        (
            b"{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (1,)}",
            "numbers",
        ),
        (b"(" * 5000, "no header"),
        (b"{'descr': __import__('os').system('true')}", "no header"),
        (b"\xff" * 20, "no header"),
    ],
)
def test_a_member_of_an_npz_is_judged_before_it_is_read(tmp_path, header, told):
    data = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(16)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", data)
    with pytest.raises(errors.CheckpointError, match=told):
        reader.read(tmp_path / "x.npz")


def test_an_npz_that_is_mostly_air_or_packed_by_others_is_refused(tmp_path):
    file = tmp_path / "x.npz"
    np.savez_compressed(file, x=np.zeros(2**24 + 2**20, np.float32))
    with pytest.raises(errors.CheckpointError, match="claim to unpack"):
        reader.read(file)
    np.savez_compressed(file, x=np.zeros(2**20, np.float32))  # Of no harm.
    assert not reader.read(file).tree["x"].any()
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(file, "w", method) as archive:
            archive.writestr("x.npy", b"")
        with pytest.raises(errors.CheckpointError, match="packed as numpy never"):
            reader.read(file)


@pytest.mark.parametrize("name", ["x.pth", "x.npz", "x.safetensors"])
def test_a_file_that_nobody_may_read_is_one_line(tmp_path, name, monkeypatch):
    (tmp_path / name).write_bytes(b"PK\3\4")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    with pytest.raises(errors.CheckpointError, match=name):
        reader.read(tmp_path / name)
