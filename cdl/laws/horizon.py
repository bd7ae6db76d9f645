"""G4: loss against 1/sqrt(T) at a scaled peak rate, and the plan that follows from it (paper, section 5, (5.1)).

For eta_peak = eta_ref / sqrt(T) and a qualified schedule the law is a straight line for every eta_ref,

    loss(eta_ref, T) = L_inf(eta_ref) + Q(eta_ref) / sqrt(T),

fitted by ordinary least squares. It holds once T is long enough (paper: from 2,500 updates on for GPT-2 0.1B). Which
horizons are too short is decided by a rule that is fixed in advance: `_long_enough`.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import stats

from cdl.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FURTHER", "HorizonFit", "Line", "NoLaw", "Prediction", "fit_horizon", "fit_line"]

LEVEL = 0.95  # what a prediction interval promises
# The data choose the horizons in the line and the rate that is recommended, which costs coverage: half of the 5% is
# set aside for that (Bonferroni). Measured end to end in tests/laws.
_OWN_LEVEL = 1 - (1 - LEVEL) / 2
FURTHER = 4  # times the longest horizon: what is predicted unless T is given
ALWAYS_IN = 4  # horizons that the rule for too short ones starts from
LEAST_R2 = 0.95  # the paper calls a fit good from here on
MOST_EXTRAPOLATION = 100.0  # further than this times the longest horizon, a line is only a guess


class NoLaw(UserError):
    """There are finished runs, but no line can be laid through them."""


@dataclass(frozen=True)
class Prediction:
    """A loss and its prediction interval: where a new run should land with probability `LEVEL` or more."""

    loss: float
    low: float
    high: float

    def __contains__(self, loss: float) -> bool:
        return self.low <= loss <= self.high


@dataclass(frozen=True)
class Line:
    """One fitted line, loss = L_inf + Q / sqrt(T).

    eta_ref: the reference rate it belongs to. L_inf_se, Q_se: standard errors, NaN with two points. r2: coefficient
    of determination, NaN where the losses do not vary. T, loss: the points it was fitted on. left_out: (T, loss) of
    those that were too short.
    """

    eta_ref: float
    L_inf: float
    Q: float
    L_inf_se: float
    Q_se: float
    r2: float
    T: np.ndarray
    loss: np.ndarray
    left_out: tuple[tuple[int, float], ...] = ()

    def at(self, T: float) -> float:
        """The fitted loss after T updates."""
        return self.L_inf + self.Q / math.sqrt(T)

    def predict(self, T: float) -> Prediction:
        """The loss of a new run of T updates, with its prediction interval.

        The interval holds the scatter of a run about the line and the error of the line itself. It supposes that the
        line goes on straight and that the new run differs from these as they differ from each other: with one seed
        for all, it knows nothing of other seeds. It is infinite with two points.
        """
        return self._interval(T, _OWN_LEVEL, runs=1)

    def agrees(self, T: float, losses: np.ndarray) -> bool:
        """Does the mean of these losses after T updates lie in the 95% interval for it?"""
        return float(losses.mean()) in self._interval(T, LEVEL, runs=len(losses))

    def _interval(self, T: float, level: float, runs: int) -> Prediction:
        """For the mean of so many new runs; Student t with n - 2 degrees of freedom."""
        x, n = 1 / np.sqrt(self.T), len(self.T)
        loss = self.at(T)
        if n < 3:
            return Prediction(loss, -math.inf, math.inf)
        residual = self.loss - (self.L_inf + self.Q * x)
        variance = float(residual @ residual) / (n - 2)
        leverage = 1 / n + (1 / math.sqrt(T) - x.mean()) ** 2 / float(((x - x.mean()) ** 2).sum())
        half = float(stats.t.ppf((1 + level) / 2, n - 2)) * math.sqrt(variance * (1 / runs + leverage))
        return Prediction(loss, loss - half, loss + half)


def fit_line(T: Sequence[float] | np.ndarray, loss: Sequence[float] | np.ndarray, eta_ref: float = 1.0) -> Line:
    """Ordinary least squares of loss on 1/sqrt(T), on exactly the points given.

    Args:
      T: horizons [P], positive; updates, or tokens or samples seen.
      loss: final losses [P], finite.
      eta_ref: a label for the line.

    Raises:
      UserError: fewer than two distinct horizons.
    """
    T, loss = np.asarray(T, float), np.asarray(loss, float)
    if len(np.unique(T)) < 2:
        raise UserError(f"a line needs two horizons, eta_ref={eta_ref:g} has T={np.unique(T)}; run more")
    fit = stats.linregress(1 / np.sqrt(T), loss)
    two = len(T) == 2
    flat = np.ptp(loss) == 0
    return Line(
        eta_ref=float(eta_ref),
        L_inf=float(fit.intercept),
        Q=float(fit.slope),
        L_inf_se=math.nan if two else float(fit.intercept_stderr),
        Q_se=math.nan if two else float(fit.stderr),
        r2=math.nan if flat else float(fit.rvalue) ** 2,
        T=T,
        loss=loss,
    )


@dataclass(frozen=True)
class HorizonFit:
    """A line for every eta_ref of a table that has two horizons.

    lines: by rising eta_ref. diverged: (eta_ref, T) of runs without a finite loss.
    """

    lines: tuple[Line, ...]
    diverged: tuple[tuple[float, int], ...]

    @property
    def longest(self) -> int:
        """The longest horizon of the lines that may be recommended."""
        return int(max(line.T.max() for line in self._candidates()))

    def line(self, eta_ref: float) -> Line:
        """The line of one eta_ref of the table."""
        for line in self.lines:
            if math.isclose(line.eta_ref, eta_ref):
                return line
        raise UserError(f"eta_ref={eta_ref:g} has no line; there are {[x.eta_ref for x in self.lines]}")

    def alike(self, T: float) -> list[Line]:
        """The lines that cannot be told apart at T: those within the prediction interval of the lowest one."""
        candidates = self._candidates()
        interval = min(candidates, key=lambda line: line.at(T)).predict(T)
        return [line for line in candidates if line.at(T) in interval]

    def best(self, T: float) -> Line:
        """The line whose eta_ref to use at horizon T: eta_ref*.

        Of the lines that cannot be told apart at T, the one that is lowest at the longest horizon trained: between
        rates that the extrapolation cannot separate, what was measured decides. A rate that was not trained that far
        is not chosen, and neither is one that diverged at a horizon as long as any of its line.
        """
        return min(self.alike(T), key=lambda line: line.at(self.longest))

    def _candidates(self) -> list[Line]:
        """The lines that may be recommended: sound ones that reach the longest horizon any sound one does."""

        def sound(line: Line) -> bool:
            return not any(math.isclose(e, line.eta_ref) and t >= line.T.max() for e, t in self.diverged)

        lines = [line for line in self.lines if sound(line)] or list(self.lines)
        reach = max(line.T.max() for line in lines)
        return [line for line in lines if line.T.max() == reach]

    def warnings(self, T: float) -> list[str]:
        """What a person should know before trusting a prediction at horizon T, a sentence each."""
        best, found = self.best(T), []
        rates = [line.eta_ref for line in self.lines]
        # A rate beyond that diverged bounds the best one as well as a worse one does.
        tried = sorted({*rates, *(e for e, _ in self.diverged)})
        diverged_itself = any(math.isclose(e, best.eta_ref) for e, _ in self.diverged)
        if len(tried) == 1:
            found.append(f"eta_ref={best.eta_ref:g} is the only rate: nothing says that it is the best; add others")
        elif best.eta_ref == tried[0] or (best.eta_ref == tried[-1] and not diverged_itself):
            low = best.eta_ref == tried[0]
            step = tried[1] / tried[0] if low else tried[-1] / tried[-2]
            wider = best.eta_ref / step if low else best.eta_ref * step
            found.append(
                f"the best eta_ref, {best.eta_ref:g}, is the {'smallest' if low else 'largest'} of the grid: a better "
                f"one may lie beyond; add eta_ref={wider:g}"
            )
        for eta_ref in sorted({e for e, _ in self.diverged}):
            horizons = ", ".join(str(t) for e, t in self.diverged if e == eta_ref)
            found.append(f"eta_ref={eta_ref:g} diverged at T = {horizons}; those runs are in no line")
        too_short: dict[str, list[str]] = {}
        for line in self.lines:
            if line.left_out:
                horizons = ", ".join(str(t) for t in sorted({t for t, _ in line.left_out}))
                too_short.setdefault(horizons, []).append(f"{line.eta_ref:g}")
        for horizons, rates in too_short.items():
            found.append(f"T = {horizons} is too short for the line of eta_ref = {', '.join(rates)} and left out of it")
        for line in self.lines:
            if line.r2 < LEAST_R2:
                found.append(f"eta_ref={line.eta_ref:g}: R2 = {line.r2:.4f}, the losses do not lie on a line")
        others = [f"{line.eta_ref:g}" for line in self.alike(T) if line is not best]
        if others:
            found.append(
                f"eta_ref = {', '.join(others)} cannot be told apart from {best.eta_ref:g} at T={T:.0f}; "
                f"of these, {best.eta_ref:g} is best at T={self.longest}"
            )
        n = len(np.unique(best.T))
        if n < ALWAYS_IN:
            found.append(f"the line of eta_ref={best.eta_ref:g} rests on {n} horizons; add some")
        elif n == ALWAYS_IN and not best.left_out:
            found.append(
                f"with {n} horizons of eta_ref={best.eta_ref:g} none can be tested for being too short; add one"
            )
        if best.Q <= 0:
            found.append(f"the loss at eta_ref={best.eta_ref:g} does not fall with T; the law does not hold here")
        if MOST_EXTRAPOLATION * self.longest < T:
            found.append(f"T={T:.0f} is {T / self.longest:.0f} times the longest horizon; treat the loss as a guess")
        return found

    def summary(self, T: float | None = None) -> str:
        """The lines as a table of text, with predictions at horizon T (four times the longest if None)."""
        T = FURTHER * self.longest if T is None else T
        best = self.best(T)
        head = f"{'eta_ref':>8}  {'L_inf':>7} {'±':>6}  {'Q':>7} {'±':>6}  {'R2':>6}  {'runs':>4}  loss at T={T:.0f}"
        rows = [head]
        for line in self.lines:
            p = line.predict(T)
            rows.append(
                f"{line.eta_ref:>8g}  {line.L_inf:>7.4f} {line.L_inf_se:>6.3f}  {line.Q:>7.3f} {line.Q_se:>6.3f}  "
                f"{line.r2:>6.4f}  {len(line.T):>4}  {p.loss:.4f} [{p.low:.4f}, {p.high:.4f}]"
                + ("  <- eta_ref*" if line is best else "")
            )
        return "\n".join(rows)

    def plot(self, T: float | None = None) -> "Figure":
        """`cdl.plots.horizon_figure` of these lines, up to horizon T (four times the longest if None)."""
        from cdl.plots import horizon_figure  # matplotlib is slow to import

        return horizon_figure(self, FURTHER * self.longest if T is None else T)


def fit_horizon(table: pd.DataFrame) -> HorizonFit:
    """Fit the law to a table of finished runs.

    Args:
      table: columns `eta_ref`, `T`, `loss`, one row per run; several seeds are several rows. Runs without a finite
        loss belong in it too: they are listed, not fitted.

    Raises:
      UserError: a column is missing, or no eta_ref has two horizons.
    """
    missing = [c for c in ("eta_ref", "T", "loss") if c not in table.columns]
    if missing:
        raise UserError(f"the table lacks the columns {missing}; it has {list(table.columns)}")
    finite = table[np.isfinite(table["loss"].to_numpy(float))]
    broken = table.drop(finite.index).sort_values(["eta_ref", "T"])
    lines = []
    for eta_ref, runs in finite.groupby("eta_ref"):
        runs = runs.sort_values("T")
        T, loss = runs["T"].to_numpy(float), runs["loss"].to_numpy(float)
        keep = _long_enough(T, loss)
        if len(np.unique(T[keep])) >= 2:
            left_out = tuple((int(t), float(x)) for t, x in zip(T[~keep], loss[~keep], strict=True))
            line = fit_line(T[keep], loss[keep], float(eta_ref))  # type: ignore[arg-type]
            lines.append(dataclasses.replace(line, left_out=left_out))
    if not lines:
        raise NoLaw("no eta_ref has finished runs at two horizons or more, so there is no line; run more of the grid")
    diverged = tuple((float(e), int(t)) for e, t in zip(broken["eta_ref"], broken["T"], strict=True))
    return HorizonFit(tuple(lines), diverged)


def _long_enough(T: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Which runs are long enough for the line: a mask over [P], by a rule fixed in advance.

    The `ALWAYS_IN` longest horizons are. The next shorter one joins as long as the mean of its losses lies in the 95%
    prediction interval of the line through those already in; the first that does not is too short, and so are all
    below it. On losses that lie on a line exactly, up to noise, this leaves out a good horizon in a tenth of lines.
    """
    horizons = np.unique(T)[::-1]
    for i in range(ALWAYS_IN, len(horizons)):
        longer, here = horizons[i] < T, horizons[i] == T
        line = fit_line(T[longer], loss[longer])
        if not line.agrees(float(horizons[i]), loss[here]):
            return longer
    return np.ones(len(T), bool)
