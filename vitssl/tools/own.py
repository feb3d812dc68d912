"""`vitssl train DIR`: a folder of images, a recipe that fits this machine, a run.

    vitssl train DIR [--method=NAME] [--model=NAME] [--weights=WEIGHTS] [--size=N]
        [--epochs=N] [--steps=N] [--batch_size=N] [--labels=none] [--workdir=DIR]
        [--dry_run] [--config.KEY=VALUE ...]

DIR holds images at any depth, with or without class folders or train, val and test.
What is found there and what follows from it is printed first, as the long command that
does the same. The same command again goes on where a run stopped.

  --method      localmim (default), mae, hjepa, dino, simclr: without labels;
                distill: without labels, from a teacher (--weights);
                finetune, parts: with the labels of class folders
  --model       vit_mini, vit_ti, vit_s, vit_b, vit_l, a patch may follow (vit_s16); or
                hvit (simclr and finetune)
  --weights     a run's workdir, or what `vitssl convert import` wrote: where localmim,
                hjepa and finetune start from, or distill's teacher
  --size        side of the training images in pixels
  --labels      none: sub-folders are no classes; or a table of labels, *.csv, *.tsv or
                *.parquet (one that lies in DIR is found): a column of files and one of
                labels, several of them by "|", or one column of 0 and 1 for each
  --dry_run     look, plan and measure; no training
"""

import dataclasses
import pathlib
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from vitssl import config, disk, errors
from vitssl.data import decode, survey
from vitssl.run import devices, log, loop, memory
from vitssl.tools import notebook, own_cost
from vitssl.tools.own_plan import METHODS, Asked, plan


def run(
    asked: Asked, *, dry_run: bool = False, show: Callable[[str], Any] = print
) -> dict[str, Any]:
    """Look at a folder, plan, train and evaluate; return the final metrics.

    Raises:
        VitsslError: one line of what is wrong; see `errors`.
    """
    asked.check()
    found = survey.look(asked.data, labels=asked.labels)
    show(f"{decode.printable(asked.data)}\n{found}")
    devices.start()
    made = plan(asked, found, jax.default_backend())
    made, parts, cost = own_cost.fitted(made)
    method = parts.experiment.settings.method
    why = f": {made.why} (--method={'|'.join(METHODS)})" if made.why else ""
    show(f"  method    {method}{why}\n\nThe same as\n\n{made.command()}\n")
    there = f" of {memory.size(cost.limit)} it may take" if cost.limit else ""
    show(f"  memory    at most {memory.size(cost.memory)}{there}")
    begun = pathlib.Path(made.workdir, "checkpoints").exists()
    if begun:
        show(f"  time      {made.workdir} goes on, and says how long it will take")
    else:
        cost = own_cost.measured(parts, cost)
        steps = parts.run.total_steps
        show(f"  time      about {log.duration(cost.seconds)}: {steps} steps")
    checked = parts.experiment
    del parts  # Its program and its state; the run makes its own.
    if dry_run:
        return {}
    name = pathlib.Path(made.workdir).name
    values = loop.run(made.read(), made.workdir, name=name)
    show("\nnext:\n" + "\n".join(f"  {line}" for line in _next(asked, made, checked)))
    return values


def _next(asked, made, checked):
    """Yield commands that go on from a finished run."""
    run_, data = shlex.quote(made.workdir), shlex.quote(asked.data)
    yield f"vitssl report {run_}"
    if checked.kind.labelled:
        yield f"vitssl predict {run_} --images={data} --to=classes.csv"
    elif made.overrides.get("data.options.labels") not in ("none", "any"):
        labels = f" --labels={shlex.quote(asked.labels)}" if asked.labels else ""
        yield f"vitssl train {data}{labels} --method=finetune --weights={run_}"
    yield f"vitssl extract {run_} --images={data} --to=features.npz"
    yield f"vitssl convert export {run_} --to=weights.safetensors"


def train(
    data: disk.AnyPath,
    method: str = "",
    model: str = "",
    *,
    verbose: bool = False,
    overrides: Iterable[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """Train on a folder of images by what fits it and this machine: `vitssl train DIR`.

        vitssl.train("photos", method="hjepa", model="vit_s16", epochs=50)

    Args:
        data: folder of images, in class folders or not.
        method: "hjepa", "localmim", "finetune", ...; see `vitssl train --help`.
        model: "vit_s16", "hvit", ...
        verbose: show every line of the log.
        overrides: ("optim.lr=1e-3", ...): any other key of the config.
        options: weights, size, epochs, steps, batch_size, labels, workdir; what is left
            out is chosen, and told.

    Returns:
        the metrics of the final evaluation, {"final/trained/knn/top1": ...}.

    Raises:
        UsageError: also for an option that there is not.
        VitsslError: whatever ends a run; the message says what to do.
    """
    known = [f.name for f in dataclasses.fields(Asked)]
    for key in options:
        if key not in known:
            raise errors.UsageError(f"train({key}=...): {config.unknown(key, known)}")
    given = dict(method=method, model=model, overrides=tuple(overrides)) | options
    with notebook.bar(verbose):
        return run(Asked(str(data), **given))


def parse(argv: Sequence[str]) -> tuple[Asked, bool]:
    """Return (what is asked, whether it is a dry run) of a command line."""
    parser = errors.Parser("vitssl train", __doc__, allow_abbrev=False)
    parser.add_argument("data", metavar="DIR")
    for field in dataclasses.fields(Asked)[1:-1]:
        kind = type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    parser.add_argument("--dry_run", action="store_true")
    own: list[str] = []
    rest: list[str] = []
    for word in argv:
        mine = word.startswith("--config.")
        (rest if mine else own).append(word)
    flags = vars(parser.parse_args(own))
    dry_run = flags.pop("dry_run")
    typed = []
    for word in rest:
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            parser.error(f"{word}: write {word}=VALUE")
        # What all else follows from is ours, whichever way it is said.
        if key in ("epochs", "steps", "batch_size") and not flags[key]:
            try:
                flags[key] = type(flags[key])(value)
                continue
            except ValueError:
                pass
        typed.append(f"{key}={value}")
    return Asked(**flags, overrides=tuple(typed)), dry_run


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    asked, dry_run = parse(argv)
    log.to_terminal()
    run(asked, dry_run=dry_run)
    return 0
