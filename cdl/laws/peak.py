"""G2: loss against peak rate at one model size and one horizon (paper, section 4.1, (4.1)).

For a qualified schedule of T updates with peak rate eta,

    loss(eta) = L_inf + a / (T eta) + b eta,    a = q1^2 >= 0,  b = q2^2 >= 0,

fitted by least squares under these signs. It is lowest at eta_peak* = sqrt(a / (b T)), where it is
L_inf + 2 sqrt(a b / T). It speaks of stable training. At which rates training was unstable is decided by a rule that is
fixed in advance: `_stable`.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, special

from cdl.errors import UserError
from cdl.laws.horizon import LEAST_R2, LEVEL, OWN_LEVEL, Prediction, numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PeakFit", "fit_peak", "fit_points"]

ALWAYS_IN = 4  # rates that the rule for unstable ones starts from, and the least that can be fitted
MOST_DROPPED = 0.05  # share of sweeps in which the rule may leave out a stable rate by chance
# A loss is a float32 at best: to a fit with smaller residuals, rounding would look like instability.
_ROUNDING = float(np.finfo(np.float32).eps)
_SURE = 0.01  # a bend that (4.1) does not have is reported where chance makes one so large less often than this


class _Squares(NamedTuple):
    """Ordinary least squares: coefficients [K], (X'X)^-1 [K, K], variance of the residuals, degrees of freedom."""

    coefficients: np.ndarray
    inverse: np.ndarray
    variance: float
    freedom: int


@dataclass(frozen=True)
class PeakFit:
    """(4.1) fitted to the final losses of one model size and one horizon.

    L_inf, a, b: as in (4.1). T: updates of every run; None where the table does not say, and `a` is then a / T. r2:
    coefficient of determination on the fitted runs. eta, loss: the fitted runs [P], by rising rate. left_out: (eta,
    loss) of runs at rates where training was unstable. diverged: rates of runs without a finite loss.
    """

    L_inf: float
    a: float
    b: float
    T: int | None
    r2: float
    eta: np.ndarray
    loss: np.ndarray
    left_out: tuple[tuple[float, float], ...] = ()
    diverged: tuple[float, ...] = ()

    @property
    def best(self) -> float:
        """eta_peak*, the rate at which the law is lowest; NaN where it falls (b = 0) or rises (a = 0) throughout."""
        return math.sqrt(self.a / (self.b * (self.T or 1))) if self.a > 0 and self.b > 0 else math.nan

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Where eta_peak* lies with probability 95%; from 0 or up to inf where the rates do not bracket it.

        eta_peak*^2 is a ratio of two regression coefficients, and Fieller's theorem gives the exact set of ratios that
        an F-test does not reject if the noise is normal and the same at every rate. NaN where a or b would be negative
        beyond chance, which says that the losses contradict (4.1). Measured after the rule has chosen the rates, it
        holds eta_peak* in 95% of simulated sweeps, and in 93% of the worst kind of sweep.
        """
        fit, scale = _plane(self.eta, self.loss)
        t2 = _student(OWN_LEVEL, fit.freedom) ** 2 * fit.variance
        # theta = A / B is in the set if (A - theta B)^2 <= t2 var(A - theta B): q2 theta^2 - 2 q1 theta + q0 <= 0.
        outer = np.outer(fit.coefficients[1:], fit.coefficients[1:]) - t2 * fit.inverse[1:, 1:]
        q0, q1, q2 = float(outer[0, 0]), float(outer[0, 1]), float(outer[1, 1])
        A, B = fit.coefficients[1:]
        if (A < 0 and q0 > 0) or (B < 0 and q2 > 0):
            return math.nan, math.nan
        root = math.sqrt(max(q1 * q1 - q0 * q2, 0.0))
        if q2 > 0:  # b differs from 0: between the roots
            low, high = (q1 - root) / q2, (q1 + root) / q2
        elif q2 < 0 < q0:  # a does: from the positive root on
            low, high = (q1 - root) / q2, math.inf
        else:
            low, high = 0.0, math.inf
        low, high = scale * math.sqrt(max(low, 0.0)), scale * math.sqrt(high)
        # Of no width where the losses lie on the law, up to rounding. min and max leave out a NaN that comes second.
        return min(low, self.best), max(high, self.best)

    def at(self, eta: float) -> float:
        """The law's loss at peak rate eta."""
        return self.L_inf + self.a / (self.T or 1) / eta + self.b * eta

    def predict(self, eta: float) -> Prediction:
        """The loss of a new run at peak rate eta, with its 95% prediction interval.

        The interval holds the scatter of a run about the law and the error of the fit, and supposes that the new run
        differs from these as they differ from the law. It has no upper end from the smallest unstable rate on.
        """
        (eta,) = _same(np.array([eta], float)).tolist()
        X, x = _columns(self.eta, 1.0), _columns(np.array([eta]), 1.0)[0]
        active = np.array([True, self.a > 0, self.b > 0])
        scale = np.abs(X[:, active]).max(0)
        fit = _squares(X[:, active] / scale, self.loss)
        half = _half(fit, x[active] / scale, OWN_LEVEL, runs=1)
        loss = self.at(eta)
        return Prediction(loss, loss - half, math.inf if eta >= self._unstable_from else loss + half)

    @property
    def _unstable_from(self) -> float:
        """The smallest rate known to be unstable."""
        beyond = [e for e in self.diverged if e > self.eta.max()]
        return min([*beyond, *(e for e, _ in self.left_out)], default=math.inf)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should know before trusting eta_peak*, a sentence each."""
        low, high = self.interval
        rates, means = _means(self.eta, self.loss)
        first, last, edge, lowest = rates[0], rates[-1], self._unstable_from, rates[means.argmin()]
        found = []
        if self.diverged:
            found.append(f"eta = {_list(self.diverged)} diverged; those runs are not fitted")
        if self.left_out:
            first_out, loss = self.left_out[0]
            why = f"the loss at {first_out:g} is {loss:.4f}, above the interval of the smaller rates' law"
            if edge in self.diverged:
                why = f"a run at {edge:g} diverged"
            found.append(f"eta = {_list([e for e, _ in self.left_out])} left out as unstable: {why}")
        if len(rates) == ALWAYS_IN and not self.left_out:
            found.append(f"with {ALWAYS_IN} rates none can be tested for being unstable; add one")
        if self.a == self.b == 0:
            found.append("the fit has neither term: the losses do not rise away from a best rate, as (4.1) does")
        elif self.a == 0 or self.b == 0:
            term, course = ("a/(T eta)", "rises") if self.a == 0 else ("b eta", "falls")
            though = f", though the lowest loss is inside the grid, at eta={lowest:g}" if first < lowest < last else ""
            found.append(f"the fit has no term {term}: it {course} with eta throughout, without eta_peak*{though}")
        if math.isnan(low):
            found.append("no eta_peak* agrees with the losses: a or b would be negative beyond chance")
        if low == 0:
            found.append(f"the best rate is not bracketed from below: add rates smaller than eta={first:g}")
        if high == math.inf:
            more = f"larger than eta={last:g}" if edge == math.inf else f"between eta={last:g} and {edge:g}"
            found.append(f"the best rate is not bracketed from above: add rates {more}")
        if not first <= self.best <= last and math.isfinite(self.best):
            found.append(f"eta_peak*={self.best:.3g} lies outside the fitted rates, {first:g} to {last:g}")
        if self.r2 < LEAST_R2:
            found.append(f"R2 = {self.r2:.4f}: the losses do not follow (4.1)")
        if (chance := self._bend()) < _SURE:
            found.append(
                f"the losses bend in another way than (4.1) (a term in log eta improves the fit, p = {chance:.1g}), "
                "which the interval of eta_peak* does not know; fit rates nearer the lowest loss"
            )
        return tuple(found)

    def _bend(self) -> float:
        """How probable so large a term in log eta is if (4.1) holds (t-test); 1 with too few runs to tell."""
        X = np.column_stack([_columns(self.eta, _middle(self.eta)), np.log(self.eta / _middle(self.eta))])
        if len(X) <= X.shape[1] or len(np.unique(self.eta)) <= X.shape[1]:
            return 1.0
        fit = _squares(X, self.loss)
        sigma = max(math.sqrt(fit.variance), _ROUNDING * float(np.abs(self.loss).max()))
        t = float(fit.coefficients[-1]) / (sigma * math.sqrt(fit.inverse[-1, -1]))
        return 2 * float(special.stdtr(fit.freedom, -abs(t)))

    def summary(self) -> str:
        """The law, every run beside it, and eta_peak* with its interval, as text."""
        T = "" if self.T is None else f" at T = {self.T}"
        distance = "eta" if self.T is None else "(T eta)"
        rows = [
            f"loss = {self.L_inf:.4f} + {self.a:.4g} / {distance} + {self.b:.4g} eta{T}, R2 = {self.r2:.4f}",
            f"{'eta':>10}  {'loss':>8}  {'law':>8}",
        ]
        runs = [(e, x, "") for e, x in zip(self.eta, self.loss, strict=True)]
        runs += [(e, x, "  left out: unstable") for e, x in self.left_out]
        runs += [(e, math.nan, "  diverged") for e in self.diverged]
        rows += [f"{e:>10.4g}  {x:>8.4f}  {self.at(e):>8.4f}{note}" for e, x, note in sorted(runs, key=lambda r: r[0])]
        low, high = self.interval
        best = "none" if math.isnan(self.best) else f"{self.best:.4g}, loss there {self.at(self.best):.4f}"
        rows.append(f"eta_peak* = {best}; {LEVEL:.0%} interval of eta_peak* {low:.4g} to {high:.4g}")
        return "\n".join(rows)

    def plot(self) -> "Figure":
        """`cdl.laws.figures.peak_figure` of this fit."""
        from cdl.laws.figures import peak_figure  # matplotlib is slow to import

        return peak_figure({"": {"loss" if self.T is None else f"T = {self.T:,}": self}})


def fit_points(eta: Sequence[float] | np.ndarray, loss: Sequence[float] | np.ndarray, T: int | None = None) -> PeakFit:
    """Least squares of (4.1) with a, b >= 0 on exactly the runs given.

    Args:
      eta: peak rates [P], positive, of four different values at least; what differs after six digits is one rate.
      loss: final losses [P], finite.
      T: updates of every run; if None, `a` of the result is a / T.

    Raises:
      UserError: a rate or T is not positive, too few rates, a loss that is not finite, or losses that are all equal.
    """
    eta, loss = _same(np.asarray(eta, float)), np.asarray(loss, float)
    if T is not None and not (math.isfinite(T) and T > 0 and T == int(T)):
        raise UserError(f"T={T} must be a positive whole number of updates")
    if len(np.unique(eta)) < ALWAYS_IN:
        raise UserError(
            f"(4.1) has three unknowns and needs {ALWAYS_IN} peak rates with a finite loss, there are "
            f"{len(np.unique(eta))}: {[float(e) for e in np.unique(eta)]}; run more"
        )
    if not np.isfinite(loss).all():
        raise UserError(f"the loss {loss[~np.isfinite(loss)][0]} is not finite; leave that run out, or use fit_peak")
    if np.ptp(loss) == 0:
        raise UserError(f"all losses are {loss[0]:g}, which says nothing of the rate; check the column loss")
    order = np.argsort(eta, kind="stable")
    eta, loss = eta[order], loss[order]
    scale = _middle(eta)
    X = _columns(eta, scale)[:, 1:]
    (A, B), _ = optimize.nnls(X - X.mean(0), loss - loss.mean())  # centred: the intercept is free
    L_inf = float(loss.mean() - X.mean(0) @ (A, B))
    residual = loss - L_inf - X @ (A, B)
    r2 = 1 - float(residual @ residual) / float(((loss - loss.mean()) ** 2).sum())
    return PeakFit(L_inf, float(A) * scale * (T or 1), float(B) / scale, T and int(T), r2, eta, loss)


def fit_peak(table: pd.DataFrame) -> PeakFit:
    """Fit (4.1) to finished runs of one model size and one horizon, without the rates where training was unstable.

    Args:
      table: columns `eta`, or `eta_peak` as in `cdl.sweep_table`, and `loss`; a row per run, several seeds are several
        rows. `T`, if there is one, has one value. Runs without a finite loss belong in it too: they are listed, and
        bound the stable rates.

    Raises:
      UserError: a column is missing, several horizons, a rate that is not positive, fewer than four rates with a finite
        loss, or losses that are all equal.
    """
    rate = "eta" if "eta" in table.columns else "eta_peak"
    runs = numbers(table, rate, *(["T"] if "T" in table.columns else [])).sort_values(rate, kind="stable")
    horizons = runs["T"].unique().tolist() if "T" in runs.columns else []
    if len(horizons) > 1:
        raise UserError(
            f"the table has the horizons T={', '.join(f'{t:.15g}' for t in sorted(horizons))}, and (4.1) is for one; "
            f'choose, as table[table["T"] == {max(horizons):.15g}]'
        )
    eta, loss = _same(np.asarray(runs[rate], float)), np.asarray(runs["loss"], float)
    finite = np.isfinite(loss)
    diverged = eta[~finite]
    eta, loss = eta[finite], loss[finite]
    fit = fit_points(eta, loss, horizons[0] if horizons else None)  # checks them all
    stable = _stable(eta, loss, diverged)
    if not stable.all():
        fit = fit_points(eta[stable], loss[stable], fit.T)
    left_out = tuple((float(e), float(x)) for e, x in zip(eta[~stable], loss[~stable], strict=True))
    return dataclasses.replace(fit, left_out=left_out, diverged=tuple(float(e) for e in diverged))


def _stable(eta: np.ndarray, loss: np.ndarray, diverged: np.ndarray) -> np.ndarray:
    """At which rates training was stable: a mask over the runs [P], by a rule fixed in advance.

    Past the edge of stability gradients grow, and the loss rises above (4.1), whose right branch rises no faster than
    b eta. So the rates up to the one with the lowest mean loss are in, and the `ALWAYS_IN` smallest in any case; the
    next larger one joins as long as no run diverged there and the mean of its losses is not above the prediction
    interval of (4.1) fitted to those already in (ordinary least squares, signs free); the first that does not join is
    unstable, and so are all above it.

    A loss below the interval is no sign of instability and stays in, and so does a small rate that trained too little:
    what (4.1) gets wrong there is for R2 and the warnings to show. The interval is one-sided, at a level that shares
    `MOST_DROPPED` among the tests to come. Tests in this order are independent if the start is given, and then a sweep
    that follows (4.1) up to normal noise loses a stable rate in 5% of cases. Where the start ends at a minimum that
    noise picked, it is more: 6% over the simulated sweeps of tests/laws/test_peak.py, 10% in the worst kind of sweep.
    """
    rates, means = _means(eta, loss)
    start = max(ALWAYS_IN, int(means.argmin()) + 1)
    level = (1 - MOST_DROPPED) ** (1 / max(1, len(rates) - start))
    for rate, mean in zip(rates[start:], means[start:], strict=True):
        smaller, here = eta < rate, eta == rate
        fit, scale = _plane(eta[smaller], loss[smaller])
        x = _columns(np.array([rate]), scale)[0]
        half = _half(fit, x, 2 * level - 1, runs=int(here.sum()))
        allowed = float(x @ fit.coefficients) + max(half, _ROUNDING * abs(mean))
        if mean > allowed or ((diverged > rates[start - 1]) & (diverged <= rate)).any():
            return smaller
    return np.ones(len(eta), bool)


def _plane(eta: np.ndarray, loss: np.ndarray) -> tuple[_Squares, float]:
    """Ordinary least squares of (4.1) with signs free, and the rate that its columns are scaled by."""
    scale = _middle(eta)
    return _squares(_columns(eta, scale), loss), scale


def _columns(eta: np.ndarray, scale: float) -> np.ndarray:
    """The regressors of (4.1), [P, 3]: 1, scale / eta, eta / scale."""
    return np.column_stack([np.ones(len(eta)), scale / eta, eta / scale])


def _means(eta: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different rates, rising, and the mean loss at each."""
    rates = np.unique(eta)
    return rates, np.array([loss[eta == e].mean() for e in rates])


def _middle(eta: np.ndarray) -> float:
    return math.sqrt(float(eta.min()) * float(eta.max()))


def _squares(X: np.ndarray, y: np.ndarray) -> _Squares:
    Q, R = np.linalg.qr(X)
    coefficients, freedom = np.linalg.solve(R, Q.T @ y), len(y) - X.shape[1]
    inner = np.linalg.inv(R)
    residual = y - X @ coefficients
    return _Squares(coefficients, inner @ inner.T, float(residual @ residual) / freedom, freedom)


def _student(level: float, freedom: int) -> float:
    """Student's t that is exceeded on either side with probability 1 - level."""
    return float(special.stdtrit(freedom, (1 + level) / 2))


def _half(fit: _Squares, x: np.ndarray, level: float, runs: int) -> float:
    """Half the width of the prediction interval, two-sided at `level`, for the mean of so many runs at x [K]."""
    spread = 1 / runs + float(x @ fit.inverse @ x)
    return _student(level, fit.freedom) * math.sqrt(fit.variance * spread)


def _same(eta: np.ndarray) -> np.ndarray:
    """The rates to six digits, so that one read as float32 or from print is the same rate."""
    if len(wrong := eta[~(np.isfinite(eta) & (eta > 0))]):
        raise UserError(f"the peak rate eta={wrong[0]:g} must be positive and finite; (4.1) divides by it")
    return np.array([float(f"{e:.6g}") for e in eta])


def _list(rates: Sequence[float]) -> str:
    return ", ".join(f"{e:g}" for e in sorted(set(rates)))
