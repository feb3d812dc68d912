import dataclasses
import types

import jax
import numpy as np
import pytest

from tests import toy
from vitssl import errors
from vitssl.data import dataset
from vitssl.pictures import gather
from vitssl.tools import draw as command

DATA = dataset.Data(
    source="digits",
    root="",
    split="train",
    bank_split="train",
    test_split="test",
    channels=1,
    mean=(0.5,),
    std=(0.5,),
)
EVALS = types.SimpleNamespace(image_size=16, features="pooled")


@dataclasses.dataclass(frozen=True)
class Shown(toy.Toy):
    """A method with pictures of its own."""

    def pictures(self, params, extra, batch, image):
        return {"grid": (len(batch["label"]), len(image))}


@pytest.fixture(scope="module")
def network():
    method = toy.make(depth=1)
    method = Shown(
        **{f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    )
    return method, jax.jit(method.init)(jax.random.key(0), toy.batch())


def collect(network, **options):
    method, state = network
    return gather.gather(method, state, DATA, EVALS, points=70, **options)


def test_features_stand_in_the_order_of_the_images(network):
    method, state = network
    found = collect(network)
    assert set(found.features) == {"trained"}
    want = jax.jit(method.features)(*state, found.images)
    assert found.features["trained"].shape[0] == 70
    np.testing.assert_allclose(found.features["trained"][:6], want["pooled"], atol=1e-5)
    assert len(found.tokens) == gather.TOKENS  # Those of the images come first.
    np.testing.assert_allclose(found.tokens[:6], want["tokens"], atol=1e-5)


def test_neighbours_are_the_nearest_of_the_training_images(network):
    method, state = network
    found = collect(network).neighbours
    train, view = DATA.open("train"), gather.views.Evaluate(16)
    assert found["total"] == len(train) == 1438 and len(found["queries"]) == 6
    labels, near = found["labels"]
    assert len(set(labels.tolist())) == 6  # Of as many classes as there are.
    images = np.stack([view(train[i])["image"] for i in range(len(train))])
    vectors = jax.jit(method.features)(*state, images)["pooled"]
    unit = [
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (np.asarray(vectors), found["features"][0])
    ]
    best = (unit[1] @ unit[0].T).argmax(1)
    wanted = {images[i].tobytes(): train[int(i)]["label"] for i in best}
    drawn = dict(zip((x.tobytes() for x in found["bank"]), near, strict=True))
    assert wanted.items() <= drawn.items()


def test_the_images_are_labelled_ones_of_the_test_split(network):
    found = collect(network)
    assert found.classes == tuple(DATA.open("test").classes)
    view = gather.views.Evaluate(16)
    test = DATA.open("test")
    known = {
        view(test[i])["image"].tobytes(): test[i]["label"] for i in range(len(test))
    }
    shown = [known[image.tobytes()] for image in found.images]
    assert shown == found.labels[:6].tolist()
    assert len(set(found.labels[:20])) > 4  # Mixed, though a source may be sorted.


def test_the_same_seed_takes_the_same_images(network):
    one, two, other = (collect(network, seed=seed).images for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


def test_an_untrained_network_is_compared(network):
    method, _ = network
    other = jax.jit(method.init)(jax.random.key(1), toy.batch())
    found = collect(network, untrained=other)
    assert list(found.features) == ["trained", "untrained"]
    assert (found.features["trained"] != found.features["untrained"]).any()


def test_a_method_adds_pictures_of_its_own_from_a_batch_of_four(network):
    assert collect(network).grid == (4, 6)
    assert collect(network, images=2).grid == (2, 2)


def test_batches_without_crops_are_not_drawn_but_their_originals_are_there(network):
    found = collect(network)
    assert found.batch == {}
    assert len(found.originals) == 4
    assert all(image.shape == (8, 8, 1) for image in found.originals)


def test_the_landscape_is_of_the_mean_loss_over_the_first_batches(network, monkeypatch):
    method, state = network
    monkeypatch.setattr(
        gather.landscape, "plane", lambda loss, params: float(loss(params))
    )
    found = collect(network, landscape_batches=2)
    stream = gather._batches(method, DATA.open("train"), 32, 0)
    each = [
        float(method.loss(*state, next(stream), jax.random.key(0), phase=())[0])
        for _ in range(2)
    ]
    assert found.plane == pytest.approx(np.mean(each), rel=1e-5)


def test_a_folder_that_is_no_workdir_is_one_line(tmp_path, capsys):
    assert errors.exit_code(command.main, [str(tmp_path)]) == 4
    assert "no complete checkpoint; want WORKDIR" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--images=0", "--points=3", "--nonsense"])
def test_bad_flags_are_refused_in_one_line_before_any_work(flag, capsys):
    assert errors.exit_code(command.main, ["somewhere", flag]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert flag in line or "--images must be 1 or more, --points 8 or more" in line
    assert line.endswith("(vitssl pictures --help)")
