"""Errors a user can cause or meet, each with the exit code of the process.

An error of this module is printed as its message alone, without a traceback;
anything else is a bug of ours and keeps its traceback (exit code 1).
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class VitsslError(Exception):
    """Base of the errors that end a run with a documented exit code."""

    code = 1


class UsageError(VitsslError, ValueError):
    """A flag, config key or combination of them is wrong (exit code 2)."""

    code = 2


class DataError(VitsslError, ValueError):
    """A data set is missing, empty, too small or too broken (exit code 3)."""

    code = 3


class CheckpointError(VitsslError, ValueError):
    """A checkpoint is damaged, or does not fit the model (exit code 4)."""

    code = 4


class NonFiniteError(VitsslError, ArithmeticError):
    """Several steps in a row had a non-finite loss or gradient (exit code 5)."""

    code = 5


class OutOfMemoryError(VitsslError, MemoryError):
    """The device ran out of memory (exit code 6)."""

    code = 6


class StalledError(VitsslError, TimeoutError):
    """No step finished for `log.stall_seconds` (exit code 7)."""

    code = 7


class Preempted(VitsslError):  # noqa: N818 - an event, not a fault.
    """A signal asked the run to stop and its state is saved (exit code 75)."""

    code = 75


def told(e: object, most: int = 300) -> str:
    """Return what an exception, or a text out of a file, says: one line, not long.

    Libraries quote what they read, and that may be anything.
    """
    text = " ".join(str(e).split()) or type(e).__name__
    text = text if len(text) <= most else f"{text[:most]} ..."
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


class Parser(argparse.ArgumentParser):
    """A command line whose faults are one line, and whose help stands as written."""

    def __init__(self, prog: str, description: str = "", **options: Any):
        form = argparse.RawDescriptionHelpFormatter
        options = {"formatter_class": form} | options
        super().__init__(prog=prog, description=description, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message} ({self.prog} --help)")


def exit_code(command: Callable[..., int], *arguments: Any) -> int:
    """Return what a command returns, or the code of its error, which is printed."""
    if hasattr(sys.stdout, "reconfigure"):  # Names may be no text of the terminal's.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return command(*arguments)
    except VitsslError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
        return e.code
