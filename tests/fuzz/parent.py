"""The parent: starts children, and counts what became of the files."""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
CHILD = ["-m", "tests.fuzz"]  # What Python runs.


@dataclasses.dataclass
class Found:
    """What became of a reader's files."""

    read: int = 0
    refused: int = 0
    slowest: float = 0.0  # Seconds of work.
    peak: float = 0.0  # MiB, of the whole process.
    failed: list = dataclasses.field(default_factory=list)  # (number, how)

    def add(self, i, told, took, peak):
        """Count one file."""
        self.slowest, self.peak = max(self.slowest, took), max(self.peak, peak)
        if told in ("read", "refused"):
            setattr(self, told, getattr(self, told) + 1)
        else:
            self.failed.append((i, told))


def run(names, count: int, seed: int) -> dict[str, Found]:
    """Return {reader: what became of its files}."""
    found, left, first = {name: Found() for name in names}, list(names), 0
    while left:
        words = [",".join(left), count, seed, first]
        command = [sys.executable, *CHILD, "--child", *map(str, words)]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            code = subprocess.run(command, cwd=ROOT, stdout=out, stderr=err).returncode
            out.seek(0)
            for line in out:
                name, i, *rest = json.loads(line)
                found[name].add(i, *rest)
                left, first = left[left.index(name) :], i + 1
            if code == 0:
                break
            err.seek(0)
            if code > 0:
                raise RuntimeError(f"the child itself failed: {err.read()[-3000:]}")
        if first >= count:
            left, first = left[1:], 0
        hang = code in (-signal.SIGALRM, -signal.SIGPROF)
        how = "hang" if hang else f"crash by signal {-code}"
        found[left[0]].add(first, how, 0.0, 0.0)
        first += 1
    return found


def table(found: dict[str, Found]) -> str:
    """Return what was found as a Markdown table."""
    lines = ["| reader | files | read | refused | failed | slowest | peak of all |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, f in found.items():
        files = f.read + f.refused + len(f.failed)
        times = f"{1e3 * f.slowest:.0f} ms | {f.peak:.0f} MiB"
        lines.append(
            f"| {name} | {files} | {f.read} | {f.refused} | {len(f.failed)} | {times} |"
        )
    return "\n".join(lines)
