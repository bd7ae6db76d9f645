"""The scripts of the paper's figures as modules."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import cdl

EXPERIMENTS = Path(cdl.__file__).parents[1] / "experiments"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """A script or a module beside it, by name, as Python finds it when a script is run."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (EXPERIMENTS / f"{name}.py").is_file():
            del sys.modules[name]
