"""What verbs of the command line print and write: tables, figures, pages. Nothing is written over an input."""

import argparse
import glob
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from cdl.errors import UserError

if TYPE_CHECKING:
    from cdl.planning import Plan

__all__ = ["FIGURES", "PAGES", "check_outputs", "save_figure", "save_table", "show_report", "table_text"]

FIGURES = (".png", ".pdf", ".svg")
PAGES = (*FIGURES, ".html")


def check_outputs(arguments: argparse.Namespace, inputs: Sequence[str | None], kinds: Sequence[str] = FIGURES) -> None:
    """Before anything is computed: can --plot and --csv be written, and are none of the inputs among them?"""
    if arguments.plot and Path(arguments.plot).suffix not in kinds:
        raise UserError(f"--plot={arguments.plot} must end in {', '.join(kinds[:-1])} or {kinds[-1]}")
    taken = {file.resolve() for name in inputs if name for file in _files(name)}
    for option in ("plot", "csv"):
        name = getattr(arguments, option, None)
        if name is None:
            continue
        path = Path(name).resolve()
        if not path.parent.is_dir():
            raise UserError(f"--{option}={name}: there is no folder {Path(name).parent}; make it first")
        if path.is_dir():
            raise UserError(f"--{option}={name} is a folder; give the name of a file")
        if path in taken:
            raise UserError(f"--{option}={name} would overwrite another file of this command; choose another name")
        taken.add(path)


def _files(name: str) -> Iterable[Path]:
    """What an input may read: a file, all in a folder, what a pattern matches."""
    path = Path(name)
    if path.is_dir():
        return path.rglob("*")
    return [path] if path.is_file() else map(Path, glob.glob(name, recursive=True))


def save_figure(figure: Figure, path: str, title: str = "", text: str = "") -> None:
    """As an image; or, where the path ends in .html, as a self-contained page with a title and text above it."""
    if Path(path).suffix == ".html":
        svg = io.StringIO()
        figure.savefig(svg, format="svg")
        drawing = svg.getvalue()
        drawing = drawing[drawing.index("<svg") :]
        loader = jinja2.FileSystemLoader(Path(__file__).parent)
        environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
        template = environment.get_template("figure.html.jinja")
        Path(path).write_text(template.render(title=title, text=text, svg=drawing))
    else:
        figure.savefig(path, dpi=150)
    print(f"Figure: {path}")


def save_table(table: pd.DataFrame, path: str) -> None:
    """As CSV."""
    table.to_csv(path, index=False)
    print(f"Numbers: {path}")


def table_text(table: pd.DataFrame) -> str:
    """Words to the left, numbers to the right with six digits."""
    words = [c for c in table.columns if not all(isinstance(x, int | float) for x in table[c])]
    shown = table.copy()
    for c in words:
        width = max(len(c), *(len(x) for x in table[c]))
        shown[c] = [x.ljust(width) for x in table[c]]
    shown.columns = [c.ljust(len(shown[c].iloc[0])) if c in words else c for c in shown.columns]
    lines = shown.to_string(index=False, float_format="{:.6g}".format).splitlines()
    return "\n".join(line.rstrip() for line in lines)


def show_report(made: "Plan", files: Sequence[Path]) -> None:
    """Print a plan, and where its report is."""
    print(made.summary())
    print(f"Report: {files[0]}\nFigures: {', '.join(str(f) for f in files[1:])}")
