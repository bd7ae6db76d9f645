"""Figures 8 and 9: GPT-2 over reference rates and horizons, a line in 1/sqrt(T) for each rate.

Beside the paper's panels, all horizons and a view of the long ones, lines that have seen nothing of the last horizons
are compared with them.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from paper import Claim, Lab, Outcome, Sweep, span

import cdl
from cdl.laws.horizon import NoLaw
from cdl.plots import finish, palette

GOOD = 0.95
FURTHER = 2  # horizons that are predicted are at least so many times the longest that is fitted
CLOSE = 0.02  # mean relative error of predictions that hold


def horizons(lab: Lab, sweep: Sweep, paper: dict[str, str]) -> Outcome:
    """Train, fit and draw.

    Args:
      paper: what the paper says: `best`, its best reference rate, and `reach`, of its extrapolation.
    """
    table = lab.train(sweep).table
    fit = cdl.fit_horizon(table)
    colors = palette([line.eta_ref for line in fit.lines])
    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    longest = fit.longest
    for ax in (left, right):
        for line in fit.lines:
            of = table[(table["eta_ref"] == line.eta_ref) & (table["status"] == "done")]
            x = np.linspace(0, float(of["T"].min()) ** -0.5, 50)
            ax.plot(x, line.L_inf + line.Q * x, lw=1.2, color=colors[line.eta_ref])
            label = f"$\\eta_{{ref}}$ = {line.eta_ref:g}, $R^2$ = {line.r2:.4f}"
            ax.plot(of["T"] ** -0.5, of["loss"], "o", ms=4, color=colors[line.eta_ref], label=label)
        ax.set(xlabel="$1/\\sqrt{T}$", ylabel="final held-out loss")
        finish(ax, legend=ax is left)
    left.set_xlim(0, None)
    near = table[(table["T"] >= longest / 4) & (table["status"] == "done")]
    right.set_xlim(0.9 * longest**-0.5, 1.08 * (longest / 4) ** -0.5)
    best = near.groupby("T")["loss"].min()
    right.set_ylim(best.min() - 0.01, float(np.quantile(near["loss"], 0.75)) + 0.02)
    left.set_title("Lines through the horizons that are long enough", loc="left", fontsize=10)
    right.set_title("The long horizons", loc="left", fontsize=10)
    predicted = _unseen(table, longest)
    rates_at = table[table["status"] == "done"].groupby("T")[["eta_ref", "loss"]].apply(_best_rate)
    all_ended = table.groupby("T")["status"].apply(lambda status: bool((status == "done").all()))
    late = rates_at[(rates_at.index >= longest / 8) & all_ended.reindex(rates_at.index)]
    r2 = [line.r2 for line in fit.lines]
    rates = table["eta_ref"].nunique()
    straight = sum(line.r2 >= GOOD and len(line.T) > 2 for line in fit.lines)
    short = sum(len(line.left_out) for line in fit.lines)
    chosen = fit.best(longest)
    claims = [
        Claim(
            "At peak rate eta_ref/sqrt(T) the loss is a line in 1/sqrt(T) for every eta_ref",
            f"R2 {span(r2, '.4f')}; {straight} of {rates} rates at {GOOD} or more; {short} of {len(table)} runs left "
            "out as too short" + (f", {len(fit.diverged)} runs diverged" if fit.diverged else ""),
            straight == rates,
        ),
        Claim(
            f"Lines of short horizons predict long ones ({paper['reach']}; here of {FURTHER} times or more)",
            "too few horizons"
            if predicted.empty
            else f"{len(predicted)} runs {FURTHER} times longer or more than any in their line: mean error "
            f"{predicted['relative'].abs().mean():.2%}, worst {predicted['relative'].abs().max():.2%}, "
            f"{int(predicted['inside'].sum())} in their 95% interval",
            None if predicted.empty else bool(predicted["relative"].abs().mean() <= CLOSE),
        ),
        Claim(
            f"One eta_ref is best at all horizons ({paper['best']})",
            f"{', '.join(f'T={T:,}: {rate:g}' for T, rate in late.items()) or 'runs have diverged'}; of the lines, "
            f"those of {', '.join(f'{x.eta_ref:g}' for x in fit.alike(longest))} cannot be told apart",
            bool(late.nunique() == 1) if len(late) > 1 else None,
        ),
    ]
    numbers: dict[str, Any] = dict(
        lines={f"{line.eta_ref:g}": vars(line) for line in fit.lines},
        best=chosen.eta_ref,
        runs=table[["eta_ref", "T", "loss", "status"]],
        predicted=predicted,
    )
    return Outcome(figure, numbers, claims)


def _best_rate(runs: pd.DataFrame) -> float:
    return float(runs["eta_ref"].to_numpy()[runs["loss"].argmin()])


def _unseen(table: pd.DataFrame, longest: int) -> pd.DataFrame:
    """Runs at FURTHER times the horizons of a fit, or more, as it predicts them, of rates that have a line in it."""
    try:
        early = cdl.fit_horizon(table[table["T"] <= longest / FURTHER])
    except NoLaw:
        return pd.DataFrame()
    rows = []
    for line in early.lines:
        if len(line.T) < 3:
            continue
        reach = table[(table["eta_ref"] == line.eta_ref) & (table["T"] >= FURTHER * line.T.max())]
        for run in reach[reach["status"] == "done"].itertuples():
            said = line.predict(float(run.T))  # type: ignore[arg-type]
            rows.append(
                dict(eta_ref=line.eta_ref, T=run.T, loss=run.loss, predicted=said.loss, low=said.low, high=said.high)
                | dict(inside=run.loss in said, relative=said.loss / run.loss - 1)  # type: ignore[operator]
            )
    return pd.DataFrame(rows)
