"""Columns of the laws against sums written out, and the interpolation in their exponents."""

import numpy as np
import pytest

from cdl.errors import UserError
from cdl.laws.forms import Form, convex, paper, positive_steps
from cdl.laws.solve import predict
from cdl.theory.bounds import bound_curve

RNG = np.random.default_rng(0)
RATES = {
    "random": RNG.uniform(0.1, 1.0, 150),
    "zeros between and at the end": RNG.uniform(0.1, 1, 150) * (np.arange(150) % 7 != 3) * (np.arange(150) < 140),
    "drop": np.repeat([1.0, 1e-4, 0.3], 50),
    "warm-up": np.minimum(np.arange(1, 151) / 40, 1.0),
}  # fmt: skip


def literal(x_T: np.ndarray, step: int, p: float) -> float:
    """The noise sum of the convex law after `step` updates, term by term."""
    total = 0.0
    for t in range(1, step + 1):
        if x_T[t - 1] > 0:
            left = sum(x_T[t - 1 : step])  # S_tau - S_{t-1}
            total += x_T[t - 1] ** 2 * sum(x_T[:t]) ** -p / left
    return total


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("r", [None, 0.0, 0.8])
def test_convex_columns_are_the_sums_written_out(rates: str, r: float | None) -> None:
    eta_T, step_P = 0.6 * RATES[rates], np.array([1, 2, 33, 80, 139, 150])
    alpha, p = 0.4, 0.3
    form, shape_J = convex(r is not None), np.array([alpha, p] if r is None else [alpha, p, r])
    near = form.prepare(eta_T, step_P, shape_J)
    columns = [predict(form, near, shape_J, c) for c in np.eye(3)]
    x_T = eta_T / eta_T.max() ** (0.5 if r is None else r)
    np.testing.assert_allclose(columns[0], 1)
    np.testing.assert_allclose(columns[1], np.cumsum(x_T)[step_P - 1] ** -alpha, rtol=1e-12)
    np.testing.assert_allclose(columns[2], [literal(x_T, s, p) for s in step_P], rtol=1e-7)


@pytest.mark.parametrize(("around", "off", "error"), [(True, 0.0, 1e-8), (True, 0.01, 1e-8), (False, 0.0, 0.01)])
def test_interpolation_in_the_exponent(around: bool, off: float, error: float) -> None:
    """Close to where they were asked for, columns are as good as exact; over the whole range, good enough to search."""
    eta_T = np.minimum(np.arange(1, 5001) / 500, 1.0) * (0.05 + np.cos(np.arange(5000) / 5000 * np.pi / 2))
    step_P = np.arange(100, 5001, 100)
    form, shape_J = convex(), np.array([0.5, 0.2])
    moved_J = shape_J + np.array([0, off])
    asked = form.prepare(eta_T, step_P, shape_J if around else None)
    exact = form.prepare(eta_T, step_P, moved_J + np.array([0, 1e-5]))
    noise = np.array([0.0, 0.0, 1.0])
    np.testing.assert_allclose(predict(form, asked, moved_J, noise), predict(form, exact, moved_J, noise), rtol=error)


@pytest.mark.parametrize("rates", RATES)
def test_paper_form_is_the_bound(rates: str) -> None:
    eta_T, step_P = RATES[rates], np.arange(1, 151)
    prepared = paper.prepare(eta_T, step_P, None)
    D, G = 1.7, 0.6
    predicted_P = predict(paper, prepared, np.zeros(0), np.array([0.0, D**2, G**2]))
    np.testing.assert_allclose(predicted_P, bound_curve(eta_T, D, G), rtol=1e-12)


@pytest.mark.parametrize("form", [convex(), convex(across_peaks=True), paper], ids=lambda f: f.title)
def test_constants_do_not_depend_on_the_unit(form: Form) -> None:
    """Constants for rates as given predict what those in units of the largest rate do."""
    unit, eta_T, step_P = 0.3, RATES["random"], np.array([10, 50, 150])
    shape_J = np.array([0.5, 0.2, 0.7])[: len(form.shape)]
    inner = dict(zip((*form.coefficients, *form.shape), [2.0, 3.0, 0.5, *shape_J], strict=True))
    outer = form.natural(inner, unit)
    losses = [
        predict(form, form.prepare(rates, step_P, shape_J), shape_J, np.array([c[k] for k in form.coefficients]))
        for rates, c in ((eta_T, inner), (eta_T * unit, outer))
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_a_loss_before_the_first_positive_rate_is_refused() -> None:
    with pytest.raises(UserError, match="recorded at step 2, but all rates before step 3 are 0"):
        positive_steps(np.array([0.0, 0.0, 1.0]), np.array([2, 3]))
