"""Seconds of things that take turns (ABAB), because machines are noisy."""

import time

import numpy as np


def seconds(one, steps: int, clock=None) -> list[float]:
    """Return the seconds of each of some calls."""
    times, clock = [], clock or time.perf_counter
    for _ in range(steps):
        start = clock()
        one()
        times.append(clock() - start)
    return times


def in_turns(contenders, turns: int, steps: int, warmup=0, clock=None):
    """Return {name: [seconds of each step] of each turn} of {name: function}.

    Args:
        turns: how often each has its turn, of so many `steps`.
        warmup: calls of each before the first turn.
        clock: of the seconds; None = `time.perf_counter`.
    """
    for one in contenders.values():
        for _ in range(warmup):
            one()
    found = {name: [] for name in contenders}
    for _ in range(turns):
        for name, one in contenders.items():
            found[name].append(seconds(one, steps, clock))
    return found


def times_faster(ours, theirs) -> list[float]:
    """Return their median over ours, turn by turn."""
    pairs = zip(ours, theirs, strict=True)
    return [float(np.median(b) / np.median(a)) for a, b in pairs]
