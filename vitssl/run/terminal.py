"""What the log looks like: a bar below the lines on a terminal, plain lines elsewhere.

A pipe or a file never gets a control code.
"""

import contextlib
import logging
import os
import sys
import time

from vitssl import progress

PAUSE = 0.1  # Seconds between two drawings of a bar.


class Terminal(logging.Handler):
    """Writes to whatever standard output is now (notebooks and tests replace it)."""

    def __init__(self):
        super().__init__(progress.BETWEEN)
        self._live, self._drawn = None, 0.0

    def emit(self, record):
        # A terminal that hung up, or a pipe whose reader ended, is no reason to stop.
        with contextlib.suppress(OSError, ValueError):
            told = getattr(record, "progress", None)
            if told is not None and moves():
                self._bar(told, record)
            elif record.levelno >= logging.INFO:
                self._line(self.format(record))

    def close(self):
        self._clear()
        super().close()

    def _line(self, text):
        if self._live is None:
            print(text, file=sys.stdout, flush=True)
        else:  # Above the bar.
            options = dict(markup=False, highlight=False, soft_wrap=True)
            self._live.console.print(text, **options)

    def _bar(self, told, record):
        """Draw how far it is, if it is time; or nothing any more."""
        now = time.monotonic()
        if told.over:
            self._clear()
        elif now - self._drawn > PAUSE or told.done >= told.total:
            self._drawn = now
            if self._live is None:
                self._live = _live()
            self._live.update(_row(told, self.format(record)), refresh=True)

    def _clear(self):
        live, self._live = self._live, None
        if live is not None:
            live.stop()


def moves() -> bool:
    """Return whether standard output is a terminal on which a line can be redrawn."""
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def _live():
    from rich import console, live

    # No thread of its own draws: a step draws when it is done.
    out = console.Console(file=sys.stdout)
    options = dict(redirect_stdout=False, redirect_stderr=False, transient=True)
    made = live.Live(console=out, auto_refresh=False, **options)
    made.start()
    out.show_cursor(True)  # A killed process could not bring it back.
    return made


def _row(told, text):
    from rich import progress_bar, table
    from rich import text as texts

    row = table.Table.grid(padding=(0, 1))
    row.add_column(no_wrap=True, overflow="ellipsis")
    row.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    bar = progress_bar.ProgressBar(max(1, told.total), told.done, width=20)
    row.add_row(bar, texts.Text(text.strip()))
    return row
