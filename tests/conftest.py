"""Eight CPU devices for every test, compiled programs kept between them, and a tiny sweep that several share."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

TINY = str(Path(__file__).parent / "tiny.py")


def pytest_configure(config: pytest.Config) -> None:
    """Subprocesses and later test runs on this machine read what was compiled before."""
    cache = config.cache
    assert cache is not None
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache.mkdir("xla"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.devices()  # from here on no command changes their number


@pytest.fixture(scope="session")
def tiny_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished sweep of tests/tiny.py, uninterrupted, made by the command itself."""
    import subprocess
    import sys

    out = tmp_path_factory.mktemp("runs") / "tiny"
    command = [sys.executable, "-m", "cdl.cli", "sweep", f"--config={TINY}", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out
