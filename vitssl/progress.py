"""How far something long is, told to the log.

What is long tells after every part how far it is. Some of that are lines for people
(level INFO): the first soon, then by time, and the last. All of it (level `BETWEEN` and
above) moves the bar of a terminal, which `run.terminal` draws.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator

logger = logging.getLogger(__name__)

BETWEEN = (logging.DEBUG + logging.INFO) // 2
FIRST, LEAST, MOST = 10.0, 10.0, 60.0  # Seconds to the first line, and between lines.


class Progress:
    """Tells how far something is.

    Args:
        what: is done, in a word or two.
        total: parts of it.
        done: of which so many are done before.
        soon: parts after which the first line is due, if `FIRST` seconds are not over.
    """

    def __init__(self, what: str, total: int, done: int = 0, soon: int | None = None):
        self.what, self.total, self.done, self.over = what, total, done, False
        self._soon = None if soon is None else done + soon
        self._began = self._said = time.monotonic()
        self._first = True  # No line was written yet.

    def update(self, done: int, line: Callable[[], str] | None = None) -> None:
        """Tell that so many parts are done; `line` makes the text, if anybody reads."""
        self.done = done
        due = self._due(done)
        if due:
            self._said, self._soon, self._first = time.monotonic(), None, False
        self._tell(logging.INFO if due else BETWEEN, line or self._line)

    def _due(self, done) -> bool:
        now = time.monotonic()
        if self._soon is not None:  # Something whose every end is told.
            return done >= min(self._soon, self.total) or now - self._began >= FIRST
        if done >= self.total:  # What was over in no time needs no line.
            return not self._first or now - self._began >= FIRST
        # A week's run has fewer lines than one of a minute, in proportion.
        pause = min(MOST, max(LEAST, (now - self._began) / 20))
        return now - self._said >= (FIRST if self._first else pause)

    def _line(self) -> str:
        return f"  {self.what} {self.done}/{self.total}"

    def _tell(self, level, line):
        logger.log(level, "%s", _Later(line), extra={"progress": self})

    def close(self) -> None:
        """Tell that it is over, or given up."""
        self.over = True
        self._tell(BETWEEN, self._line)


class _Later:
    """A text that is made when it is written."""

    def __init__(self, make):
        self._make = make

    def __str__(self):
        return self._make()


def each(items: Iterable, what: str, total: int | None = None) -> Iterator:
    """Yield the items of a list, or `total` of something else, telling how far it is.

    An iterator that is given up closes the one it is made of.
    """
    if total is None:
        items = list(items)
        total = len(items)
    with contextlib.closing(Progress(what, total)) as told:
        for i, item in enumerate(items):
            told.update(i)
            yield item
        told.update(total)
