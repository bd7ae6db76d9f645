"""Fits against known constants, scipy's optimisers and finite differences."""

import numpy as np
import pytest
from scipy import optimize, special

from cdl.laws.forms import Form, Prepared, convex, paper
from cdl.laws.holdout import join
from cdl.laws.solve import DELTA, Solution, derivatives, objective, predict, solve
from cdl.schedules import schedule

STEPS = np.arange(100, 2001, 40)
SCHEDULES = [
    schedule("cosine", 2000, warmup=100, final=0.1),
    schedule("constant", 2000, warmup=100),
    schedule("step", 2000, peak=0.3, at=(0.4,), factor=0.2, warmup=100),  # another peak, for r
]


def prepared(form: Form, around_J: np.ndarray | None = None) -> Prepared:
    return join([form.prepare(eta_T, STEPS, around_J) for eta_T in SCHEDULES])


@pytest.mark.parametrize(
    ("form", "shape_J", "coefficient_K"),
    [
        (convex(), [0.55, 0.2], [3.0, 20.0, 0.1]),
        (convex(across_peaks=True), [0.5, 0.3, 0.7], [2.7, 10.0, 0.3]),
        (paper, [], [3.0, 50.0, 0.02]),
    ],
    ids=lambda x: getattr(x, "title", ""),
)
def test_constants_come_back_from_exact_losses(form: Form, shape_J: list[float], coefficient_K: list[float]) -> None:
    near = prepared(form, np.array(shape_J))
    losses = predict(form, near, np.array(shape_J), np.array(coefficient_K))
    wide = solve(form, prepared(form), losses)
    found = solve(form, prepared(form, wide.shape_J), losses, near=wide) if form.shape else wide
    np.testing.assert_allclose(found.shape_J, shape_J, atol=1e-4)
    np.testing.assert_allclose(found.coefficient_K, coefficient_K, rtol=1e-3)


def noisy(form: Form) -> np.ndarray:
    rng = np.random.default_rng(1)
    losses = predict(form, prepared(form), np.array([0.55, 0.2]), np.array([3.0, 20.0, 0.1]))
    return losses * np.exp(1e-3 * rng.standard_normal(len(losses)) * (1 + 20 * (rng.random(len(losses)) < 0.1)))


def test_no_optimiser_of_scipy_finds_less() -> None:
    form = convex()
    rows, losses = prepared(form), noisy(convex())
    found = solve(form, rows, losses)

    def value(theta_I: np.ndarray) -> float:
        return objective(predict(form, rows, theta_I[:2], np.exp(theta_I[2:])), losses)

    theta_I = np.concatenate([found.shape_J, np.log(found.coefficient_K)])
    assert value(theta_I) == pytest.approx(found.objective_N[0], rel=1e-9)
    rng = np.random.default_rng(0)
    for _ in range(3):
        start = theta_I + 0.1 * rng.standard_normal(5)
        other = optimize.minimize(
            value, start, method="Nelder-Mead", options=dict(maxiter=400, xatol=1e-8, fatol=1e-14)
        )
        assert found.objective_N[0] <= other.fun * (1 + 1e-6)


def test_starts_agree_and_two_fits_are_equal() -> None:
    form = convex()
    first, second = (solve(form, prepared(form), noisy(form)) for _ in range(2))
    np.testing.assert_allclose(first.objective_N, first.objective_N[0], rtol=1e-6)
    np.testing.assert_array_equal(first.coefficient_K, second.coefficient_K)


def test_objective_is_hubers() -> None:
    rng = np.random.default_rng(2)
    losses = rng.uniform(1, 2, 30)
    predicted = losses * np.exp(3e-3 * rng.standard_normal(30))
    assert objective(predicted, losses) == pytest.approx(special.huber(DELTA, np.log(predicted / losses)).sum())


def test_squares_against_scipys_bounded_least_squares() -> None:
    rng = np.random.default_rng(3)
    rows = prepared(paper)
    losses = 3 + 5 * rows["distance"] - 0.01 * rows["noise"] + 0.01 * rng.standard_normal(len(rows["noise"]))
    found = solve(paper, rows, losses)
    X = np.stack([np.ones_like(losses), rows["distance"], rows["noise"]], 1)
    other = optimize.lsq_linear(X, losses, bounds=([-np.inf, 0, 0], np.inf), method="bvls", tol=1e-14)
    np.testing.assert_allclose(found.coefficient_K, other.x, rtol=1e-8, atol=1e-12)
    assert found.coefficient_K[2] == 0  # it would be negative


@pytest.mark.parametrize("form", [convex(), paper], ids=lambda f: f.title)
def test_derivatives_against_finite_differences(form: Form) -> None:
    shape_J, coefficient_K = np.array([0.5, 0.2])[: len(form.shape)], np.array([3.0, 20.0, 0.1])
    rows = prepared(form, shape_J)
    exact_PxI = derivatives(form, rows, Solution(shape_J, coefficient_K, np.zeros(1)))
    constants_I = np.concatenate([shape_J, coefficient_K])
    J = len(shape_J)
    for i in range(len(constants_I)):
        step_I = 1e-5 * np.eye(len(constants_I))[i]
        up, down = (predict(form, rows, c[:J], c[J:]) for c in (constants_I + step_I, constants_I - step_I))
        np.testing.assert_allclose(exact_PxI[:, i], np.log(up / down) / 2e-5, rtol=1e-4, atol=1e-9)
