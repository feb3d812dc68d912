"""Logs of a run: metrics.jsonl, TensorBoard, W&B, status.json, the progress line.

Metrics of step k are read after step k + 1 is dispatched, so the device never waits
for the log. Lines hold means since the last line; the running sums are part of a
checkpoint, so a resumed run writes the same lines.
"""

import dataclasses
import json
import logging
import math
import os
import pathlib
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from typing import Literal

import jax
import numpy as np

from vitssl import disk, errors, ranges
from vitssl import progress as progress_lib
from vitssl.run import terminal

logger = logging.getLogger(__name__)

YOUNG = 3.0  # Seconds of steps whose pace is a matter of chance.


@dataclasses.dataclass(frozen=True)
class Log:
    """Config section `log`.

    Attributes:
        every_steps: a line of metrics.jsonl each so many steps; the lines that one
            sees while it trains come by time.
        tensorboard: write event files (read them with the tensorboard package).
        wandb: Weights & Biases project; "" is off. Needs the extra `[wandb]`; a run
            without it, or without a network, goes on unchanged.
        wandb_mode: offline keeps the run in WORKDIR until `wandb sync`.
        wandb_entity, wandb_group, wandb_job_type, wandb_tags: as `wandb.init` has them;
            empty is none.
        wandb_id: of the W&B run to go on with; "" is the one in WORKDIR/wandb_id, which
            is drawn when a workdir is new and stays.
        histograms: norms of gradients and parameters of every module, and at each line
            their histograms, for TensorBoard and W&B. It makes steps slower.
        nonfinite_limit: so many non-finite steps in a row end the run (exit code 5).
        stall_seconds: a step that takes longer ends the run (exit code 7); 0 is off.
        pictures: write WORKDIR/pictures/*.png at the end (crops, masks, attention,
            tokens, curves ...), as `vitssl pictures WORKDIR` does.
        profile_steps: first and last step of a profiler trace; (0, 0) is off.
    """

    every_steps: ranges.Count
    tensorboard: bool = True
    wandb: str = ""
    wandb_mode: Literal["online", "offline"] = "offline"
    wandb_entity: str = ""
    wandb_group: str = ""
    wandb_job_type: str = ""
    wandb_tags: tuple[str, ...] = ()
    wandb_id: str = ""
    histograms: bool = False
    nonfinite_limit: ranges.Count = 3
    stall_seconds: ranges.NotNegative = 1800.0
    pictures: bool = False
    profile_steps: tuple[int, int] = (0, 0)


class Writers:
    """Where scalars go. A writer that fails is dropped with one warning.

    Args:
        workdir: directory of the run.
        spec: the config section.
        step: lines of later steps are removed: they belong to work that was lost, and
            is done again. None is a run that starts: it has no lines yet.
        config: resolved config, for W&B.
        name: name of the run, for W&B.
    """

    def __init__(self, workdir, spec: Log, step: int | None, config: dict, name: str):
        workdir = pathlib.Path(workdir)
        self._path = workdir / "metrics.jsonl"
        self._last = _truncate(self._path, step)
        self._others = {}
        if spec.tensorboard:
            self._try("tensorboard", lambda: _tensorboard(workdir, step))
        if spec.wandb:
            self._try("wandb", lambda: _wandb(workdir, spec, config, name))

    def scalars(self, step: int, values: dict) -> None:
        """Write one line of metrics.jsonl and the same to the other writers."""
        line = json.dumps({"step": step, **values}) + "\n"
        if line in self._last:  # A finished run was evaluated once more.
            return
        try:
            _append(self._path, line.encode())
        except OSError as e:  # A full disk must not end the run.
            logger.warning("%s: %s; this line is lost: %s", self._path, e, line[:200])
        self._write(step, values)

    def histograms(self, step: int, values: dict) -> None:
        """Write {name: [2 + bins]} of `histograms.metrics`, not to metrics.jsonl."""
        # Those of a step that was not due, or of another line, are empty.
        if values := {k: v for k, v in values.items() if v[2:].any()}:
            self._write(step, values)

    def _write(self, step, values):
        for name in list(self._others):
            write, _ = self._others[name]
            self._guard(name, lambda write=write: write(step, values))

    def close(self) -> None:
        """Flush and close every writer."""
        for name in list(self._others):
            self._guard(name, self._others[name][1])

    def _try(self, name, open_):
        try:
            self._others[name] = open_()
        except Exception as e:  # noqa: BLE001 - a logger must not break a run.
            logger.warning("%s is off: %s", name, e)

    def _guard(self, name, call):
        try:
            call()
        except Exception as e:  # noqa: BLE001
            logger.warning("%s failed and is off from now on: %s", name, e)
            self._others.pop(name, None)


def lines(path) -> Iterator[tuple[str, dict]]:
    """Yield (line, row) of what is whole in a metrics.jsonl; the rest is left out."""
    try:
        raw = pathlib.Path(path).read_bytes()
    except OSError:
        return
    for line in raw.splitlines(keepends=True):
        try:
            row = disk.parse(line)
        except disk.Damaged:
            continue
        step = row.get("step")
        if isinstance(step, int | float) and math.isfinite(step):
            yield line.decode().rstrip("\r\n") + "\n", row


def _truncate(path: pathlib.Path, step: int | None) -> set[str]:
    """Drop lines after `step`, and torn ones; return those of `step` itself."""
    if not path.exists():
        return set()
    found = list(lines(path))
    last = max((row["step"] for _, row in found), default=0)
    lost = "no line of it can be read" if path.stat().st_size and not found else ""
    if step is None and last:
        lost = f"it reaches step {last}, of which there is no checkpoint"
    if lost:
        kept = disk.aside(path, "before")
        logger.warning("%s: %s; it begins anew, the old is %s", path, lost, kept.name)
    step = -1 if step is None else step
    kept = [line for line, row in found if row["step"] <= step]
    disk.write(path, "".join(kept))
    return {line for line, row in found if row["step"] == step}


def _append(path: pathlib.Path, line: bytes) -> None:
    """Add a line, whole or not at all: a torn one would swallow the next."""
    with path.open("ab", buffering=0) as f:
        at = os.fstat(f.fileno()).st_size
        try:
            while line:
                line = line[f.write(line) :]
        except OSError:
            os.ftruncate(f.fileno(), at)
            raise


def _tensorboard(workdir, step):
    import tensorboardX

    writer = tensorboardX.SummaryWriter(str(workdir), purge_step=step or None)

    def write(step, values):
        for key, value in values.items():
            if np.ndim(value):
                counts, edges = _bins(value)
                middle = (edges[1:] + edges[:-1]) / 2
                sums = counts @ middle, counts @ middle**2
                about = value[0], value[1], counts.sum(), *sums
                writer.add_histogram_raw(key, *about, edges[1:], counts, step)
            else:
                writer.add_scalar(key, value, step)

    return write, writer.close


def _bins(value):  # [2 + bins] -> counts [bins], edges [bins + 1]
    value = np.asarray(value, np.float64)
    return value[2:], np.linspace(value[0], value[1], len(value) - 1)


def _wandb(workdir, spec, config, name):
    import wandb

    run = wandb.init(
        project=spec.wandb,
        name=name,
        id=_wandb_id(workdir / "wandb_id", spec.wandb_id),
        entity=spec.wandb_entity or None,
        group=spec.wandb_group or None,
        job_type=spec.wandb_job_type or None,
        tags=spec.wandb_tags or None,
        dir=str(workdir),
        config=config,
        mode=spec.wandb_mode,
        resume="allow",
    )

    def write(step, values):
        shown = {
            k: wandb.Histogram(np_histogram=_bins(v)) if np.ndim(v) else v
            for k, v in values.items()
        }
        run.log(shown, step=step)

    return write, run.finish


def _wandb_id(path, given):
    """Return the W&B run of a workdir, which is kept in a file: `given`, or a new one.

    A name would not do: runs of one recipe with other seeds share it.
    """
    kept = path.read_text(errors="replace").strip() if path.exists() else ""
    chosen = given or kept or secrets.token_hex(8)
    if chosen != kept:
        disk.write(path, chosen + "\n")
    return chosen


class Metrics:
    """Collects step metrics one step late, averages them, watches for non-finite ones.

    A metric that is nan at a finite step was not measured there, and its mean is over
    the other steps.

    Args:
        spec: the config section.
        state: what `state` returned before the checkpoint; {} for a fresh run.
    """

    def __init__(self, spec: Log, state: dict):
        self._spec = spec
        self._pending = None
        self.sums = dict(state.get("sums", {}))
        self.unmeasured = dict(state.get("unmeasured", {}))  # Steps, by metric.
        self.count = int(state.get("count", 0))
        self.nonfinite = int(state.get("nonfinite", 0))
        self.in_a_row = int(state.get("in_a_row", 0))
        self.last, self.histograms = {}, {}

    def push(self, step: int, metrics, ids=None) -> None:
        """Hand over the device metrics of `step`, and read those of the step before.

        Args:
            step: 0-based.
            metrics: on the device: a dict or `step.Metrics` of scalars, and of arrays
                that are `histograms`.
            ids: sample ids of the batch [b], for the report of a non-finite step.

        Raises:
            NonFiniteError: too many non-finite steps in a row.
        """
        previous, self._pending = self._pending, (step, metrics, ids)
        if previous is not None:
            self._read(*previous)

    def drain(self) -> None:
        """Read what is pending (before a checkpoint, a log line, or the end)."""
        previous, self._pending = self._pending, None
        if previous is not None:
            self._read(*previous)

    def _read(self, step, metrics, ids):
        found = dict(jax.device_get(metrics))
        self.histograms = {}
        values = {k: float(v) for k, v in found.items() if not np.ndim(v)}
        self.last = values
        if values["nonfinite"]:
            self.nonfinite += 1
            self.in_a_row += 1
            logger.warning(
                "step %d: non-finite loss or gradient (loss %s, gradient norm %s); the "
                "update was skipped (%d so far); samples %s",
                step,
                values["loss"],
                values["grad_norm"],
                self.nonfinite,
                None if ids is None else np.asarray(ids).tolist(),
            )
            if self.in_a_row >= self._spec.nonfinite_limit:
                raise errors.NonFiniteError(
                    f"step {step}: {self.in_a_row} non-finite steps in a row; the last "
                    "finite state is saved. Try a lower optim.lr, optim.clip_norm=1.0, "
                    "or precision=float32"
                )
            return
        self.histograms = {k: v for k, v in found.items() if np.ndim(v)}
        self.in_a_row = 0
        self.count += 1
        for key, value in values.items():
            if math.isnan(value):
                self.unmeasured[key] = self.unmeasured.get(key, 0) + 1
            else:
                self.sums[key] = self.sums.get(key, 0.0) + value

    def means(self) -> dict:
        """Return the means since the last call and start anew."""
        means = self.so_far()
        self.sums, self.unmeasured, self.count = {}, {}, 0
        return means

    def so_far(self) -> dict:
        """Return the means since `means` was called."""
        counts = {k: self.count - self.unmeasured.get(k, 0) for k in self.sums}
        means = {k: v / counts[k] for k, v in self.sums.items()}
        means.pop("nonfinite", None)
        means["nonfinite_steps"] = self.nonfinite
        return means

    def state(self) -> dict:
        """Return what a checkpoint must hold for the next line to be the same."""
        return {
            # A copy: it is written in the background while the next steps add to it.
            "sums": dict(self.sums),
            "unmeasured": dict(self.unmeasured),
            "count": self.count,
            "nonfinite": self.nonfinite,
            "in_a_row": self.in_a_row,
        }


@dataclasses.dataclass
class Clock:
    """Times of a run: pace, waiting for data, pauses for evaluation and saving.

    Attributes:
        total_steps: steps of the whole run.
        images_per_step: global batch size.
        flops_per_step: of all devices together; 0.0 if unknown.
        peak: FLOP/s of all devices together; 0.0 if unknown.
        device_count: number of devices.
    """

    total_steps: int
    images_per_step: int
    device_count: int
    flops_per_step: float = 0.0
    peak: float = 0.0
    _start: float = dataclasses.field(default_factory=time.perf_counter)
    _steps: int = 0
    _waited: float = 0.0
    _paused: float = 0.0
    _last: dict = dataclasses.field(default_factory=dict)

    def restart(self) -> None:
        """Begin a new interval."""
        self._start = time.perf_counter()
        self._steps, self._waited, self._paused = 0, 0.0, 0.0

    def step(self, waited: float) -> None:
        """Count one step that waited so many seconds for its batch."""
        self._steps += 1
        self._waited += waited

    def pause(self, seconds: float) -> None:
        """Leave out time spent beside training (evaluation, saving, compiling)."""
        self._paused += seconds

    def read(self, step: int) -> dict:
        """Return the figures of the interval, and start the next."""
        self._last = self._figures(step)
        self.restart()
        return self._last

    def figures(self, step: int) -> dict:
        """Return the figures of the interval; of one of few seconds, of the last."""
        if self._seconds() >= YOUNG or not self._last:
            return self._figures(step)
        left = (self.total_steps - step) * self._last["time/step_seconds"]
        return self._last | {"time/eta_seconds": left}

    def _seconds(self) -> float:
        return max(1e-9, time.perf_counter() - self._start - self._paused)

    def _figures(self, step):
        seconds = self._seconds()
        each = seconds / max(1, self._steps)
        rate = self.images_per_step / each
        figures = {
            "time/step_seconds": each,
            "time/images_per_second": rate,
            "time/images_per_second_per_device": rate / self.device_count,
            "time/data_wait_percent": 100 * self._waited / seconds,
            "time/eta_seconds": (self.total_steps - step) * each,
        }
        if self.flops_per_step and self.peak:
            figures["time/mfu_percent"] = 100 * self.flops_per_step / each / self.peak
        return figures


def progress(step: int, total: int, values: dict) -> str:
    """Return the progress line of one interval."""
    parts = [f"{step:>{len(str(total))}}/{total}"]
    if "loss" in values:
        parts.append(f"loss {values['loss']:.4f}")
    if "lr" in values:
        parts.append(f"lr {values['lr']:.2e}")
    parts.append(f"{values['time/images_per_second_per_device']:.0f} img/s/device")
    if "time/step_seconds" in values:
        parts.append(f"{1e3 * values['time/step_seconds']:.0f} ms/step")
    cut = len("tokens/")
    counts = [f"{k[cut:]} {v:.0f}" for k, v in values.items() if k[:cut] == "tokens/"]
    if counts:
        parts.append(f"tokens: {', '.join(counts)}")
    parts.append(f"data wait {values['time/data_wait_percent']:.0f} %")
    if "time/mfu_percent" in values:
        parts.append(f"MFU {values['time/mfu_percent']:.1f} %")
    if values.get("nonfinite_steps"):
        parts.append(f"skipped {values['nonfinite_steps']}")
    parts.append(f"ETA {duration(values['time/eta_seconds'])}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Return 5400.0 as "1h30m", 90.0 as "1m30s", 9.0 as "9s"."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(int(round(seconds)), 60)
    h, m = divmod(minutes, 60)
    if h:
        return f"{h}h{m:02d}m"
    return f"{m}m{s:02d}s" if m else f"{s}s"


def write_status(workdir, **values) -> None:
    """Write status.json: what the run is doing, for people and schedulers.

    A failure to write is not the run's.
    """
    path = pathlib.Path(workdir) / "status.json"
    now = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
    values = {**now, **values}
    try:
        disk.write(path, json.dumps(values, indent=1, default=_plain) + "\n")
    except OSError as e:
        logger.warning("%s: %s", path, e)


def _plain(value):
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return str(value)


def to_terminal(verbose: bool = True) -> None:
    """Send the package's log records to standard output; see `terminal`."""
    for stream in (sys.stdout, sys.stderr):
        # A path with an accent, where the locale has none, must not cost the line.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    handler = terminal.Terminal()
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("vitssl")
    package.handlers[:] = [handler]
    package.setLevel(progress_lib.BETWEEN if verbose else logging.WARNING)
    package.propagate = False
