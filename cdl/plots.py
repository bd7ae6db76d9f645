"""Figures of sweeps and of bounds, and what all figures share (those of laws are in `cdl.laws.figures`).

Each function draws one `matplotlib.figure.Figure` and touches no global state.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

if TYPE_CHECKING:  # what is drawn draws itself by these functions
    from cdl.laws.horizon import HorizonFit
    from cdl.theory.exam import Exam

__all__ = ["GREY", "bounds_figure", "curves_figure", "exam_figure", "finish", "palette", "rate_figure"]

GREY = "#666666"


def rate_figure(table: pd.DataFrame, fit: "HorizonFit", T: float) -> Figure:
    """Final loss against eta_ref, a line per horizon: where the best rate lies, and whether it stays there."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    ax = figure.add_subplot()
    done = table[table["status"] == "done"]
    horizons = sorted(done["T"].unique())
    colors = palette(horizons, "plasma")
    for t in horizons:
        runs = done[done["T"] == t].groupby("eta_ref")["loss"].mean()
        ax.plot(runs.index, runs.to_numpy(), "o-", ms=4, lw=1.3, color=colors[t], label=f"T = {t:,}")
        ax.plot(runs.idxmin(), runs.min(), "o", ms=9, mfc="none", mec=colors[t])
    rates = [line.eta_ref for line in fit.lines]
    ax.plot(rates, [line.at(T) for line in fit.lines], "k--", lw=1.2, label=f"predicted, T = {T:,g}")
    ax.set(xscale="log", xlabel="$\\eta_{ref}$", ylabel="held-out loss (nats a token)")
    every = sorted(table["eta_ref"].unique())
    ax.xaxis.set_major_locator(FixedLocator(every))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([f"{e:g}" for e in every])
    for e in sorted({e for e, _ in fit.diverged}):
        ax.axvline(e, color="r", lw=0.8, ls=":")
    ax.set_title("Final loss by reference rate (ring: best of its horizon)", loc="left", fontsize=11)
    finish(ax, legend=False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def curves_figure(table: pd.DataFrame, curves: Mapping[str, pd.DataFrame]) -> Figure:
    """Loss curves of the lowest seed, a panel per horizon: training loss (running mean), held-out loss (points).

    Args:
      table: of the sweep.
      curves: id -> curve with columns step, train_loss, eval_loss.
    """
    horizons = sorted(table["T"].unique())
    columns = min(3, len(horizons))
    rows = -(-len(horizons) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.6 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    colors = palette(sorted(table["eta_ref"].unique()))
    for ax, T in zip(axes, horizons, strict=False):
        runs = table[(table["T"] == T) & (table["seed"] == table["seed"].min())]
        for run in runs.itertuples():
            curve = curves[str(run.id)]
            smooth = curve["train_loss"].rolling(max(1, int(T) // 50), min_periods=1, center=True).mean()
            color = colors[run.eta_ref]  # type: ignore[index]
            ax.plot(curve["step"], smooth, lw=1, color=color)
            ax.plot(curve["step"], curve["eval_loss"], "o", ms=3, color=color)
        ax.set_title(f"T = {T:,}", fontsize=9)
        finish(ax, legend=False)
    for ax in axes[len(horizons) :]:
        ax.axis("off")
    # Spikes of unstable runs would flatten everything else: they leave the panel above the initial loss.
    axes[0].set_ylim(top=1.1 * max((c["train_loss"].iloc[0] for c in curves.values() if len(c)), default=1.0))
    axes[0].set_ylabel("loss (nats a token)")
    figure.supxlabel("update", fontsize=9)
    rates = sorted(table["eta_ref"].unique())
    handles = [Line2D([], [], color=colors[e], label=f"{e:g}") for e in rates]
    figure.legend(handles=handles, title="$\\eta_{ref}$", loc="outside right upper", fontsize=8, frameon=False)
    return figure


def bounds_figure(rates: Mapping[str, np.ndarray], bounds: Mapping[str, np.ndarray]) -> Figure:
    """Rates (left) and bound after every update (right) of schedules, name -> [T] each."""
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = palette(list(rates), "turbo")
    dashes = ["-", "--", "-.", ":"]  # equal curves stay visible
    for i, (name, eta_T) in enumerate(rates.items()):
        shown = _thinned(len(eta_T))
        style = dict(color=colors[name], ls=dashes[i % 4], lw=1.5)
        left.plot(shown + 1, eta_T[shown], label=name, **style)
        right.plot(shown + 1, bounds[name][shown], **style)
    # A few first rates of inv_sqrt, and bounds after almost no updates, would flatten everything else.
    usual = max(float(np.quantile(eta_T, 0.98)) for eta_T in rates.values())
    highest = max(float(eta_T.max()) for eta_T in rates.values())
    left.set(xlabel="update", ylabel="learning rate", ylim=(0, 1.05 * (highest if highest < 3 * usual else 2 * usual)))
    ends = [float(b[-1]) for b in bounds.values() if np.isfinite(b[-1])] or [1.0]
    right.set(xlabel="update", ylabel="bound of the loss, less $L_*$", yscale="log")
    right.set_ylim(0.8 * min(float(b.min()) for b in bounds.values()), 20 * max(ends))
    right.set_title("Last iterate, (2.4)", loc="left", fontsize=11)
    left.set_title("Schedule", loc="left", fontsize=11)
    finish(left)
    finish(right, legend=False)
    return figure


def exam_figure(exams: "Sequence[Exam]") -> Figure:
    """sqrt(T) times the bound at peak rate 1/sqrt(T), against T: qualified schedules (solid) level off."""
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    ax = figure.add_subplot()
    colors = palette([e.shape for e in exams], "turbo")
    for e in exams:
        scaled = np.add(e.distance, e.noise)
        style = dict(ls="-" if e.qualified else "--", color=colors[e.shape], lw=1.5)
        ax.plot(e.T, scaled, label=f"{e.shape}{'' if e.qualified else ' (fails)'}", **style)
    ax.set(xscale="log", yscale="log", xlabel="T", ylabel="$\\sqrt{T}$ x (bound - $L_*$)")
    ax.set_title("Exam: does the bound at peak $1/\\sqrt{T}$ fall like $1/\\sqrt{T}$?", loc="left", fontsize=11)
    finish(ax, legend=False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _thinned(T: int, points: int = 4000) -> np.ndarray:
    """Indices to draw of T values: all of few, else the first ones and evenly spaced ones, with the last."""
    if T <= points:
        return np.arange(T)
    return np.unique(np.concatenate([np.geomspace(1, T, points // 4), np.linspace(1, T, points)]).astype(int)) - 1


def palette(values: Sequence[Any], name: str = "turbo") -> dict[Any, tuple[float, float, float, float]]:
    """A colour for each of the ordered values."""
    ramp = matplotlib.colormaps[name](np.linspace(0.08, 0.88, max(len(values), 2)))
    return {v: (c[0], c[1], c[2], c[3]) for v, c in zip(values, ramp, strict=False)}


def finish(ax: Axes, legend: bool = True) -> None:
    ax.grid(alpha=0.25, lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    if legend:
        ax.legend(fontsize=8, frameon=False)
