"""Find the workdirs of runs and read them, without touching devices or runs.

What lies in them may be torn, damaged or somebody else's: what is no value of its kind
is taken as absent, and texts are made printable where they are read.
"""

import dataclasses
import json
import logging
import os
import pathlib
import socket
import time

from vitssl import errors
from vitssl.data import decode
from vitssl.pictures import curves

logger = logging.getLogger("vitssl.tools")

CONFIG, STATUS, METRICS = "config.json", "status.json", "metrics.jsonl"
# What a run of another host may be silent for before it counts as stopped.
SILENCE = 3600.0
MAX_BYTES, MAX_DEPTH = 2**22, 20  # Of a JSON file; ours have some kilobytes.
# What a status says is a text, or a number from 0 that a float holds exactly.
_TEXTS, _LARGEST = ("state", "error", "host"), 2**53


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

    def section(self, name: str) -> dict:
        """Return a section of the config, {} if there is none."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def step(self) -> int:
        """Return the optimizer steps that are known to be done."""
        logged = [int(steps[-1]) for steps, _ in self.metrics.values()]
        return max([int(self.status.get("step") or 0), *logged])

    @property
    def per_epoch(self) -> float:
        """Return the steps of an epoch; 0 where that is not known."""
        total, epochs = self.status.get("total_steps"), self.config.get("epochs")
        told = self.status.get("steps_per_epoch")
        if told or not total or self.config.get("steps"):
            return float(told or 0)
        return total / epochs if isinstance(epochs, int | float) and epochs else 0.0

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
        except (OSError, KeyError, OverflowError):
            return False
        return True

    def last(self, metric: str) -> float | None:
        """Return the last value of a metric, or None."""
        found = self.metrics.get(metric)
        return float(found[1][-1]) if found else None


def is_workdir(path) -> bool:
    """Return whether `path` is the workdir of a run."""
    return os.path.isfile(pathlib.Path(path) / CONFIG)


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
    try:
        config = _json(path / CONFIG)
    except ValueError as e:
        raise errors.UsageError(f"{e}; start the run again, or leave it out") from e
    return Workdir(
        path,
        config,
        _status(lenient(path / STATUS)),
        _metrics(path / METRICS),
        {key: str(value) for key, value in lenient(path / "versions.json").items()},
    )


def below(directory) -> list[Workdir]:
    """Return all workdirs at or below a directory, by path.

    One that is damaged is left out with a line.

    Raises:
        UsageError: there is no such directory, or no sound run in it.
    """
    root = pathlib.Path(directory)
    if not root.is_dir():
        raise errors.UsageError(f"{root}: no such directory")
    found = []
    for folder, folders, files in os.walk(root):
        if CONFIG in files and is_workdir(folder):
            folders.clear()  # A run does not hold runs.
            found.append(pathlib.Path(folder))
        folders.sort()
    if not found:
        raise errors.UsageError(
            f"{root}: no run in it; a run is a directory with {CONFIG}, and is made by "
            "`vitssl train --config=configs/hjepa.py --workdir=DIR`"
        )
    runs = []
    for path in sorted(found):
        try:
            runs.append(workdir(path))
        except errors.UsageError as e:
            if len(found) == 1:
                raise
            logger.warning("left out: %s", e)
    if not runs:
        raise errors.UsageError(f"{root}: all of its {len(found)} runs are damaged")
    return runs


def _json(path) -> dict:
    """Return a JSON object with printable texts.

    Raises:
        ValueError: it cannot be read, or is no such thing; the message names it.
    """
    data = decode.contents(path, MAX_BYTES)
    try:
        value = _plain(json.loads(data))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{decode.printable(path)}: damaged ({errors.told(e)})") from e
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{decode.printable(path)}: damaged (no object)")
    return value


def lenient(path) -> dict:
    """Return a JSON object, or {} if it is absent, torn or damaged."""
    try:
        return _json(path)
    except ValueError:
        return {}


def _plain(value, depth=0):
    """Return a value of JSON with printable texts and no depths."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        return {curves.printable(k): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v, depth + 1) for v in value]
    return curves.printable(value) if isinstance(value, str) else value


def _status(found) -> dict:
    """Return what a status says in values of the right kind."""

    def right(key, value):
        if key in _TEXTS:
            return isinstance(value, str)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and 0 <= value < _LARGEST

    return {key: value for key, value in found.items() if right(key, value)}


def _metrics(path) -> dict:
    """Return the curves of a metrics.jsonl, {} if it is absent or nobody may read it.

    A pipe would be waited for.
    """
    try:
        return curves.read(path) if path.is_file() else {}
    except OSError as e:
        logger.warning("%s: cannot be read: %s", decode.printable(path), e.strerror)
        return {}
