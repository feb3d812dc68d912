"""What a run is said to have come to, from what it logged."""

import numpy as np
import pytest

from vitssl.evals import accuracy, verdict


def final(ours=0.9, theirs=0.5, images=360, name="knn", **more):
    """Return the metrics of a run that was evaluated at the end."""
    values = {
        f"final/trained/{name}/top1": ours,
        f"final/untrained/{name}/top1": theirs,
    }
    values |= {f"final/trained/{name}/images": images, "final/trained/dim": 64}
    return {k: (np.array([80]), np.array([float(v)])) for k, v in values.items()} | more


def collapse(*flags, every=20, rank=3.5):
    """Return the evaluations of step 0, `every`, 2 `every`, ..."""
    steps = every * np.arange(len(flags))
    return {
        verdict.COLLAPSED: (steps, np.array(flags, float)),
        verdict.RANK: (steps, np.full(len(flags), rank)),
    }


@pytest.mark.parametrize(
    "share, count, low, high",
    [  # The first three by R's prop.test(..., correct=FALSE).
        (0.5, 10, 0.2366, 0.7634),
        (0.0, 20, 0.0, 0.1611),
        (1.0, 1, 0.2065, 1.0),
        (0.9, 360, 0.8647, 0.9269),
    ],
)
def test_wilsons_interval(share, count, low, high):
    assert accuracy.wilson(share, count) == pytest.approx((low, high), abs=2e-4)


def test_it_holds_the_truth_in_nineteen_of_twenty_experiments():
    rng, hits = np.random.default_rng(0), []
    for share in (0.02, 0.5, 0.97):
        for right in rng.binomial(50, share, 2000):
            low, high = accuracy.wilson(right / 50, 50)
            hits.append(low <= share <= high)
    assert 0.93 < np.mean(hits) < 0.97


def test_an_accuracy_is_written_with_its_interval_where_its_images_are_known():
    assert accuracy.written(0.9, 360) == "90.0% (86.5-92.7)"
    assert accuracy.written(0.9, None) == accuracy.written(0.9, 0) == "90.0%"
    assert accuracy.written(0.9, float("nan")) == "90.0%"


def test_the_interval_of_a_difference_is_newcombes():
    # Table II of the paper: 56/70 against 48/80.
    low, high = verdict.difference(56 / 70, 48 / 80, 70, 80)
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=2e-4)


def test_a_run_that_beats_its_untrained_self_learned():
    found = verdict.verdict(final())
    assert found.short == "learned"
    assert found.text == (
        "It learned: k-NN 90.0% (86.5-92.7), untrained 50.0% (44.9-55.1), "
        "on 360 test images."
    )


@pytest.mark.parametrize("ours", [0.52, 0.3])
def test_one_that_does_not_beat_it_did_not(ours):
    found = verdict.verdict(final(ours))
    assert found.short == "not learned" and found.text.startswith("No sign that it ")
    assert ("too few to tell" in found.text) == (ours > 0.5)


def test_few_images_tell_nothing_that_many_tell():
    assert verdict.verdict(final(0.625, 0.583, 24)).short == "not learned"
    assert verdict.verdict(final(0.625, 0.583, 24_000)).short == "learned"


def test_a_collapse_is_said_with_its_first_step_unless_it_learned():
    metrics = final(0.5) | collapse(1, 0, 1, 1, 1)
    found = verdict.verdict(metrics)
    assert found.short == "collapsed since step 40"
    assert found.text.startswith(
        "Collapsed since step 40: few directions in use (3.5 of 64); k-NN 50.0%"
    )
    found = verdict.verdict(final(0.9) | collapse(0, 1, 1))
    assert found.short == "learned, few directions since 20"
    assert "It learned" in found.text and "since step 20 (3.5 of 64)" in found.text


def test_a_small_variance_alone_is_no_collapse():
    found = verdict.verdict(final(0.5) | collapse(0, 1, 1, rank=13.3))
    assert found.short == "not learned, few directions since 20"
    assert "Few directions in use since step 20 (13.3 of 64)." in found.text
    half = collapse(0, 1, 1, rank=13.3)
    half[verdict.RANK][1][0] = 30  # It has lost more than half of them.
    found = verdict.verdict(final(0.5) | half)
    assert found.short == "collapsed since step 20"


def test_a_network_that_begins_thin_or_recovers_did_not_collapse():
    assert verdict.few_directions(collapse(1, 0, 0)) == []
    found = verdict.verdict(final(0.5) | collapse(0, 1, 1, 0))
    assert found.short == "not learned"
    assert "from step 20 to 40, not at the end" in found.text


def test_the_final_evaluation_looks_for_a_collapse_too():
    last = {"final/trained/quality/collapsed": (np.array([80]), np.array([1.0]))}
    assert verdict.verdict(final(0.5, **last)).short == "collapsed since step 80"
    last["final/trained/quality/collapsed"][1][0] = 0
    found = verdict.verdict(final(0.5) | collapse(0, 1, 1) | last)
    assert found.short == "not learned"


def test_a_run_that_goes_on_is_judged_only_by_its_collapse():
    assert verdict.verdict({}) is None
    assert verdict.verdict(collapse(0, 0, 0)) is None
    assert verdict.verdict(collapse(0, 0, 1)).short == "few directions since step 40"


def test_without_an_accuracy_nothing_is_claimed():
    metrics = {"final/trained/quality/rankme": (np.array([9]), np.array([20.0]))}
    metrics["loss"] = np.array([1, 9]), np.array([2.0, 0.5])
    found = verdict.verdict(metrics)
    assert found.short == "-" and "no accuracy" in found.text
    assert "loss 2 at first, 0.5 at last" in found.text
    found = verdict.verdict(metrics | collapse(0, 1))
    assert found.short == "collapsed since step 20"


def test_a_classifier_has_to_beat_the_largest_class():
    values = {"top1": 0.8, "largest_class": 0.75, "images": 1000}
    metrics = {
        f"final/test/{k}": (np.array([5]), np.array([v])) for k, v in values.items()
    }
    assert verdict.verdict(metrics).short == "learned"
    metrics["final/test/images"] = np.array([5]), np.array([50])
    assert verdict.verdict(metrics).short == "not learned"


def test_a_probe_of_pixels_has_to_beat_itself_before_the_first_step():
    values = {"accuracy": 0.9, "miou": 0.8, "images": 80}
    metrics = final(ours=0.2, theirs=0.4) | {
        f"final/test/{k}": (np.array([5]), np.array([v])) for k, v in values.items()
    }
    assert verdict.verdict(metrics).short == "not learned"  # By k-NN of images.
    metrics["test/accuracy"] = np.array([2, 5]), np.array([0.7, 0.9])
    assert verdict.verdict(metrics).short == "not learned"  # Nobody knows its start.
    metrics["test/accuracy"] = np.array([0, 5]), np.array([0.7, 0.9])
    found = verdict.verdict(metrics)
    assert found.short == "learned"
    assert "before the first step 70.0% (59.2-78.9), on 80 test images" in found.text
    metrics["test/accuracy"] = np.array([0, 5]), np.array([0.85, 0.9])
    assert verdict.verdict(metrics).short == "not learned"


def test_the_scores_of_a_method_are_told_with_the_interval_of_its_accuracy():
    scores = {"f1_macro": 0.5, "top1": 0.9, "loss": 1 / 3, "images": 360}
    assert accuracy.told(scores, 3) == [
        "f1_macro 0.5",
        "top1 90.0% (86.5-92.7)",
        "loss 0.3333",
    ]
    assert accuracy.told({"top1": 0.9}) == ["top1 90.0%"]
