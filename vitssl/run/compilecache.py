"""Compiled programs kept between runs, so that the same one is compiled once.

They lie in ~/.cache/vitssl/xla (or below XDG_CACHE_HOME). JAX_COMPILATION_CACHE_DIR
puts them elsewhere, JAX_ENABLE_COMPILATION_CACHE=false keeps none; it is safe to delete
them at any time.
"""

import hashlib
import os
import pathlib
import platform

import jax
from jax.experimental.compilation_cache import compilation_cache


def start() -> None:
    """Keep compiled programs, unless the user's environment says where or not to."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder()))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            # A run has hundreds of small programs, which take as long as the large one.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def stop() -> None:
    """Neither keep nor read compiled programs.

    For several CPU devices, of one process or more: in a program that XLA wrote to disk
    (seen in jaxlib 0.10.2) the collectives have lost their order, so two devices that
    run it may each wait in another one, for ever.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # What it says of itself is else that of before.


def folder() -> pathlib.Path:
    """Return where the programs of machines like this one lie.

    A program for a CPU has its instructions, and a home may be that of many machines.
    """
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "vitssl" / "xla" / _processor()


def _processor() -> str:
    text = platform.processor()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    # What Linux calls the sets of instructions on x86 and on ARM.
    sets = [x for x in lines if x.startswith(("flags", "Features"))][:1]
    digest = hashlib.sha256("".join([text, *sets]).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:8]}"
