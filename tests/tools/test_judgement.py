"""Verdicts of a study: what pairs of seeds say, and when they say nothing."""

import math

import pytest

from tests.tools import test_study
from vitssl import errors
from vitssl.tools import judgement, study

TOP1, PIXELS = "final/trained/linear/top1", "final/raw_pixels/linear/top1"
CLAIM = (("multi", TOP1), ("single", TOP1), 0.03)


def _claim(value=CLAIM, arms=("multi", "single", "labels")):
    return judgement.claim(value, arms)


def _found(multi, single):
    return {"multi": {TOP1: multi}, "single": {TOP1: single}}


@pytest.mark.parametrize(
    "differences, word",
    [
        ((0.05, 0.06, 0.07), "yes"),
        ((0.02, 0.021, 0.022), "no"),  # Surely ahead, by nothing that matters.
        ((-0.05, -0.06, -0.07), "no"),
        ((0.0, 0.0, 0.0), "no"),
        ((0.2, 0.0, -0.1), "undecided"),
        ((0.01, 0.03, 0.04), "undecided"),  # Surely ahead, perhaps by enough.
        ((0.5,), "undecided"),  # One seed has no spread.
        ((), "undecided"),
    ],
)
def test_a_difference_is_shown_at_two_standard_errors(differences, word):
    single = [0.4] * len(differences)
    multi = [0.4 + d for d in differences]
    seen = _claim().judge(_found(multi, single))
    assert seen.word == word
    if len(differences) == 3:
        mean = sum(differences) / 3
        spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2)
        half = 2 * spread / math.sqrt(3)
        assert seen.interval == pytest.approx((mean - half, mean + half), abs=1e-12)


def test_seeds_are_paired_and_those_without_a_value_left_out():
    multi, single = [0.9, 0.3, None, 0.6], [0.8, 0.2, 0.5, None]
    seen = _claim().judge(_found(multi, single))
    # The seeds differ by 0.6, the arms by 0.1 in each of them.
    assert seen.differences == pytest.approx([0.1, 0.1]) and seen.word == "yes"


@pytest.mark.parametrize(
    "value, why",
    [
        ((("multi", TOP1), ("one", TOP1), 0.1), "no arm 'one'; there is: multi"),
        ((("multi", TOP1), ("single", TOP1)), "want ((ARM, COLUMN)"),
        ("multi", "want ((ARM, COLUMN)"),
        ((("multi", 3), ("single", TOP1), 0.1), "want ((ARM, COLUMN)"),
        ((("multi", TOP1), ("single", TOP1), -1.0), "0 or more"),
        ((("multi", TOP1), ("single", TOP1), math.nan), "0 or more"),
        ((("multi", TOP1), ("single", TOP1), True), "0 or more"),
    ],
)
def test_a_claim_that_is_none_says_why(value, why):
    with pytest.raises(ValueError) as caught:
        _claim(value)
    assert why in str(caught.value)


def _text(labels, pixels):
    found = _found([0.6, 0.61], [0.5, 0.52])
    found["labels"] = {TOP1: labels, PIXELS: pixels}
    gate = _claim((("labels", TOP1), ("labels", PIXELS), 0.1))
    return judgement.text(found, {"crops": _claim()}, gate)


def test_where_labels_do_not_beat_the_pixels_nothing_is_decided():
    fit = _text([0.84, 0.83], [0.69, 0.69])
    assert fit.startswith("This world is fit for evidence (labels final/trained")
    row = next(line for line in fit.splitlines() if "crops" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[-3:] == ["+0.095 [+0.085, +0.105]", "2", "yes"]
    unfit = _text([0.14, 0.13], [0.13, 0.13])
    assert "NOT fit for evidence" in unfit and "wanted 0.1" in unfit
    assert "undecided (see the gate)" in unfit and "| yes |" not in unfit
    assert "is undecided (labels" in _text([0.9, 0.3], [0.3, 0.3])


def test_a_study_judges_its_claims_and_an_arm_may_be_another_config(
    tmp_path, monkeypatch
):
    c = test_study._config(
        tmp_path,
        multi=(),
        single=("multicrop.num_local_crops=0",),
        labels=(str(tmp_path / "labels.py"), "steps=2"),
    )
    (tmp_path / "labels.py").write_text(
        "from vitssl import config\n"
        "def get_config():\n"
        "    c = config.recipe('finetune_vit:smoke')\n"
        f"    c.data.source = {c.data.source!r}\n"
        f"    c.data.options = {c.data.options.to_dict()!r}\n"
        f"    c.data.test_split = {c.data.test_split!r}\n"
        "    return c\n"
    )
    c.study.claims = dict(crops=CLAIM)
    c.study.seeded = ("data.threads",)
    c.study.gate = (("labels", TOP1), ("labels", PIXELS), 0.1)
    plan = study.read(c)
    assert plan.runs["labels", 1].settings.method == "classify"
    for arm in c.study.arms:
        for seed in (0, 1):
            found = plan.runs[arm, seed].settings
            assert found.seed == found.data.threads == seed
    values = {"multi": 0.6, "single": 0.5, "labels": 0.8}

    def fake(one, directory, **_):
        seed = one.settings.seed / 100
        return {TOP1: values[directory.parent.name] + seed, PIXELS: 0.5}

    monkeypatch.setattr("vitssl.run.loop.run", fake)
    study.run(plan, tmp_path, name="test")
    text = (tmp_path / "study.md").read_text()
    assert "This world is fit for evidence" in text
    assert " +0.100 [+0.100, +0.100] |     2 |     yes |" in text
    c.study.arms.labels = ("finetune_vit:scratch", "data.source=leaves")
    c.study.claims.crops = (("multi", TOP1), ("nobody", TOP1), 0.03)
    with pytest.raises(errors.UsageError) as caught:
        study.read(c)
    assert "study.claims.crops: no arm 'nobody'" in str(caught.value)
    c.study.claims.crops = (("multi", TOP1), ("labels", TOP1), 0.03)
    with pytest.raises(errors.UsageError) as caught:
        study.read(c)
    assert "images that differ cannot be compared" in str(caught.value)
