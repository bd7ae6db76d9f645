"""What a law gets wrong where it was not fitted, and the intervals of forecasts that follow from it.

The residuals of a fit say little about its forecasts: neighbouring points err together, and a law that bends the wrong
way fits well until it is asked to reach further. So a law is refitted to parts of the points and compared with the
others: later parts of runs from earlier ones, and runs from other runs.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.spatial import KDTree

from cdl.laws.forms import Form, Prepared
from cdl.laws.records import Trajectory
from cdl.laws.solve import Solution, derivatives, predict, solve

__all__ = [
    "HALF",
    "LATER",
    "OTHERS",
    "Expected",
    "Holdout",
    "Spread",
    "expected_of",
    "hold_out",
    "join",
    "points_of",
    "score_of",
    "spread_of",
]

LATER, OTHERS = "2nd half from 1st", "from other runs"
HALF = 0.5
_CUTS = (HALF, 0.35, 0.7)  # of each run's steps
_MOST_FOLDS = 10  # with more runs than this, several are left out at once
_FEWEST = 4  # points to compare with
_TENTH = 0.1
_ROUNDING = 1e-6  # of a recorded loss: residuals are not smaller


@dataclass(frozen=True)
class Holdout:
    """One run, or the later part of one, predicted by a law that had not seen it.

    kind: LATER or OTHERS. cut: the part of each run's steps that was fitted, 1 for OTHERS. loss_P, predicted_P: of the
    points held out. expected_P: `Expected.error` there.
    """

    kind: str
    run: str
    cut: float
    loss_P: np.ndarray
    predicted_P: np.ndarray
    expected_P: np.ndarray

    @property
    def surprise(self) -> float:
        """Root mean square of the errors, each over the one expected."""
        return float(np.sqrt(np.mean(((self.predicted_P / self.loss_P - 1) / self.expected_P) ** 2)))


@dataclass(frozen=True)
class Seen:
    """Where the losses fitted were: sums of rates and rates, [N] each, and the lowest and highest peak of the runs."""

    S_N: np.ndarray
    eta_N: np.ndarray
    peaks: tuple[float, float]

    def reach(self, eta_T: np.ndarray, step_P: np.ndarray) -> np.ndarray:
        """How far points of a run lie from the nearest loss fitted, in factors of 2; [P].

        Factors of the sum of rates, of the rate, and of the peak beyond the peaks fitted, added up.
        Rates are counted with a tenth of the peak added: less than that, they gain little more.
        """

        def place(S: np.ndarray, eta: np.ndarray) -> np.ndarray:
            return np.log2(np.stack([S, eta + _TENTH * self.peaks[1]], 1))

        S_P, eta_P, peak = np.cumsum(eta_T)[step_P - 1], eta_T[step_P - 1], float(eta_T.max())
        nearest_P, _ = KDTree(place(self.S_N, self.eta_N)).query(place(S_P, eta_P), p=1)
        return nearest_P + abs(math.log2(peak / float(np.clip(peak, *self.peaks))))


@dataclass(frozen=True)
class Expected:
    """How far off forecasts should be, from the points fitted alone.

    variance: of the residuals, relative to the loss. covariance_IxI: of the constants, shape first. blind_I: constants
    that no point fitted depends on.
    """

    variance: float
    covariance_IxI: np.ndarray
    blind_I: np.ndarray
    seen: Seen

    def error(self, derivatives_PxI: np.ndarray, eta_T: np.ndarray, step_P: np.ndarray) -> np.ndarray:
        """Standard deviation of a loss about its prediction, relative to the loss; [P].

        What residuals and constants give, once more for each factor of 2 of `Seen.reach`: a law is not exact, and
        less so the further it is carried. Infinite where it rests on constants nothing is known of.
        """
        constants_P = np.einsum("pi,ij,pj->p", derivatives_PxI, self.covariance_IxI, derivatives_PxI)
        error_P = np.sqrt(self.variance + constants_P) * (1 + self.seen.reach(eta_T, step_P))
        return np.where((derivatives_PxI[:, self.blind_I] != 0).any(1), np.inf, error_P)


@dataclass(frozen=True)
class Spread:
    """How far off forecasts are: what is expected, times what held-out points make of that.

    factor: root mean square of `Holdout.surprise`, at least 1: what is expected if the law holds is the least.
    dof: how many runs and parts of runs that rests on.
    """

    expected: Expected
    factor: float
    dof: int

    def half_width(
        self, derivatives_PxI: np.ndarray, eta_T: np.ndarray, step_P: np.ndarray, level: float
    ) -> np.ndarray:
        """Half the width of the interval at points, relative to the loss; Student t."""
        t = float(stats.t.ppf((1 + level) / 2, self.dof))
        return t * self.factor * self.expected.error(derivatives_PxI, eta_T, step_P)


def score_of(predicted_P: np.ndarray, loss_P: np.ndarray) -> dict[str, float]:
    """r2, mae, relative (mean relative error) and worst (largest); r2 is NaN where the losses do not vary."""
    error_P = np.abs(predicted_P - loss_P)
    scatter = float(((loss_P - loss_P.mean()) ** 2).sum())
    return {
        "r2": 1 - float((error_P**2).sum()) / scatter if scatter > 0 else math.nan,
        "mae": float(error_P.mean()),
        "relative": float((error_P / loss_P).mean()),
        "worst": float((error_P / loss_P).max()),
    }


def join(prepared: Sequence[Prepared]) -> Prepared:
    """The points of several runs as one."""
    return {k: np.concatenate([p[k] for p in prepared]) for k in prepared[0]}


def hold_out(form: Form, fitted: Sequence[Trajectory], prepared: Sequence[Prepared]) -> tuple[Holdout, ...]:
    """Refit a form to parts of the points fitted, and predict the others.

    Args:
      fitted: runs with the points fitted. prepared: of these points.
    """
    found = []
    least = len(form.shape) + len(form.coefficients) + 1

    def compare(kind: str, cut: float, in_sample: list[np.ndarray]) -> None:
        """in_sample: which points of each run are fitted."""
        part = [points_of(t, keep_P) for t, keep_P in zip(fitted, in_sample, strict=True)]
        rows = [{k: v[keep_P] for k, v in p.items()} for p, keep_P in zip(prepared, in_sample, strict=True)]
        loss_P = np.concatenate([t.loss_P for t in part])
        if len(loss_P) < least or np.ptp(loss_P) == 0:
            return
        peaks = [float(t.eta_T.max()) for t in part if len(t.step_P)]
        suited = form.suited(peaks)
        solution = solve(suited, join(rows), loss_P)
        expected = expected_of(suited, solution, part, rows)
        for t, p, keep_P in zip(fitted, prepared, in_sample, strict=True):
            if (~keep_P).sum() >= _FEWEST:
                out, row = points_of(t, ~keep_P), {k: v[~keep_P] for k, v in p.items()}
                predicted_P = predict(suited, row, solution.shape_J, solution.coefficient_K)
                error_P = expected.error(derivatives(suited, row, solution), out.eta_T, out.step_P)
                found.append(Holdout(kind, t.run, cut, out.loss_P, predicted_P, error_P))

    for cut in _CUTS:
        compare(LATER, cut, [t.step_P <= cut * t.step_P.max(initial=0) for t in fitted])
    folds = min(len(fitted), _MOST_FOLDS)
    for fold in range(folds if folds > 1 else 0):
        compare(OTHERS, 1.0, [np.full(len(t.step_P), i % folds != fold) for i, t in enumerate(fitted)])
    return tuple(found)


def expected_of(form: Form, solution: Solution, fitted: Sequence[Trajectory], prepared: Sequence[Prepared]) -> Expected:
    """How far off forecasts should be, from the residuals of a fit and the derivatives there.

    Neighbouring residuals of a run are alike, as those of a first-order autoregression, and count as fewer. Constants
    that the points leave open are held to their range, and coefficients to a factor e either way.
    """
    rows = join(prepared)
    J_PxI = derivatives(form, rows, solution)
    predicted_P = predict(form, rows, solution.shape_J, solution.coefficient_K)
    residual_P = np.concatenate([t.loss_P for t in fitted]) / predicted_P - 1
    run_P = np.repeat(np.arange(len(fitted)), [len(t.step_P) for t in fitted])
    squares = max(float(residual_P @ residual_P), len(residual_P) * _ROUNDING**2)
    alike = float((residual_P[1:] * residual_P[:-1])[run_P[1:] == run_P[:-1]].sum()) / squares
    alike = float(np.clip(alike, 0, 1 - 1 / len(residual_P)))
    variance = squares / len(residual_P)
    range_J = (np.array(form.high) - np.array(form.low)) / 4
    open_I = np.concatenate([range_J, np.maximum(np.abs(solution.coefficient_K), 1e-300)])  # standard deviations
    scaled_PxI = J_PxI * open_I
    information_IxI = scaled_PxI.T @ scaled_PxI * (1 - alike) / (1 + alike) / variance + np.eye(len(open_I))
    covariance_IxI = np.linalg.inv(information_IxI) * np.outer(open_I, open_I)
    peaks = [float(t.eta_T.max()) for t in fitted if len(t.step_P)]
    S_N = np.concatenate([np.cumsum(t.eta_T)[t.step_P - 1] for t in fitted])
    eta_N = np.concatenate([t.eta_T[t.step_P - 1] for t in fitted])
    return Expected(variance, covariance_IxI, (J_PxI == 0).all(0), Seen(S_N, eta_N, (min(peaks), max(peaks))))


def spread_of(expected: Expected, holdouts: Sequence[Holdout]) -> Spread:
    """The spread of forecasts by a fit, from what refits got wrong; with nothing held out, factor 1 and one degree."""
    surprises = [h.surprise for h in holdouts if np.isfinite(h.expected_P).all()]
    if not surprises:
        return Spread(expected, 1.0, 1)
    return Spread(expected, max(1.0, float(np.sqrt(np.mean(np.square(surprises))))), len(surprises))


def points_of(t: Trajectory, keep_P: np.ndarray) -> Trajectory:
    """The run with some of its losses."""
    return dataclasses.replace(t, step_P=t.step_P[keep_P], loss_P=t.loss_P[keep_P])
