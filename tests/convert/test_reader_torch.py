"""The .pth reader: what it reads, and what it refuses without running anything."""

import os
import pickle
import struct
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest

from tests.convert import pth
from vitssl import errors
from vitssl.convert import reader
from vitssl.data import pickles


@pytest.fixture
def file(tmp_path):
    """Where a file goes."""
    return tmp_path / "weights.pth"


def _arrays():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(3, 4)).astype(np.float32),
        "half": rng.normal(size=(5,)).astype(np.float16),
        "brain": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
        "count": np.array(7, np.int64),
    }


def test_tensors_of_every_kind_come_back_bit_by_bit(file):
    arrays = _arrays()
    pth.write(file, {"model": arrays, "epoch": 3, "lr": [1e-3, (True, None)]})
    tree = reader.read(file).tree
    assert tree["epoch"] == 3 and tree["lr"] == [1e-3, (True, None)]
    for name, want in arrays.items():
        got = tree["model"][name]
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_arrays_are_views_of_the_file(file):
    pth.write(file, _arrays())
    got = reader.read(file).tree["a.weight"]
    assert not got.flags.owndata and not got.flags.writeable


def test_a_transposed_tensor_keeps_its_stride(file):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    stored = pth.value((2, 3), []) + pth.value((3, 1), [])
    turned = pth.value((3, 2), []) + pth.value((1, 3), [])
    program = pth.value(x, []).replace(stored, turned)
    records = {"archive/data/0": x.tobytes()}
    pth.write(file, {"x": pth.Raw(program)}, records=records)
    np.testing.assert_array_equal(reader.read(file).tree["x"], x.T)


def test_namespace_is_a_plain_dict_and_ordered_dict_too(file):
    space = pth.call("argparse.Namespace") + pth.value({"lr": 0.5}, []) + b"b"
    pth.write(file, {"args": pth.Raw(space), "d": pth.call("collections.OrderedDict")})
    tree = reader.read(file).tree
    assert tree == {"args": {"lr": 0.5}, "d": {}} and type(tree["args"]) is dict


class _Touch:
    """Pickles to a call of os.system."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_a_malicious_pickle_is_refused_and_leaves_no_trace(file, tmp_path, protocol):
    trace = tmp_path / "trace"
    program = pickle.dumps({"model": _Touch(trace)}, protocol)
    pth.write(file, {}, records={"archive/data.pkl": program})
    with pytest.raises(errors.CheckpointError, match="refused"):
        reader.read(file)
    assert not trace.exists()
    pickle.loads(program)  # It would have worked.
    assert trace.exists()


@pytest.mark.parametrize(
    "path",
    [
        "builtins.eval",
        "builtins.getattr",
        "os.system",
        "torch.load",
        "torch.storage._load_from_bytes",
        "torch._utils._rebuild_tensor_v2.__globals__.get",
    ],
)
def test_names_that_are_not_data_are_refused_before_their_arguments_are_used(
    file, path
):
    pth.write(file, {"x": pth.call(path, pth.value("1", []))})
    with pytest.raises(errors.CheckpointError, match="refused"):
        reader.read(file)


def test_opcodes_that_build_arbitrary_objects_are_refused(file):
    for program in (b"\x80\x02(ios\nsystem\n.", b"\x80\x02\x82\x01.", b"\x80\x02)e."):
        pth.write(file, {}, records={"archive/data.pkl": program})
        with pytest.raises(errors.CheckpointError):
            reader.read(file)


def test_an_array_larger_than_its_bytes_is_refused(file):
    program = pth.value(np.zeros((2, 3), np.float32), [])
    big = program.replace(pth.value((2, 3), []), pth.value((2**30, 2**30), []))
    flat = big.replace(pth.value((3, 1), []), pth.value((0, 0), []))
    for crafted in (big, flat):
        records = {"archive/data/0": bytes(24)}
        pth.write(file, {"x": pth.Raw(crafted)}, records=records)
        with pytest.raises(errors.CheckpointError, match="larger than its bytes"):
            reader.read(file)


def test_a_small_pickle_that_unfolds_without_end_is_refused(file, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OBJECTS", 10_000)
    program = b"\x80\x02]q\x00"  # Ten references to the list before, forty times.
    for i in range(1, 40):
        program += b"](" + b"h" + bytes([i - 1]) + b"2" * 9 + b"eq" + bytes([i])
    pth.write(file, {}, records={"archive/data.pkl": program + b"."})
    with pytest.raises(errors.CheckpointError, match="objects"):
        reader.read(file)
    loop = b"\x80\x02]q\x00h\x00a."
    pth.write(file, {}, records={"archive/data.pkl": loop})
    with pytest.raises(errors.CheckpointError, match="nested too deeply"):
        reader.read(file)


def test_truncated_files_are_refused(file):
    pth.write(file, _arrays())
    data = file.read_bytes()
    for end in (0, 3, 50, len(data) // 2, len(data) - 30):
        file.write_bytes(data[:end])
        with pytest.raises(errors.CheckpointError):
            reader.read(file)
    pth.write(file, _arrays(), records={"archive/data/0": b"1234"})
    with pytest.raises(errors.CheckpointError, match="larger than its bytes"):
        reader.read(file)


@pytest.mark.parametrize("bad", ["/etc/passwd", "../x", "archive/../../x", "C:/x"])
def test_paths_that_lead_out_of_the_archive_are_refused(file, bad):
    pth.write(file, _arrays(), records={bad: b"x"})
    with pytest.raises(errors.CheckpointError, match="leads out"):
        reader.read(file)


def test_legacy_and_foreign_files_say_what_to_do(file, tmp_path):
    file.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"more")
    with pytest.raises(errors.CheckpointError, match="legacy.*weights_only=True"):
        reader.read(file)
    file.write_bytes(b"<html>404</html>")
    with pytest.raises(errors.CheckpointError, match="no zip archive"):
        reader.read(file)
    pth.write(file, {}, records={"archive/constants.pkl": b""})
    with pytest.raises(errors.CheckpointError, match="TorchScript"):
        reader.read(file)
    with pytest.raises(errors.CheckpointError, match="no such file"):
        reader.read(tmp_path / "absent.pth")
    (tmp_path / "x.h5").write_bytes(b"")
    with pytest.raises(errors.CheckpointError, match="ends in"):
        reader.read(tmp_path / "x.h5")


def test_compressed_and_oversized_records_are_refused(file, monkeypatch):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(errors.CheckpointError, match="compressed"):
        reader.read(file)
    monkeypatch.setattr(pickles, "MAX_BYTES", 10)
    pth.write(file, _arrays())
    with pytest.raises(errors.CheckpointError, match="too many"):
        reader.read(file)


def test_state_dicts_of_a_training_checkpoint(file):
    a = _arrays()
    pth.write(file, {"teacher": a, "student": {"x": a}, "optimizer": {"s": a}})
    assert list(reader.state_dicts(reader.read(file).tree)) == ["teacher", "student.x"]


def _crafted(file, shape, stride, offset=0):
    """Write a tensor of six floats between others that a pickle describes at will."""
    plain = pth.value(np.zeros((2, 3), np.float32), [])
    given = b"tQJ" + struct.pack("<i", 0) + pth.value((2, 3), [])
    given += pth.value((3, 1), [])
    assert given in plain
    wanted = b"tQJ" + struct.pack("<i", offset) + _value(shape) + _value(stride)
    six = np.arange(6, dtype=np.float32).tobytes()
    records = {f"archive/data/{i}": six for i in range(3)}
    pth.write(file, {"x": pth.Raw(plain.replace(given, wanted))}, records=records)
    return reader.read(file).tree["x"]


def _value(sizes):
    """Pickle a tuple of integers of any size."""
    each = (
        b"\x8a" + bytes([9]) + int(n).to_bytes(9, "little", signed=True) for n in sizes
    )
    return b"(" + b"".join(each) + b"t"


@pytest.mark.parametrize(
    "shape, stride, offset",
    [
        ((2, 3), (3, 1), -1),
        ((2, 3), (3, 1), -(2**31)),
        ((2, 3), (3, 1), 1),
        ((2, 3), (-3, 1), 3),
        ((-2, 3), (3, 1), 0),
        ((2, 3), (4, 1), 0),
        ((2, 3), (2**62, 1), 0),
        ((2**62, 4), (0, 0), 0),
        ((2, 3), (1,), 0),
        ((0, 2**63), (1, 1), 0),
        ((1,) * 70, (1,) * 70, 0),
    ],
)
def test_no_byte_outside_of_its_record_is_reached(file, shape, stride, offset):
    with pytest.raises(errors.CheckpointError):
        _crafted(file, shape, stride, offset)


def test_what_lies_inside_of_its_record_is_read_whatever_its_strides(file):
    assert _crafted(file, (2, 2), (3, 1), 1).tolist() == [[1, 2], [4, 5]]
    assert _crafted(file, (0, 3), (3, 1)).shape == (0, 3)
    assert _crafted(file, (), (), 5) == 5
    expanded = _crafted(file, (4, 3), (0, 1), 3)  # torch.Tensor.expand.
    assert expanded.tolist() == [[3, 4, 5]] * 4
    assert _crafted(file, (1, 3), (2**40, 1)).tolist() == [[0, 1, 2]]


NEST = b"".join(b"h%c2\x86q%c0" % (i, i + 1) for i in range(60))  # Pairs of pairs.
PROGRAMS = {
    "nested tuples as a key": b")q\x000" + NEST + b"}h\x3cNs.",
    "nested tuples in a set": b")q\x000" + NEST + b"\x8f(h\x3c\x90.",
    "nested tuples as pairs": pth.call(
        "collections.OrderedDict", b")q\x000" + NEST + b"]h\x3ca"
    )
    + b".",
    "nested lists as a module": b")q\x000" + NEST + b"h\x3cX\x01\0\0\0a\x93.",
    "nested lists as a device": b")q\x000" + NEST + b"ctorch\ndevice\n(h\x3ctR.",
    "nested lists as a storage": b")q\x000" + NEST + b"(X\x07\0\0\0storage"
    b"ctorch\nFloatStorage\nh\x3cX\x03\0\0\0cpuK\x06tQ.",
    "nested lists as a persistent object": b")q\x000" + NEST + b"(h\x3c"
    b"ctorch\nFloatStorage\nNNK\x06tQ.",
    "nested lists": b")q\x000" + NEST + b"h\x3c.",
    "a long list as many sizes": b"](" + b"N" * 50_000 + b"e\x85q\0ctorch\nSize\nq\x01"
    b"0" + b"h\x01h\0R" * 500 + b".",
    "a long text as many bytes": b"X"
    + struct.pack("<I", 2**20)
    + b"a" * 2**20
    + b"\x85q\0c_codecs\nencode\nq\x010"
    + b"h\x01h\0R" * 500
    + b".",
    "a long tuple of arguments": b"("
    + b"N" * 50_000
    + b"tq\0ctorch\nSize\nq\x010"
    + b"cbuiltins\nslice\nq\x020"
    + b"h\x02h\0R" * 500
    + b".",
    "keys that collide": b"}("
    + b"".join(
        b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N"
        for i in range(1, 20_000)
    )
    + b"u.",
    "tuples of keys without end": b"}(" + b"J\1\0\0\0\x85N" * 20_000 + b"u.",
    "a long tuple as a key": b"}(" + b"K\1" * 1000 + b"tq\0Ns.",
    "a number of many digits": b"}\x8b"
    + struct.pack("<i", 10_000)
    + b"\x7f" * 10_000
    + b"Ns.",
    "an entry of the memo that is not there": b"h\x07.",
    "a memo of 2**32 entries": b"Nr\xff\xff\xff\xff" + b"j\0\0\0\0.",
    "no stack": b"0.",
    "marks that are not there": b"t.",
    "a container that holds itself": b"}q\0X\1\0\0\0ah\0s.",
    "state of an array that is not one": b"cnumpy.core.multiarray\n_reconstruct\n"
    b"(tR(K\1(J\xff\xff\xff\x7ftNNB\0\0\0\0tb.",
}


@pytest.mark.parametrize("what", PROGRAMS)
def test_a_small_program_neither_hangs_nor_fills_the_memory(file, what):
    program = {"archive/data.pkl": b"\x80\x02" + PROGRAMS[what]}
    pth.write(file, {}, records=program)
    start = time.process_time()
    with pytest.raises(errors.CheckpointError) as told:
        reader.read(file)
    assert time.process_time() - start < 20 and len(str(told.value)) < 1000


def test_keys_are_scalars_or_flat_tuples(file):
    tree = {
        "s": {1, 2},
        b"b": b"",
        "a": 1,
        2: 2,
        0.5: 3,
        None: 4,
        True: 5,
        ("a", 0): 6,
        (): 7,
    }
    program = {"archive/data.pkl": pickle.dumps(tree, 2)}
    pth.write(file, {}, records=program)
    assert reader.read(file).tree == tree


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_of_numpy_are_arrays(file, protocol):
    arrays = {
        "c": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
        "none": np.zeros((0, 3), np.float32),
        "one": np.float32(0.5),
    }
    program = pickle.dumps(arrays, protocol)
    pth.write(file, {}, records={"archive/data.pkl": program})
    found = reader.read(file).tree
    for name, want in arrays.items():
        np.testing.assert_array_equal(found[name], want)
    big = pickle.dumps({"x": np.arange(3, dtype=">i4")}, 2)
    pth.write(file, {}, records={"archive/data.pkl": big})
    with pytest.raises(errors.CheckpointError, match="big-endian"):
        reader.read(file)
