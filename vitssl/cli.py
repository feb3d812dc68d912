"""The command `vitssl`: train, and everything beside training.

Every command has `--help`, ends with the exit codes of `vitssl.main`, and says what
is wrong in one line.
"""

import difflib
import importlib
import pathlib
import shutil
import sys

from vitssl import errors

USAGE = """\
usage: vitssl COMMAND ...

  train DIR                            train on a folder of images: what fits it
  train --config=NAME[:ARGUMENT] ...   train, or go on (as python -m vitssl.main does)
  recipes [WORD ...]                   recipes by purpose; --explain=KEY says a key
  doctor                               what works on this machine, and what to install
  runs [DIR]                           a table of the runs below DIR
  compare RUN RUN ...                  configs and curves of runs, side by side
  report RUN                           one HTML page about a run
  pictures RUN                         draw the pictures of a run again
  convert import FILE --to=DIR         weights of others to ours (safetensors, pth, npz)
  convert export RUN --to=FILE         ours to timm, transformers, big_vision
  extract RUN --images=DIR --to=FILE   features of a folder of images
  predict RUN --images=DIR --to=FILE   classes of a folder of images
  prepare siim_acr DIR --to=ROOT       published files to the folders of a data set
  sweep FILE                           many runs from a file of overrides
  bench NAME ...                       times, and steps compiled for devices elsewhere
  store RUN --to=DIR --boundary=N      tokens of a frozen prefix of LocalMIM
  freeze-plan RUN                      which layers settled when: what to freeze
  pack DIR --to=SHARDS                 a folder of images as tar files

`vitssl COMMAND --help` says more. A RUN is a workdir, such as runs/hjepa.
"""


def main(argv: list[str]) -> int:
    """Run one command; return the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if argv else errors.UsageError.code
    if argv[0] == "--version":
        from vitssl import __version__

        print(__version__)
        return 0
    if argv[0].startswith("--config"):
        argv = ["train", *argv]
    command, *rest = argv
    if command not in COMMANDS:
        print(_unknown(command), file=sys.stderr)
        return errors.UsageError.code
    try:
        return errors.exit_code(_command(command), rest)
    except BrokenPipeError:  # `vitssl runs | head`
        sys.stderr.close()
        return 0


def _unknown(command) -> str:
    near = difflib.get_close_matches(command, COMMANDS, 1)
    hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(COMMANDS)}"
    return f"UsageError: vitssl {command}: no such command; {hint}"


def _command(name):
    """Return the function of a command; only now is what it needs imported."""
    found = COMMANDS.get(name) or TRAIN[name]
    return importlib.import_module(found).main if isinstance(found, str) else found


def _parser(command, text):
    return errors.Parser(f"vitssl {command}", text)


def _train(argv):
    """Train a recipe, or on a folder, which then is one of the words."""
    plain = [word for word in argv if not word.startswith("-")]
    recipe = any(word.startswith("--config") and word[8:9] != "." for word in argv)
    if recipe or not plain or _names_recipe(plain[0]):
        return _command("recipe")(argv)
    return _command("folder")(argv)


def _names_recipe(word) -> bool:
    """Return whether a word that is no folder names a recipe: train hjepa:smoke."""
    from vitssl import config

    if pathlib.Path(word).is_dir():
        return False
    try:
        return bool(config.find(word.partition(":")[0]))
    except errors.UsageError:
        return word.endswith(".py")


def _recipes(argv):
    parser = _parser(
        "recipes",
        "List recipes by purpose: all, or those that have all WORDs, such as folder,\n"
        "laptop, gpu, papers, hjepa, vit. DIR is another folder of configs.",
    )
    parser.add_argument("words", nargs="*", metavar="WORD|DIR")
    parser.add_argument("--explain", default="", metavar="KEY", help="what a key means")
    parser.add_argument("--write", action="store_true", help="write DIR/README.md")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="compile their steps here, and keep how much memory they need",
    )
    flags = parser.parse_args(argv)
    from vitssl import config
    from vitssl.tools import keys, recipes

    folders = [word for word in flags.words if pathlib.Path(word).is_dir()]
    folder = pathlib.Path(folders[0] if folders else config.home())
    if flags.explain:
        print(keys.explain(flags.explain, folder))
        return 0
    found = recipes.read(folder)
    words = [word for word in flags.words if word not in folders]
    shown = recipes.chosen(found, words)
    if flags.measure:
        recipes.measure([r for file in shown for r in file.recipes])
    elif flags.write:
        path = folder / "README.md"
        path.write_text(recipes.markdown(found))
        print(path)
    else:
        print(recipes.text(shown, shutil.get_terminal_size((100, 24)).columns))
    return 0


def _doctor(argv):
    parser = _parser("doctor", "Check what runs need; say how to get what is missing.")
    parser.add_argument("--workdir", default="runs", help="where runs would write")
    flags = parser.parse_args(argv)
    from vitssl.tools import doctor

    return doctor.main(flags.workdir)


def _runs(argv):
    parser = _parser("runs", "List the runs at or below a directory.")
    parser.add_argument("directory", nargs="?", default="runs", metavar="DIR")
    parser.add_argument("--metrics", default="", help="metrics to show, by commas")
    parser.add_argument("--sort", default="", help="metric; the highest comes first")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per run, all metrics"
    )
    flags = parser.parse_args(argv)
    from vitssl.tools import listing, workdir

    found = workdir.below(flags.directory)
    if flags.json:
        print(listing.as_json(found))
        return 0
    metrics = tuple(filter(None, flags.metrics.split(",")))
    print(listing.text(*listing.rows(found, metrics, flags.sort)))
    return 0


def _compare(argv):
    parser = _parser(
        "compare", "Show how the configs of runs differ, and their curves."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="two workdirs or more")
    parser.add_argument("--out", default="compare.html", help="page of the curves")
    flags = parser.parse_args(argv)
    if len(flags.runs) < 2:
        parser.error("give two runs or more")
    from vitssl.tools import compare, workdir

    found = [workdir.workdir(path) for path in flags.runs]
    # First the page: who reads the text may not want all of it (| head).
    said = _write(flags.out, compare.page(found))
    print(compare.text(found))
    print(said)
    return 0


def _report(argv):
    parser = _parser(
        "report",
        "Write one self-contained HTML page about a run: curves, pictures, nearest\n"
        "neighbours, confusion matrix, timing and memory, the resolved config.",
    )
    parser.add_argument("run", metavar="RUN", help="a workdir, finished or not")
    parser.add_argument("--out", default="", help="file (default RUN/report.html)")
    parser.add_argument(
        "--draw",
        action="store_true",
        help="draw the pictures from the newest checkpoint first (needs the data)",
    )
    flags = parser.parse_args(argv)
    from vitssl.tools import page, workdir

    run = workdir.workdir(flags.run)
    if flags.draw:
        code = _command("pictures")([flags.run])
        if code:
            return code
    print(_write(flags.out or run.path / "report.html", page.page(run)))
    return 0


def _write(path, text) -> str:
    """Write a page; return the line that says so."""
    from vitssl.data import decode

    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise errors.UsageError(f"--out={path}: {e.strerror}; give another") from e
    size = len(text.encode()) / 1e6
    return f"{decode.printable(path)}: {size:.1f} MB, open it in any browser"


# What the command `train` is.
TRAIN = {"recipe": "vitssl.main", "folder": "vitssl.tools.own"}
# A module has a function `main`.
COMMANDS = {
    "train": _train,
    "recipes": _recipes,
    "doctor": _doctor,
    "runs": _runs,
    "compare": _compare,
    "report": _report,
    "pictures": "vitssl.tools.draw",
    "convert": "vitssl.convert.__main__",
    "extract": "vitssl.tools.extract",
    "predict": "vitssl.tools.predict",
    "prepare": "vitssl.tools.prepare",
    "sweep": "vitssl.tools.sweep",
    "bench": "vitssl.bench.__main__",
    "store": "vitssl.tools.feature_store",
    "pack": "vitssl.tools.pack",
    "freeze-plan": "vitssl.tools.freeze_plan",
}


def cli() -> None:
    """Run `sys.argv` and exit."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    cli()
