"""What a plan of `vitssl train DIR` will take, and one that fits what is there."""

import dataclasses
import math
import time

from vitssl import errors
from vitssl.run import build, devices, memory
from vitssl.tools import own_plan

# What compiling evaluations, drawing pictures and an allocator that keeps room take of
# a CPU's memory beside a step: 0.6 GiB in the plans of 300 photographs.
BESIDE = 2**30
ROOM = 0.7  # Share of the memory that is free, which a run may take.


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run will take.

    Attributes:
        memory: peak in bytes: of the device; on a CPU, of the process.
        limit: what a run may take of it: our share of what is free, and what this
            process has by now; 0 if unknown.
        seconds: for all steps and evaluations, by two steps that were made.
    """

    memory: int
    limit: int
    seconds: float = 0.0

    @property
    def fits(self) -> bool:
        """Return whether it is within our share."""
        return not self.limit or self.memory <= self.limit


def fitted(made: own_plan.Plan) -> tuple[own_plan.Plan, build.Parts, Cost]:
    """Return a plan whose step fits the memory that is free: in parts, or smaller.

    Raises:
        OutOfMemoryError: not even one image at a time fits.
    """
    free, batch = memory.free(), 0
    here = memory.resident()
    limit = int(ROOM * free) + (here or 0) if free else 0
    while True:
        parts = build.build(made.read())
        e = memory.estimate(parts)
        # Now, since the run, too, keeps what compiling leaves behind.
        cost = Cost(_promised(parts, e, memory.resident()), limit)
        s = parts.experiment.settings
        batch = s.batch_size // s.accumulate
        if cost.fits:
            return made, parts, cost
        rest = limit - (cost.memory - e.activations)
        most = int(rest / max(1.0, e.activations / e.images)) * (batch // e.images)
        if batch <= 1 or most < 1:
            own = f" and the {memory.size(here)} of this process" if here else ""
            raise errors.OutOfMemoryError(
                f"a step of one image needs more than {memory.size(limit)}: {ROOM:.0%} "
                f"of the free {memory.size(free)}{own}; take a smaller --model or "
                "--size\n"
                f"{memory.advice(parts)}"
            )
        most = min(most, batch // 2)
        if parts.method.divisible:
            more = range(s.accumulate + 1, s.batch_size + 1)
            ways = (k for k in more if s.batch_size % k == 0)
            k = next((k for k in ways if s.batch_size // k <= most), s.batch_size)
            made = made.changed(accumulate=k)
        else:
            made = made.changed(batch_size=most)


def _promised(parts, e: memory.Estimate, here: int | None) -> int:
    """Return the peak of a run: a step, beside it what else lives at that time."""
    state = e.parameters + e.optimizer + e.extra
    total = e.total + state  # At the end the untrained network is there, too.
    if here is None:
        return total
    s = parts.experiment.settings
    # Batches ahead, images of evaluations, and what the process has by now.
    side = s.evals.image_size
    pixels = math.prod(side if isinstance(side, tuple) else (side, side))
    images = min(s.evals.cache_bytes, 2 * len(parts.source) * pixels * s.data.channels)
    return total + 10 * e.batch + images + here + BESIDE


def measured(parts: build.Parts, cost: Cost) -> Cost:
    """Return the cost with its seconds, by the pace of two steps of the run."""
    s, phase = parts.experiment.settings, parts.phase(0)
    state = parts.fresh()
    times = []
    rows = devices.batch_sharding(parts.mesh)
    stream = parts.stream(0)
    with stream:
        for _ in range(3):
            start = time.perf_counter()
            batch = devices.put(next(stream), rows)
            state, metrics = parts.compiled.get(phase, batch)(state, batch)
            float(metrics["loss"])
            times.append(time.perf_counter() - start)
    step = sum(times[1:]) / 2
    seen = (
        len(parts.source) * 1.2
    )  # Bank and test; a forward pass is a third of a step.
    every = s.evals.every_epochs * parts.run.steps_per_epoch
    rounds = 3 + (1 + parts.run.total_steps // every if every else 0)
    evaluation = rounds * seen / s.batch_size * step / 3
    return dataclasses.replace(cost, seconds=parts.run.total_steps * step + evaluation)
