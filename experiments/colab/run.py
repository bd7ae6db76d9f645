"""Run the notebooks from top to bottom, as Colab does, and store what they show.

    python experiments/colab/run.py [NOTEBOOK ...]

Each runs in an empty folder that is removed afterwards. Needs nbclient and ipykernel: `pip install -e '.[test]'`.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SECONDS = 600  # for a cell


def executed(notebook: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with new outputs.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell has failed.
    """
    book: Any = nbformat.read(notebook, as_version=4)
    NotebookClient(
        book, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # times
        for output in cell.get("outputs", []):
            output.get("metadata", {}).clear()
    return book


def main() -> None:
    """Run them all, or those named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")), metavar="NOTEBOOK")
    for notebook in parser.parse_args().notebooks:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(notebook, Path(folder)), notebook)
        print(notebook)


if __name__ == "__main__":
    main()
