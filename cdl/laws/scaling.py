"""(5.1): loss over model size N and horizon T, from pilots of several sizes (paper, section 5.3).

    loss(N, T) = L_inf(eta_ref*; N) + Q(eta_ref*; N) / sqrt(T),      eta_peak*(N, T) = eta_ref* / sqrt(T)

eta_ref* is found on the smallest model and carried to larger ones unchanged. L_inf and Q of each size come from its own
line (`cdl.laws.horizon`), and are then straight lines in log N. Where there are sizes enough to see that L_inf bends,
it is E + A N^-k instead: L_inf(N) is the loss of a model with unlimited data, which cannot fall below the entropy of
the text, and a straight line in log N falls without end. The choice is made by a test fixed in advance, `_bends`; where
it leaves the question open, the interval covers both.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import optimize, stats

from cdl.errors import UserError
from cdl.laws.horizon import FURTHER, LEAST_R2, OWN_LEVEL, HorizonFit, Line, NoLaw, Prediction, fit_horizon, numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ScalingFit", "Size", "Trend", "fit_scaling"]

LEAST_HORIZONS = 3  # of a line in the trend, as in Table 6 of the paper: with two nothing is known of its error
FEW_SIZES = 5  # fewer leave at most two degrees of freedom
# Further than this times the largest pilot, the trend is only a guess: so it was on the Chinchilla runs (docs).
MOST_GROWTH = 3.0
SURE = 0.05  # level of the test for a bend
_EXPONENTS = (0.02, 2.0)  # of N in the bent form: below, it is a straight line in log N


@dataclass(frozen=True)
class Size:
    """The runs of one model size. N: its parameters. fit: a line per eta_ref. cost: N x horizon, summed over runs."""

    N: float
    fit: HorizonFit
    cost: float


@dataclass(frozen=True)
class Trend:
    """L_inf and Q of lines against N.

    N: sizes [n], rising. lines: one each. L_inf = coefficients [p] . basis(N): L_inf_coef[0] + L_inf_coef[1] log10(N /
    N0), or, with an exponent k, L_inf_coef[0] + L_inf_coef[1] (N / N0)^-k. Q = Q_coef[0] + Q_coef[1] log10(N / N0).
    *_se: standard errors, NaN with two sizes. N0: the smallest size. bends: L_inf, Q depart from a straight line in log
    N by more than chance. other: of a straight line, E + A N^-k for the same lines where they cannot rule it out.
    """

    N: np.ndarray
    lines: tuple[Line, ...]
    k: float | None
    L_inf_coef: np.ndarray
    L_inf_se: np.ndarray
    Q_coef: np.ndarray
    Q_se: np.ndarray
    bends: tuple[bool, bool]
    other: "Trend | None" = None

    @property
    def N0(self) -> float:
        """The size at which the first coefficients are read."""
        return float(self.N[0])

    def L_inf(self, N: float | np.ndarray) -> np.ndarray:
        """L_inf of the trend at sizes N."""
        return self._basis(N, self.k) @ self.L_inf_coef

    def Q(self, N: float | np.ndarray) -> np.ndarray:
        """Q of the trend at sizes N."""
        return self._basis(N, None) @ self.Q_coef

    def predict(self, N: float, T: float) -> Prediction:
        """The loss of a new run at a size N that has no line of its own, with its prediction interval.

        Its variance adds: a run about its line; a line of a new size about the trend; and the trend's own error, to
        which each line brings its error at T and its size's departure from the trend. The departures are estimated
        together for L_inf and Q, as what the residuals of the trend hold beyond the error of the lines. Student t with
        as many degrees of freedom as sizes beyond coefficients; infinite where there are none. It reaches as far as the
        interval of `other` does.
        """
        here = self._predict(N, T)
        if self.other is None:
            return here
        there = self.other.predict(N, T)
        return Prediction(here.loss, min(here.low, there.low), max(here.high, there.high))

    def _predict(self, N: float, T: float) -> Prediction:
        u = 1 / math.sqrt(T)
        loss = float(self.L_inf(N)[0] + self.Q(N)[0] * u)
        at = np.append(self.N, N) / self.N0
        X_L, X_Q = _slopes(at, self.k, self.L_inf_coef[1]), _basis(at, None)
        free = len(self.N) - X_L.shape[1]
        if free < 1 or any(line.flat for line in self.lines):
            return Prediction(loss, -math.inf, math.inf)
        run, errors = self._errors(u)
        L_inf, Q = (np.array([getattr(line, name) for line in self.lines]) for name in ("L_inf", "Q"))
        residual = np.stack([L_inf - self.L_inf(self.N), u * (Q - self.Q(self.N))])
        departure = _positive(residual @ residual.T / free - errors.mean(0))
        # How much each line's L_inf and Q count in the prediction.
        weights = np.stack([X[-1] @ np.linalg.pinv(X[:-1]) for X in (X_L, X_Q)], axis=-1)
        variance = run + departure.sum() + np.einsum("ni,nij,nj->", weights, errors + departure, weights)
        half = float(stats.t.ppf((1 + OWN_LEVEL) / 2, free)) * math.sqrt(variance)
        return Prediction(loss, loss - half, loss + half)

    def summary(self) -> str:
        """The two trends, a line of text each."""
        L, L_se, Q, Q_se = self.L_inf_coef, self.L_inf_se, self.Q_coef, self.Q_se
        size = f"N/{self.N0:.4g}"
        by = f"log10({size})" if self.k is None else f"({size})^-{self.k:.3g}"
        return (
            f"L_inf = {L[0]:.4f} (± {L_se[0]:.4f}) {L[1]:+.4f} (± {L_se[1]:.4f}) {by}\n"
            f"Q     = {Q[0]:.4g} (± {Q_se[0]:.2g}) {Q[1]:+.4g} (± {Q_se[1]:.2g}) log10({size})"
        )

    def _basis(self, N: float | np.ndarray, k: float | None) -> np.ndarray:
        return _basis(np.atleast_1d(np.asarray(N, float)) / self.N0, k)

    def _errors(self, u: float) -> tuple[float, np.ndarray]:
        """Variance of a run about its line, over all lines, and covariance of (L_inf, u Q) of each line: [n, 2, 2]."""
        squares = freedom = 0.0
        errors = []
        for line in self.lines:
            x = 1 / np.sqrt(line.T)
            residual = line.loss - line.L_inf - line.Q * x
            squares, freedom = squares + float(residual @ residual), freedom + len(x) - 2
            X = np.column_stack([np.ones_like(x), x / u])
            errors.append(np.linalg.inv(X.T @ X))
        run = squares / freedom
        return run, run * np.array(errors)


@dataclass(frozen=True)
class ScalingFit:
    """The law over model sizes: a `HorizonFit` each, by rising N. x: what T counts, "T" or "tokens"."""

    sizes: tuple[Size, ...]
    x: str = "T"

    @property
    def N(self) -> list[float]:
        """The pilots' model sizes."""
        return [size.N for size in self.sizes]

    @property
    def longest(self) -> int:
        """The longest horizon of any size."""
        return max(size.fit.longest for size in self.sizes)

    def size(self, N: float) -> Size | None:
        """The pilots of just this size, or None."""
        return next((size for size in self.sizes if math.isclose(size.N, N)), None)

    def eta_ref(self, N: float, T: float) -> float:
        """eta_ref* for a run of size N and horizon T, NaN where the table has none.

        That of the smallest model, unchanged; but a size with pilots at two rates or more has its own.
        """
        own = self.size(N)
        return (own if own and len(own.fit.lines) > 1 else self.sizes[0]).fit.best(T).eta_ref

    def eta_peak(self, N: float, T: float) -> float:
        """The peak rate for size N and T updates."""
        if self.x != "T":
            raise UserError("horizons in tokens give no peak rate, which is eta_ref* / sqrt(updates); fit with x='T'")
        return self.eta_ref(N, T) / math.sqrt(T)

    def trend(self, T: float) -> Trend:
        """L_inf and Q against N at the eta_ref* of horizon T.

        Raises:
          NoLaw: fewer than two sizes have a line of `LEAST_HORIZONS` horizons at that rate.
        """
        found = self._lines(self.sizes[0].fit.best(T).eta_ref)
        if len(found) < 2:
            only = f"all pilots have N={self.N[0]:.6g}" if len(self.N) == 1 else "only one size has a line of its own"
            raise NoLaw(
                f"{only}, so nothing is known of how the loss changes with N; add pilots of other sizes, "
                f"{LEAST_HORIZONS} horizons or more each"
            )
        return _trend(tuple(found), tuple(found.values()))

    def predict(self, N: float, T: float) -> Prediction:
        """The loss of a run of size N and horizon T at its eta_ref*, with its 95% prediction interval.

        A size that has pilots is predicted by its own line, any other by the trend.

        Raises:
          NoLaw: N has no pilots, and there is no trend.
          UserError: N or T is not positive.
        """
        if not (0 < N < math.inf and 0 < T < math.inf):
            raise UserError(f"N={N:g}, T={T:g}: both must be positive and finite")
        own = self._own_line(N, T)
        return own.predict(T) if own else self.trend(T).predict(N, T)

    def share(self, N: float, T: float) -> float:
        """FLOPs of all pilots over those of a run of size N and horizon T: 6 N a token, one batch size for all."""
        return sum(size.cost for size in self.sizes) / (N * T)

    def count(self, T: float) -> str:
        """A horizon in words: T=6400, tokens=6.4e+10."""
        return self.sizes[0].fit.count(T)

    def warnings(self, N: float, T: float) -> list[str]:
        """What a person should know before trusting a prediction at (N, T), a sentence each."""
        first, own = self.sizes[0], self.size(N)
        found = [self._of(first, w) for w in first.fit.warnings(T)]
        if own and own is not first:  # at one rate, that of the smallest, it has nothing to say of rates
            of_rate = own.fit.rate_warnings(T) if len(own.fit.lines) > 1 else []
            found += [self._of(own, w) for w in of_rate + own.fit.line_warnings(T)]
        found += self._rate_warnings(N, T)
        other = [size for size in self.sizes if size not in (own, first)]
        bad = [f"{s.N:.4g}" for s in other if any(line.flat or line.r2 < LEAST_R2 for line in s.fit.lines)]
        if bad:
            found.append(f"N = {', '.join(bad)}: some losses do not lie on a line")
        broken = [f"{s.N:.4g}" for s in other if s.fit.diverged]
        if broken:
            found.append(f"N = {', '.join(broken)}: some runs diverged, and are in no line")
        if self._own_line(N, T):
            return found
        try:
            trend = self.trend(T)
        except NoLaw as e:
            return [*found, str(e)]
        left_out = [f"{size.N:.4g}" for size in self.sizes if size.N not in trend.N]
        if left_out:
            found.append(
                f"N = {', '.join(left_out)} has no line of {LEAST_HORIZONS} horizons at eta_ref*: left out of the trend"
            )
        if len(trend.N) < FEW_SIZES:
            what = "there is no interval" if len(trend.N) == 2 else "the interval is wide"
            found.append(f"the trend with N rests on {len(trend.N)} sizes, so {what}; add sizes")
        if trend.k is not None:
            found.append("L_inf against log N bends by more than chance; it is fitted by E + A N^-k")
        elif trend.other:
            found.append("whether L_inf falls like log N or like E + A N^-k is open; the interval covers both")
        elif trend.bends[0]:
            found.append("L_inf against log N bends by more than chance, and not as E + A N^-k does; treat as a guess")
        if trend.bends[1]:
            found.append("Q against log N bends by more than chance; it is fitted by a straight line all the same")
        if trend.L_inf(trend.N[-1])[0] >= trend.L_inf(trend.N[0])[0]:
            found.append("L_inf does not fall with N; the law does not hold here")
        if MOST_GROWTH * trend.N[-1] < N:
            found.append(f"N={N:.4g} is {N / trend.N[-1]:.0f} times the largest pilot; treat the loss as a guess")
        return found

    def summary(self, N: float | None = None, T: float | None = None) -> str:
        """The lines at eta_ref* as a table of text, the trend, and the prediction at (N, T).

        N is the largest of the pilots, and T four times their longest, where not given.
        """
        N, T = self._target(N, T)
        digits = ".3f" if self.x == "T" else ".3g"
        rows = [
            f"{'N':>10}  {'eta_ref':>8}  {'L_inf':>7} {'±':>6}  {'Q':>7} {'±':>6}  {'R2':>6}  {'runs':>4}  best eta_ref"
        ]
        lines = self.lines(T)
        for size in self.sizes:
            line = lines.get(size.N)
            if line is None:
                rows.append(f"{size.N:>10.4g}  no line at eta_ref*")
                continue
            best = size.fit.best(T).eta_ref
            shown = ["best" if math.isnan(e) else f"{e:g}" for e in (line.eta_ref, best)]
            rows.append(
                f"{size.N:>10.4g}  {shown[0]:>8}  {line.L_inf:>7.4f} {line.L_inf_se:>6.3f}  {line.Q:>7{digits}} "
                f"{line.Q_se:>6{digits}}  {line.r2:>6.4f}  {len(line.T):>4}  "
                + (shown[1] if len(size.fit.lines) > 1 else "-")
            )
        try:
            rows.append(self.trend(T).summary())
            p = self.predict(N, T)
            rows.append(f"loss at N={N:.4g}, {self.count(T)}: {p.loss:.4f} [{p.low:.4f}, {p.high:.4f}]")
        except NoLaw:
            rows.append("no trend with N")
        return "\n".join(rows)

    def plot(self, N: float | None = None, T: float | None = None) -> "Figure":
        """`cdl.laws.figures.scaling_figure` of these lines and the trend, up to (N, T); both as in `summary`."""
        from cdl.laws.figures import scaling_figure  # matplotlib is slow to import

        return scaling_figure(self, *self._target(N, T))

    def _target(self, N: float | None, T: float | None) -> tuple[float, float]:
        return self.N[-1] if N is None else N, FURTHER * self.longest if T is None else T

    def lines(self, T: float) -> dict[float, Line]:
        """N -> its line at the eta_ref* of horizon T; sizes without one are left out."""
        return self._lines(self.sizes[0].fit.best(T).eta_ref, 2)

    def _lines(self, eta_ref: float, least: int = LEAST_HORIZONS) -> dict[float, Line]:
        """The line of each size at this rate, of those that have so many horizons."""
        found = {}
        for size in self.sizes:
            for line in size.fit.lines:
                same = math.isclose(line.eta_ref, eta_ref) or (math.isnan(line.eta_ref) and math.isnan(eta_ref))
                if same and len(np.unique(line.T)) >= least:
                    found[size.N] = line
        return found

    def _own_line(self, N: float, T: float) -> Line | None:
        own = self.size(N)
        return self._lines(self.eta_ref(N, T), 2).get(own.N) if own else None

    def _of(self, size: Size, warning: str) -> str:
        return warning if len(self.sizes) == 1 else f"N={size.N:.4g}: {warning}"

    def _rate_warnings(self, N: float, T: float) -> list[str]:
        """Does the best rate stay where it was as N grows? Sizes with one rate say nothing."""
        first, found = self.sizes[0].fit.best(T), []
        if math.isnan(first.eta_ref):
            return found
        checked = [size for size in self.sizes[1:] if len(size.fit.lines) > 1]
        if not checked and self.size(N) is not self.sizes[0]:
            found.append(
                f"eta_ref*={first.eta_ref:g} is that of the smallest model, N={self.N[0]:.4g}, and no larger one was "
                f"tried at other rates: that it stays the best is supposed"
            )
        for size in checked:
            best, here = size.fit.best(T), size.fit.alike(T)
            if not any(math.isclose(line.eta_ref, first.eta_ref) for line in here):
                found.append(
                    f"the best rate moves with N: eta_ref={first.eta_ref:g} at N={self.N[0]:.4g}, {best.eta_ref:g} at "
                    f"N={size.N:.4g}"
                )
        return found


def fit_scaling(table: pd.DataFrame, x: str = "T") -> ScalingFit:
    """Fit (5.1) to a table of finished runs of one model size or several.

    Args:
      table: columns `N` (parameters), `loss`, the one named by x, and `eta_ref`, one row per run, all of one batch
        size; `fit_horizon` says more. Without `eta_ref` every run is taken to have had its best peak rate.
      x: the column that counts the horizon, "T" or "tokens". Not FLOPs: they hold N already.

    Raises:
      UserError: a column is missing or holds what is no number. NoLaw: no size has a line.

    >>> table = pd.DataFrame(
    ...     [(N, 1.0, T, 3 - 0.1 * math.log10(N) + 9 / T**0.5) for N in (1e6, 1e7, 1e8) for T in (100, 400, 900, 1600)],
    ...     columns=["N", "eta_ref", "T", "loss"],
    ... )
    >>> print(fit_scaling(table).trend(1e4).summary().splitlines()[0])
    L_inf = 2.4000 (± 0.0000) -0.1000 (± 0.0000) log10(N/1e+06)
    """
    if x not in ("T", "tokens"):
        raise UserError(f"x={x!r} must be 'T' or 'tokens' (FLOPs hold N already)")
    table = numbers(table, "N", x)
    rates = table if table["eta_ref"].notna().any() else table.drop(columns="eta_ref")
    sizes, reasons = [], []
    for N, runs in rates.groupby("N"):
        try:
            fit = fit_horizon(runs, x)
        except NoLaw as e:
            reasons.append(e)
            continue
        sizes.append(Size(float(N), fit, float((runs["N"] * runs[x]).sum())))  # type: ignore[arg-type]
    if not sizes:
        raise reasons[0] if reasons else NoLaw("the table has no runs")
    return ScalingFit(tuple(sizes), x)


def _trend(N: tuple[float, ...], lines: tuple[Line, ...]) -> Trend:
    """Both regressions on N, unweighted: the scatter about the trend outweighs the error of a good line."""
    sizes = np.array(N)
    relative = sizes / sizes[0]
    L_inf, Q = np.array([line.L_inf for line in lines]), np.array([line.Q for line in lines])
    straight = _basis(relative, None)
    Q_coef, Q_se = _regression(straight, Q)
    bends = (_bends(relative, L_inf), _bends(relative, Q))
    k = _exponent(relative, L_inf) if len(N) >= FEW_SIZES else None
    bent = None
    if k is not None:
        coef, _ = _regression(_basis(relative, k), L_inf)
        # To first order, an error of k is one more column; on the residual it regresses to nothing.
        _, se = _regression(_slopes(relative, k, coef[1]), L_inf)
        bent = Trend(sizes, lines, k, coef, se[:2], Q_coef, Q_se, bends)
    if bent and bends[0]:
        return bent
    return Trend(sizes, lines, None, *_regression(straight, L_inf), Q_coef, Q_se, bends, bent)


def _basis(relative: np.ndarray, k: float | None) -> np.ndarray:
    """Columns 1 and log10 or power -k of sizes [n] over the smallest one: [n, 2]."""
    return np.column_stack([np.ones_like(relative), np.log10(relative) if k is None else relative**-k])


def _slopes(relative: np.ndarray, k: float | None, A: float) -> np.ndarray:
    """Derivatives of L_inf with respect to its parameters: [n, 2], or [n, 3] with an exponent k of factor A."""
    basis = _basis(relative, k)
    return basis if k is None else np.column_stack([basis, -A * np.log(relative) * basis[:, 1]])


def _regression(X: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares: coefficients and their standard errors, NaN where no degree of freedom is left."""
    coefficients = np.linalg.lstsq(X, y, rcond=None)[0]
    free = len(y) - X.shape[1]
    if free < 1:
        return coefficients, np.full(X.shape[1], math.nan)
    residual = y - X @ coefficients
    return coefficients, np.sqrt(np.diag(np.linalg.inv(X.T @ X)) * float(residual @ residual) / free)


def _bends(relative: np.ndarray, y: np.ndarray) -> bool:
    """Does y depart from a straight line in log N? Student's t on the square of log N; fewer sizes cannot tell."""
    if len(y) < FEW_SIZES:
        return False
    log = np.log10(relative)
    X = np.column_stack([np.ones_like(log), log, log**2])
    coefficients, errors = _regression(X, y)
    sure = abs(coefficients[2]) > errors[2] * stats.t.ppf(1 - SURE / 2, len(y) - 3)
    # A bend within the rounding of float32 losses is none.
    return bool(sure and abs(coefficients[2]) * np.ptp(log) ** 2 > np.finfo(np.float32).eps * np.abs(y).max())


def _exponent(relative: np.ndarray, L_inf: np.ndarray) -> float | None:
    """The k of the best E + A N^-k with A > 0, None where there is none in `_EXPONENTS`."""

    def squares(log_k: float) -> float:
        X = _basis(relative, math.exp(log_k))
        residual = L_inf - X @ np.linalg.lstsq(X, L_inf, rcond=None)[0]
        return float(residual @ residual)

    low, high = (math.log(k) for k in _EXPONENTS)
    k = math.exp(float(optimize.minimize_scalar(squares, bounds=(low, high), method="bounded").x))
    inside = 1.01 * _EXPONENTS[0] < k < _EXPONENTS[1] / 1.01
    return k if inside and _regression(_basis(relative, k), L_inf)[0][1] > 0 else None


def _positive(matrix: np.ndarray) -> np.ndarray:
    """The nearest covariance: a symmetric matrix without its negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.maximum(values, 0) @ vectors.T
