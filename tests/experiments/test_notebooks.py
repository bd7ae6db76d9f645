"""The notebooks run from top to bottom, and show their figures without being run."""

import json
from pathlib import Path

import pytest

import cdl

NOTEBOOKS = sorted((Path(cdl.__file__).parents[1] / "experiments" / "colab").glob("*.ipynb"))


def test_notebooks_are_stored_with_what_they_show() -> None:
    assert len(NOTEBOOKS) == 3
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        outputs = [output for cell in code for output in cell["outputs"]]
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), notebook.name
        assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2, notebook.name
        assert not any(output["output_type"] == "error" for output in outputs), notebook.name


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_run(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient")
    monkeypatch.syspath_prepend(str(notebook.parent))
    from run import executed  # pyrefly: ignore[missing-import]

    book = executed(notebook, tmp_path)
    pictures = [o for cell in book.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 2
