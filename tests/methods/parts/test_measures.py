"""What is measured once, at the end: thresholds, ImageNet-9, sheets of maps."""

import types

import cv2
import jax
import numpy as np
import pytest

from tests import layouts
from tests.methods.parts import test_method
from vitssl.data import dataset
from vitssl.data.sources import in9
from vitssl.evals import suite
from vitssl.methods.parts import measures, scores
from vitssl.pictures import overlays
from vitssl.run import devices, evaluation

SHARES = (0.05, 0.5)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A tiny method, its weights and its final evaluation with everything on."""
    root = tmp_path_factory.mktemp("in9")
    layouts.in9.in9(root, size=(32, 32), names=layouts.in9.CLASSES[:2])
    section = measures.Measures(
        thresholds=SHARES, backgrounds=str(root), challenge=2, maps=1.0
    )
    m = test_method.method(measures=section)
    params, extra = test_method.init(m, test_method.batch(evaluation=True)["image"])
    section = suite.Evals(
        image_size=32,
        batch_size=4,
        every_epochs=1,
        online_samples_train=4,
        online_samples_test=4,
        final=(),
        knn_k=(1,),
        knn_temperature=(1.0,),
        probe="lbfgs",
        probe_epochs=1,
    )
    data = dataset.Data(
        "birds", "", "train", "train", "test", 3, (0.5,) * 3, (0.25,) * 3
    )
    data.options.update(count=8, size=32)
    folder = tmp_path_factory.mktemp("run")
    mesh = devices.mesh(devices.Mesh(), 4)
    one = evaluation.Evaluation(section, data, m, mesh, workdir=folder)
    state = types.SimpleNamespace(params=params, extra=extra, step=10)
    values, _ = one.final(state, state)
    return m, (params, extra), data, one, values, folder


def _batch(data, split):
    source = data.open(split)
    images = np.stack([source[i]["image"] for i in range(len(source))])
    return {"image": images, "label": source.labels}


def test_thresholds_are_quantiles_of_each_parts_own_patches(found):
    m, state, data, one, _, _ = found
    out = jax.jit(m.predict)(*state, _batch(data, "train")["image"]).found
    owner = np.asarray(out.maps.argmax(-1))
    own = np.take_along_axis(np.asarray(out.dot), owner[..., None], axis=-1)[..., 0]
    want = scores.thresholds(owner, own, 3, SHARES)
    got = dict(zip(SHARES, one.arrays["thresholds"], strict=True))
    for q in SHARES:
        np.testing.assert_allclose(got[q], want[q], rtol=1e-5, atol=1e-6)


def test_thresholds_change_the_maps_and_none_at_all_is_the_plain_score(found):
    m, state, data, one, values, _ = found
    for q in SHARES:
        assert f"final/test/top1_least_{q:g}" in values
    given = _batch(data, "test")
    limits = one.arrays["thresholds"][1]
    fixed = test_method.method(parts=dict(thresholds=tuple(map(float, limits))))
    if np.isfinite(limits).all():  # What the section itself does with these numbers.
        want = test_method.outputs(fixed, *state, given)["logits"].argmax(-1)
        right = float((want == given["label"]).mean())
        assert values["final/test/top1_least_0.5"] == pytest.approx(right)
    got = jax.jit(m.thresholded)(*state, np.full(3, np.inf, np.float32), given)
    gone = jax.jit(m.predict)(*state, given["image"], removed=(0, 1, 2))
    np.testing.assert_allclose(got["logits"], gone.logits, atol=1e-5)


def test_imagenet_9_by_hand(found):
    m, state, _, _, values, _ = found
    root = m.measures.backgrounds
    source = in9.challenge(root, 2)
    images = np.stack([source[i]["image"] for i in range(len(source))])
    guess = np.asarray(jax.jit(m.predict)(*state, images).logits.argmax(-1))
    wrong = (guess != source.labels).reshape(4, 2)
    assert values["final/test/in9_challenge"] == float(1 - wrong.any(1).mean())
    assert "final/test/in9_only_bg_t" not in values
    assert {"final/test/in9_original", "final/test/in9_mixed_rand"} <= set(values)
    np.testing.assert_array_equal(
        scores.coarse(np.array([0, 2, 5]), {"0": 7, "2": -1}), [7, -1, -1]
    )


def test_batches_are_drawn_when_due(found):
    m, _, _, _, _, folder = found
    files = sorted((folder / "pictures" / "maps").iterdir())
    assert [f.name for f in files] == [f"000010_{i:04d}_birds.jpg" for i in range(2)]
    assert cv2.imread(str(files[0])).shape == (512, 512, 3)
    # Ten steps of two an epoch: the first epoch, each fourth, the last.
    m = test_method.method(measures=measures.Measures(maps=0.3, maps_every_epochs=4))
    assert [m.drawn(s) for s in (0, 2, 4, 8, 10)] == [0.0, 0.3, 0.0, 0.3, 0.3]


def test_a_sheet_colours_parts_and_leaves_the_background():
    images = np.full((6, 4, 4, 3), 100, np.uint8)
    maps = np.zeros((6, 4, 4, 3))
    maps[..., 2] = 1.0  # Background ...
    maps[5, :, :, 1] = 2.0  # ... but for the last image.
    got = overlays.sheet(images, maps, side=4)
    assert got.shape == (12, 8, 3)  # Six tiles: three rows of two.
    np.testing.assert_allclose(got[:8], 100 / 255, atol=1e-6)
    want = (100 / 255 + overlays.palette(2)[1]) / 2
    np.testing.assert_allclose(got[8:, 4:], np.broadcast_to(want, (4, 4, 3)), 1e-5)
