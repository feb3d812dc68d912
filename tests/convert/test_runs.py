"""Weights out of a run of ours: its features, its encoder, a program of it."""

import jax
import numpy as np
import pytest

import vitssl
from tests import runs as make
from vitssl import errors, features
from vitssl.convert import backbone, exporter, importer, runs


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run of two steps."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    done = make.run(path, steps=2, optim__lr=0.1)
    assert done.returncode == 0, done.said
    return path


def _images():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (3, 16, 16, 1), dtype=np.uint8)


def test_parts_of_a_run_are_its_trees(workdir):
    stored = make.state(workdir, 2)
    for part, prefix in (("", "extra/target"), ("encoder", "params/encoder")):
        found = runs.read(workdir, part)
        assert found.about.model["width"] == 16 and found.about.pool == "mean"
        for name, leaf in found.leaves.items():
            want = stored[name.replace("encoder", prefix, 1)]
            np.testing.assert_array_equal(leaf, want)
    differs = [
        name
        for name, leaf in runs.read(workdir, "encoder").leaves.items()
        if np.any(leaf != runs.read(workdir, "target").leaves[name])
    ]
    assert differs  # The parts are not the same thing under two names.
    with pytest.raises(errors.UsageError, match="target, encoder"):
        runs.read(workdir, "teacher")


def test_a_run_and_its_export_give_the_same_features(workdir, tmp_path):
    image = _images()
    want = vitssl.load(workdir)(image)
    for path in (workdir, workdir / "checkpoints" / "2"):
        got = vitssl.load(path, part="target")(image)
        np.testing.assert_allclose(got["tokens"], want["tokens"], atol=1e-6)
        np.testing.assert_allclose(got["pooled"], want["pooled"], atol=1e-6)
    exporter.write(runs.read(workdir), tmp_path / "w", "vitssl")
    got = vitssl.load(tmp_path / "w")(image)
    np.testing.assert_allclose(got["pooled"], want["pooled"], atol=1e-6)
    file = exporter.write(runs.read(workdir), tmp_path / "t.safetensors", "timm")
    found = importer.read(file, options=importer.family.Options(heads=2))
    assert found.about.family == "timm"
    for name, leaf in backbone.read(tmp_path / "w").leaves.items():
        np.testing.assert_array_equal(found.leaves[name], leaf)


def test_a_run_becomes_a_program(workdir, tmp_path):
    made = vitssl.load(workdir)
    features.export_program(made, tmp_path, platforms=("cpu",))
    program = jax.export.deserialize((tmp_path / "features.jax").read_bytes())
    weights = importer.reader.read(tmp_path / "weights.safetensors").tree
    got = program.call({k: np.array(v) for k, v in weights.items()}, _images())
    want = made(_images())
    np.testing.assert_allclose(got["pooled"], want["pooled"], rtol=1e-5, atol=1e-6)


def test_a_folder_that_is_no_run_says_so(tmp_path):
    with pytest.raises(errors.CheckpointError, match="no complete checkpoint"):
        vitssl.load(tmp_path)
