"""A run of the past, ready to use: its objects and its newest checkpoint."""

import pathlib

from vitssl import config, errors
from vitssl.run import build, checkpoint, experiment, warmstart


def newest(workdir):
    """Return (parts, state) of a workdir's newest checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, or config.json is not its config.
        UsageError: there is no config.json.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists():
        raise errors.UsageError(f"{path}: missing; want the workdir of a run")
    parts = build.build(experiment.read(config.from_json(path.read_text())))
    directory, step = warmstart.locate(workdir)
    target = build.restore_target(parts)(step)
    return parts, checkpoint.read(directory, step, target)[0]
