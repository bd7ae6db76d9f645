"""Who may import whom (design: downward only), and what a notebook pays for a name."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cdl

ROOT = Path(cdl.__file__).parent
# Higher may import lower. What is not listed may be imported by all.
LAYERS = [
    {"cli"},
    {"cli_pilot"},
    {"cli_sweep", "cli_probe", "cli_export"},
    {"cli_train", "cli_store"},
    {"report", "cli_theory", "cli_laws", "cli_data"},
    {"launch", "progress", "status", "cli_output"},
    {"metrics", "pilot"},
    {"planning", "probing"},
    {"sweep"},
    {"train", "config"},
    {"models", "optim", "data", "laws", "probes"},
    {"theory"},
    {"schedules", "plots", "sharding", "compute", "wording", "machine"},
    {"errors"},
]
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def imports_of(file: Path) -> set[str]:
    """Top-level parts of cdl that a file imports, type-checking blocks left out."""
    tree = ast.parse(file.read_text())
    typing_only = {
        id(n)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for n in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("cdl.")}
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cdl":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


def test_imports_point_downward() -> None:
    files = [f for f in ROOT.rglob("*.py") if f.name != "__init__.py"]
    assert len(files) > 15
    for file in files:
        here = file.relative_to(ROOT).parts[0].removesuffix(".py")
        for other in imports_of(file) - {here}:
            assert LEVEL[other] > LEVEL[here], f"{file} imports cdl.{other}, which is not below it"


def test_laws_import_neither_model_nor_trainer() -> None:
    for file in (ROOT / "laws").glob("*.py"):
        assert imports_of(file) <= {"errors", "laws", "plots", "schedules", "theory"}


def test_probes_import_neither_model_nor_trainer() -> None:
    for file in (ROOT / "probes").glob("*.py"):
        assert imports_of(file) <= {"errors", "plots", "probes"}
        assert "flax" not in file.read_text()


def test_theory_stands_alone() -> None:
    for file in (ROOT / "theory").glob("*.py"):
        assert imports_of(file) <= {"errors", "schedules", "theory"}


@pytest.mark.parametrize("name", ["bound", "bound_curve", "average_bound", "fit_curve"])
def test_bounds_load_jax_alone(name: str) -> None:
    code = f"import cdl, sys; cdl.{name}; print([m for m in ('flax', 'optax', 'grain', 'sympy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name", ["schedule", "read_runs", "fit_peak", "fit_horizon", "fit_scaling", "sweep_table", "plan"]
)
def test_a_name_for_notebooks_loads_no_trainer(name: str) -> None:
    code = f"import cdl, sys; cdl.{name}; print([m for m in ('jax', 'flax', 'optax', 'grain') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_looking_at_results_loads_no_jax() -> None:
    code = "import cdl.cli_store, sys; print([m for m in ('jax', 'flax', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist_and_unknown_ones_do_not() -> None:
    assert all(callable(getattr(cdl, name)) for name in cdl.__all__)  # none is hidden by a module of its name
    assert dir(cdl) == cdl.__all__
    with pytest.raises(AttributeError, match="no attribute 'schedul'"):
        cdl.schedul  # noqa: B018
