"""Which values a config key accepts, said once beside the field that has them.

    lr: ranges.Positive
    k: tuple[ranges.Count, ...] = (20,)
    momentum: Annotated[float, ranges.Range(0, 1, open_high=True)] = 0.9

`config.section` reads them from the annotations; a section's `check` is left with what
several keys must agree on.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

_UNIONS = (types.UnionType, typing.Union)
LARGEST = 3.4028234e38  # That float32, in which everything is computed, holds.


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; an open end is not among them.

    Attributes:
        hint: what to do about numbers outside.
    """

    low: float = float("-inf")
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False
    hint: str = ""

    def __contains__(self, value) -> bool:
        """Return whether a number is allowed."""
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        """Return the range in words: "above 0", "0 or more", "in [0, 1)"."""
        low, high = f"{self.low:g}", f"{self.high:g}"
        if self.high == float("inf"):
            return f"above {low}" if self.open_low else f"{low} or more"
        if self.low == float("-inf"):
            return f"below {high}" if self.open_high else f"{high} or less"
        within = f"in {'[('[self.open_low]}{low}, {high}{'])'[self.open_high]}"
        return f"{within}; {self.hint}" if self.hint else within


Positive = Annotated[float, Range(0, open_low=True)]
NotNegative = Annotated[float, Range(0)]
Probability = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, open_high=True)]  # A share that leaves some.
Share = Annotated[float, Range(0, 1, open_low=True)]  # A share that is not nothing.
Count = Annotated[int, Range(1)]
OrNone = Annotated[int, Range(0)]  # 0 is none, all or off, as the key says.


def in_order(section: object, *keys: str) -> Iterator[str]:
    """Yield what is wrong with pairs (smallest, largest) of a section."""
    for key in keys:
        low, high = getattr(section, key)
        if low > high:
            yield f"{key}={(low, high)}: smallest <= largest"


def fault(annotation: Any, value: Any) -> str:
    """Return what is wrong with a value for an annotation, or "".

    One value stands for a tuple of one, where any number of them is wanted; an int for
    a float.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        found = fault(args[0], value)
        return found or "".join(str(r) for r in args[1:] if value not in r)
    if origin in _UNIONS:
        each = [fault(arg, value) for arg in args]
        near = [text for text in each if not text.startswith("want ")]
        return "" if "" in each else (near or [_want(annotation)])[0]
    if origin is tuple:
        return _tuple_fault(annotation, args, value)
    if origin is Literal:
        right = value in args and not isinstance(value, bool)
    elif annotation is Any:
        right = True
    elif isinstance(value, bool):
        right = annotation is bool
    elif annotation is float:
        right = isinstance(value, int | float)
        if right and (text := beyond(value)):
            return text
    else:
        right = isinstance(annotation, type) and isinstance(value, annotation)
    return "" if right else _want(annotation)


def beyond(value: Any) -> str:
    """Return why a number, or one inside of a value, cannot be computed with, or ""."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return next(filter(None, map(beyond, value)), "")
    if isinstance(value, float) and not abs(value) < float("inf"):
        return "want a finite number"
    if isinstance(value, float) and abs(value) > LARGEST:
        return f"want a number that float32 holds, up to {LARGEST:.2g}"
    large = isinstance(value, int) and abs(value) >= 2**64
    return "want a number below 2^64" if large else ""


def _tuple_fault(annotation, args, value) -> str:
    several = args[1:] == (Ellipsis,)
    if not isinstance(value, tuple | list):
        if not several:
            return _want(annotation)
        return fault(args[0], value) and _want(annotation)
    if not several and len(args) != len(value):
        return _want(annotation)
    each = args[:1] * len(value) if several else args
    found = [text for a, v in zip(each, value, strict=True) if (text := fault(a, v))]
    if any(text.startswith("want ") for text in found):
        return _want(annotation)
    return f"every value {found[0].removeprefix('every value ')}" if found else ""


def _want(annotation) -> str:
    return f"want {describe(annotation)}"


def is_one_of_several(annotation: Any, value: Any) -> bool:
    """Return whether a value is no tuple, but stands for one of the tuple wanted."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    alone = origin is tuple and args[1:] == (Ellipsis,)
    return alone and not isinstance(value, tuple | list) and not fault(args[0], value)


def convert(annotation: Any, value: Any) -> Any:
    """Return a value without fault as its annotation has it."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return convert(args[0], value)
    if origin in _UNIONS:
        return convert(next(arg for arg in args if not fault(arg, value)), value)
    if is_one_of_several(annotation, value):
        value = (value,)
    if origin is tuple:
        each = args[:1] * len(value) if args[1:] == (Ellipsis,) else args
        return tuple(map(convert, each, value))
    return float(value) if annotation is float else value


def describe(annotation: Any) -> str:
    """Return what a key of this type accepts, in words."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return describe(args[0]) + "".join(f" {r}" for r in args[1:])
    if origin is Literal:
        return "one of " + ", ".join(str(a) or "''" for a in args)
    if origin in _UNIONS:
        return " or ".join(map(describe, args))
    if origin is tuple:
        if args[1:] == (Ellipsis,):
            return f"a tuple of {describe(args[0])}"
        return "a tuple (" + ", ".join(map(describe, args)) + ")"
    if dataclasses.is_dataclass(annotation):
        keys = (f.name.removesuffix("_") for f in dataclasses.fields(annotation))
        return f"a section with the keys {', '.join(keys)}"
    return getattr(annotation, "__name__", str(annotation))
