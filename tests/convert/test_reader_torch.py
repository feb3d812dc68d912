"""The .pth reader: what it reads, and what it refuses without running anything."""

import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from tests.convert import pth
from vitssl import errors
from vitssl.convert import reader, reader_pickle


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
    monkeypatch.setattr(reader_pickle, "MAX_OBJECTS", 10_000)
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
    monkeypatch.setattr(reader_pickle, "MAX_BYTES", 10)
    pth.write(file, _arrays())
    with pytest.raises(errors.CheckpointError, match="too many"):
        reader.read(file)


def test_state_dicts_of_a_training_checkpoint(file):
    a = _arrays()
    pth.write(file, {"teacher": a, "student": {"x": a}, "optimizer": {"s": a}})
    assert list(reader.state_dicts(reader.read(file).tree)) == ["teacher", "student.x"]
