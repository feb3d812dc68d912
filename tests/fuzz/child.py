"""The child: reads damaged files, and writes a line about each."""

import json
import pathlib
import resource
import signal
import sys
import tempfile
import time

from tests.fuzz import readers

SECONDS = 10.0  # Of work for one file; of time, on a busy machine, six times as many.
UNBOUNDED = resource.RLIM_INFINITY
MEMORY = 2**31 + 2**30  # Bytes of addresses, above what the imports have.
# What nothing but a program that was run would do.
FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn")
FORBIDDEN += (
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
    "ctypes.dlopen",
)


def _bounded():
    """Let the system end this process where it passes its bounds."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, UNBOUNDED))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _peak() -> float:
    """Return the most MiB that this process has held; `getrusage` counts its parent."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _verdict(read, path, ran) -> str:
    """Return "read", "refused", or how a reader failed."""
    from vitssl import errors

    ran.clear()
    try:
        read(path)
        told = "read"
    except errors.VitsslError as e:
        line, told = str(e), "refused"
        if isinstance(e.__cause__, MemoryError):
            told = "memory"
        elif not line.isprintable() or not 0 < len(line) < 1000:
            told = f"no line: {line[:200]!r}"
    except Exception as e:  # noqa: BLE001 - this is what is looked for.
        told = f"traceback: {type(e).__name__}: {str(e)[:200]}"
    return f"ran {ran[0]}" if ran else told


def read(names, count: int, seed: int, first: int) -> None:
    """Read the files of some readers, from the file `first` of the first of them."""
    ran, armed = [], []

    def hook(event, arguments):
        if armed and event in FORBIDDEN:
            ran.append(f"{event} {arguments!r}"[:200])

    sys.addaudithook(hook)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            resource.setrlimit(resource.RLIMIT_AS, (UNBOUNDED, UNBOUNDED))
            reader = readers.READERS[name]
            sound, path = reader.made(), pathlib.Path(folder) / reader.name
            for data in sound:  # Whatever is imported late is imported now.
                path.write_bytes(data)
                _verdict(reader.read, path, ran)
            _bounded()
            for i in range(first, count):
                path.write_bytes(readers.file(name, seed, i, sound))
                start = time.process_time()
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)
                armed.append(True)
                told = _verdict(reader.read, path, ran)
                armed.clear()
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.setitimer(signal.ITIMER_REAL, 0)
                took = time.process_time() - start
                print(json.dumps([name, i, told, took, _peak()]), flush=True)
            first = 0
