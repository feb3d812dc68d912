"""What values a key accepts, by its annotation alone."""

from typing import Annotated, Literal

import pytest

from vitssl import ranges

CASES = [
    (ranges.Positive, 0.1, ""),
    (ranges.Positive, 1, ""),
    (ranges.Positive, 0.0, "above 0"),
    (ranges.Positive, float("nan"), "want a finite number"),
    (ranges.Positive, float("inf"), "want a finite number"),
    (ranges.Positive, "x", "want float"),
    (ranges.Positive, True, "want float"),
    (ranges.NotNegative, -1e-9, "0 or more"),
    (ranges.Probability, 1.0, ""),
    (ranges.Probability, 1.01, "in [0, 1]"),
    (ranges.BelowOne, 1.0, "in [0, 1)"),
    (ranges.Share, 0.0, "in (0, 1]"),
    (ranges.Count, 0, "1 or more"),
    (ranges.Count, 1.0, "want int"),
    (ranges.OrNone, 0, ""),
    (Annotated[int, ranges.Range(-1)], -2, "-1 or more"),
    (Annotated[float, ranges.Range(high=0, open_high=True)], 0, "below 0"),
    (tuple[ranges.Count, ...], (3, 0), "every value 1 or more"),
    (tuple[ranges.Count, ...], 0, "want a tuple of int 1 or more"),
    (tuple[ranges.Count, ...], 7, ""),
    (tuple[ranges.Count, ...], (3, "x"), "want a tuple of int 1 or more"),
    (tuple[float, float], 0.5, "want a tuple (float, float)"),
    (tuple[float, float], (0.5,), "want a tuple (float, float)"),
    (ranges.Count | tuple[ranges.Count, ranges.Count], (4, 8), ""),
    (ranges.Count | tuple[ranges.Count, ranges.Count], 0, "1 or more"),
    (Literal["a", "b"], "c", "want one of a, b"),
    (Literal[1, 2], True, "want one of 1, 2"),
    (bool, 1, "want bool"),
]


@pytest.mark.parametrize("annotation, value, fault", CASES)
def test_what_is_wrong_with_a_value(annotation, value, fault):
    assert ranges.fault(annotation, value) == fault


def test_values_become_what_the_annotation_says():
    assert ranges.convert(tuple[ranges.Positive, ...], 2) == (2.0,)
    assert ranges.convert(tuple[ranges.Count, ...], [1, 2]) == (1, 2)
    assert isinstance(ranges.convert(ranges.Positive, 1), float)
    assert ranges.convert(int | tuple[int, int], [3, 4]) == (3, 4)
