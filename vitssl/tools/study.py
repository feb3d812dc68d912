"""A study: several arms of one config, several seeds each, one table.

A config becomes a study by its section `study`; arms are overrides as typed:

    c.study = dict(
        seeds=(0, 1, 2),
        arms=dict(multi=(), single=("multicrop.num_local_crops=0",)),
        columns=("knn/trained", "knn/untrained"),
    )

    c.study.first = ("configs/x.py:pretrain", "epochs=5.0")

An arm whose first word is no override is a run of another config, on the same data:
`labels=("configs/finetune_vit.py:scratch", "epochs=13.0")`; what is overridden in the
study's own config is not overridden there.

The optional keys `claims` and `gate` are judged below the table; see `judgement`.
Keys in `seeded`, such as "data.options.seed", get each run's seed, too, and those of
`then`.

The optional key `first` is a config, and overrides of it, that is run once, in
WORKDIR/first; arms start from it by the override init.from=@first. Several such runs
have names, {"teacher": ("configs/x.py",), "student": (..., "teacher.from=@teacher")},
and each may use those before it; one that no arm needs is not run. With
`first_each_seed=True` every seed has its own, in WORKDIR/first/seed<n>.

The optional key `then` is such a config too, run after every run of an arm, with its
seed and from what it made: ("configs/x.py:score", "epochs=5.0"); its values are columns
"then/<name>". Every run is an ordinary workdir, WORKDIR/<arm>/seed<n>: it resumes, and
a study that was killed goes on where it stopped.
Several processes may share one: `--share=1/2` and `--share=2/2` beside each other.
`only` names the arms to run: --config.study.only="('multi',)"; claims about others are
left out.
"""

import dataclasses
import json
import logging
import pathlib
import time

import ml_collections
import numpy as np

from vitssl import config, disk, errors
from vitssl.run import experiment
from vitssl.tools import judgement, listing

logger = logging.getLogger(__name__)

FROM = ("init", "teacher")  # Sections whose key `from` may name a run by @NAME.
TFLOP = "compute/tflop"
TOTAL = "compute/total_tflop"  # With what a run started from.
COSTS = TFLOP, TOTAL  # A study with such a column gets a picture against it.
BESIDE = "count", "masks"  # Options that change no image to test: training's; masks.
MOST = 1000  # Runs of a study.
WAIT = 5.0  # Seconds between looks for the first run of another process.


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs of a study."""

    runs: dict  # {(arm, seed): checked experiment}.
    columns: tuple[str, ...]  # Metrics of the final evaluation that the table shows.
    first: dict = dataclasses.field(default_factory=dict)  # {folder: run before arms}.
    then: dict = dataclasses.field(default_factory=dict)  # {seed: run after an arm's}.
    claims: dict = dataclasses.field(default_factory=dict)  # {name: judgement.Claim}.
    gate: judgement.Claim | None = None
    first_each_seed: bool = False

    def before(self, name: str, seed: int) -> str:
        """Return the folder of the run `@name` that an arm of a seed starts from."""
        return f"{name}/seed{seed}" if self.first_each_seed else name

    @property
    def wanted(self) -> tuple[str, ...]:
        """Return all metrics that are looked at, those of the table first."""
        judged = [*self.claims.values(), *((self.gate,) if self.gate else ())]
        more = [column for one in judged for column in one.columns]
        return tuple(dict.fromkeys((*self.columns, "minutes", *more)))


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
    arms = _chosen(study, problems)
    # One seed may be given for several: --config.study.seeds=3.
    seeds = study.seeds if isinstance(study.seeds, tuple) else (study.seeds,)
    for arm in arms:
        fault = config.folder_fault(arm)
        if arm == "first" and study.get("first", ()):
            fault = "it is the folder of study.first"
        if fault:
            problems.append(f"study.arms: an arm called {arm!r}: {fault}")
    if (count := len(arms) * len(seeds)) > MOST:
        problems.append(f"study: {count} runs; at most {MOST}")
    problems.stop()
    runs, keys = {}, ("seed", *study.get("seeded", ()))
    own = {seed: tuple(f"{key}={seed}" for key in keys) for seed in seeds}
    for arm, overrides in arms.items():
        for seed in seeds:
            try:
                runs[arm, seed] = experiment.read(_arm(base, (*overrides, *own[seed])))
            except errors.UsageError as e:
                problems.append(f"study.arms.{arm}: {e}")
                break
    claims, gate = _claims(study, arms, problems)
    _same_images(runs, claims, gate, problems)
    each = bool(study.get("first_each_seed", False))
    before = {}
    for seed in seeds if each else seeds[:1]:
        words = own[seed] if each else ()
        before[seed] = _first(study, words, runs.values(), problems)
    for (arm, seed), one in runs.items():
        there = before[seed if each else seeds[0]]
        _known(one, there, f"study.arms.{arm}", problems)
    then = {}
    if study.get("then", ()):
        spec, *overrides = study.then
        for seed in seeds:
            words = (*overrides, *own[seed], "init.from=@run")
            then[seed] = experiment.read(experiment.load(spec, words))
    problems.stop()
    plan = Plan(runs, tuple(study.columns), {}, then, claims, gate, each)
    for seed, found in before.items():
        plan.first.update({plan.before(k, seed): one for k, one in found.items()})
    return plan


def _chosen(study, problems) -> dict:
    """Return {arm: overrides} of the arms that `study.only` names, or of all."""
    only = study.get("only", ())
    only = (only,) if isinstance(only, str) and only else only
    for name in only:
        if name not in study.arms:
            there = ", ".join(study.arms)
            problems.append(f"study.only={name!r}: no such arm; there is: {there}")
    problems.stop()
    return {k: v for k, v in study.arms.items() if not only or k in only}


def _first(study, own, runs, problems) -> dict:
    """Return {name: run before `runs` that they need}, after what it starts from."""
    first = study.get("first", {})
    if not isinstance(first, ml_collections.ConfigDict):
        first = {"first": first} if first else {}
    before, left = {}, {}
    for name, (spec, *overrides) in first.items():
        fault = f"study.first.{name}: an arm has that name"
        if name in study.arms and fault not in problems:
            problems.append(fault)
        left[name] = experiment.read(experiment.load(spec, (*overrides, *own)))
    while left:  # A ConfigDict keeps no order.
        ready = [n for n, one in left.items() if before.keys() >= set(_starts(one))]
        if not ready:
            for name, one in left.items():
                _known(one, before, f"study.first.{name}", problems)
            break
        before |= {name: left.pop(name) for name in ready}
    needed = [name for one in runs for name in _starts(one)]
    for name in needed:  # Which grows by what those start from.
        needed += _starts(before[name]) if name in before else ()
    return {name: one for name, one in before.items() if name in needed}


def _arm(base, words) -> ml_collections.ConfigDict:
    """Return the config of an arm: the study's own or another one, overridden."""
    if "=" not in words[0]:
        return experiment.load(words[0], words[1:])
    copy = config.without(base)
    experiment.apply(copy, words)
    return copy


def _claims(study, arms, problems) -> tuple[dict, judgement.Claim | None]:
    """Return ({name: claim}, gate) of a study, without those of arms left out."""

    def read(key, value):
        try:
            return judgement.claim(value, tuple(study.arms))
        except ValueError as e:
            problems.append(f"study.{key}: {e}")

    claims = {k: read(f"claims.{k}", v) for k, v in study.get("claims", {}).items()}
    gate = read("gate", study.gate) if study.get("gate", ()) else None

    def has(claim):
        return claim and {claim.ahead.arm, claim.behind.arm} <= arms.keys()

    found = {k: v for k, v in claims.items() if has(v)}
    return found, gate if has(gate) else None


def _same_images(runs, claims, gate, problems):
    """Report arms that are compared and score other images."""
    settings = {arm: one.settings for (arm, _), one in runs.items()}

    def scored(arm):
        data, evals = settings[arm].data, settings[arm].evals
        options = {k: v for k, v in data.options.items() if k not in BESIDE}
        return {
            "data.source": data.source,
            "data.options": options,
            "data.test_split": evals.final_split or data.test_split,
            "evals.final_samples_test": evals.final_samples_test,
        }

    for one in [*claims.values(), *([gate] if gate else [])]:
        a, b = one.ahead.arm, one.behind.arm
        if a not in settings or b not in settings:
            continue  # Its own faults are told.
        ours, theirs = scored(a), scored(b)
        for key in (k for k in ours if ours[k] != theirs[k]):
            fault = (
                f"study.arms: {a} has {key}={ours[key]!r}, {b} {theirs[key]!r}; "
                "images that differ cannot be compared"
            )
            if fault not in problems:
                problems.append(fault)


def _starts(one) -> dict:
    """Return {NAME: section} of the sections with from=@NAME."""
    froms = ((one.config.get(s, {}).get("from", ""), s) for s in FROM)
    return {name[1:]: section for name, section in froms if name.startswith("@")}


def _known(one, before, what, problems):
    """Report a run that starts from one that is not among those before it."""
    for name, section in _starts(one).items():
        fault = f"study.first: missing; {what} has {section}.from=@{name}"
        if name not in before and fault not in problems:
            problems.append(fault)


def started_from(one, folder):
    """Return an experiment whose `from=@NAME` are the directories folder(NAME)."""
    c = config.without(one.config)
    for name, section in _starts(one).items():
        c[section]["from"] = str(folder(name))
    return experiment.read(c) if _starts(one) else one


def _check_lengths(plan: Plan) -> None:
    """Build every arm once: what only the data can tell is told before the first run.

    Not those that start from what is not made yet.

    Raises:
        UsageError: such as a warm-up that is longer than its run.
    """
    from vitssl.run import build

    problems = config.Problems()
    for arm, one in {arm: one for (arm, _), one in plan.runs.items()}.items():
        if _starts(one):
            continue
        try:
            build.build(one)
        except errors.UsageError as e:
            problems.append(f"study.arms.{arm}: {e}")
    problems.stop()


def run(
    plan: Plan, workdir, *, name: str, force_unlock: bool = False, share=(1, 1)
) -> dict:
    """Run what is not finished yet; then print the table of all, and write it.

    Args:
        force_unlock: ignore the locks of other processes on its runs.
        share: (k, n): make the runs k, k + n, k + 2 n, ... of them; the other shares
            are made by processes beside this one. What arms start from is shared
            too; who needs it waits for it.

    Returns:
        {arm: {column: [value of each seed]}}; also WORKDIR/study.json and study.md.
        Of what is finished, while other shares are not.
    """
    from vitssl.run import devices, guard, loop

    devices.start()
    workdir = pathlib.Path(workdir)
    guard.writable(workdir, ("study.json", "study.md", "study.png"), ())
    number, count = share
    home = workdir.resolve()
    _check_lengths(plan)

    def ready(one, seed):
        """Return it with the directories it starts from, once they are made."""
        for start in _starts(one):
            while not _finished(workdir / plan.before(start, seed)):
                logger.info("  waiting for %s", workdir / plan.before(start, seed))
                time.sleep(WAIT)
        return started_from(one, lambda start: home / plan.before(start, seed))

    def total(values, one, seed):
        """Return its values and the compute of it and of all that it started from."""
        starts = [_values(workdir / plan.before(s, seed)) for s in _starts(one)]
        spent = [values.get(TFLOP), *(v.get(TOTAL) for v in starts)]
        return values if None in spent else values | {TOTAL: sum(spent)}

    for i, (called, one) in enumerate(plan.first.items()):
        before = workdir / called
        if i % count == number - 1 and not _finished(before):
            seed = one.settings.seed
            made = loop.run(
                ready(one, seed), before, name=called, force_unlock=force_unlock
            )
            _finish(before, total(made, one, seed))
    # All arms of a seed before the next seed: what is there can be compared.
    order = sorted(plan.runs, key=lambda run: run[1])
    for i in range(number - 1, len(order), count):
        arm, seed = order[i]
        directory = workdir / arm / f"seed{seed}"
        logger.info("\nstudy %s: run %d of %d", name, i + 1, len(order))
        if _finished(directory):
            logger.info("  %s is finished", directory)
            continue
        start = time.perf_counter()
        own = dict(name=f"{arm}-{seed}", force_unlock=force_unlock)
        one = plan.runs[arm, seed]
        values = total(loop.run(ready(one, seed), directory, **own), one, seed)
        if seed in plan.then:
            made = home / arm / f"seed{seed}"
            last = started_from(plan.then[seed], lambda _, made=made: made)
            found = loop.run(last, directory / "then", **own)
            values = values | {f"then/{key}": v for key, v in found.items()}
        minutes = (time.perf_counter() - start) / 60
        _finish(directory, {**values, "minutes": minutes})
    return _results(plan, workdir)


def _finished(directory) -> bool:
    return _values(directory) is not None


def _values(directory) -> dict | None:
    """Return the values of a finished run, or None; torn ones are made again."""
    try:
        return disk.read(directory / "final.json")
    except disk.Damaged:
        return None


def _finish(directory, values) -> None:
    """Write the values of a finished run, whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    disk.write(directory / "final.json", json.dumps(values, indent=1))


def _results(plan, workdir) -> dict:
    """Return the values of all finished runs; write and show their table."""
    found, columns = {}, (*plan.columns, "minutes")
    missing = 0
    for arm, seed in plan.runs:
        values = _values(workdir / arm / f"seed{seed}")
        missing += values is None
        values = values or {}
        for column in plan.wanted:
            value = values.get(column)
            value = value if isinstance(value, int | float) else None
            found.setdefault(arm, {}).setdefault(column, []).append(value)
    text = table(found, columns)
    if judged := judgement.text(found, plan.claims, plan.gate):
        text = f"{text}\n\n{judged}"
    logger.info("\n%s", text)
    if missing:
        logger.info("%d of %d runs are not finished yet", missing, len(plan.runs))
    disk.write(workdir / "study.json", json.dumps(found, indent=1))
    disk.write(workdir / "study.md", text + "\n")
    cost = next((c for c in plan.columns if c in COSTS), "")
    if cost and not missing:
        from vitssl.pictures import tradeoff

        score = next(c for c in plan.columns if c != cost)
        tradeoff.arms(found, cost, score, path=workdir / "study.png")
    return found


def table(found: dict, columns) -> str:
    """Return a Markdown table: mean, spread over seeds, and every seed's value."""
    rows = [[arm, *(_cell(v.get(c, [])) for c in columns)] for arm, v in found.items()]
    return listing.text(["arm", *columns], rows)


def _cell(values) -> str:
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    each = ", ".join(f"{v:.3g}" for v in values)
    if len(values) < 2:
        return f"{values[0]:.3g} ({each})"
    # Equal values have a spread of a rounding error.
    spread = np.std(values, ddof=1) if np.ptp(values) else 0.0
    return f"{np.mean(values):.3g} ± {spread:.2g} ({each})"
