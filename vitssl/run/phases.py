"""What each phase of a run cost: steps, seconds, FLOPs. One row per kind of step."""

import time


class Phases:
    """Adds up the steps and the time of every phase.

    Evaluation, saving and waiting for a compilation are left out. A phase that is
    entered again goes on in its row, in a resumed run too.

    Args:
        rows: from `state` of an earlier part of the run.
    """

    def __init__(self, rows=()):
        self.rows = [dict(row) for row in rows]
        self._row = None
        self._since = None

    def enter(self, at: int, frozen: int, flops: float) -> None:
        """Begin the phase of step `at`.

        Args:
            at: 0-based step.
            frozen: number of leaves that do not train.
            flops: of one step, by XLA's count.
        """
        self._settle()
        self._row = self._of(at, frozen, flops)
        self._since = time.perf_counter()

    def beside(self, at: int, frozen: int, flops: float) -> None:
        """Count what was run beside step `at`, whose time is that of the step."""
        self._of(at, frozen, flops)["steps"] += 1

    def _of(self, at, frozen, flops):
        """Return the row of a kind of steps."""
        kind = (frozen, flops)
        same = [r for r in self.rows if (r["frozen"], r["flops"]) == kind]
        # Batches of several shapes take turns: a row for each turn would be too many.
        if not same:
            same = [
                {"from": at, "frozen": frozen, "flops": flops, "steps": 0, "seconds": 0}
            ]
            self.rows += same
        return same[0]

    def step(self) -> None:
        """Count one step of the present phase."""
        self._row["steps"] += 1

    def pause(self, seconds: float) -> None:
        """Leave out time spent beside training."""
        if self._since is not None:
            self._since += seconds

    def leave(self) -> None:
        """End the present phase: what follows is no training."""
        self._settle()
        self._since = None

    def _settle(self):
        if self._since is not None:
            now = time.perf_counter()
            self._row["seconds"] += max(0.0, now - self._since)
            self._since = now

    def state(self) -> list:
        """Return what a checkpoint must hold."""
        self._settle()
        return [dict(row) for row in self.rows]

    def totals(self) -> dict[str, float]:
        """Return {"time/train_seconds", "compute/tflop"} of all steps so far."""
        self._settle()
        return {
            "time/train_seconds": float(sum(r["seconds"] for r in self.rows)),
            "compute/tflop": sum(r["steps"] * r["flops"] for r in self.rows) / 1e12,
        }

    def table(self) -> str:
        """Return one line per phase; "" for a run with a single one."""
        self._settle()
        if len(self.rows) < 2:
            return ""
        head = ("from step", "frozen", "steps", "ms/step", "GFLOP/step", "of first")
        first = self.rows[0]["flops"] or 1.0
        rows = [head, tuple("-" * len(h) for h in head)]
        for r in self.rows:
            each = 1e3 * r["seconds"] / max(1, r["steps"])
            rows.append(
                (
                    str(r["from"]),
                    str(r["frozen"]),
                    str(r["steps"]),
                    f"{each:.1f}",
                    f"{r['flops'] / 1e9:.3f}",
                    f"{r['flops'] / first:.1%}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "| " + " | ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) + " |"
            for r in rows
        ]
        return "\n".join(lines)
