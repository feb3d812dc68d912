"""What protects a run: the workdir's lock, signals, the watchdog for stalled steps."""

import contextlib
import faulthandler
import os
import pathlib
import signal
import socket
import sys
import threading
import time

import filelock
import jax
from jax.experimental import multihost_utils

from vitssl import errors
from vitssl.run import log

LOCK = "lock.json"
# What a run writes into its workdir.
FILES = ("config.json", "versions.json", "status.json", "metrics.jsonl", "scores.npz")
FOLDERS = ("checkpoints", "pictures")


@contextlib.contextmanager
def lock(workdir, force: bool = False):
    """Hold WORKDIR/lock.json, an OS lock that dies with its process; yield a `Lock`.

    On NFS the server keeps it, so that runs on other hosts see it. A file system that
    has no locks (NFS mounted "nolock", Lustre without "flock") gives none, and the run
    goes on without: `vitssl doctor` says so.

    Raises:
        UsageError: the directory cannot be written, or another live run holds it.
    """
    held = Lock(pathlib.Path(workdir), force)
    held.take()
    try:
        yield held
    finally:
        held.close()


class Lock:
    """The lock of a workdir, which somebody may remove together with its folder.

    `filelock.FileLock` would hide the file, which says who holds it, and whose loss is
    to be noticed: of filelock it is the lock of an open file.
    """

    def __init__(self, workdir: pathlib.Path, force: bool = False):
        self._workdir, self._force, self._handle = workdir, force, None

    @property
    def lost(self) -> bool:
        """Return whether what is in the workdir now is not the file that is held."""
        try:
            now = os.stat(self._workdir / LOCK)
        except OSError:
            return True
        mine = os.fstat(self._handle.fileno())
        return (mine.st_dev, mine.st_ino) != (now.st_dev, now.st_ino)

    def take(self) -> None:
        """Make the workdir, and take its lock; see `lock`."""
        workdir = self._workdir
        _check_name(workdir)
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if not _regular(workdir / LOCK):
                raise FileExistsError(0, f"{LOCK} is no regular file")
            handle = (workdir / LOCK).open("a+")
        except OSError as e:
            raise errors.UsageError(
                f"--workdir={workdir}: cannot be written ({e.strerror}); give another"
            ) from e
        if not _take(handle) and not self._force:
            with handle:
                who = _holder(handle)
            raise errors.UsageError(
                f"--workdir={workdir}: in use by a live run ({who}); give another, or "
                "end that run (--force_unlock ignores this)"
            )
        self.close()
        self._handle = handle
        with contextlib.suppress(OSError):  # A full disk: the lock itself is held.
            handle.seek(0)
            handle.truncate()
            handle.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            handle.flush()

    def close(self) -> None:
        """Let the lock go."""
        if self._handle is not None:
            with contextlib.suppress(OSError):  # What a full disk did not take.
                self._handle.close()


def _check_name(workdir) -> None:
    """Refuse a name that the checkpoint library cannot be told, which wants UTF-8."""
    try:
        str(workdir).encode()
    except UnicodeEncodeError as e:
        raise errors.UsageError(
            f"--workdir={ascii(str(workdir))}: is no UTF-8 text; give another, or "
            "set LC_ALL=C.UTF-8 where the locale has another encoding"
        ) from e


def _regular(path) -> bool:
    return path.is_file() or not os.path.lexists(path)


def writable(workdir, files=FILES, folders=FOLDERS) -> None:
    """Refuse a workdir in which something is in the way of what will be written.

    Raises:
        UsageError: the first file or folder that cannot be written.
    """
    workdir = pathlib.Path(workdir)
    for name in (*files, *folders):
        path, folder = workdir / name, name in folders
        if not os.path.lexists(path):
            continue
        fault = "" if os.access(path, os.R_OK | os.W_OK) else "no permission"
        if folder and not path.is_dir():
            fault = "a file is in its place"
        elif not folder and path.is_dir():
            fault = "a folder is in its place"
        elif not folder and not _regular(path):
            fault = "it is no regular file"
        if fault:
            raise errors.UsageError(
                f"--workdir={workdir}: {name} cannot be written ({fault}); move it, or "
                "give another"
            )


def _take(handle) -> bool:
    try:
        return filelock.lock_descriptor(handle.fileno(), blocking=False)
    except OSError:  # Some network file systems have no locks; go on without.
        return True


def _holder(handle) -> str:
    try:
        handle.seek(0)
        return ascii(handle.read(200).strip())[1:-1]
    except OSError:  # Windows lets nobody else read what is locked.
        return "of another process"


class Signals:
    """Turns SIGTERM and SIGINT into "save and stop"; a second one stops at once.

    In a job of several processes JAX's runtime handles SIGTERM: it tells all of them,
    and they agree on a step. A handler of ours would replace its own, and nobody would
    hear of the signal.
    """

    def __init__(self):
        self.received = ""
        self._old, self._nothing_to_save = {}, False

    def __enter__(self):
        """Install the handlers (only the main thread may)."""
        if threading.current_thread() is not threading.main_thread():
            return self
        handlers = {signal.SIGTERM: self._handle, signal.SIGINT: self._handle}
        if jax.process_count() > 1:
            handlers = {signal.SIGINT: self._pass_on}
        for number, handler in handlers.items():
            self._old[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *unused):
        """Put the old handlers back."""
        for number, old in self._old.items():
            signal.signal(number, old)

    def _handle(self, number, frame):
        del frame
        if self.received:
            os._exit(errors.Preempted.code)
        self.received = signal.Signals(number).name
        if self._nothing_to_save:
            raise self._over()
        _say(f"{self.received}: saving after this step, then exit 75")

    def _pass_on(self, number, frame):
        del number, frame
        if self.received:
            os._exit(errors.Preempted.code)
        self.received = "SIGINT"
        _say("SIGINT: saving soon on every process, then exit 75")
        os.kill(os.getpid(), signal.SIGTERM)

    def saved(self) -> None:
        """From now on a signal ends the run at once: its last state is sealed on disk.

        Raises:
            Preempted: one came before.
        """
        if jax.process_count() == 1:
            self._nothing_to_save = True
            if self.received:
                raise self._over()

    def _over(self) -> errors.Preempted:
        return errors.Preempted(
            f"{self.received}: saved; run it again for the final evaluation"
        )

    def stop(self, step: int) -> str:
        """Return the signal's name if all processes shall stop after `step`, or ""."""
        if jax.process_count() > 1:
            # Every process must stop after the same step; JAX agrees on one.
            reached = multihost_utils.reached_preemption_sync_point(step)
            return (self.received or "SIGTERM") if reached else ""
        return self.received


def _say(text):
    # What sent the signal may have closed the terminal, too.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(f"\n{text}\n")


class Watchdog:
    """Ends the process with exit code 7 if nothing beats for too long.

    Args:
        workdir: where status.json is written.
        seconds: longest time between two beats, none while stopped; 0.0 is off.
    """

    def __init__(self, workdir, seconds: float):
        self._workdir, self._seconds = workdir, seconds
        self._last, self._what = time.monotonic(), "start"
        self._stop = threading.Event()

    def beat(self, what: str) -> None:
        """Report progress; `what` names what begins now."""
        self._last, self._what = time.monotonic(), what

    def __enter__(self):
        """Start watching."""
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *unused):
        """Stop watching."""
        self._stop.set()

    def _watch(self):
        tick = min(1.0, self._seconds / 4)
        seen, silent, before = self._last, 0.0, time.monotonic()
        while not self._stop.wait(tick):
            now = time.monotonic()
            # Who was stopped meanwhile, as Slurm suspends a job, did not stall.
            silent += min(now - before, 2 * tick)
            if seen != self._last:
                seen, silent = self._last, 0.0
            before = now
            if silent > self._seconds:
                message = (
                    f"stalled: {self._what} has taken {silent:.0f} s "
                    f"(log.stall_seconds={self._seconds}); stacks of all threads follow"
                )
                sys.stderr.write(message + "\n")
                faulthandler.dump_traceback(all_threads=True)
                log.write_status(self._workdir, state="stalled", error=message)
                sys.stderr.flush()
                os._exit(errors.StalledError.code)
