"""G1 and the forecasting laws: the loss along a run from its rates, fitted, checked on what was not fitted, forecast.

`fit_curve` fits one law to one run or many; the laws are `cdl.laws.forms` and `cdl.laws.baselines`, the search is
`cdl.laws.solve`, what was not fitted is `cdl.laws.holdout`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cdl.errors import UserError, unknown
from cdl.laws import baselines, forms
from cdl.laws.forms import SAME_PEAK, Form, Prepared
from cdl.laws.holdout import (
    HALF,
    LATER,
    OTHERS,
    Holdout,
    Spread,
    expected_of,
    hold_out,
    join,
    points_of,
    score_of,
    spread_of,
)
from cdl.laws.records import Trajectory, read_runs, short_names, trajectories
from cdl.laws.solve import Solution, derivatives, objective, predict, solve
from cdl.theory.bounds import checked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LAWS", "CurveFit", "compare_laws", "fit_curve", "score_text"]

LAWS = ("convex", "paper", "multipower", "annealing", "functional")
LEVEL = 0.9  # of forecasts
_SPARE_POINTS = 3  # more points than constants
_BOUNDARY = 1e-3  # of its range: a shape this near an end is at the end
_MOST_PASSES, _CLOSE = 4, 0.01  # of the shape, from one pass to the next
_NOTHING = 1e-6  # of the loss
_FAR = 5.0  # times the sum of rates fitted
_NO_CHANGE = 0.01  # rates that vary by less than this are constant

FITTED = "fitted"
FIGURES = ("r2", "mae", "relative", "worst")
# What trainers call sizes of the model, data and batch.
_SETTINGS = frozenset({
    "n_layer", "n_layers", "num_layers", "num_hidden_layers", "n_embd", "d_model", "hidden_size", "n_head", "n_params",
    "optimizer", "opt", "dataset", "vocab_size", "batch_size", "sequence_length", "seq_len", "weight_decay",
})  # fmt: skip
Runs = pd.DataFrame | str | Path | Sequence[Any]


@dataclass(frozen=True)
class CurveFit:
    """A law fitted to runs.

    law: its name. fitted: the recorded points it was fitted to; rest: those of the same runs it was not, empty if all
    were. warnings: sentences. form: the law as columns, for rates in units of `unit`, the largest rate of the runs.
    solution: its constants in these units; `params` has them for rates as they were given. prepared: what the form
    knows of the points fitted, good over the whole range of its shape (refits start from it).
    """

    law: str
    form: Form
    unit: float
    solution: Solution
    fitted: tuple[Trajectory, ...]
    rest: tuple[Trajectory, ...]
    prepared: tuple[Prepared, ...]
    warnings: tuple[str, ...]

    @property
    def params(self) -> dict[str, float]:
        """The constants of the law by name, for rates as they were given."""
        return self.form.natural(_named(self.form, self.solution), self.unit)

    @property
    def standard_errors(self) -> dict[str, float]:
        """Of `params`: from the residuals, times what held-out points make of them; infinite where nothing is known."""
        values = _named(self.form, self.solution)
        names = [*self.form.shape, *self.form.coefficients]
        slopes = []
        for name in names:  # of the natural constants in those of the fit
            step = 1e-6 * max(abs(values[name]), 1e-6)
            up, down = (self.form.natural(values | {name: values[name] + h}, self.unit) for h in (step, -step))
            slopes.append([(up[x] - down[x]) / (2 * step) for x in names])
        slope_IxI = np.array(slopes).T
        expected = self._spread.expected
        variance_I = np.einsum("ai,ij,aj->a", slope_IxI, expected.covariance_IxI, slope_IxI)
        blind_I = (slope_IxI[:, expected.blind_I] != 0).any(1)
        error_I = np.where(blind_I, np.inf, self._spread.factor * np.sqrt(variance_I))
        return dict(zip(names, error_I.tolist(), strict=True))

    @property
    def objective(self) -> float:
        """Sum of Huber's function of the log residuals at the fitted points (`cdl.laws.solve`)."""
        pairs = [(self.predict(t.eta_T, t.step_P), t.loss_P) for t in self.fitted]
        return sum(objective(predicted_P, loss_P) for predicted_P, loss_P in pairs)

    def predict(self, eta_T: Any, steps: Any = None) -> np.ndarray:
        """The loss after each of some steps of a run with these rates.

        Args:
          eta_T: rates [T], as given to `cdl.bound`.
          steps: which steps, integers in 1..T; all from the first positive rate on if None.

        Returns:
          Losses, float64 [P].
        """
        eta_T, step_P = _checked_rates(eta_T, steps)
        prepared = self.form.prepare(eta_T / self.unit, step_P, self.solution.shape_J)
        return _finite(predict(self.form, prepared, self.solution.shape_J, self.solution.coefficient_K))

    def forecast(self, eta_T: Any, steps: Any = None, level: float = LEVEL) -> pd.DataFrame:
        """The loss of a run with these rates, with intervals; columns step, eta, loss, low, high.

        The interval at a step is meant to hold the loss of a new run with probability `level`. Its width comes from
        what the law got wrong on losses it had not been fitted to (`holdouts`), from how well the losses fix the
        constants, and from the distance to the nearest loss fitted. How often it holds on published runs is in
        docs/laws.md.
        """
        if not 0 < level < 1:
            raise UserError(f"level={level} must lie between 0 and 1, such as {LEVEL}")
        eta_T, step_P = _checked_rates(eta_T, steps)
        loss_P, low_P, high_P = self._interval(eta_T, step_P, level)
        for other in self._others:  # where the constants cannot be told apart, all that they could be
            _, low, high = other._interval(eta_T, step_P, level)
            low_P, high_P = np.minimum(low_P, low), np.maximum(high_P, high)
        return pd.DataFrame({"step": step_P, "eta": eta_T[step_P - 1], "loss": loss_P, "low": low_P, "high": high_P})

    def _interval(self, eta_T: np.ndarray, step_P: np.ndarray, level: float) -> tuple[np.ndarray, ...]:
        prepared = self.form.prepare(eta_T / self.unit, step_P, self.solution.shape_J)
        loss_P = _finite(predict(self.form, prepared, self.solution.shape_J, self.solution.coefficient_K))
        J_PxI = derivatives(self.form, prepared, self.solution)
        half_P = loss_P * self._spread.half_width(J_PxI, eta_T, step_P, level)
        return loss_P, loss_P - half_P, loss_P + half_P

    @functools.cached_property
    def _others(self) -> "list[CurveFit]":
        """Where the rate is constant at all points fitted: the law without its falling part, and without its noise."""
        if not _constant_rate(self.fitted) or len(self.form.coefficients) != 3:
            return []
        loss_P = np.concatenate([t.loss_P for t in self.fitted])
        found: list[CurveFit] = []
        for k in (1, 2):
            form = forms.without(self.form, k)
            solution = _solve(form, self.fitted, self.prepared, loss_P, self.unit)
            if np.isfinite(solution.objective_N[0]):
                found.append(dataclasses.replace(self, form=form, solution=solution))
        return found

    def cautions(self, eta_T: Any) -> list[str]:
        """How a schedule leaves what the law was fitted on, a sentence each."""
        eta_T, _ = _checked_rates(eta_T, None)
        found = []
        peaks = [float(t.eta_T[: t.step_P[-1]].max()) for t in self.fitted]
        lowest = float(_rates(self.fitted).min())
        furthest = max(float(t.eta_T[: t.step_P[-1]].sum()) for t in self.fitted)
        peak, last = float(eta_T.max()), float(eta_T[-1])
        if not min(peaks) / SAME_PEAK <= peak <= max(peaks) * SAME_PEAK:
            found.append(
                f"it peaks at {peak:.4g}, the runs fitted at {_span(peaks)}; how laws carry from one peak rate to "
                f"another was measured on few runs"
            )
        if last < lowest / 2 and lowest > 0:
            found.append(
                f"its rate falls to {last:.4g}, that of the losses fitted never below {lowest:.4g}; what a further "
                f"decay gains is extrapolated"
            )
        if eta_T.sum() > _FAR * furthest:
            found.append(f"its rates add up to {eta_T.sum() / furthest:.0f} times those of the longest run fitted")
        return found

    def scores(self, runs: Runs) -> pd.DataFrame:
        """How well the law predicts runs: one row each, columns run, points, r2, mae, relative, worst."""
        rows = [
            {"run": t.run, "points": len(t.step_P)} | score_of(self.predict(t.eta_T, t.step_P), t.loss_P)
            for t in _trajectories(runs)
        ]
        return pd.DataFrame(rows)

    def score(self, runs: Runs) -> dict[str, float]:
        """Means over the runs of `scores`: r2, mae (in the loss), relative (mean relative error), worst (largest)."""
        table = self.scores(runs)
        return {c: float(table[c].mean()) for c in FIGURES}

    @functools.cached_property
    def holdouts(self) -> tuple[Holdout, ...]:
        """The law refitted to parts of the fitted points and compared with the other parts (`cdl.laws.holdout`)."""
        return hold_out(self.form, self.fitted, self.prepared)

    @functools.cached_property
    def _spread(self) -> Spread:
        near = [self.form.prepare(t.eta_T / self.unit, t.step_P, self.solution.shape_J) for t in self.fitted]
        return spread_of(expected_of(self.form, self.solution, self.fitted, near), self.holdouts)

    def table(self) -> pd.DataFrame:
        """In sample and out of sample side by side: a row for each run, columns (sample, figure).

        Samples: fitted; later, the points after `until`; LATER and OTHERS of `cdl.laws.holdout`, the law refitted
        without them. Figures: points, r2, mae, relative, worst.
        """
        rows: dict[str, dict[tuple[str, str], float]] = {t.run: {} for t in self.fitted}

        def enter(run: str, sample: str, predicted_P: np.ndarray, loss_P: np.ndarray) -> None:
            figures = {"points": len(loss_P)} | score_of(predicted_P, loss_P)
            rows[run] |= {(sample, name): value for name, value in figures.items()}

        for t in self.fitted:
            enter(t.run, FITTED, self.predict(t.eta_T, t.step_P), t.loss_P)
        for t in self.rest:
            enter(t.run, "after until", self.predict(t.eta_T, t.step_P), t.loss_P)
        for h in self.holdouts:
            if h.kind == OTHERS or h.cut == HALF:
                enter(h.run, h.kind, h.predicted_P, h.loss_P)
        columns = list(dict.fromkeys(c for figures in rows.values() for c in figures))
        values = [[figures.get(c, np.nan) for c in columns] for figures in rows.values()]
        return pd.DataFrame(values, index=pd.Index(rows, name="run"), columns=pd.MultiIndex.from_tuples(columns))

    def summary(self) -> str:
        """Constants, figures in and out of sample, and warnings as text."""
        errors = self.standard_errors
        constants = ", ".join(f"{k} = {v:.4g} ± {errors[k]:.1g}" for k, v in self.params.items())
        points = sum(len(t.step_P) for t in self.fitted)
        lines = [f"{self.form.title}: {constants}", f"Fitted to {points} losses of {_runs(len(self.fitted))}."]
        table = self.table()
        shown = table.loc[:, [c for c in table.columns if c[1] in ("points", "r2", "mae", "worst")]]
        lines.append(score_text(shown))
        for sample in dict.fromkeys(c[0] for c in table.columns):
            bad = [str(run) for run, r2 in table[(sample, "r2")].items() if r2 < 0]
            if bad:
                lines.append(f"Warning: {sample}: worse than the mean of the losses (R2 < 0) for {', '.join(bad)}.")
        return "\n".join(lines + [f"Warning: {w}." for w in self.warnings])

    def plot(self, runs: Runs | None = None) -> "Figure":
        """`cdl.laws.figures.curve_figure`: measured points, fit (solid), predictions (dashed) with their band."""
        from cdl.laws.figures import curve_figure  # matplotlib is slow to import

        return curve_figure(self, [] if runs is None else _trajectories(runs))


def fit_curve(
    runs: Runs, law: str = "convex", *, until: float = 1.0, after: int = 0, across_peaks: bool | None = None
) -> CurveFit:
    """Fit a law of the loss along runs.

    Args:
      runs: what `cdl.read_runs` gives or reads: a table, files, folders.
      law: ``convex`` (five constants, the forecasting law of docs/laws.md), ``paper`` (3.1), ``multipower``,
        ``annealing`` or ``functional``.
      until: the part of each run to fit, of its recorded steps; 0.5 fits the first half and leaves the second for
        comparison.
      after: leave out losses recorded at this step or before: early training follows no law of the rates.
      across_peaks: fit r of the convex law, the sixth constant, which carries it from one peak rate to another; if
        None, when the runs have several.

    Raises:
      UserError: unknown law; too few points; losses that are constant or not positive; losses before the first
        positive rate.
    """
    if law not in LAWS:
        raise unknown("law", law, LAWS)
    if after < 0:
        raise UserError(f"after={after} must be a step, 0 or more")
    if not 0 < until <= 1:
        raise UserError(f"until={until} must be a part of the run, above 0 and at most 1")
    if across_peaks and law != "convex":
        raise UserError(f"across_peaks is for law='convex', not {law!r}")
    if not _are_trajectories(runs):
        runs = read_runs(runs)
    fitted, rest, empty = [], [], []
    for t in _trajectories(runs):
        late = points_of(t, t.step_P > after)
        early_P = late.step_P <= until * late.step_P.max(initial=0)
        if early_P.any():
            fitted.append(points_of(late, early_P))
        else:
            empty.append(t.run)
        if not early_P.all():
            rest.append(points_of(late, ~early_P))
    where = (f" after step {after}" if after else "") + (f" in the first {until:.0%} of the runs" if until < 1 else "")
    if not fitted:
        raise UserError(f"there are no recorded losses{where}: nothing to fit")
    loss_P = np.concatenate([t.loss_P for t in fitted])
    peaks = [float(t.eta_T.max()) for t in fitted]
    form = _form(law)
    if law == "convex" and across_peaks is False:
        form = forms.convex()
    form = form.suited(peaks)
    if across_peaks and "r" not in form.shape:
        raise UserError(f"across_peaks needs runs of several peak rates, all peak at {_span(peaks)}; leave it out")
    constants = len(form.shape) + len(form.coefficients)
    if len(loss_P) < constants + _SPARE_POINTS:
        raise UserError(
            f"{len(loss_P)} recorded losses{where} are too few for the {constants} constants of law={law!r}; give at "
            f"least {constants + _SPARE_POINTS}"
        )
    if loss_P.min() <= 0:
        raise UserError(f"a loss of {loss_P.min():g} is not positive, and the law is fitted to log losses")
    if np.ptp(loss_P) == 0:
        raise UserError(f"all losses are {loss_P[0]:g}: there is nothing to fit")
    unit = max(peaks)
    if unit == 0:
        raise UserError(f"all rates of {fitted[0].run} are 0: nothing was trained")
    prepared = [form.prepare(t.eta_T / unit, t.step_P, None) for t in fitted]
    solution = _solve(form, fitted, prepared, loss_P, unit)
    doubts = [f"{run} has no losses{where} and is left out" for run in empty]
    doubts += [*_differences(runs), *_doubts(form, solution, fitted, prepared)]
    return CurveFit(law, form, unit, solution, tuple(fitted), tuple(rest), tuple(prepared), tuple(doubts))


def compare_laws(
    fit_runs: Runs, test_runs: Runs | None = None, *, laws: Sequence[str] = LAWS, until: float = 1.0, after: int = 0
) -> pd.DataFrame:
    """All laws on the same runs: a row each, with errors in sample and out of sample.

    Args:
      fit_runs: to fit. test_runs: to predict; if None, the points after `until`, or, with until = 1, the later halves
        from the earlier ones.

    Returns:
      Columns law, parameters, then fitted r2, and r2, mae, relative, worst out of sample, means over runs; NaN where a
      law cannot be fitted to these runs. `attrs["warnings"]`: those of the fits, sentences.

    Raises:
      UserError: no law can be fitted; there is nothing to test on.
    """
    if not _are_trajectories(fit_runs):
        fit_runs = read_runs(fit_runs)
    tests = [] if test_runs is None else [points_of(t, t.step_P > after) for t in _trajectories(test_runs)]
    tests = [t for t in tests if len(t.step_P)]
    if test_runs is not None and not tests:
        raise UserError(f"the runs to test on have no losses after step {after}; give others, or a smaller after")
    rows, warnings = [], []
    problem = None
    for law in laws:
        nothing = {c: np.nan for c in ("fitted r2", *FIGURES)}
        try:
            fit = fit_curve(fit_runs, law, until=until, after=after)
        except UserError as e:
            problem = e
            warnings.append(f"{law} cannot be fitted: {e}")
            rows.append({"law": law, "parameters": np.nan} | nothing)
            continue
        warnings += [f"{law}: {w}" for w in fit.warnings]
        if tests or fit.rest:
            out = fit.score(tests or fit.rest)
        else:
            table = fit.table()
            if (LATER, "r2") not in table.columns:
                raise UserError("the runs are too short to hold a half of them out; give runs to test on")
            out = {c: float(table[(LATER, c)].mean()) for c in FIGURES}
        parameters = len(fit.form.shape) + len(fit.form.coefficients)
        rows.append({"law": law, "parameters": parameters, "fitted r2": fit.score(fit.fitted)["r2"]} | out)
    if problem and len(warnings) >= len(laws) and all(np.isnan(row["parameters"]) for row in rows):
        raise problem
    compared = pd.DataFrame(rows)
    compared.attrs["warnings"] = list(dict.fromkeys(warnings))
    return compared


def score_text(table: pd.DataFrame) -> str:
    """A table of figures for the terminal."""
    formats = {"points": "{:.0f}", "r2": "{:.5f}", "fitted r2": "{:.5f}", "mae": "{:.5f}", "parameters": "{:.0f}"}
    formats |= {"relative": "{:.3%}", "worst": "{:.2%}"}

    def formatter(column: Any) -> Any:
        name = column[1] if isinstance(column, tuple) else column
        return lambda x: "" if x != x else formats[name].format(x) if name in formats else str(x)

    if table.index.name:
        table = table.rename(index=short_names([str(name) for name in table.index]))
    formatters: Any = {c: formatter(c) for c in table.columns}
    return table.to_string(formatters=formatters, index=table.index.name is not None)


def _form(law: str) -> Form:
    return {
        "convex": forms.convex(across_peaks=True),
        "paper": forms.paper,
        "multipower": baselines.multipower,
        "annealing": baselines.annealing,
        "functional": baselines.functional,
    }[law]


def _are_trajectories(runs: Runs) -> bool:
    if isinstance(runs, pd.DataFrame | str | Path) or not len(runs):
        return False
    return all(isinstance(t, Trajectory) for t in runs)


def _trajectories(runs: Runs) -> list[Trajectory]:
    return list(runs) if _are_trajectories(runs) else trajectories(runs)  # type: ignore[arg-type]


def _differences(runs: Runs) -> list[str]:
    """Settings in which the runs differ and one law cannot hold for all, a sentence each."""
    if not isinstance(runs, pd.DataFrame):
        return []
    found = []
    for column in runs.columns:
        values = runs[column].dropna().unique() if str(column).rpartition(".")[2] in _SETTINGS else []
        if len(values) > 1:
            several = ", ".join(map(str, values[:3]))
            found.append(
                f"the runs differ in {column} ({several}): one law holds for one model, its data and batch size"
            )
    return found


def _solve(
    form: Form, fitted: Sequence[Trajectory], prepared: Sequence[Prepared], loss_P: np.ndarray, unit: float
) -> Solution:
    solution = solve(form, join(prepared), loss_P)
    for _ in range(_MOST_PASSES if form.shape else 0):  # with columns that are exact where the search ended
        near = [form.prepare(t.eta_T / unit, t.step_P, solution.shape_J) for t in fitted]
        polished = solve(form, join(near), loss_P, near=solution)
        moved = np.abs(polished.shape_J - solution.shape_J).max()
        solution = Solution(polished.shape_J, polished.coefficient_K, solution.objective_N)
        if moved < _CLOSE:
            break
    return solution


def _rates(fitted: Sequence[Trajectory]) -> np.ndarray:
    """The rates at the points fitted, without those of warm-ups (of all, where there are no others)."""
    after = [t.eta_T[t.step_P[t.step_P > np.argmax(t.eta_T >= t.eta_T.max() * (1 - _NO_CHANGE))] - 1] for t in fitted]
    eta_P = np.concatenate(after)
    return eta_P if len(eta_P) else np.concatenate([t.eta_T[t.step_P - 1] for t in fitted])


def _constant_rate(fitted: Sequence[Trajectory]) -> bool:
    """Is the rate the same at all points fitted, but for a warm-up?"""
    eta_P = _rates(fitted)
    return bool(np.ptp(eta_P) < _NO_CHANGE * eta_P.max())


def _checked_rates(eta_T: Any, steps: Any) -> tuple[np.ndarray, np.ndarray]:
    eta_T = checked("eta_T", eta_T)
    if eta_T.ndim != 1:
        raise UserError(f"rates of shape {eta_T.shape} are not those of one run; give [T]")
    if not eta_T.any():
        raise UserError(f"{len(eta_T)} rates, none of them positive: give those of a run")
    step_P = np.arange(np.argmax(eta_T > 0), len(eta_T)) + 1 if steps is None else np.asarray(steps)
    if step_P.ndim != 1 or step_P.dtype.kind not in "iu" or len(step_P) == 0:
        raise UserError(f"steps={steps!r} must be whole numbers in a row, such as [100, 200]")
    if step_P.min() < 1 or step_P.max() > len(eta_T):
        raise UserError(f"steps from {step_P.min()} to {step_P.max()} must lie in 1..{len(eta_T)}, the rates given")
    return eta_T, step_P


def _doubts(form: Form, solution: Solution, fitted: Sequence[Trajectory], prepared: Sequence[Prepared]) -> list[str]:
    """What a person should know before trusting the constants, a sentence each."""
    found = []
    if _constant_rate(fitted):
        rate = float(_rates(fitted).max())
        found.append(
            f"the rate is {rate:.4g} at all losses fitted: {' and '.join(form.coefficients[1:])} cannot be told "
            f"apart, and forecasts hold at this rate only; add a run whose rate changes"
        )
    rows, J = join(prepared), len(form.shape)
    share_PxK = derivatives(form, rows, solution)[:, J:] * solution.coefficient_K  # of each term in the loss
    for name, share in zip(form.coefficients[1:], np.abs(share_PxK).max(0)[1:], strict=True):
        if share < _NOTHING and not _constant_rate(fitted):
            found.append(f"the term of {name} is nothing: the losses fitted do not ask for it")
    for name, x, low, high in zip(form.shape, solution.shape_J, form.low, form.high, strict=True):
        at, *ends = np.log([x, low, high]) if low > 0 else (x, low, high)
        if min(at - ends[0], ends[1] - at) < _BOUNDARY * (ends[1] - ends[0]):
            found.append(f"{name} = {x:.4g} is at the end of its range [{low:g}, {high:g}]")
    return found


def _finite(loss_P: np.ndarray) -> np.ndarray:
    if not np.isfinite(loss_P).all():
        raise UserError("the law gives no finite loss for these rates; they are far from those of the runs fitted")
    return loss_P


def _named(form: Form, solution: Solution) -> dict[str, float]:
    values = [*solution.coefficient_K, *solution.shape_J]
    return {name: float(x) for name, x in zip((*form.coefficients, *form.shape), values, strict=True)}


def _span(x: Sequence[float]) -> str:
    return f"{min(x):.4g}" if max(x) <= SAME_PEAK * min(x) else f"{min(x):.4g} to {max(x):.4g}"


def _runs(n: int) -> str:
    return "1 run" if n == 1 else f"{n} runs"
