"""From a finished sweep to the settings of a longer run, and whether that run kept the promise."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from cdl.errors import UserError
from cdl.laws.horizon import FURTHER, HorizonFit, Line, NoLaw, Prediction, fit_horizon
from cdl.sweep.store import Store, sweep_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CHECKS", "Check", "Plan", "plan", "settings"]

CHECKS = "check"  # folder beside the sweep's points, with the runs that tested its predictions


def settings(table: pd.DataFrame) -> list[str]:
    """The columns of a sweep's table that one law must have in common: its config but for the axes of the law.

    Of the schedule that includes everything: it is a shape over the horizon. The path of the data is left out, their
    fingerprint is in.
    """
    sections = ("model", "data", "optimizer", "schedule", "eval")
    return [c for c in table.columns if c.split(".")[0] in sections and c != "data.path"]


@dataclass(frozen=True)
class Check:
    """A run at a predicted horizon: what it gave against what was said."""

    eta_ref: float
    T: int
    loss: float
    prediction: Prediction

    @property
    def inside(self) -> bool:
        """Is the loss in the prediction interval?"""
        return self.loss in self.prediction

    def summary(self) -> str:
        """One sentence."""
        p = self.prediction
        return (
            f"trained eta_ref={self.eta_ref:g}, T={self.T}: loss {self.loss:.4f}, predicted {p.loss:.4f} "
            f"[{p.low:.4f}, {p.high:.4f}]: {'inside' if self.inside else 'OUTSIDE'} the 95% interval"
        )


@dataclass(frozen=True)
class Plan:
    """The rate to use at horizon T, and the loss to expect ((5.1) at one model size).

    eta_peak = eta_ref / sqrt(T). warnings: sentences. checks: runs that tested predictions of this sweep.
    """

    fit: HorizonFit
    T: int
    line: Line
    prediction: Prediction
    warnings: tuple[str, ...]
    checks: tuple[Check, ...]

    @property
    def eta_ref(self) -> float:
        """eta_ref*, by `HorizonFit.best`."""
        return self.line.eta_ref

    @property
    def eta_peak(self) -> float:
        """The peak rate for T."""
        return self.eta_ref / self.T**0.5

    def recommendation(self) -> str:
        """The plan in one sentence."""
        p = self.prediction
        return (
            f"at T={self.T} use eta_ref*={self.eta_ref:g}, a peak rate of {self.eta_peak:.4g}, "
            f"and expect a loss of {p.loss:.4f} (95% interval {p.low:.4f} to {p.high:.4f})"
        )

    def summary(self) -> str:
        """Lines, plan, warnings and checks as text."""
        parts = [self.fit.summary(self.T), f"Plan: {self.recommendation()}."]
        parts += [f"Warning: {w}." for w in self.warnings]
        parts += [f"Check: {c.summary()}." for c in self.checks]
        return "\n".join(parts)

    def plot(self) -> "Figure":
        """`cdl.plots.horizon_figure` of the lines, the plan and its checks."""
        from cdl.plots import horizon_figure  # matplotlib is slow to import

        return horizon_figure(self.fit, self.T, self.checks)


def plan(folder: str | Path, T: int | None = None) -> Plan:
    """Fit the law to a sweep and say how to run T updates (four times the longest horizon if None).

    Raises:
      UserError: no finished runs. NoLaw: no line, or runs that differ in more than eta_ref, T and seed.
    """
    store = Store(folder)
    table = sweep_table(folder)
    _one_setting(table, folder)
    fit = fit_horizon(table)
    T = FURTHER * fit.longest if T is None else T
    if T < 1:
        raise UserError(f"T={T} must be at least 1")
    line = fit.best(T)
    warnings = fit.warnings(T)
    missing = len(store.expected() - store.ids())
    if missing:
        warnings.append(f"{missing} of the sweep's {len(store.expected())} runs are missing; run it again to go on")
    checks = []
    tested = Store(store.root / CHECKS).table()
    for row in tested.to_dict("records"):
        eta_ref, horizon, loss = row["eta_ref"], row["T"], row["loss"]
        if any(str(row[c]) != str(table[c].iloc[0]) for c in settings(table)):
            warnings.append(f"the check run at eta_ref={eta_ref:g}, T={horizon} has other settings and is left out")
        elif row["status"] != "done":
            warnings.append(f"the check run at eta_ref={eta_ref:g}, T={horizon} diverged")
        elif not any(line.eta_ref == eta_ref for line in fit.lines):
            warnings.append(f"the check run at eta_ref={eta_ref:g}, T={horizon} has no line to be compared with")
        else:
            checks.append(Check(eta_ref, horizon, loss, fit.line(eta_ref).predict(horizon)))
    return Plan(fit, int(T), line, line.predict(T), tuple(warnings), tuple(checks))


def _one_setting(table: pd.DataFrame, folder: str | Path) -> None:
    for column in settings(table):
        values = table[column].map(str).unique()
        if len(values) > 1:
            raise NoLaw(
                f"the runs in {folder} differ in {column} ({', '.join(values[:3])}): one law does not fit them; "
                f"sweep each into a folder of its own"
            )
