"""Command line: `python -m vitssl.main --config=FILE[:ARGUMENT] [--workdir=DIR] ...`.

Exit codes: 0 done, 2 usage or config, 3 data, 4 checkpoint, 5 non-finite, 6 out of
memory, 7 stalled, 75 preempted and saved. 1 is a bug, with its traceback.
"""

import difflib
import functools
import pathlib
import re
import shlex
import sys

USAGE = """\
usage: python -m vitssl.main --config=FILE[:ARGUMENT] [--workdir=DIR]
                             [--config.KEY=VALUE ...] [--dry_run] [--force_unlock]
                             [--reseal] [--share=K/N] [--on=KIND:NUMBER]

  --config        a recipe: hjepa, hjepa:smoke, or a file, configs/hjepa.py:smoke
  --workdir       directory of the run (default runs/<config>[-<argument>]);
                  the same command again goes on where the run stopped
  --config.KEY    override any value: --config.optim.lr=1e-3
  --dry_run       print the config in full and the memory of a step; no training
  --on            with --dry_run: compile for devices that are not here, h200:8, v5e:4x4
  --force_unlock  ignore the lock of another run on this workdir
  --reseal        take checkpoints that were copied without their vitssl.sha256.json,
                  once they are read to the end
  --share         of a study: make every N-th of its runs, from the K-th on; N such
                  commands beside each other make all
"""
_SWITCHES = ("dry_run", "force_unlock", "reseal", "help")
_FLAGS = ("config", "workdir", "share", "on", *_SWITCHES)


def parse(argv: list[str]) -> dict:
    """Return the flags: {"config", "workdir", "overrides", "share", "dry_run", ...}.

    Raises:
        UsageError: everything on the command line that is not understood.
    """
    from vitssl import errors

    found = {"config": "", "workdir": "", "overrides": [], "share": (1, 1)}
    found |= {"on": ""} | dict.fromkeys(_SWITCHES, False)
    faults, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").removeprefix("-")
        if flag == word == name or not word.startswith("-"):
            faults.append(f"{word}: not a flag; a recipe is given as --config={word}")
            continue
        if name in (*_SWITCHES, "h") and not equals:
            found["help" if name == "h" else name] = True
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                faults.append(f"{word}: needs a value, {word}=VALUE")
                continue
            value = rest.pop(0)
        if name in ("config", "workdir", "on"):
            found[name] = value
        elif name == "share":
            fits = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", value)
            found["share"] = tuple(map(int, fits.groups())) if fits else (1, 0)
            if found["share"][0] > found["share"][1]:
                faults.append(f"{word}: want K/N with K from 1 to N, such as 1/2")
        elif name.startswith("config."):
            found["overrides"].append(f"{name.removeprefix('config.')}={value}")
        else:
            near = difflib.get_close_matches(name, _FLAGS, 1)
            hint = f"; did you mean --{near[0]}?" if near else ""
            faults.append(f"{word}: no such flag{hint}")
    if found["on"] and not found["dry_run"]:
        faults.append("--on: needs --dry_run; to train, start on those devices")
    if not found["config"] and not found["help"]:
        faults.append("--config=NAME is missing; `vitssl recipes` lists them")
    if faults and not found["help"]:
        raise errors.UsageError("command line:\n  " + "\n  ".join(faults))
    return found


def main(argv: list[str]) -> int:
    """Run one command; return the exit code."""
    from vitssl import errors

    try:
        flags = parse(argv)
        if flags["help"]:
            print(USAGE, end="")
            return 0
        return _run(flags)
    except errors.VitsslError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
        return e.code


def _run(flags) -> int:
    from vitssl import config, disk, errors
    from vitssl.run import experiment, log

    c = experiment.load(flags["config"], flags["overrides"])
    name = config.name_of(flags["config"])
    workdir = flags["workdir"] or str(pathlib.Path("runs") / name)
    if not flags["workdir"] and pathlib.Path(name).name != name:
        raise errors.UsageError(f"{name!r} is no name of a folder; give --workdir=DIR")
    log.to_terminal()
    if "study" in c:
        from vitssl.tools import study

        plan = study.read(c)
        if flags["on"]:
            text = "--on: of one run; this is a study, name a recipe"
            raise errors.UsageError(f"command line:\n  {text}")
        if flags["dry_run"]:
            print(config.to_json(c), end="")
            return 0
        unlock, share = flags["force_unlock"], flags["share"]
        with disk.faults(workdir):
            study.run(plan, workdir, name=name, force_unlock=unlock, share=share)
        return 0
    checked = experiment.read(c)
    if flags["share"] != (1, 1):
        raise errors.UsageError("command line:\n  --share: of a study; this is one run")
    if flags["dry_run"]:
        print(config.to_json(checked.config), end="", flush=True)
        return _dry_run(checked, flags["on"], flags["config"])
    # Only now anything that touches devices or data.
    from vitssl.run import devices, loop

    devices.start()
    own = {key: flags[key] for key in ("force_unlock", "reseal")}
    loop.run(checked, workdir, name=name, **own)
    run = shlex.quote(workdir)
    print(f"next: vitssl report {run}")
    print(f"      vitssl convert export {run} --to=weights.safetensors")
    return 0


def _dry_run(checked, on, name) -> int:
    """Print what a step needs; it is compiled, but nothing is computed."""
    if on:
        from vitssl.bench import aot

        make = functools.partial(aot.of_experiment, checked, name)
        return aot.report(make, aot.reach(on))
    from vitssl.run import build, devices, memory, notes

    devices.start()
    parts, said = build.anyhow(checked)
    if said:
        print(said, flush=True)
    params = parts.compiled.abstract(parts.phase(0)).params
    lines = notes.parameter_table(params, parts.optimizer)
    print("\n".join(lines), flush=True)
    print(memory.describe(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
