"""G3 and G4: loss against 1/sqrt(T) at a scaled peak rate, and the plan that follows from it (paper, section 5, (5.1)).

For eta_peak = eta_ref / sqrt(T) and a qualified schedule the law is a straight line for every eta_ref (G4),

    loss(eta_ref, T) = L_inf(eta_ref) + Q(eta_ref) / sqrt(T),

fitted by ordinary least squares. Runs at their best peak rate each lie on one line (G3). With a fixed batch and model,
tokens and FLOPs are multiples of T, and the horizon may be counted in them. The law holds once T is long enough (paper:
from 2,500 updates on for GPT-2 0.1B). Which horizons are too short is decided by a rule that is fixed in advance:
`_long_enough`.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import stats

from cdl.errors import UserError, unknown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FURTHER", "HORIZONS", "HorizonFit", "Line", "NoLaw", "Prediction", "fit_horizon", "fit_line", "numbers"]

HORIZONS = {"T": "T", "tokens": "tokens", "flops": "FLOPs"}  # column that counts the horizon: what it is called
LEVEL = 0.95  # what a prediction interval promises
# The data choose the horizons in the line and the rate that is recommended, which costs coverage: half of the 5% is
# set aside for that (Bonferroni). Measured end to end in tests/laws.
OWN_LEVEL = 1 - (1 - LEVEL) / 2
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

    eta_ref: the reference rate it belongs to, NaN where every run had its best one (G3). L_inf_se, Q_se: standard
    errors, NaN with two points. r2: coefficient of determination, NaN where the losses do not vary. T, loss: the points
    it was fitted on, T in updates, tokens or FLOPs. left_out: (T, loss) of those that were too short.
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

    @property
    def name(self) -> str:
        """Which rate, in words."""
        return "the best rate of each run" if math.isnan(self.eta_ref) else f"eta_ref={self.eta_ref:g}"

    @property
    def flat(self) -> bool:
        """Are all the losses the same number? Then they say nothing of their scatter."""
        return bool(np.ptp(self.loss) == 0)

    def at(self, T: float) -> float:
        """The fitted loss after T updates."""
        if not 0 < T < math.inf:
            raise UserError(f"T={T} must be a positive number")
        return self.L_inf + self.Q / math.sqrt(T)

    def predict(self, T: float) -> Prediction:
        """The loss of a new run of T updates, with its prediction interval.

        The interval holds the scatter of a run about the line and the error of the line itself. It supposes that the
        line goes on straight and that the new run differs from these as they differ from each other: with one seed
        for all, it knows nothing of other seeds. It is infinite with two points, and where the losses do not vary.
        """
        return self._interval(T, OWN_LEVEL, runs=1)

    def agrees(self, T: float, losses: np.ndarray) -> bool:
        """Does the mean of these losses after T updates lie in the 95% interval for it?"""
        return float(losses.mean()) in self._interval(T, LEVEL, runs=len(losses))

    def _interval(self, T: float, level: float, runs: int) -> Prediction:
        """For the mean of so many new runs; Student t with n - 2 degrees of freedom."""
        x, n = 1 / np.sqrt(self.T), len(self.T)
        loss = self.at(T)
        if n < 3 or self.flat:
            return Prediction(loss, -math.inf, math.inf)
        residual = self.loss - (self.L_inf + self.Q * x)
        variance = float(residual @ residual) / (n - 2)
        leverage = 1 / n + (1 / math.sqrt(T) - x.mean()) ** 2 / float(((x - x.mean()) ** 2).sum())
        half = float(stats.t.ppf((1 + level) / 2, n - 2)) * math.sqrt(variance * (1 / runs + leverage))
        return Prediction(loss, loss - half, loss + half)


def fit_line(T: Sequence[float] | np.ndarray, loss: Sequence[float] | np.ndarray, eta_ref: float = 1.0) -> Line:
    """Ordinary least squares of loss on 1/sqrt(T), on exactly the points given.

    Args:
      T: horizons [P], positive; updates, or tokens, samples or FLOPs.
      loss: final losses [P], finite.
      eta_ref: a label for the line.

    Raises:
      UserError: fewer than two distinct horizons, values that are not positive or not finite, or arrays of two lengths.
    """
    T, loss = np.asarray(T, float), np.asarray(loss, float)
    if T.shape != loss.shape or T.ndim != 1:
        raise UserError(f"T has shape {T.shape} and loss {loss.shape}; give two arrays of one length")
    if not (np.isfinite(T) & (T > 0)).all():
        raise UserError(f"T={T[~(np.isfinite(T) & (T > 0))][0]:g} is no horizon; it must be positive and finite")
    if not np.isfinite(loss).all():
        raise UserError(f"the loss at T={T[~np.isfinite(loss)][0]:g} is not finite; leave that run out")
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

    lines: by rising eta_ref; a single one, its eta_ref NaN, where every run had its best rate (G3). diverged: (eta_ref,
    T) of runs without a finite loss. x: what T counts here, a key of `HORIZONS`.
    """

    lines: tuple[Line, ...]
    diverged: tuple[tuple[float, int], ...]
    x: str = "T"

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

    def count(self, T: float) -> str:
        """A horizon in words: T=6400, tokens=6.4e+10."""
        return f"{HORIZONS[self.x]}={self._number(T)}"

    def _number(self, T: float) -> str:
        return f"{T:.0f}" if self.x == "T" else f"{T:.4g}"

    def warnings(self, T: float) -> list[str]:
        """What a person should know before trusting a prediction at horizon T, a sentence each."""
        return self.rate_warnings(T) + self.line_warnings(T)

    def rate_warnings(self, T: float) -> list[str]:
        """Those of `warnings` that say whether the best rate was among those tried."""
        best = self.best(T)
        # A rate beyond that diverged bounds the best one as well as a worse one does.
        tried = sorted({line.eta_ref for line in self.lines} | {e for e, _ in self.diverged})
        diverged_itself = any(math.isclose(e, best.eta_ref) for e, _ in self.diverged)
        if math.isnan(best.eta_ref):
            return ["the table has no eta_ref: every run is taken to have had its best peak rate"]
        if len(tried) == 1:
            return [f"eta_ref={best.eta_ref:g} is the only rate: nothing says that it is the best; add others"]
        if best.eta_ref == tried[0] or (best.eta_ref == tried[-1] and not diverged_itself):
            low = best.eta_ref == tried[0]
            step = tried[1] / tried[0] if low else tried[-1] / tried[-2]
            wider = best.eta_ref / step if low else best.eta_ref * step
            return [
                f"the best eta_ref, {best.eta_ref:g}, is the {'smallest' if low else 'largest'} of the grid: a better "
                f"one may lie beyond; add eta_ref={wider:g}"
            ]
        return []

    def line_warnings(self, T: float) -> list[str]:
        """Those of `warnings` that are about the lines and how far they reach."""
        best, found = self.best(T), []
        name = HORIZONS[self.x]
        if math.isnan(best.eta_ref) and self.diverged:
            found.append(f"{len(self.diverged)} runs without a finite loss are left out")
        for eta_ref in sorted({e for e, _ in self.diverged if not math.isnan(e)}):
            horizons = ", ".join(self._number(t) for e, t in self.diverged if e == eta_ref)
            found.append(f"eta_ref={eta_ref:g} diverged at {name} = {horizons}; those runs are in no line")
        too_short: dict[str, list[str]] = {}
        for line in self.lines:
            if line.left_out:
                horizons = ", ".join(self._number(t) for t in sorted({t for t, _ in line.left_out}))
                too_short.setdefault(horizons, []).append(f"{line.eta_ref:g}")
        for horizons, rates in too_short.items():
            whose = "" if math.isnan(best.eta_ref) else f" of eta_ref = {', '.join(rates)}"
            found.append(f"{name} = {horizons} is too short for the line{whose} and left out of it")
        for line in self.lines:
            if line.flat:
                found.append(f"{line.name}: every loss is {line.loss[0]:g}, which no measurement is; check the column")
            elif line.r2 < LEAST_R2:
                found.append(f"{line.name}: R2 = {line.r2:.4f}, the losses do not lie on a line")
        others = [f"{line.eta_ref:g}" for line in self.alike(T) if line is not best]
        if others:
            found.append(
                f"eta_ref = {', '.join(others)} cannot be told apart from {best.eta_ref:g} at {self.count(T)}; "
                f"of these, {best.eta_ref:g} is best at {self.count(self.longest)}"
            )
        n = len(np.unique(best.T))
        if n < ALWAYS_IN:
            found.append(f"the line of {best.name} rests on {n} horizons; add some")
        elif n == ALWAYS_IN and not best.left_out:
            found.append(f"with {n} horizons of {best.name} none can be tested for being too short; add one")
        if best.Q <= 0:
            found.append(f"the loss at {best.name} does not fall with {name}; the law does not hold here")
        if MOST_EXTRAPOLATION * self.longest < T:
            found.append(
                f"{self.count(T)} is {T / self.longest:.0f} times the longest horizon; treat the loss as a guess"
            )
        return found

    def summary(self, T: float | None = None) -> str:
        """The lines as a table of text, with predictions at horizon T (four times the longest if None)."""
        T = FURTHER * self.longest if T is None else T
        best = self.best(T)
        digits = ".3f" if self.x == "T" else ".3g"  # Q is in units of sqrt(T)
        head = f"{'eta_ref':>8}  {'L_inf':>7} {'±':>6}  {'Q':>7} {'±':>6}  {'R2':>6}  {'runs':>4}  "
        rows = [f"{head}loss at {self.count(T)}"]
        for line in self.lines:
            p = line.predict(T)
            rate = "best" if math.isnan(line.eta_ref) else f"{line.eta_ref:g}"
            rows.append(
                f"{rate:>8}  {line.L_inf:>7.4f} {line.L_inf_se:>6.3f}  {line.Q:>7{digits}} {line.Q_se:>6{digits}}  "
                f"{line.r2:>6.4f}  {len(line.T):>4}  {p.loss:.4f} [{p.low:.4f}, {p.high:.4f}]"
                + ("  <- eta_ref*" if line is best and rate != "best" else "")
            )
        return "\n".join(rows)

    def plot(self, T: float | None = None) -> "Figure":
        """`cdl.laws.figures.horizon_figure` of these lines, up to horizon T (four times the longest if None)."""
        from cdl.laws.figures import horizon_figure  # matplotlib is slow to import

        return horizon_figure(self, FURTHER * self.longest if T is None else T)


def fit_horizon(table: pd.DataFrame, x: str = "T") -> HorizonFit:
    """Fit the law to a table of finished runs.

    Args:
      table: columns `loss`, the one named by x, and `eta_ref`, one row per run; several seeds are several rows. Runs
        without a finite loss belong in it too, at the horizon they were meant to reach: they are listed, not fitted.
        Without a column `eta_ref` every run is taken to have had its best peak rate, and there is one line (G3).
      x: the column that counts the horizon: "T", "tokens" or "flops". One batch size and one model size to a table.

    Raises:
      UserError: a column is missing or holds what is no number. NoLaw: no eta_ref has two horizons.
    """
    if x not in HORIZONS:
        raise unknown("column of horizons", x, HORIZONS)
    table = numbers(table, x)
    finite = table[np.isfinite(table["loss"])]
    broken = table[~np.isfinite(table["loss"])].sort_values(["eta_ref", x])
    lines = []
    for eta_ref, runs in finite.groupby("eta_ref", dropna=False):
        runs = runs.sort_values(x)
        T, loss = runs[x].to_numpy(float), runs["loss"].to_numpy(float)
        keep = _long_enough(T, loss)
        if len(np.unique(T[keep])) >= 2:
            left_out = tuple((int(t), float(x)) for t, x in zip(T[~keep], loss[~keep], strict=True))
            line = fit_line(T[keep], loss[keep], float(eta_ref))  # type: ignore[arg-type]
            lines.append(dataclasses.replace(line, left_out=left_out))
    if not lines:
        raise NoLaw("no eta_ref has finished runs at two horizons or more, so there is no line; run more of the grid")
    diverged = tuple((float(e), int(t)) for e, t in zip(broken["eta_ref"], broken[x], strict=True))
    return HorizonFit(tuple(lines), diverged, x)


def numbers(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The columns `eta_ref`, `loss` and those named, as numbers; eta_ref is NaN where the table has none.

    Raises:
      UserError: a column is missing, holds text, or, but for the loss, a value that is not positive and finite.
    """
    missing = [c for c in (*columns, "loss") if c not in table.columns]
    if missing:
        raise UserError(f"the table lacks the columns {missing}; it has {list(table.columns)}")
    found: dict[str, np.ndarray] = {}
    for column in ("eta_ref", *columns, "loss"):
        if column not in table.columns:
            found[column] = np.full(len(table), math.nan)
            continue
        try:
            found[column] = np.asarray(pd.to_numeric(table[column]), float)
        except (TypeError, ValueError) as e:
            raise UserError(f"the column {column} holds what is no number ({e}); mend the table") from e
        wrong = ~(np.isfinite(found[column]) & (found[column] > 0))
        if column != "loss" and wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise UserError(f"{column}={found[column][row]:g} in row {row} must be positive and finite; mend the table")
    return pd.DataFrame(found)


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
