"""State dicts of OlmoEarth, there and back, and as a file for `init.from`."""

import numpy as np
import pytest

from tests.convert import pth
from tests.golden.checks import hybrid_model as parts
from tests.models import fields
from vitssl import convert, errors, tree
from vitssl.convert import importer
from vitssl.methods.latent_mim import names as olmoearth


def _params():
    system = fields.system(fields.ALL, encoder=dict(registers=2, qk_norm=True))
    params = fields.params(system)
    return params | {"target": params["encoder"]["patch_embed"]}


def _state(params):
    state = convert.export(params, olmoearth.table(fields.ALL))
    state["encoder.composite_encodings.pos_embed"] = np.zeros((12, 4), np.float32)
    state["target_encoder.norm.weight"] = np.zeros(16, np.float32)
    return state


def test_weights_go_out_and_come_back():
    params = _params()
    state = _state(params)
    theirs = "encoder.patch_embeddings.per_modality_embeddings.optical.optical__1"
    assert state[f"{theirs}.proj.weight"].shape == (16, 1, 4, 4)
    back = parts.load(state, params, fields.ALL)
    for name, x in tree.flat(back).items():
        np.testing.assert_array_equal(x, tree.flat(params)[name])
    only = parts.load(state, {"encoder": params["encoder"]}, fields.ALL)
    assert set(only) == {"encoder"}
    del state["encoder.norm.bias"]
    with pytest.raises(errors.CheckpointError, match="encoder/norm/bias"):
        parts.load(state, params, fields.ALL)


def test_a_file_tells_its_modalities_and_comes_with_every_parameter(tmp_path):
    params = _params()
    state = {f"module.{k}": v for k, v in _state(params).items()}
    pth.write(tmp_path / "weights.pth", state)
    found = importer.read(tmp_path / "weights.pth")
    assert found.about.family == "olmoearth"
    want = tree.flat(params)
    assert found.leaves.keys() == want.keys()
    for name, x in found.leaves.items():
        np.testing.assert_array_equal(x, want[name])
    names = {
        s.name: (len(s.channels), s.space) for s in olmoearth.sensors(_state(params))
    }
    assert names == {m.name: (len(m.channels), m.space) for m in fields.ALL}
