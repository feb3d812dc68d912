"""Find the workdirs of runs and read them, without touching devices or runs."""

import dataclasses
import json
import os
import pathlib
import socket
import time

from vitssl import errors
from vitssl.pictures import curves

CONFIG, STATUS, METRICS = "config.json", "status.json", "metrics.jsonl"
# What a run of another host may be silent for before it counts as stopped.
SILENCE = 3600.0


@dataclasses.dataclass(frozen=True)
class Workdir:
    """What a run has written so far; status and versions are {} if they are absent."""

    path: pathlib.Path
    config: dict  # The resolved one, nested dicts.
    status: dict
    metrics: dict  # {metric: (steps [n], values [n])}
    versions: dict

    @property
    def name(self) -> str:
        """Return the name of the directory."""
        return self.path.resolve().name

    @property
    def step(self) -> int:
        """Return the optimizer steps that are known to be done."""
        logged = [int(steps[-1]) for steps, _ in self.metrics.values()]
        return max([int(self.status.get("step") or 0), *logged])

    @property
    def state(self) -> str:
        """Return "training", "finished", "preempted", "failed", "stalled" ...

        "stopped" is a run whose status says it trains but whose process is gone.
        """
        said = str(self.status.get("state", "unknown"))
        if said in ("starting", "training") and not self._alive():
            return "stopped"
        return said

    def _alive(self) -> bool:
        host = self.status.get("host", "")
        if host and host != socket.gethostname():
            return time.time() - float(self.status.get("time", 0.0)) < SILENCE
        try:
            os.kill(int(self.status["pid"]), 0)
        except PermissionError:
            return True  # Of another user, but there.
        except (OSError, KeyError, ValueError, TypeError):
            return False
        return True

    def last(self, metric: str) -> float | None:
        """Return the last value of a metric, or None."""
        found = self.metrics.get(metric)
        return float(found[1][-1]) if found else None


def is_workdir(path) -> bool:
    """Return whether `path` is the workdir of a run."""
    return (pathlib.Path(path) / CONFIG).is_file()


def workdir(path) -> Workdir:
    """Read one workdir.

    Raises:
        UsageError: `path` is no workdir, or its config.json is damaged.
    """
    path = pathlib.Path(path)
    if not is_workdir(path):
        what = "no such directory" if not path.exists() else "no config.json in it"
        raise errors.UsageError(
            f"{path}: {what}; want the workdir of a run, such as runs/hjepa "
            "(`vitssl runs DIR` lists those below DIR)"
        )
    config = _json(path / CONFIG)
    if not config:
        raise errors.UsageError(f"{path / CONFIG}: damaged; start the run again")
    metrics = path / METRICS
    return Workdir(
        path,
        config,
        _json(path / STATUS),
        curves.read(metrics) if metrics.is_file() else {},
        _json(path / "versions.json"),
    )


def below(directory) -> list[Workdir]:
    """Return all workdirs at or below a directory, by path.

    Raises:
        UsageError: there is no such directory, or no run in it.
    """
    root = pathlib.Path(directory)
    if not root.is_dir():
        raise errors.UsageError(f"{root}: no such directory")
    found = []
    for folder, folders, files in os.walk(root):
        if CONFIG in files:
            folders.clear()  # A run does not hold runs.
            found.append(pathlib.Path(folder))
        folders.sort()
    if not found:
        raise errors.UsageError(
            f"{root}: no run in it; a run is a directory with {CONFIG}, and is made by "
            "`vitssl train --config=configs/hjepa.py --workdir=DIR`"
        )
    return [workdir(path) for path in sorted(found)]


def _json(path) -> dict:
    """Return a JSON object, or {} if it is absent or torn."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
