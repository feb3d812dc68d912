"""Where compiled programs are kept."""

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from vitssl.run import compilecache, devices


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    names += ("jax_enable_compilation_cache",)
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_they_lie_in_the_users_cache_by_kind_of_processor(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    compilecache.start()
    assert jax.config.jax_compilation_cache_dir == str(compilecache.folder())
    assert compilecache.folder().parent == tmp_path / "vitssl" / "xla"
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.0
    here = compilecache.folder()
    monkeypatch.setattr(compilecache.platform, "processor", lambda: "another")
    assert compilecache.folder() != here


def test_without_xdg_they_lie_in_the_home(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compilecache.folder().parent == tmp_path / ".cache" / "vitssl" / "xla"


def test_a_folder_of_the_users_own_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilecache.start()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_several_cpus_keep_none(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()

    def kept(power):
        x = np.ones(3, np.float32)
        jax.jit(lambda x: x**power).lower(x).compile()
        return len([p for p in tmp_path.iterdir() if p.name.endswith("-cache")])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        devices.mesh(devices.Mesh(), 4)
    assert kept(3) == 1
    devices.mesh(devices.Mesh(), 4)
    assert kept(5) == 1
