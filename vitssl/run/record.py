"""config.json and versions.json: what a run was started with."""

import json
import logging

from vitssl import config, disk
from vitssl.run import notes

logger = logging.getLogger(__name__)


def write(workdir, c) -> None:
    """Write config.json and versions.json, where they are not there already."""
    _put(workdir / "config.json", config.to_json(c))
    _put(workdir / "versions.json", json.dumps(notes.versions(), indent=1))


def _put(path, text):
    """Write a file, unless it has this text: what is not written cannot be torn."""
    try:
        if path.read_bytes() == text.encode():
            return
    except OSError:
        pass  # There is none, or it may be written and not read.
    disk.write(path, text)


def say_changes(path, c) -> None:
    """Say what changed since the run was started."""
    try:
        old = config.from_json(path.read_bytes())
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", "") or e
        logger.warning("%s: damaged (%s); written anew from this command", path, why)
        return
    for line in config.differences(old, c):
        logger.warning("config changed since this run began: %s", line)
