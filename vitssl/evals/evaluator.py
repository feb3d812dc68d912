"""What an evaluator is: its keys, its numbers and their columns, in one class."""

import abc
import dataclasses


@dataclasses.dataclass(frozen=True)
class Evaluator(abc.ABC):
    """Measures frozen features; its fields are its keys of the config section `evals`.

    To add one: a file with a class like this, and its line in `suite.EVALS`. Keys that
    a user may set go to `suite.Evals`, too.

    Attributes:
        prefix: field `k` is the key `<prefix>k` of the section.
        labelled: whether it needs labels; without them it is left out.
        several: whether, if it does, it can also have "labels" [M, K] of 0 and 1 in
            their place, where images have several labels or none; "label" then is -1.
        columns: {pattern of a number's name: (heading, format)} of the final table;
            "top1" says that it is an accuracy over all classes, "map" the mean average
            precision of several labels. Numbers of no column
            are left to the logs.
    """

    prefix = ""
    labelled = True
    several = False
    columns = {}

    @classmethod
    def of(cls, section) -> "Evaluator":
        """Return the evaluator that a section `evals` describes."""
        names = [f.name for f in dataclasses.fields(cls)]
        return cls(**{name: getattr(section, cls.prefix + name) for name in names})

    @abc.abstractmethod
    def __call__(self, bank: dict, query: dict, classes: int) -> dict[str, float]:
        """Return the numbers of `query`; `bank` is what a classifier learns from.

        Args:
            bank, query: {"vector": [M, D], "label": int [M], -1 for unknown}, and
                "tokens" [M, N, D] if they were extracted, "labels" as said above.
            classes: number of classes.
        """

    def __str__(self) -> str:
        """Return how it measures, for the line below the table; "" says nothing."""
        return ""
