"""Figures of laws. Each function draws one `matplotlib.figure.Figure` and touches no global state."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from cdl.errors import UserError
from cdl.laws.records import short_names
from cdl.plots import GREY, finish, palette

if TYPE_CHECKING:  # what is drawn draws itself by these functions
    from cdl.laws.curve import CurveFit
    from cdl.laws.horizon import HorizonFit, Line
    from cdl.laws.peak import PeakFit
    from cdl.laws.records import Trajectory
    from cdl.laws.scaling import ScalingFit
    from cdl.planning import Check

__all__ = ["curve_figure", "horizon_figure", "peak_figure", "scaling_figure", "sizes_figure"]

_SHOWN = 400  # points of a line
_FEW = 50  # losses of a run that are drawn large
_EARLIEST = 0.02  # of the points may lie above the figure: early losses are high and say little


def curve_figure(
    fit: "CurveFit", runs: "Sequence[Trajectory]" = (), forecasts: Mapping[str, pd.DataFrame] | None = None
) -> Figure:
    """Measured losses and a law along runs, as in Figures 2 to 5 of the paper, and below what it got wrong.

    Solid where the law was fitted, dashed with a band where it predicts: the later parts of the runs fitted, other
    runs, and forecasts without measurements.

    Args:
      runs: with losses to predict. forecasts: name -> `CurveFit.forecast`.
    """
    forecasts = forecasts or {}
    names = [t.run for t in fit.fitted] + [t.run for t in runs if t.run not in {f.run for f in fit.fitted}]
    shown, color = short_names([*names, *forecasts]), palette([*names, *forecasts])
    figure = Figure(figsize=(8.6, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
    for t in fit.fitted:
        step_P = _between(t.step_P)
        upper.plot(step_P, fit.predict(t.eta_T, step_P), "-", color=color[t.run], lw=1.6)
    for t in (*fit.rest, *runs):
        _draw_forecast(upper, fit.forecast(t.eta_T, _between(t.step_P)), color[t.run])
    for name, table in forecasts.items():
        _draw_forecast(upper, table.iloc[_between(np.arange(len(table))).tolist()], color[name])
    for t in (*fit.fitted, *fit.rest, *runs):
        few = len(t.step_P) < _FEW
        upper.plot(t.step_P, t.loss_P, ".", ms=7 if few else 2.5, color=color[t.run], alpha=0.6)
        error_P = 100 * (fit.predict(t.eta_T, t.step_P) / t.loss_P - 1)
        fitted = any(t is f for f in fit.fitted)
        lower.plot(t.step_P, error_P, "-" if fitted else "--", lw=0.9, color=color[t.run])
    losses = [t.loss_P for t in (*fit.fitted, *fit.rest, *runs)] + [table["low"] for table in forecasts.values()]
    all_P = np.concatenate(losses)
    all_P = all_P[np.isfinite(all_P)]  # intervals may be infinite
    bottom, top = all_P.min(), np.quantile(all_P, 1 - _EARLIEST)
    upper.set(ylabel="loss", ylim=(bottom - 0.06 * (top - bottom), top + 0.06 * (top - bottom)))
    lower.set(xlabel="step", ylabel="predicted over\nmeasured (%)")
    lower.axhline(0, color=GREY, lw=0.8)
    reach = np.quantile(np.abs(np.concatenate([line.get_ydata() for line in lower.get_lines()[:-1]])), 1 - _EARLIEST)
    lower.set_ylim(-1.3 * reach, 1.3 * reach)
    upper.set_title(fit.form.title, loc="left", fontsize=11)
    finish(lower, legend=False)
    finish(upper, legend=False)
    handles: list[Any] = [Line2D([], [], color=color[name], lw=2, label=shown[name]) for name in (*names, *forecasts)]
    handles.append(Line2D([], [], color=GREY, label="measured", marker=".", ls=""))
    handles += [Line2D([], [], color=GREY, label=label, ls=ls) for label, ls in (("fitted", "-"), ("predicted", "--"))]
    upper.legend(handles=handles, fontsize=8, frameon=False, ncols=2 if len(handles) > 6 else 1, loc="upper right")
    return figure


def horizon_figure(fit: "HorizonFit", T: float, checks: "Sequence[Check]" = ()) -> Figure:
    """Loss against 1/sqrt(T), or tokens or FLOPs, with the fitted lines, as in Figures 8 and 9 of the paper.

    Hollow points are horizons too short for the line. The bar at the left is the prediction interval of the best rate
    at horizon T, stars are runs that tested predictions.
    """
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    ax = figure.add_subplot()
    color, chosen = palette([line.eta_ref for line in fit.lines]), fit.best(T)
    for line in fit.lines:
        rate = line.name if np.isnan(line.eta_ref) else f"$\\eta_{{ref}}$ = {line.eta_ref:g}"
        best = line is chosen and len(fit.lines) > 1
        label = f"{rate}{' *' if best else ''},  $R^2$ = {line.r2:.4f}"
        _draw_line(ax, line, T, color=color[line.eta_ref], label=label, lw=2.2 if best else 1.3)
    p = chosen.predict(T)
    _draw_interval(ax, T**-0.5, p.loss, p.low, p.high, f"95% interval at {fit.count(T)}")
    for i, check in enumerate(checks):
        name = "check run" if i == 0 else None
        ax.plot(check.T**-0.5, check.loss, "*", ms=10, mfc=color.get(check.eta_ref, "w"), mec="k", zorder=6, label=name)
    unit = {"T": "T", "tokens": "\\mathrm{tokens}", "flops": "\\mathrm{FLOPs}"}[fit.x]
    ax.set(xlim=(0, None), xlabel=f"$1/\\sqrt{{{unit}}}$", ylabel="final loss (nats a token)")
    ax.set_title("Final loss at peak rate $\\eta_{ref}/\\sqrt{T}$" if fit.x == "T" else "", loc="left", fontsize=11)
    horizons = sorted({float(t) for line in fit.lines for t in (*line.T, *(t for t, _ in line.left_out))})
    top = ax.secondary_xaxis("top", functions=(lambda x: x, lambda x: x))
    apart = 0.022 * min(T, *horizons) ** -0.5  # so that labels do not lie on each other
    shown = [T]
    for t in reversed(horizons):
        if all(abs(t**-0.5 - other**-0.5) > apart for other in shown):
            shown.append(t)
    top.xaxis.set_major_locator(FixedLocator([t**-0.5 for t in shown]))
    top.xaxis.set_minor_locator(NullLocator())
    top.set_xticklabels([f"{t:,g}" if t < 1e6 else f"{t:.2g}" for t in shown], fontsize=7, rotation=60, color=GREY)
    top.set_xlabel({"T": "T", "tokens": "tokens", "flops": "FLOPs"}[fit.x], fontsize=8, color=GREY)
    finish(ax)
    return figure


def peak_figure(panels: "Mapping[str, Mapping[str, PeakFit]]") -> Figure:
    """Final loss against peak rate, as in Figure 6 of the paper: panel title -> name -> fit.

    Hollow points were left out as unstable, triangles at the upper edge lie above it at the loss written beside them,
    and red dotted lines are rates that diverged. The law is solid over the rates it was fitted on and dashed beyond. A
    star and its bar are eta_peak* and its 95% interval, cut off at the rates where it has no end.
    """
    figure = Figure(figsize=(1.0 + 5.6 * len(panels), 5.0), layout="constrained")
    for ax, (title, fits) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        color_of = palette(list(fits))
        rates = [e for f in fits.values() for e in (*f.eta, *f.diverged, *(e for e, _ in f.left_out))]
        losses = np.concatenate([f.loss for f in fits.values()])
        top, bottom = losses.max() + 0.4 * np.ptp(losses), losses.min() - 0.08 * np.ptp(losses)
        off = [name for name, f in fits.items() if any(loss > top for _, loss in f.left_out)]
        ax.set(xscale="log", xlim=(min(rates) / 1.2, max(rates) * 1.2), ylim=(bottom, top))
        for name, f in fits.items():
            color = color_of[name]
            ax.plot(f.eta, f.loss, "o", ms=5, color=color, label=f"{name},  $R^2$ = {f.r2:.4f}")
            tried = max([*f.eta, *(e for e, _ in f.left_out)])
            for ends, style in [((f.eta.min(), f.eta.max()), "-"), ((f.eta.max(), tried), "--")]:
                eta = np.geomspace(*ends, 200)
                ax.plot(eta, [f.at(e) for e in eta], style, lw=1.4, color=color)
            for e, loss in f.left_out:
                above = loss > top
                y = top - (0.02 + 0.045 * off.index(name)) * (top - bottom) if above else loss
                ax.plot(e, y, "^" if above else "o", ms=5, mfc="none", color=color)
                if above:
                    ax.annotate(
                        f"{loss:.2f}", (e, y), (-5, 0), textcoords="offset points", fontsize=6, ha="right", va="center",
                        color=color, bbox=dict(fc="w", ec="none", pad=0.5),
                    )  # fmt: skip
            if ax.get_xlim()[0] < f.best < ax.get_xlim()[1]:
                low, high = np.clip(f.interval, *ax.get_xlim())
                y = f.at(f.best)
                bar = [[f.best - low], [high - f.best]]
                style = dict(fmt="*", ms=10, mfc=color, mec="k", ecolor="k", capsize=3, lw=1, zorder=5)
                ax.errorbar(f.best, y, xerr=bar, **style)
            for e in f.diverged:
                ax.axvline(e, color="r", lw=0.8, ls=":")
        ax.set(xlabel="$\\eta_{peak}$", ylabel="final loss (nats a token)")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(lambda e, _: f"{e:g}")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_title(title, loc="left", fontsize=11)
        finish(ax, legend=False)
        handles, _ = ax.get_legend_handles_labels()
        if any(f.left_out for f in fits.values()):
            handles.append(Line2D([], [], marker="o", ls="", ms=5, mfc="none", color=GREY, label="left out: unstable"))
        if any(np.isfinite(f.best) for f in fits.values()):
            name = "$\\eta_{peak}^*$ and its 95% interval"
            handles.append(Line2D([], [], marker="*", ls="-", lw=1, ms=8, color=GREY, label=name))
        ax.legend(handles=handles, fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    return figure


def scaling_figure(fit: "ScalingFit", N: float, T: float) -> Figure:
    """The law over model sizes: loss against 1/sqrt(T) or, of tokens, 1/sqrt(FLOPs) (paper, Figure 10), and its trends.

    Left: a line per size at eta_ref*, solid where it was measured, dashed on to T; the bar is the prediction at (N, T).
    Right: L_inf and Q of the lines with standard errors against N, and the trend through them where there is one.
    """
    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.5, 1, 1])
    flops = fit.x == "tokens"
    lines = fit.lines(T)
    color = palette(list(lines), "viridis")
    for size, line in lines.items():
        label = f"N = {size:.3g}" if len(lines) <= 8 or size in (min(lines), max(lines)) else None
        _draw_line(left, line, T, color=color[size], label=label, scale=6 * size if flops else 1.0)
    at = (6 * N * T if flops else T) ** -0.5
    trend = p = None  # without them there are still the lines
    with contextlib.suppress(UserError):
        trend = fit.trend(T)
    with contextlib.suppress(UserError):
        p = fit.predict(N, T)
    if p:
        _draw_interval(left, at, p.loss, p.low, p.high, f"N = {N:.3g}, {fit.count(T)}")
    else:
        left.axvline(at, color="k", lw=0.8, ls=":", label=f"N = {N:.3g}, {fit.count(T)}: unknown")
    left.set(xlim=(0, None), ylabel="final loss (nats a token)")
    left.set_xlabel("$1/\\sqrt{\\mathrm{FLOPs}}$, FLOPs = 6 N tokens" if flops else "$1/\\sqrt{T}$")
    known = not any(np.isnan(line.eta_ref) for line in lines.values())
    left.set_title("Loss at $\\eta_{ref}^*$" if known else "Loss at the best peak rate", loc="left", fontsize=11)
    finish(left)
    for ax, name in ((middle, "L_inf"), (right, "Q")):
        _draw_sizes(ax, lines, name, "tab:blue")
        if trend:
            through = np.geomspace(min(trend.N[0], N), max(trend.N[-1], N), 100)
            ax.plot(through, getattr(trend, name)(through), "--", color=GREY, lw=1.2, label="trend")
            ax.plot(N, getattr(trend, name)(N), "*", ms=10, mfc="w", mec="k", label=f"N = {N:.3g}")
        symbol = {"L_inf": "$L_\\infty$", "Q": "$Q$"}[name]
        ax.set(xscale="log", xlabel="N (parameters)", ylabel=symbol)
        ax.set_title(f"{symbol} against N", loc="left", fontsize=11)
        finish(ax, legend=trend is not None)
    return figure


def sizes_figure(lines: "Mapping[float, Line]", shown: float) -> Figure:
    """Lines of loss against 1/sqrt(tokens) of many model sizes N (paper, Figure 7).

    Upper: the line of the size `shown`, and 1% to either side. Lower: L_inf and slope of all, with standard errors.
    """
    figure = Figure(figsize=(7.2, 8.0), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    line = lines[shown]
    tokens = np.geomspace(0.8 * line.T.min(), 1.25 * line.T.max(), 200)
    loss = np.array([line.at(t) for t in tokens])
    upper.fill_between(tokens, 0.99 * loss, 1.01 * loss, color="tab:blue", alpha=0.15, lw=0, label="within 1%")
    upper.plot(tokens, loss, color="tab:blue", lw=1.5, label=f"{line.L_inf:.3f} + {line.Q:.3g} / $\\sqrt{{tokens}}$")
    upper.plot(line.T, line.loss, "o", ms=5, color="k", label="runs")
    upper.set(xscale="log", xlabel="tokens", ylabel="final loss (nats a token)")
    upper.set_title(f"N = {shown / 1e9:.3g}B,  $R^2$ = {line.r2:.4f}", loc="left", fontsize=11)
    finish(upper)
    slope = lower.twinx()
    _draw_sizes(lower, lines, "L_inf", "tab:blue")
    _draw_sizes(slope, lines, "Q", "tab:red")
    lower.set(xscale="log", xlabel="N (parameters)")
    lower.set_ylabel("$L_\\infty$ (nats a token)", color="tab:blue")
    slope.set_ylabel("slope, nats x $\\sqrt{tokens}$", color="tab:red")
    lower.set_title("Intercept and slope of every size (bars: one standard error)", loc="left", fontsize=11)
    finish(lower, legend=False)
    slope.spines["top"].set_visible(False)
    return figure


def _draw_forecast(ax: Axes, table: pd.DataFrame, color: Any) -> None:
    ax.fill_between(table["step"], table["low"], table["high"], color=color, alpha=0.15, lw=0)
    ax.plot(table["step"], table["loss"], "--", color=color, lw=1.6)


def _between(step_P: np.ndarray) -> np.ndarray:
    """Steps from the first to the last, no more than can be seen."""
    return np.unique(np.linspace(step_P[0], step_P[-1], _SHOWN).round().astype(int))


def _draw_line(
    ax: Axes, line: "Line", T: float, color: Any, label: str | None, scale: float = 1.0, lw: float = 1.3
) -> None:
    """A line against 1/sqrt(scale x horizon): solid over the runs in it, dashed on to T; hollow: too short for it."""
    ends = np.array([line.T.max(), line.T.min()])
    further = np.array([max(T, ends[0]), ends[0]])
    for horizons, dash in ((ends, "-"), (further, "--")):
        loss = [line.at(t) for t in horizons]
        ax.plot((scale * horizons) ** -0.5, loss, dash, color=color, lw=lw, label=label if dash == "-" else None)
    ax.plot((scale * line.T) ** -0.5, line.loss, "o", ms=4, color=color)
    for short, loss in line.left_out:
        ax.plot((scale * short) ** -0.5, loss, "o", ms=4, mfc="none", color=color)


def _draw_interval(ax: Axes, x: float, loss: float, low: float, high: float, label: str) -> None:
    """A prediction; without a bar where its interval is infinite."""
    reach = [[loss - low], [high - loss]] if np.isfinite(high - low) else None
    ax.errorbar(x, loss, yerr=reach, fmt="k*", ms=8, capsize=4, lw=1.4, label=label, zorder=5)


def _draw_sizes(ax: Axes, lines: "Mapping[float, Line]", name: str, color: str) -> None:
    """L_inf or Q of lines against N, with standard errors."""
    values = [getattr(line, name) for line in lines.values()]
    errors = np.nan_to_num([getattr(line, f"{name}_se") for line in lines.values()])
    ax.errorbar(list(lines), values, yerr=errors, fmt="o", ms=4, capsize=2, lw=1, color=color)
