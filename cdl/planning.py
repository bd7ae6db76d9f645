"""From finished sweeps to the settings of a longer or larger run, and whether that run kept the promise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

import pandas as pd

from cdl.errors import UserError
from cdl.laws.horizon import FURTHER, HorizonFit, Line, NoLaw, Prediction, fit_horizon
from cdl.laws.scaling import ScalingFit, fit_scaling
from cdl.sweep.identity import PATHS
from cdl.sweep.store import Store, sweep_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CHECKS", "Check", "Plan", "ScalingPlan", "plan", "settings"]

CHECKS = "check"  # folder beside the sweep's points, with the runs that tested its predictions
_SIZE = ("model.n_layer", "model.n_head", "model.d_model")  # what the pilots of a plan for another N may differ in


def settings(table: pd.DataFrame) -> list[str]:
    """The columns of a sweep's table that one law must have in common: its config but for the axes of the law.

    Of the schedule that includes everything: it is a shape over the horizon. Paths of files are left out, the
    fingerprints of what is in them are in.
    """
    sections = ("model", "data", "optimizer", "schedule", "eval", "init", "lora")
    return [c for c in table.columns if c.split(".")[0] in sections and c not in PATHS]


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
        """`cdl.laws.figures.horizon_figure` of the lines, the plan and its checks."""
        from cdl.laws.figures import horizon_figure  # matplotlib is slow to import

        return horizon_figure(self.fit, self.T, self.checks)


@dataclass(frozen=True)
class ScalingPlan:
    """The rate to use for N parameters and T updates, and the loss to expect (5.1).

    prediction: None where the pilots have one size and N is another. pilots_flops, flops: of all pilots, and of the
    planned run, at 6 N a token; a pilot that diverged counts as if it had gone on. warnings: sentences.
    """

    fit: ScalingFit
    N: float
    T: int
    prediction: Prediction | None
    pilots_flops: float
    flops: float
    warnings: tuple[str, ...]

    @property
    def eta_ref(self) -> float:
        """eta_ref*, by `ScalingFit.eta_ref`."""
        return self.fit.eta_ref(self.N, self.T)

    @property
    def eta_peak(self) -> float:
        """The peak rate for T."""
        return self.fit.eta_peak(self.N, self.T)

    def recommendation(self) -> str:
        """The plan in one sentence."""
        p = self.prediction
        if p is None:
            loss = "which loss to expect cannot be said"
        elif math.isinf(p.high):
            loss = f"expect a loss of about {p.loss:.4f}, with no interval"
        else:
            loss = f"expect a loss of {p.loss:.4f} (95% interval {p.low:.4f} to {p.high:.4f})"
        return (
            f"train N={self.N:.6g}, T={self.T} at a peak rate of {self.eta_peak:.4g} (eta_ref*={self.eta_ref:g}); "
            f"{loss}; the pilots cost {self.pilots_flops / self.flops:.2%} of this run's FLOPs "
            f"({self.pilots_flops:.3g} of {self.flops:.3g})"
        )

    def summary(self) -> str:
        """Lines, trend, plan and warnings as text."""
        parts = [self.fit.summary(self.N, self.T), f"Plan: {self.recommendation()}."]
        return "\n".join(parts + [f"Warning: {w}." for w in self.warnings])

    def plot(self) -> "Figure":
        """`cdl.laws.figures.scaling_figure` of the lines, the trend and the plan."""
        return self.fit.plot(self.N, self.T)


@overload
def plan(folders: str | Path, T: int | None = None) -> Plan: ...


@overload
def plan(
    folders: str | Path | Sequence[str | Path], T: int | None = None, N: float | None = None
) -> Plan | ScalingPlan: ...


def plan(
    folders: str | Path | Sequence[str | Path], T: int | None = None, N: float | None = None
) -> Plan | ScalingPlan:
    """Fit the law to sweeps and say how to run T updates of a model of N parameters.

    Args:
      folders: a sweep's folder, or several, which may differ in the size of their models and in nothing else.
      T: four times the longest horizon if None.
      N: one folder without N is planned for by its own lines alone, with a `Plan`. Otherwise a `ScalingPlan`, for the
        largest of the pilots' sizes if None.

    Raises:
      UserError: no finished runs, or T or N is not positive. NoLaw: no line, or runs that differ in more than eta_ref,
        T, seed and, for a `ScalingPlan`, model size.
    """
    folders = [folders] if isinstance(folders, str | Path) else list(folders)
    if not folders:
        raise UserError("there is no folder to plan from; name one or more sweeps")
    if len(folders) == 1 and N is None:
        return _plan_horizon(folders[0], T)
    return _plan_scaling(folders, T, N)


def _plan_horizon(folder: str | Path, T: int | None) -> Plan:
    store = Store(folder)
    table = sweep_table(folder)
    _one_setting(table, str(folder))
    fit = fit_horizon(table)
    T = FURTHER * fit.longest if T is None else T
    if T < 1:
        raise UserError(f"T={T} must be at least 1")
    line = fit.best(T)
    warnings = fit.warnings(T)
    warnings += _missing(store, "the sweep")
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


def _plan_scaling(folders: Sequence[str | Path], T: int | None, N: float | None) -> ScalingPlan:
    tables = [sweep_table(folder) for folder in folders]
    for folder, table in zip(folders, tables, strict=True):
        if "n_params" not in table.columns or table["n_params"].isna().any():
            raise UserError(f"results in {folder} lack the number of parameters, n_params; train them anew")
    table = pd.concat(tables, ignore_index=True).drop_duplicates("id", ignore_index=True)
    _one_setting(table, ", ".join(str(folder) for folder in folders), _SIZE)
    fit = fit_scaling(table.rename(columns={"n_params": "N"}))
    T = FURTHER * fit.longest if T is None else T
    N = fit.N[-1] if N is None else N
    if T < 1 or not 1 <= N < math.inf:
        raise UserError(f"T={T}, N={N:g}: both must be at least 1")
    warnings = fit.warnings(N, T)
    for folder in folders:
        warnings += _missing(Store(folder), str(folder))
    try:
        prediction = fit.predict(N, T)
    except NoLaw:  # a warning says why; the rate carries over all the same
        prediction = None
    flops = 6 * N * T * float(table["data.batch_size"].iloc[0]) * float(table["data.seq_len"].iloc[0])
    return ScalingPlan(fit, N, int(T), prediction, fit.share(N, T) * flops, flops, tuple(warnings))


def _missing(store: Store, whose: str) -> list[str]:
    expected = store.expected()
    missing = len(expected - store.ids())
    return [f"{missing} of {whose}'s {len(expected)} runs are missing; run it again to go on"] if missing else []


def _one_setting(table: pd.DataFrame, where: str, free: Sequence[str] = ()) -> None:
    """Raise where the runs differ in a setting, those named in `free` apart."""
    for column in settings(table):
        values = table[column].map(str).unique()
        if len(values) > 1 and column not in free:
            remedy = (
                "plan with sweeps that differ in model size alone" if free else "sweep each into a folder of its own"
            )
            raise NoLaw(
                f"the runs in {where} differ in {column} ({', '.join(values[:3])}): one law does not fit them; {remedy}"
            )
