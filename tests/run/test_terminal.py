"""How far something is: lines by time in a pipe, a bar on a terminal."""

import io
import logging

import pytest

from vitssl import progress
from vitssl.run import log


class Screen(io.StringIO):
    """A terminal of its own width."""

    def isatty(self):
        return True


@pytest.fixture
def package():
    found = logging.getLogger("vitssl")
    before = found.handlers[:], found.level, found.propagate
    yield found
    for handler in found.handlers:
        handler.close()
    found.handlers[:], found.level, found.propagate = before


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def say(told, done):
    told.update(done, lambda: f"step {done}")


def test_the_first_line_comes_after_ten_steps_and_the_others_by_time(
    package, clock, capsys
):
    log.to_terminal()
    told = progress.Progress("training", 1000, soon=10)
    for done in range(1, 101):
        clock[0] += 0.5
        say(told, done)
    lines = capsys.readouterr().out.split("\n")[:-1]
    # After 10 steps, then every ten seconds: every 20 steps.
    assert lines == ["step 10", "step 30", "step 50", "step 70", "step 90"]


def test_slow_steps_tell_after_ten_seconds_and_a_resumed_run_counts_its_own(
    package, clock, capsys
):
    log.to_terminal()
    told = progress.Progress("training", 1000, 500, soon=10)
    for done in (501, 502, 503):
        clock[0] += 6
        say(told, done)
    assert capsys.readouterr().out == "step 502\n"
    told = progress.Progress("training", 1000, 500, soon=10)
    for done in range(501, 520):
        say(told, done)
    assert capsys.readouterr().out == "step 510\n"


def test_the_last_step_is_told_of_any_run(package, clock, capsys):
    log.to_terminal()
    for total in (1, 2, 10, 15):
        told = progress.Progress("training", total, soon=10)
        for done in range(1, total + 1):
            say(told, done)
        assert capsys.readouterr().out.split("\n")[-2] == f"step {total}"


def test_lines_of_a_long_run_come_once_a_minute(package, clock, capsys):
    log.to_terminal()
    told = progress.Progress("training", 10**6, soon=10)
    for done in range(1, 3601 * 4):
        clock[0] += 1.0
        say(told, done)
    assert 240 <= len(capsys.readouterr().out.split("\n")) < 300


def test_what_is_over_in_no_time_says_nothing(package, clock, capsys):
    log.to_terminal()
    assert list(progress.each("abc", "pictures")) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""
    seen = []
    for item in progress.each("abcd", "pictures"):
        seen.append(item)
        clock[0] += 6
    assert capsys.readouterr().out == "  pictures 2/4\n  pictures 4/4\n"


def test_a_pipe_never_gets_a_control_code(package, clock, capsys):
    log.to_terminal()
    told = progress.Progress("training", 50, soon=10)
    for done in range(1, 51):
        clock[0] += 1
        say(told, done)
    told.close()
    logging.getLogger("vitssl.run.loop").info("| a | table |")
    text = capsys.readouterr().out
    assert text.replace("\n", "").isprintable() and "━" not in text


def test_a_terminal_has_a_bar_below_its_lines(package, monkeypatch):
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("vitssl.run.terminal.PAUSE", 0.0)
    log.to_terminal()
    told = progress.Progress("training", 4, soon=10)
    logger = logging.getLogger("vitssl.run.loop")
    for done in (1, 2):
        say(told, done)
    logger.info("  after step 2: k-NN [50.0%]")
    say(told, 3)
    text = screen.getvalue()
    assert all(f"step {i}" in text for i in (1, 2, 3)) and "━" in text
    assert "  after step 2: k-NN [50.0%]\n" in text
    told.close()
    logger.info("end")
    assert screen.getvalue().endswith("end\n")
    # Where it was, the bar is gone; the cursor was there all the time.
    assert "\x1b[2K" in screen.getvalue()[len(text) :]
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")


def test_a_dumb_terminal_gets_lines(package, monkeypatch):
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("TERM", "dumb")
    log.to_terminal()
    say(progress.Progress("training", 1, soon=10), 1)
    assert screen.getvalue() == "step 1\n"


def test_the_text_of_a_line_that_nobody_reads_is_not_made(package):
    package.setLevel(logging.INFO)

    def never():
        raise AssertionError

    progress.Progress("training", 1000, soon=10).update(1, never)
