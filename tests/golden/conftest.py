"""Finds the golden cases and the check of each."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from tests.golden import reading


@dataclasses.dataclass
class Case:
    """One oracle: arrays written by the original PyTorch module, and how to compare."""

    path: pathlib.Path

    def __post_init__(self):
        """Read the description, then the arrays, if the case has any."""
        self.meta = json.loads(self.path.read_text())
        self.config = reading.recorded(self.meta.get("config", {}))
        tolerance = self.meta.get("tolerance", 1e-4)
        # Statistics say in words how they compare; their check knows.
        worded = isinstance(tolerance, str)
        self.tolerance = 1e-4 if worded else float(tolerance)
        self.param, self.inputs, self.out = {}, {}, {}
        self.compared = set()
        arrays = self.path.with_suffix(".npz")
        if arrays.exists():
            kinds = {"param": self.param, "in": self.inputs, "out": self.out}
            with np.load(arrays, allow_pickle=False) as file:
                for key in file.files:
                    kind, name = key.split("/", 1)
                    kinds[kind][name] = file[key]

    def close(self, name, got, *, tolerance=0.0):
        """Assert that `got` equals out/`name` within the case's own tolerance.

        The tolerance is absolute for values below one and relative above.
        """
        want = self.out[name]
        self.compared.add(name)
        got = np.asarray(got)
        assert got.shape == want.shape, f"{name}: {got.shape} is not {want.shape}"
        tolerance = tolerance or self.tolerance
        np.testing.assert_allclose(
            got, want, rtol=tolerance, atol=tolerance, err_msg=name
        )


def pytest_generate_tests(metafunc):
    """One test per case file found."""
    if "case_path" in metafunc.fixturenames:
        root = pathlib.Path(metafunc.config.getoption("--golden-dir"))
        paths = sorted(root.rglob("*.json"))
        ids = [f"{p.parent.name}-{p.stem}" for p in paths]
        metafunc.parametrize("case_path", paths, ids=ids)


@pytest.fixture
def case(case_path):
    """The case of one json file."""
    return Case(case_path)
