"""`cdl fit` and `cdl forecast`: `cdl.laws` in the terminal."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from cdl.cli_output import PAGES, check_outputs, save_figure, save_table, table_text
from cdl.errors import UserError
from cdl.laws.curve import CurveFit, compare_laws, fit_curve, score_text
from cdl.laws.figures import curve_figure
from cdl.laws.horizon import FURTHER, fit_horizon
from cdl.laws.peak import fit_peak
from cdl.laws.records import read_runs, trajectories
from cdl.sweep.store import sweep_table
from cdl.theory.compare import read_rates

__all__ = ["curve", "forecast", "horizon", "peak"]


def curve(arguments: argparse.Namespace) -> None:
    """Fit a law along runs, or compare all laws on them."""
    check_outputs(arguments, [*arguments.runs, *(arguments.test or []), arguments.schedule], PAGES)
    runs = _read(arguments.runs, arguments)
    tests = _read(arguments.test, arguments) if arguments.test else None
    if tests is not None:  # their rates count from the first update, their losses from where the fit begins
        tests.loc[tests["step"] <= arguments.after, "loss"] = np.nan
        if not tests["loss"].notna().any():
            raise UserError(f"--after={arguments.after} leaves no loss of the runs to test on; use a smaller one")
    options = dict(until=arguments.until, after=arguments.after)
    law, text = arguments.law, ""
    if law == "all":
        with _busy("fitting all laws"):
            compared = compare_laws(runs, tests, **options)
        text = "\n".join([score_text(compared), *(f"Warning: {w}." for w in compared.attrs["warnings"])])
        print(text)
        law = compared.loc[compared["mae"].idxmin(), "law"]
        if not (arguments.plot or arguments.csv):
            return
    with _busy(f"fitting the law {law}"):
        fit = fit_curve(runs, law, **options)
        summary = fit.summary()
        if tests is not None:
            scores = fit.scores(tests).set_index("run")
            scores.loc["mean"] = scores.mean()
            summary += f"\nOther runs, predicted:\n{score_text(scores)}"
    if not text:
        print(summary)
    if arguments.plot:
        with _busy("drawing"):
            figure = curve_figure(fit, [] if tests is None else trajectories(tests))
        save_figure(figure, arguments.plot, f"{fit.form.title}", "\n\n".join(filter(None, [text, summary])))
    if arguments.csv:
        save_table(_points(fit, tests), arguments.csv)


def forecast(arguments: argparse.Namespace) -> None:
    """Fit a law along runs, and forecast the loss of other schedules."""
    check_outputs(arguments, [*arguments.runs, *arguments.to, arguments.schedule], PAGES)
    rates = {text: read_rates(text, arguments.T) for text in dict.fromkeys(arguments.to)}
    runs = _read(arguments.runs, arguments)
    with _busy(f"fitting the law {arguments.law}"):
        fit = fit_curve(runs, arguments.law, until=arguments.until, after=arguments.after)
        steps = {text: _some_steps(fit, eta_T) for text, eta_T in rates.items()}
        tables = {t: fit.forecast(eta_T, steps[t], arguments.level) for t, eta_T in rates.items()}
    rows = []
    for text, table in tables.items():
        last, eta_T = table.iloc[-1], rates[text]
        row = {"schedule": text, "T": len(eta_T), "peak": float(eta_T.max())}
        rows.append(row | {name: float(last[name]) for name in ("loss", "low", "high")})
    text = (
        f"{fit.summary()}\nLoss after the last update, with {100 * arguments.level:g}% intervals:\n"
        f"{table_text(pd.DataFrame(rows))}"
    )
    for schedule, eta_T in rates.items():
        for warning in fit.cautions(eta_T):
            text += f"\nWarning: {schedule}: {warning}."
    print(text)
    if arguments.plot:
        save_figure(curve_figure(fit, forecasts=tables), arguments.plot, "Forecast", text)
    if arguments.csv:
        save_table(pd.concat([table.assign(schedule=t) for t, table in tables.items()]), arguments.csv)


def peak(arguments: argparse.Namespace) -> None:
    """Fit (4.1), loss against peak rate at one horizon."""
    check_outputs(arguments, [arguments.table], PAGES)
    table = _table(arguments.table)
    if arguments.T is not None:
        if "T" not in table.columns:
            raise UserError(f"--T={arguments.T}: {arguments.table} has no column T; leave --T out")
        if not (table["T"] == arguments.T).any():
            raise UserError(f"--T={arguments.T} is not in {arguments.table}; it has {sorted(set(table['T']))}")
        table = table[table["T"] == arguments.T]
    elif "T" in table.columns and table["T"].nunique() > 1:
        raise UserError(
            f"{arguments.table} has several horizons and (4.1) is for one; give --T={table['T'].max():.10g}"
        )
    fit = fit_peak(table)
    text = "\n".join([fit.summary(), *(f"Warning: {w}." for w in fit.warnings)])
    print(text)
    if arguments.plot:
        save_figure(fit.plot(), arguments.plot, "Loss against peak rate", text)
    if arguments.csv:
        eta = np.geomspace(fit.eta.min(), fit.eta.max(), 200)
        predictions = [fit.predict(float(e)) for e in eta]
        columns = {name: [getattr(p, name) for p in predictions] for name in ("loss", "low", "high")}
        save_table(pd.DataFrame({"eta": eta} | columns), arguments.csv)


def horizon(arguments: argparse.Namespace) -> None:
    """Fit lines of loss against 1/sqrt(T), 1/sqrt(tokens) or 1/sqrt(FLOPs)."""
    check_outputs(arguments, [arguments.table], PAGES)
    fit = fit_horizon(_table(arguments.table), arguments.x)
    to = FURTHER * fit.longest if arguments.to is None else arguments.to
    if not 0 < to < np.inf:
        raise UserError(f"--to={to} must be a positive number of {arguments.x}")
    text = "\n".join([fit.summary(to), *(f"Warning: {w}." for w in fit.warnings(to))])
    print(text)
    if arguments.plot:
        save_figure(fit.plot(to), arguments.plot, "Loss against the horizon", text)
    if arguments.csv:
        rows = [
            {"eta_ref": line.eta_ref, "L_inf": line.L_inf, "L_inf_se": line.L_inf_se, "Q": line.Q, "Q_se": line.Q_se}
            | {"r2": line.r2, "runs": len(line.T), arguments.x: to}
            | {name: getattr(line.predict(to), name) for name in ("loss", "low", "high")}
            for line in fit.lines
        ]
        save_table(pd.DataFrame(rows), arguments.csv)


def _read(paths: list[str], arguments: argparse.Namespace) -> pd.DataFrame:
    """Runs, with what was mended and assumed on stderr, each sentence once."""
    runs = read_runs(paths, schedule=arguments.schedule, loss=arguments.loss, warmup=arguments.warmup)
    found: dict[str, list[str]] = {}
    for note in runs.attrs["notes"]:
        run, _, sentence = note.partition(": ")
        found.setdefault(sentence, []).append(run)
    for sentence, names in found.items():
        who = ", ".join(names) if len(names) <= 3 else f"{len(names)} runs"
        print(f"Note: {who}: {sentence}.", file=sys.stderr)
    return runs


def _table(path: str) -> pd.DataFrame:
    """A sweep, or a CSV or Parquet file with a row for each run."""
    if Path(path).is_dir():
        table = sweep_table(path)
        if table["n_params"].nunique() > 1:
            sizes = ", ".join(map(str, sorted(set(table["n_params"]))))
            raise UserError(f"{path} holds models of several sizes (n_params = {sizes}); use cdl plan")
        return table
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; give the folder of a sweep or a CSV file with a row for each run")
    try:
        return pd.read_parquet(path) if Path(path).suffix == ".parquet" else pd.read_csv(path)
    except (ValueError, OSError) as e:  # pandas' and pyarrow's
        raise UserError(f"{path} is no table: {str(e).splitlines()[0]}; give a CSV file with a row for each run") from e


def _points(fit: CurveFit, tests: pd.DataFrame | None) -> pd.DataFrame:
    """Every loss with its prediction; those not fitted with their intervals."""
    parts = []
    for t in fit.fitted:
        columns = dict(run=t.run, step=t.step_P, loss=t.loss_P, predicted=fit.predict(t.eta_T, t.step_P), fitted=True)
        parts.append(pd.DataFrame(columns))
    for t in (*fit.rest, *([] if tests is None else trajectories(tests))):
        table = fit.forecast(t.eta_T, t.step_P).drop(columns="eta").rename(columns={"loss": "predicted"})
        table.insert(0, "run", t.run)
        parts.append(table.assign(loss=t.loss_P.tolist(), fitted=False))
    return pd.concat(parts, ignore_index=True)


def _some_steps(fit: CurveFit, eta_T: np.ndarray) -> np.ndarray:
    """Steps of a forecast: evenly spaced, from where the fit begins."""
    first = min(int(t.step_P[0]) for t in fit.fitted)
    return np.unique(np.linspace(min(first, len(eta_T)), len(eta_T), 1000).round().astype(int))


@contextlib.contextmanager
def _busy(what: str) -> Iterator[None]:
    """A spinner on a terminal while something may take longer than a second."""
    with Console(stderr=True).status(f"{what} ..."):
        yield
