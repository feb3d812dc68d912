"""`vitssl sweep FILE`: many runs from a file of overrides, here or as a Slurm array.

Every run is an ordinary workdir, SWEEP/NAME: it resumes, and a sweep that was stopped
goes on where it was.
"""

import collections
import dataclasses
import itertools
import math
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

from vitssl import config, errors
from vitssl.run import experiment
from vitssl.tools import listing
from vitssl.tools import workdir as read

SBATCH = pathlib.Path(__file__).parents[2] / "launch" / "slurm.sbatch"
RUN = (sys.executable, "-m", "vitssl.main")
MOST = 1000  # Runs of a sweep; a Slurm array has as many by default.
RESTARTS = 3  # A run that exits with 75 while the sweep goes on is started again.

HELP = """\
Run every line of a file of overrides and print one table. In the file:

  --config=FILE[:ARGUMENT]   recipe of the lines that follow
  KEY=VALUE ...              a run: overrides of config keys
  KEY={A,B}                  one run for each; several of these are a grid
  NAME: KEY=VALUE ...        a run with a name of its own (default: its overrides)
  all: KEY=VALUE ...         overrides of every line that follows
  # text                     a comment

All configs are checked before the first run starts. The same command again goes on
with what is not finished."""


@dataclasses.dataclass(frozen=True)
class One:
    """A run of a sweep."""

    name: str  # Its directory below that of the sweep.
    spec: str  # What --config gets.
    overrides: tuple[str, ...]  # "key=value".
    line: int  # In the file, from 1.

    def arguments(self, workdir) -> list[str]:
        """Return the arguments of `vitssl.main`."""
        directory = pathlib.Path(workdir) / self.name
        changed = [f"--config.{text}" for text in self.overrides]
        return [f"--config={self.spec}", f"--workdir={directory}", *changed]


def parse(text: str) -> list[One]:
    """Return the runs of a file.

    Raises:
        UsageError: every line that is not understood, names that occur twice or are
            no name of a folder, more than `MOST` runs.
    """
    spec, common, found, faults = "", (), [], []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as e:
            faults.append(f"line {number}: {e}")
            continue
        if not words:
            continue
        if words[0].startswith("--config="):
            spec = words[0].removeprefix("--config=")
            words = words[1:]
            common = ()
            if not words:
                continue
        name = ""
        if words and words[0].endswith(":") and "=" not in words[0]:
            name, words = words[0][:-1], words[1:]
        wrong = [w for w in words if "=" not in w or w.startswith("-")]
        if wrong:
            faults.append(f"line {number}: {wrong[0]}: want KEY=VALUE, or NAME: before")
        elif name == "all":
            common = (*common, *words)
        elif not spec:
            faults.append(f"line {number}: no --config=FILE line comes before it")
        elif (count := len(found) + math.prod(map(len, map(_choices, words)))) > MOST:
            faults.append(
                f"line {number}: {count} runs up to here; at most {MOST} in one file"
            )
        else:
            found.extend(_grid(name, spec, common, words, number))
    names = collections.Counter(one.name for one in found)
    for name in sorted(name for name, count in names.items() if count > 1):
        lines = [str(one.line) for one in found if one.name == name]
        faults.append(f"lines {', '.join(lines)}: two runs are called {name!r}")
    for one in found:
        if fault := config.folder_fault(one.name):
            faults.append(f"line {one.line}: a run called {one.name!r}: {fault}")
    if not found and not faults:
        faults.append("no run in it; a run is a line KEY=VALUE ...")
    if faults:
        raise errors.UsageError("\n  ".join(["sweep:", *faults]))
    return found


def _grid(name, spec, common, words, line):
    """Yield the runs of one line: every combination of its braces."""
    choices = list(map(_choices, words))
    for chosen in itertools.product(*choices):
        pairs = zip(chosen, choices, strict=True)
        varied = [text for text, options in pairs if len(options) > 1]
        own = "-".join(filter(None, [name, *map(_short, varied)])) if name else ""
        called = own or "-".join(map(_short, chosen)) or config.name_of(spec)
        yield One(called, spec, (*common, *chosen), line)


def _choices(word) -> list[str]:
    """Return "k=a", "k=b" of "k={a,b}"; any other word is its own only choice."""
    key, _, value = word.partition("=")
    if not (value.startswith("{") and value.endswith("}") and "," in value):
        return [word]
    if ":" in value:  # A dict, no choice.
        return [word]
    parts, depth = [""], 0
    for letter in value[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [f"{key}={part.strip()}" for part in parts]


def _short(text) -> str:
    """Return an override as part of a directory's name: "optim.lr=1e-3" is lr=1e-3."""
    key, _, value = text.partition("=")
    kept = "".join(c if c.isalnum() or c in "=.+-_" else "_" for c in value)
    return f"{key.rpartition('.')[2]}={kept.strip('_')}"[:60]


def check(runs) -> None:
    """Check the config of every run.

    Raises:
        UsageError: the faults of all runs, each with its line.
    """
    faults = []
    for one in runs:
        try:
            c = experiment.load(one.spec, one.overrides)
            if "study" in c:
                raise errors.UsageError("is a study; sweep over a single run instead")
            experiment.read(c)
        except errors.UsageError as e:
            faults.append(f"line {one.line} ({one.name}): {e}")
    if faults:
        raise errors.UsageError("sweep:\n" + "\n".join(faults))


def main(argv) -> int:
    """Run a sweep; return the exit code: 0, or that of the first run that failed."""
    flags = _flags(argv)
    path = pathlib.Path(flags.file)
    if not path.is_file():
        raise errors.UsageError(f"{path}: no such file; see vitssl sweep --help")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, "strerror", "") or "it is no UTF-8 text"
        raise errors.UsageError(f"{path}: cannot be read: {why}") from e
    runs = parse(text)
    check(runs)
    workdir = pathlib.Path(flags.workdir or pathlib.Path("runs") / path.stem)
    if flags.dry_run:
        for one in runs:
            print(shlex.join(["vitssl", "train", *one.arguments(workdir)]))
        return 0
    code = 0
    if flags.slurm:
        _submit(runs, workdir, flags)
    elif not flags.table:
        code = _Local(runs, workdir, flags.jobs, flags.gpus).go()
    _table(runs, workdir, flags)
    return code


def _flags(argv):
    parser = errors.Parser("vitssl sweep", HELP)
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--workdir", default="", help="default: runs/<name of FILE>")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, here")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs the jobs share")
    parser.add_argument("--slurm", action="store_true", help="submit a Slurm array")
    parser.add_argument(
        "--sbatch", default="", help='options of sbatch: --sbatch="--partition=gpu"'
    )
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--metrics", default="", help="columns, by commas")
    parser.add_argument("--sort", default="", help="metric; the highest comes first")
    parser.add_argument("--dry_run", action="store_true", help="only print the runs")
    flags = parser.parse_args(argv)
    if flags.jobs < 1 or flags.gpus < 0:
        parser.error("--jobs: 1 or more; --gpus: 0 or more")
    if flags.gpus % flags.jobs:
        parser.error(f"--gpus={flags.gpus} must be a multiple of --jobs={flags.jobs}")
    return flags


def _finished(one, workdir) -> bool:
    found = _workdir(pathlib.Path(workdir) / one.name)
    return found is not None and found.state == "finished"


def _workdir(path):
    """Return a run of the sweep, or None where it has not begun, or is damaged."""
    try:
        return read.workdir(path) if read.is_workdir(path) else None
    except errors.UsageError as e:
        print(e)  # Its own command writes it anew.
        return None


def _table(runs, workdir, flags):
    """Print one table of all runs, and write it to SWEEP/sweep.md."""
    found = [_workdir(workdir / one.name) for one in runs]
    found = [run for run in found if run is not None]
    if not found:
        print("no run has begun yet")
        return
    metrics = tuple(filter(None, flags.metrics.split(",")))
    text = listing.text(*listing.rows(found, metrics, flags.sort))
    (workdir / "sweep.md").write_text(text + "\n")
    print(text)


def _submit(runs, workdir, flags):
    """Write the file of the array's runs, and hand it to sbatch.

    Raises:
        UsageError: there is no Slurm here, or it refuses.
    """
    left = [one for one in runs if not _finished(one, workdir)]
    if not left:
        print("every run is finished")
        return
    if not SBATCH.is_file():
        raise errors.UsageError(f"{SBATCH}: missing; run this from a clone of vitssl")
    workdir.mkdir(parents=True, exist_ok=True)
    # A file of its own for each submission: a queued array still reads the old one.
    listed = workdir / f"array-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    absolute = workdir.absolute()
    lines = [shlex.join(one.arguments(absolute)) for one in left]
    listed.write_text("\n".join(lines) + "\n")
    command = [
        "sbatch",
        f"--array=0-{len(left) - 1}%{flags.jobs}",
        f"--output={absolute}/%x-%A_%a.log",
        f"--export=ALL,VITSSL_RUNS={listed.absolute()},VITSSL_ROOT={SBATCH.parents[1]}",
        *shlex.split(flags.sbatch),
        str(SBATCH),
    ]
    print(shlex.join(command), flush=True)
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError as e:
        raise errors.UsageError("sbatch: not found; --slurm needs Slurm here") from e
    except subprocess.CalledProcessError as e:
        raise errors.UsageError(f"sbatch refused (exit code {e.returncode})") from e


class _Local:
    """Runs as processes of this machine, `jobs` at a time.

    SIGTERM and SIGINT are passed on; the runs save, and the sweep exits with 75.
    """

    def __init__(self, runs, workdir, jobs, gpus):
        self._left = [one for one in runs if not _finished(one, workdir)]
        for one in (one for one in runs if one not in self._left):
            print(f"{one.name}: finished already")
        self._workdir, self._gpus, self._jobs = workdir, gpus, jobs
        self._slots = list(range(min(jobs, len(runs))))
        self._going, self._tries = {}, {}
        self._stopping, self._code = False, 0

    def go(self) -> int:
        """Run everything; return the exit code."""
        old = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self._going or (self._left and not self._stopping):
                while self._left and self._slots and not self._stopping:
                    self._start(self._left.pop(0))
                time.sleep(0.1)
                for process in [p for p in self._going if p.poll() is not None]:
                    self._ended(process)
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
        return errors.Preempted.code if self._stopping else self._code

    def _stop(self, number, frame):
        del frame
        self._stopping = True
        for process in self._going:
            process.send_signal(number)

    def _start(self, one):
        slot = self._slots.pop(0)
        directory = self._workdir / one.name
        directory.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        if self._gpus:
            each = self._gpus // self._jobs
            mine = range(slot * each, (slot + 1) * each)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))
        with (directory / "log.txt").open("a") as log:
            # A session of its own: Ctrl-C reaches it once, through `_stop`.
            process = subprocess.Popen(
                [*RUN, *one.arguments(self._workdir)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        print(f"{one.name}: started, {directory / 'log.txt'}", flush=True)
        self._going[process] = one, slot
        self._tries[one] = self._tries.get(one, 0) + 1

    def _ended(self, process):
        one, slot = self._going.pop(process)
        self._slots.append(slot)
        code = process.returncode
        print(f"{one.name}: exit code {code}", flush=True)
        if code == errors.Preempted.code and self._tries[one] <= RESTARTS:
            self._left.append(one)
        elif code:
            log = self._workdir / one.name / "log.txt"
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            print(f"  {' '.join(last)}", flush=True)
            self._code = self._code or (code if code > 0 else 1)
