"""A study: several arms of one config, several seeds each, one table.

A config becomes a study by its section `study`; arms are overrides as typed:

    c.study = dict(
        seeds=(0, 1, 2),
        arms=dict(multi=(), single=("multicrop.num_local_crops=0",)),
        columns=("knn/trained", "knn/untrained"),
    )

    c.study.first = "configs/x.py:pretrain"

The optional key `first` is a config that is run once, in WORKDIR/first; arms start from
it by the override init.from=@first. Every run is an ordinary workdir,
WORKDIR/<arm>/seed<n>: it resumes, and a study that was killed goes on where it stopped.
"""

import dataclasses
import json
import logging
import pathlib
import time

import ml_collections
import numpy as np

from vitssl import config, errors, experiment

logger = logging.getLogger(__name__)

FIRST = "@first"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs of a study.

    Attributes:
        runs: {(arm, seed): checked experiment}.
        columns: metrics of the final evaluation that the table shows.
        first: what is run before all others, or None.
    """

    runs: dict
    columns: tuple[str, ...]
    first: experiment.Experiment | None = None


def read(c: ml_collections.ConfigDict) -> Plan:
    """Check every run of a study before the first one starts.

    Raises:
        UsageError: every fault of every arm, each with the arm's name.
    """
    study, base = c.study, config.without(c, "study")
    problems = config.Problems()
    for key in ("seeds", "arms", "columns"):
        if key not in study:
            problems.append(f"study.{key}: missing")
    problems.stop()
    runs = {}
    for arm, overrides in study.arms.items():
        for seed in study.seeds:
            copy = config.without(base)
            faults = config.Problems()
            config.override(copy, (*overrides, f"seed={seed}"), faults)
            try:
                faults.stop()
                runs[arm, seed] = experiment.read(copy)
            except errors.UsageError as e:
                problems.append(f"study.arms.{arm}: {e}")
                break
    first = None
    if study.get("first", ""):
        first = experiment.read(experiment.load(study.first))
    elif any(run.settings.init.from_ == FIRST for run in runs.values()):
        problems.append(f"study.first: missing; arms have init.from={FIRST}")
    problems.stop()
    return Plan(runs, tuple(study.columns), first)


def started_from(one, directory):
    """Return an experiment whose init.from=@first names the directory of that run."""
    if one.settings.init.from_ != FIRST:
        return one
    init = dataclasses.replace(one.settings.init, from_=str(directory))
    c = config.without(one.config)
    c.init["from"] = str(directory)
    settings = dataclasses.replace(one.settings, init=init)
    return dataclasses.replace(one, settings=settings, config=c)


def run(plan: Plan, workdir, *, name: str, force_unlock: bool = False) -> dict:
    """Run what is not finished yet, print the table, and write it.

    Returns:
        {arm: {column: [value of each seed]}}; also WORKDIR/study.json and study.md.
    """
    from vitssl import devices, train

    devices.start()
    workdir = pathlib.Path(workdir)
    found = {}
    before = workdir / "first"
    if plan.first is not None and not (before / "final.json").exists():
        values = train.run(plan.first, before, name="first", force_unlock=force_unlock)
        (before / "final.json").write_text(json.dumps(values, indent=1))
    for i, ((arm, seed), one) in enumerate(plan.runs.items()):
        directory = workdir / arm / f"seed{seed}"
        logger.info("\nstudy %s: run %d of %d", name, i + 1, len(plan.runs))
        start = time.perf_counter()
        path = directory / "final.json"
        if path.exists():
            values = json.loads(path.read_text())
            logger.info("  %s is finished", directory)
        else:
            values = train.run(
                started_from(one, before.resolve()),
                directory,
                name=f"{arm}-{seed}",
                force_unlock=force_unlock,
            )
            values = {**values, "minutes": (time.perf_counter() - start) / 60}
            path.write_text(json.dumps(values, indent=1))
        for column in (*plan.columns, "minutes"):
            found.setdefault(arm, {}).setdefault(column, []).append(values.get(column))
    text = table(found, (*plan.columns, "minutes"))
    logger.info("\n%s", text)
    (workdir / "study.json").write_text(json.dumps(found, indent=1))
    (workdir / "study.md").write_text(text + "\n")
    return found


def table(found: dict, columns) -> str:
    """Return a Markdown table: mean, spread over seeds, and every seed's value."""
    lines = ["| arm | " + " | ".join(columns) + " |"]
    lines.append("|" + " --- |" * (1 + len(columns)))
    for arm, values in found.items():
        cells = [_cell(values.get(c, [])) for c in columns]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values) -> str:
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    each = ", ".join(f"{v:.3g}" for v in values)
    spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
    return f"{np.mean(values):.3g}{spread} ({each})"
