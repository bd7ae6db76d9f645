"""How often intervals of `CurveFit.forecast` hold what comes, on published runs.

    python experiments/forecast_coverage.py --curves=DIR --llama=DIR [--law=convex] [--level=0.9] [--out=runs/paper]

--curves has 25M/*.csv and 100M/*.csv of the GitHub repository thu-yao-01-luo/MultiPowerLaw, --llama the W&B exports
(JSON) of fabian-sp/lr-scheduling, of which losses after step 1000 count. A forecast is one fit and one run or rest of a
run that it had not seen. Its losses err together, so a forecast counts once however many losses it has.

Writes forecast_coverage_LAW.png (share inside against level) and .csv (every forecast), and prints a row for each kind
of forecast. No training; several minutes on a CPU.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cdl.errors import UserError
from cdl.laws.curve import LAWS, fit_curve
from cdl.laws.holdout import points_of
from cdl.laws.records import Trajectory, read_runs, short_names, trajectories
from cdl.plots import GREY, finish, palette

AFTER = 1000  # of the Llama runs: losses up to this step follow no law of the rates
SIZES = ("25M", "100M")  # folders of --curves
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of the figure
PARTS = (0.3, 0.5, 0.7)
PILOTS = ("cosine_24000", "constant_24000")
SPLIT = (*PILOTS, "wsdcon_9")  # published with the multi-power law

Runs = Sequence[Trajectory]
Case = tuple[str, str, Runs, float, Runs]


def read(curves: Path, llama: Path) -> tuple[dict[str, list[Trajectory]], dict[str, list[Trajectory]]]:
    """Model size -> runs of --curves, and of --llama.

    Raises:
      UserError: no such runs there.
    """
    for size in SIZES:
        if not list((curves / size).glob("*.csv")):
            where = "https://github.com/thu-yao-01-luo/MultiPowerLaw"
            raise UserError(f"--curves={curves} has no {size}/*.csv; take the curves of {where}")
    if not list(llama.glob("*.json")):
        raise UserError(f"--llama={llama} has no *.json; take the runs of https://github.com/fabian-sp/lr-scheduling")
    table = read_runs(llama)
    by_layers = {f"{n:g} layers": late(trajectories(these)) for n, these in table.groupby("n_layer")}
    return {size: trajectories(curves / size) for size in SIZES}, by_layers


def late(runs: Runs) -> list[Trajectory]:
    """Losses after step AFTER, and shorter names."""
    names = short_names([t.run for t in runs])
    return [dataclasses.replace(points_of(t, t.step_P > AFTER), run=names[t.run]) for t in runs]


def cases(curves: Mapping[str, Runs], llama: Mapping[str, Runs]) -> Iterator[Case]:
    """Kind of forecast, model size, runs to fit and which part of them, runs to forecast (none: the other part)."""
    for part in PARTS:
        for model, runs in (*curves.items(), *llama.items()):
            yield from ((f"one run, first {part:.0%}", model, [t], part, []) for t in runs)
    for model, runs in curves.items():
        yield from (("one pilot", model, [t], 1.0, [other for other in runs if other is not t]) for t in runs)
    for kind, names in (("two pilots", PILOTS), ("published split", SPLIT)):
        for model, runs in curves.items():
            yield kind, model, [t for t in runs if t.run in names], 1.0, [t for t in runs if t.run not in names]
    for kind, models in (("all but one", curves), ("all but one, two peak rates", llama)):
        for model, runs in models.items():
            yield from ((kind, model, [other for other in runs if other is not t], 1.0, [t]) for t in runs)


def forecasts(case: Case, law: str, level: float) -> list[dict[str, Any]]:
    """A row for each forecast: share of its losses inside its intervals, how wide these are and how far off it is.

    Raises:
      UserError: the law cannot be fitted to these points.
    """
    kind, model, fitted, part, runs = case
    fit = fit_curve(fitted, law, until=part)
    rows = []
    for t in runs or fit.rest:
        tables = {at: fit.forecast(t.eta_T, t.step_P, at) for at in {level, *LEVELS}}
        inside = {at: share_inside(table, t.loss_P) for at, table in tables.items()}
        table = tables[level]
        half, error = (table["high"] - table["low"]) / 2 / table["loss"], (table["loss"] / t.loss_P - 1).abs()
        figures = dict(inside=inside[level], half=half.mean(), error=error.mean(), worst=error.max())
        found = dict(kind=kind, model=model, run=t.run, points=len(t.step_P)) | figures
        rows.append(found | {f"inside at {at:g}": inside[at] for at in LEVELS})
    return rows


def share_inside(table: pd.DataFrame, loss_P: np.ndarray) -> float:
    return float(pd.Series(loss_P.tolist()).between(table["low"], table["high"]).mean())


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def row_of(kind: str, these: pd.DataFrame) -> str:
    inside, half = these["inside"], these["half"]
    pooled = (inside * these["points"]).sum() / these["points"].sum()
    shares = [f"{x:.3f}" for x in (inside.mean(), inside.median(), pooled)]
    figures = [f"{x:.2%}" for x in (half.mean(), half.median(), these["error"].mean(), these["worst"].mean())]
    return line([kind, f"{len(these)}", *shares, *figures])


def coverage_figure(table: pd.DataFrame, law: str) -> Figure:
    """Share of losses inside, mean over forecasts, against the level of the intervals."""
    figure = Figure(figsize=(8.4, 4.8), layout="constrained")
    ax = figure.add_subplot()
    ax.plot(LEVELS, LEVELS, ":", color=GREY, lw=1.2, label="as promised")
    kinds = list(dict.fromkeys(table["kind"]))
    color = palette(kinds)
    for kind in kinds:
        these = table[table["kind"] == kind]
        shares = [these[f"inside at {at:g}"].mean() for at in LEVELS]
        ax.plot(LEVELS, shares, "o-", ms=4, lw=1.3, color=color[kind], label=f"{kind} ({len(these)})")
    shares = [table[f"inside at {at:g}"].mean() for at in LEVELS]
    ax.plot(LEVELS, shares, "ko-", ms=5, lw=2, label=f"all ({len(table)})")
    ax.set(xlabel="level of the intervals", ylabel="share of losses inside", xticks=LEVELS, ylim=(0.45, 1.02))
    ax.set_title(f"law={law}: how often intervals hold what comes (forecasts)", loc="left", fontsize=11)
    finish(ax, legend=False)
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curves", required=True, metavar="DIR", help="folder with 25M/ and 100M/ of MultiPowerLaw")
    parser.add_argument("--llama", required=True, metavar="DIR", help="folder with runs of lr-scheduling, *.json")
    parser.add_argument("--law", default="convex", choices=LAWS)
    parser.add_argument("--level", type=float, default=0.9, help="of the intervals in the table")
    parser.add_argument("--out", default="runs/paper", metavar="DIR", help="folder for figure and numbers")
    arguments = parser.parse_args()
    if not 0 < arguments.level < 1:
        parser.error(f"--level={arguments.level} must lie between 0 and 1, such as 0.9")
    try:
        curves, llama = read(Path(arguments.curves), Path(arguments.llama))
    except UserError as e:
        parser.error(str(e))
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)

    found: dict[str, list[dict[str, Any]]] = {}
    impossible = []
    columns = ["mean share", "median", "of all losses", "half-width", "median", "error", "worst"]
    print(line([f"law={arguments.law}, level {arguments.level:g}", "forecasts", *columns]))
    print("|---" * 9 + "|", flush=True)
    listed = list(cases(curves, llama))
    for i, case in enumerate(listed):
        kind, model, fitted = case[:3]
        try:
            found.setdefault(kind, []).extend(forecasts(case, arguments.law, arguments.level))
        except UserError as e:
            impossible.append(f"{kind}, {model}, {', '.join(t.run for t in fitted)}: {e}")
        if (i + 1 == len(listed) or listed[i + 1][0] != kind) and found[kind]:
            print(row_of(kind, pd.DataFrame(found[kind])), flush=True)
    table = pd.DataFrame([row for rows in found.values() for row in rows])
    print(row_of("all", table))
    for sentence in impossible:
        print(f"Left out: {sentence}.")
    worst = table.sort_values("inside", kind="stable").head(10)
    print("\nForecasts with the fewest losses inside:")
    for r in worst.to_dict("records"):
        figures = f"{r['inside']:.3f}, half-width {r['half']:.2%}, error {r['error']:.2%}"
        print(f"  {figures}: {r['kind']}, {r['model']}, {r['run']}")
    file = out / f"forecast_coverage_{arguments.law}"
    table.to_csv(file.with_suffix(".csv"), index=False)
    coverage_figure(table, arguments.law).savefig(file.with_suffix(".png"), dpi=130)
    print(f"\nNumbers: {file.with_suffix('.csv')}\nFigure: {file.with_suffix('.png')}")


if __name__ == "__main__":
    main()
