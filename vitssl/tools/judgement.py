"""Verdicts of a study: yes, no or undecided, from pairs of seeds.

A claim is written down before the runs, with the difference that matters:

    c.study.claims = dict(
        crops=(("multi", "final/trained/knn/top1"),
               ("single", "final/trained/knn/top1"), 0.03),
    )

arm and column that shall be ahead, arm and column they are compared with, and by how
much. The optional `study.gate` is one more: what the same network reaches with labels
against a trivial baseline. A world where it fails says nothing about methods.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from vitssl.tools import listing

WANTED = "want ((ARM, COLUMN), (ARM, COLUMN), smallest difference that matters)"


class Side(NamedTuple):
    """The values of one column of one arm."""

    arm: str
    column: str

    def __str__(self) -> str:
        """Return "multi final/trained/knn/top1"."""
        return f"{self.arm} {self.column}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """That one side is ahead of another, by a difference that matters."""

    ahead: Side
    behind: Side
    matters: float

    @property
    def columns(self) -> tuple[str, str]:
        """Return the columns it looks at."""
        return self.ahead.column, self.behind.column

    def judge(self, found: dict) -> "Verdict":
        """Return the verdict on {arm: {column: [value of each seed, or None]}}."""
        sides = self.ahead, self.behind
        a, b = (found.get(s.arm, {}).get(s.column, ()) for s in sides)
        pairs = [(x, y) for x, y in zip(a, b, strict=False) if None not in (x, y)]
        return Verdict(np.array([x - y for x, y in pairs], float), self.matters)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the differences of paired seeds say.

    Attributes:
        differences: [n], one per seed.
        matters: smallest difference that matters.
    """

    differences: np.ndarray
    matters: float

    @property
    def mean(self) -> float:
        """Return the mean difference."""
        return float(self.differences.mean()) if len(self.differences) else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Return the mean less and plus two standard errors; nan of one seed."""
        n = len(self.differences)
        half = 2 * self.differences.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
        return self.mean - half, self.mean + half

    @property
    def word(self) -> str:
        """Return the verdict.

        "yes": surely above 0, and on average what matters. "no": surely less than what
        matters. Else "undecided": more seeds would tell.
        """
        low, high = self.interval
        if high < self.matters:
            return "no"
        if low > 0 and self.mean >= self.matters:
            return "yes"
        return "undecided"

    def __str__(self) -> str:
        """Return "+0.051 [+0.031, +0.071]"."""
        low, high = self.interval
        return f"{self.mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def claim(value, arms) -> Claim:
    """Return the claim that a config states.

    Raises:
        ValueError: why it is none.
    """
    try:
        (first, a), (second, b), matters = value
    except (TypeError, ValueError):
        raise ValueError(f"{value!r}: {WANTED}") from None
    for arm in (first, second):
        if arm not in arms:
            raise ValueError(f"no arm {arm!r}; there is: {', '.join(arms)}")
    if type(matters) not in (int, float) or not 0 <= matters < math.inf:
        raise ValueError(f"{matters!r}: the difference that matters is 0 or more")
    if not all(isinstance(column, str) for column in (a, b)):
        raise ValueError(f"{value!r}: {WANTED}")
    return Claim(Side(first, a), Side(second, b), float(matters))


def text(found: dict, claims: dict, gate: Claim | None = None) -> str:
    """Return the verdicts in Markdown: the gate in a sentence, the claims in a table.

    Args:
        found: {arm: {column: [value of each seed, or None]}}.
        claims: {name: claim}.
        gate: what makes the world fit for evidence.
    """
    lines, fit = [], "yes"
    if gate:
        seen = gate.judge(found)
        fit = seen.word
        what = f"{gate.ahead} less {gate.behind}: {seen}, wanted {gate.matters:g}"
        says = {
            "yes": "This world is fit for evidence",
            "no": "This world is NOT fit for evidence: the same network does not learn "
            "it from labels either, so no difference below is about a method",
            "undecided": "Whether this world is fit for evidence is undecided",
        }
        lines += [f"{says[fit]} ({what}).", ""]
    if claims:
        headings = ["claim", "ahead", "of", "matters", "difference", "seeds", "verdict"]
        rows = []
        for name, one in claims.items():
            seen = one.judge(found)
            word = seen.word if fit == "yes" else "undecided (see the gate)"
            cells = [
                name,
                str(one.ahead),
                str(one.behind),
                f"{one.matters:g}",
                str(seen),
            ]
            rows.append([*cells, str(len(seen.differences)), word])
        lines += [listing.text(headings, rows), ""]
        lines += ["Differences of paired seeds, with two standard errors."]
    return "\n".join(lines)
