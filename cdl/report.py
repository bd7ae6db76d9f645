"""One self-contained HTML page about a sweep, and its figures as PNG files beside it."""

import base64
import io
import os
from pathlib import Path

import jinja2

from cdl.planning import Plan, plan, settings
from cdl.plots import curves_figure, rate_figure
from cdl.sweep.store import Store, sweep_table
from cdl.wording import duration

__all__ = ["write_report"]


def write_report(folder: str | Path, T: int | None = None) -> tuple[Plan, list[Path]]:
    """Write `report.html`, `horizon.png`, `rate.png` and `curves.png` into the folder of a sweep.

    Args:
      folder: of a sweep.
      T: horizon to predict; four times the longest if None.

    Returns:
      the plan, and the files written, the page first.

    Raises:
      UserError: as `cdl.plan`.
    """
    root = Path(folder)
    store, table, made = Store(root), sweep_table(root), plan(root, T)
    figures = {
        "horizon": made.plot(),
        "rate": rate_figure(table, made.fit, made.T),
        "curves": curves_figure(table, {id: store.curve(id) for id in table["id"]}),
    }
    images = {}
    for name, figure in figures.items():
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150)
        images[name] = png.getvalue()
        _replace(root / f"{name}.png", images[name])
    sentence = made.recommendation()
    page = _template().render(
        name=root.resolve().name,
        plan=made,
        recommendation=sentence[0].upper() + sentence[1:],
        lines=[(line, line.predict(made.T)) for line in made.fit.lines],
        runs=table.to_dict("records"),
        settings={c: table[c].iloc[0] for c in ["data.path", *settings(table)]},
        figures={name: base64.b64encode(png).decode() for name, png in images.items()},
        n_params=f"{table['n_params'].iloc[0]:,}",
        total_time=duration(table["seconds"].sum()),
        versions=table["versions"].iloc[-1],
        device=table["device"].iloc[-1],
    )
    _replace(root / "report.html", page.encode())
    return made, [root / "report.html", *(root / f"{name}.png" for name in figures)]


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("report.html.jinja")


def _replace(path: Path, content: bytes) -> None:
    """Write the file whole or not at all."""
    temporary = path.with_name(f".writing-{os.getpid()}-{path.name}")
    temporary.write_bytes(content)
    temporary.replace(path)
