"""The section `evals`, online and final evaluation, and the table at the end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitssl import config
from vitssl.evals import evaluator, suite

SECTION = dict(
    image_size=8,
    batch_size=16,
    every_epochs=1,
    online_samples_train=0,
    online_samples_test=0,
    final=("knn", "linear", "fewshot", "quality"),
    knn_k=(20, 5),
    knn_temperature=(0.07,),
    probe="lbfgs",
    probe_epochs=3,
)
CLASSES = 3


def test_an_evaluator_that_measures_nothing_is_not_made():
    class Half(evaluator.Evaluator):
        columns = {"x": ("X", "{}")}

    with pytest.raises(TypeError, match="abstract.*__call__"):
        Half()


def _section(**changes):
    return suite.Evals(**(SECTION | changes))


def _images(count, seed):
    """Class c is a bright column c, anywhere in brightness; the rest is noise."""
    rng = np.random.default_rng(seed)
    label = np.arange(count) % CLASSES
    image = rng.integers(0, 120, (count, 8, 8, 1))
    image[np.arange(count), :, label] += rng.integers(30, 136, (count, 1, 1))
    return image.astype(np.uint8), label


class Batches:
    """An evaluation set that counts its passes."""

    def __init__(self, count, seed, labelled=True):
        self.image, self.label = _images(count, seed)
        if not labelled:
            self.label = np.full(count, -1)
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        count = len(self.label)
        for start in range(0, count, 16):
            index = np.arange(start, start + 16)
            row = np.minimum(index, count - 1)
            yield {
                "image": self.image[row],
                "label": np.where(index < count, self.label[row], -1).astype(np.int32),
                "index": np.where(index < count, row, -1).astype(np.int32),
                "valid": index < count,
            }


@dataclasses.dataclass
class Network:
    traces: int = 0

    def features(self, params, extra, image):
        """Columns, mixed by params: the identity tells the classes."""
        self.traces += 1
        x = image[..., 0].astype(jnp.float32) / 255 - 0.3  # [B, 8, 8]
        tokens = x @ params  # [B, 8, D]
        return {"pooled": tokens.mean(1) + extra, "tokens": tokens}


GOOD = (np.eye(8, dtype=np.float32)[:, :4], np.float32(0))
# The classes are in what is not looked at.
BAD = (np.eye(8, dtype=np.float32)[:, 4:], np.float32(0))


def test_online_tells_a_good_network_from_a_bad_one():
    network, section = Network(), _section(online_probe_epochs=20)
    good, bad = (
        suite.online(
            section,
            network.features,
            state,
            Batches(120, 0),
            Batches(50, 1),
            classes=CLASSES,
        )
        for state in (GOOD, BAD)
    )
    assert network.traces == 1
    assert set(good) == {
        "knn/top1",
        "knn/images",
        "knn/top5",
        "quality/std",
        "quality/rankme",
        "quality/effective_rank",
        "quality/collapsed",
        "probe/top1",
    }
    assert good["knn/top1"] > 0.9 and good["probe/top1"] > 0.9
    assert bad["knn/top1"] < 0.6 and bad["probe/top1"] < 0.6
    assert all(isinstance(v, float) for v in good.values())


def test_online_sees_a_collapse():
    network = Network()
    flat = (np.ones((8, 4), np.float32), np.float32(0))
    dead = (np.zeros((8, 4), np.float32), np.arange(4, dtype=np.float32))
    found = [
        suite.online(
            _section(),
            network.features,
            state,
            Batches(60, 0),
            Batches(50, 1),
            classes=CLASSES,
        )
        for state in (GOOD, flat, dead)
    ]
    good, flat, dead = found
    assert good["quality/effective_rank"] > 3 > 1.01 > flat["quality/effective_rank"]
    assert dead["quality/std"] == 0 and dead["quality/collapsed"] == 1
    # All images alike: the neighbours are the first rows of the bank.
    assert dead["knn/top1"] == pytest.approx(17 / 50)


def test_few_images_of_many_dimensions_are_no_collapse():
    rng = np.random.default_rng(0)
    wide = (rng.normal(size=(8, 400)).astype(np.float32), np.float32(0))
    found = suite.online(
        _section(),
        Network().features,
        wide,
        Batches(8, 0),
        Batches(30, 1),
        classes=CLASSES,
    )
    # At most 8 directions of 400, and of 29 that 30 images can span.
    assert 3 < found["quality/effective_rank"] < 8 and not found["quality/collapsed"]


def test_without_labels_only_the_spread_is_measured():
    bank = Batches(60, 0, labelled=False)
    for classes, labelled in ((0, True), (CLASSES, False)):
        found = suite.online(
            _section(),
            Network().features,
            GOOD,
            bank,
            Batches(50, 1, labelled),
            classes=classes,
        )
        assert {k.split("/")[0] for k in found} == {"quality"}
    assert bank.passes == 0
    rows = suite.final(
        _section(),
        Network().features,
        {"trained": GOOD},
        bank,
        Batches(50, 1, labelled=False),
        classes=0,
    )
    assert [row["features"] for row in rows] == ["trained", "raw pixels"]
    assert "quality/rankme" in rows[0] and "knn/top1" not in rows[0]


@pytest.fixture(scope="module")
def rows():
    """The final evaluation of a good and a bad state."""
    return suite.final(
        _section(),
        Network().features,
        {"trained": GOOD, "untrained": BAD},
        Batches(120, 0),
        Batches(100, 1),
        classes=CLASSES,
        side=2,
    )


def test_final_compares_trained_untrained_pixels_and_guessing(rows):
    names = ["trained", "untrained", "raw pixels", "averaged pixels", "largest class"]
    assert [row["features"] for row in rows] == names
    trained, untrained, pixels, averaged, largest = rows
    # Of 2 x 2 patches of an 8 x 8 image: where a bright column is, is gone.
    assert averaged["dim"] == 4 and averaged["linear/top1"] < 0.7
    for key in ("knn/top1", "linear/top1", "fewshot/5/top1"):
        assert trained[key] > 0.9 and untrained[key] < 0.6
    assert pixels["dim"] == 64 and trained["dim"] == 4
    assert pixels["linear/top1"] > 0.9
    assert largest["knn/top1"] == largest["linear/top1"] == 0.34
    assert trained["bank"] == 120 and trained["query"] == 100
    # The first k of the sweep is the one reported.
    assert trained["knn/top1"] == trained["knn/k20_t0.07/top1"]
    assert "knn/k5_t0.07/top5" in trained and 0 < trained["linear/penalty"] <= 1
    assert trained["quality/uniformity"] < 0 and trained["quality/collapsed"] == 0


def test_the_table_shows_the_headlines(rows):
    text = suite.format_table(rows, _section().protocol())
    lines = text.splitlines()
    assert len(lines) == 2 + 5 + 1
    heads = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert heads[:3] == ["features", "dim", "k-NN top-1"]
    assert heads[3:5] == ["standardised", "linear top-1"]
    assert heads[5:] == ["1-shot", "5-shot", "10-shot", "RankMe", "std"]
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[2] == "98.0% (93.0-99.4)" and rows[0]["knn/images"] == 100
    assert rows[0]["knn/confusion"].sum() == 100
    assert "Wilson" in lines[-1]
    assert cells[3].startswith(f"{100 * rows[0]['knn/standardised_top1']:.1f}%")
    cells = [cell.strip() for cell in lines[6].strip("|").split("|")]
    assert cells == ["largest class", "-", "34.0%", "-", "34.0%", *["-"] * 5]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert "k=20, cosine, temperature 0.07" in lines[-1] and "lbfgs" in lines[-1]


class Sizes:
    """Features of images of any size: what is bright in a column, at eight places."""

    def features(self, params, extra, image):
        assert image.dtype == jnp.uint8  # Floats would pass as normalised.
        x = image[..., 0].astype(jnp.float32) / 255
        x = jax.image.resize(x, (len(x), 8, 8), "linear") - 0.3
        return {"pooled": (x @ params).mean(1), "tokens": x @ params}


def test_tokens_in_place_and_other_scales_are_rows_of_their_own():
    section = _section(final=("knn",), in_place=True, scales=(0.5, 1.0))
    rows = suite.final(
        section,
        Sizes().features,
        {"trained": GOOD, "untrained": BAD},
        Batches(120, 0),
        Batches(50, 1),
        classes=CLASSES,
        side=2,
    )
    found = {row["features"]: row for row in rows}
    assert list(found) == [
        *("trained", "untrained", "trained in place", "untrained in place"),
        *("trained at 0.5", "trained at 1", "untrained at 0.5", "untrained at 1"),
        *("raw pixels", "averaged pixels", "largest class"),
    ]
    assert found["trained in place"]["dim"] == 8 * found["trained"]["dim"] == 32
    same, half = found["trained at 1"], found["trained at 0.5"]
    assert same["knn/top1"] == found["trained"]["knn/top1"]
    assert same["scale/cosine"] == pytest.approx(1)
    assert 0.2 < half["scale/cosine"] < 0.99
    assert half["knn/top1"] < same["knn/top1"]
    assert "final/trained_at_0.5/scale/cosine" in suite.flat(rows)
    head = [cell.strip() for cell in suite.format_table(rows).split("\n")[0].split("|")]
    assert head[-2] == "cosine to 1"


@pytest.mark.parametrize(
    "size, scale, side, want",
    [
        ((48, 48), 0.5, 6, (24, 24)),
        ((48, 48), 0.71, 6, (36, 36)),
        ((48, 48), 1.4, 6, (66, 66)),
        ((48, 96), 0.5, 16, (32, 48)),
        ((16, 16), 0.1, 16, (16, 16)),
    ],
)
def test_images_are_scaled_to_whole_patches(size, scale, side, want):
    assert suite.extraction.scaled(size, scale, side) == want


def test_averaged_pixels_are_the_mean_over_the_patches_of_an_image():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 7, 9, 3)).astype(np.uint8)
    got = np.asarray(suite.extraction.Patches(3)(image)["pooled"])
    want = np.zeros((2, 27))
    for y in (0, 3):
        for x in (0, 3, 6):
            want += image[:, y : y + 3, x : x + 3].reshape(2, 27) / 255 / 6
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_all_results_are_metrics(rows):
    found = suite.flat(rows)
    assert found["final/trained/knn/top1"] == rows[0]["knn/top1"]
    assert found["final/raw_pixels/dim"] == 64
    assert all(isinstance(v, float) for v in found.values())
    numbers = [k for row in rows for k, v in row.items() if not np.ndim(v)]
    assert len(found) == len(numbers) - len(rows)
    assert "final/averaged_pixels/knn/standardised_top1" in found


@pytest.mark.parametrize(
    "changes, better",
    [
        (dict(probe="sgd", probe_epochs=30, probe_folds=3), 0.9),
        (dict(probe_pooling="max"), 0.6),
        (dict(probe="sgd", probe_epochs=30, probe_pooling="attention"), 0.8),
        (dict(features="tokens", final=("knn", "linear")), 0.9),
    ],
)
def test_every_way_to_probe_runs(changes, better):
    section = _section(**({"final": ("linear",)} | changes))
    assert not list(section.check())
    first = suite.final(
        section,
        Network().features,
        {"trained": GOOD},
        Batches(120, 0),
        Batches(50, 1),
        classes=CLASSES,
    )[0]
    assert first["linear/top1"] > better
    if section.probe_folds:
        assert first["linear/folds_top1"] > 0.8 and "linear/folds_top1_std" in first
    if "knn" in section.final:
        assert first["knn/top1"] > 0.9 and first["dim"] == 4


def test_the_online_evaluation_moves_nothing_implicitly():
    network, state = Network(), jax.device_put(GOOD)
    with jax.transfer_guard("disallow"):
        suite.online(
            _section(online_probe_epochs=2),
            network.features,
            state,
            Batches(60, 0),
            Batches(50, 1),
            classes=CLASSES,
        )


def test_a_good_section_has_no_faults():
    problems = config.Problems()
    built = config.section(suite.Evals, SECTION, "evals", problems)
    assert problems == [] and built == _section()


@pytest.mark.parametrize(
    "key, value",
    [
        ("image_size", 0),
        ("batch_size", 0),
        ("every_epochs", -1),
        ("online_samples_train", -1),
        ("final_samples_test", -1),
        ("knn_k", ()),
        ("knn_k", (5, 0)),
        ("knn_temperature", (0.0,)),
        ("knn_max_bytes", 1000),
        ("final", ("knn", "svm")),
        ("probe", "adam"),
        ("probe_epochs", 0),
        ("probe_lr", 0.0),
        ("probe_folds", 1),
        ("probe_pooling", "attention"),
        ("probe_normalise", True),
        ("fewshot_ways", 1),
        ("fewshot_shots", ()),
        ("fewshot_queries", 0),
    ],
)
def test_each_fault_is_named_with_its_key(key, value):
    problems = config.Problems()
    config.section(suite.Evals, SECTION | {key: value}, "evals", problems)
    assert len(problems) == 1 and problems[0].startswith(f"evals.{key}=")


def test_the_histogram_of_colours_counts_pixels_and_is_a_row():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 5, 4, 3)).astype(np.uint8)
    got = np.asarray(suite.extraction.Colours(4)(image)["pooled"])
    want = np.zeros((3, 64))
    for b in range(3):
        for pixel in image[b].reshape(-1, 3).tolist():
            r, g, blue = (v // 64 for v in pixel)
            want[b, 16 * r + 4 * g + blue] += 1 / 20
    np.testing.assert_allclose(got, want, rtol=1e-6)
    rows = suite.final(
        _section(final=("linear",), baselines=("colours",)),
        Network().features,
        {"trained": GOOD},
        Batches(60, 0),
        Batches(50, 1),
        classes=CLASSES,
    )
    assert [r["features"] for r in rows[1:]] == ["colour histogram", "largest class"]
    assert rows[1]["dim"] == 4  # One channel.
    assert 0 <= rows[1]["linear/f1_macro"] <= 1
