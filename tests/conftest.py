"""Eight CPU devices for every test, compiled programs kept between them, and sweeps that several share."""

import os
import subprocess
import sys
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
    return _swept(TINY, tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="session")
def long8(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A config of eight points whose sweep takes seconds on fast machines too, so that things can be done to it."""
    return _varied(tmp_path_factory, "T=[1200, 1800, 2700, 3900]")


@pytest.fixture(scope="session")
def undisturbed8(long8: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its sweep, in one process."""
    return _swept(long8, tmp_path_factory.mktemp("runs") / "undisturbed8")


@pytest.fixture(scope="session")
def points24(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A config of 24 points, some seconds as well."""
    return _varied(tmp_path_factory, "T=[400, 600, 900, 1300]", "eta_ref=[0.25, 0.5, 1.0, 2.0, 4.0, 8.0]")


@pytest.fixture(scope="session")
def undisturbed24(points24: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its sweep, in one process."""
    return _swept(points24, tmp_path_factory.mktemp("runs") / "undisturbed24")


def _varied(folders: pytest.TempPathFactory, T: str, eta_ref: str = "eta_ref=[0.5, 2.0]") -> str:
    """tests/tiny.py with other axes."""
    config = folders.mktemp("config") / "varied.py"
    text = Path(TINY).read_text()
    config.write_text(text.replace("T=[40, 60, 90, 130]", T).replace("eta_ref=[0.5, 2.0]", eta_ref))
    return str(config)


def _swept(config: str, out: Path) -> Path:
    command = [sys.executable, "-m", "cdl.cli", "sweep", f"--config={config}", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out
