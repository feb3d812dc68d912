"""Settings every test shares: CPU, four simulated devices, a compile cache."""

import ctypes
import gc
import importlib.metadata
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Processes that tests start read what the first of them compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
_FLAGS = "--xla_force_host_platform_device_count=4"
# Simulated devices that meet in a collective wait for each other; on a busy machine one
# may come minutes late, and XLA ends the process after 40 seconds.
_FLAGS += " --xla_cpu_collective_call_terminate_timeout_seconds=900"
# Most of the time here is compilation: machine code that is made without optimization
# takes half the time, and a third less again without these emitters. HLO is the same.
_FLAGS += " --xla_backend_optimization_level=0"
# And a tenth less in one piece than in 32, which are for as many threads.
_FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
# Later versions of XLA do not know this flag, and end the process of who sets it.
if importlib.metadata.version("jax").startswith("0.10."):
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _FLAGS)
# Compiled functions are kept between runs; tiny ones too (the default is >= 1 s).
_CACHE = pathlib.Path(tempfile.gettempdir()) / "vitssl-test-compile-cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# Tracing allocates objects by the million, few of them garbage; looking through the
# heap as Python would is a tenth of the time here. `forget` collects what there is.
gc.disable()

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

# grain reads absl flags in its workers; nobody parses them under pytest.
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()

_KEEPS = jax.config.jax_enable_compilation_cache
_CASES = pathlib.Path(__file__).parent / "golden" / "cases"


def forget():
    """Drop compiled functions, and give their memory back.

    XLA maps some memory regions for each; a process that ran a thousand tests passed
    the kernel's limit of 65,530 (vm.max_map_count) and died. What glibc keeps of what
    compiling took was 8 GB a process at the end.
    """
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def full() -> bool:
    """Return whether this process holds so much that it is time to `forget`."""
    if sys.platform != "linux":
        return True
    about = pathlib.Path("/proc/self")
    pages = int((about / "statm").read_text().split()[1])
    regions = (about / "maps").read_text().count("\n")
    return pages * os.sysconf("SC_PAGE_SIZE") > 3 * 2**30 or regions > 20_000


@pytest.fixture(autouse=True, scope="module")
def _executables_of_one_file():
    yield
    forget()
    # Several devices, where a test had them, keep nothing (`compilecache.stop`).
    jax.config.update("jax_enable_compilation_cache", _KEEPS)
    compilation_cache.reset_cache()


@pytest.fixture
def few_executables():
    """Drop compiled functions where there are many, not at the end of the file."""
    yield
    if full():
        forget()


def pytest_addoption(parser):
    """Add `--golden-dir`: golden cases other than the project's own copy."""
    parser.addoption("--golden-dir", default=str(_CASES))
