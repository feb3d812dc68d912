"""Where compiled programs are kept."""

import jax
import pytest

from vitssl.run import compilecache


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


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
