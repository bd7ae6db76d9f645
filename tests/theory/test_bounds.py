"""The bounds against the paper's formulas as printed, closed forms, and what has to hold for any schedule."""

import warnings
from fractions import Fraction
from typing import Any

import jax
import numpy as np
import pytest
from scipy import special

import cdl
from cdl.theory.bounds import average_bound, bound, bound_curve, bound_terms
from cdl.theory.cauchy import padded_length

from .reference import RNG, causal_sums, hard_schedules, literal_average, literal_last

RATES = [Fraction(n, 7) for n in (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8)]
ETA_T = np.array([float(e) for e in RATES])
D, G = Fraction(3, 2), Fraction(2, 3)


def harmonic(n: float) -> float:
    return float(special.digamma(n + 1) + np.euler_gamma)


# --- Values --------------------------------------------------------------------------------------------------------


def test_the_formulas_as_printed() -> None:
    assert bound(ETA_T, float(D), float(G)) == pytest.approx(float(literal_last(RATES, D, G)), rel=1e-14)
    assert average_bound(ETA_T, float(D), float(G)) == pytest.approx(float(literal_average(RATES, D, G)), rel=1e-14)
    for iterate, literal in (("last", literal_last), ("average", literal_average)):
        curve = [float(literal(RATES[:k], D, G)) for k in range(1, len(RATES) + 1)]
        np.testing.assert_allclose(bound_curve(ETA_T, float(D), float(G), iterate=iterate), curve, rtol=1e-14)


@pytest.mark.parametrize("T", [1, 2, 1000, 10**6])
def test_constant_in_closed_form(T: int) -> None:
    eta = 0.3
    expected = 4 / (2 * T * eta) + eta * 9 / 2 * (harmonic(T - 1) + 1)
    assert bound(np.full(T, eta), 2.0, 3.0) == pytest.approx(expected, rel=1e-13)
    assert average_bound(np.full(T, eta), 2.0, 3.0) == pytest.approx(4 / (2 * T * eta) + eta * 9 / 2, rel=1e-13)


@pytest.mark.parametrize("T", [3, 1000, 10**6])
def test_the_papers_linear_schedule_in_closed_form(T: int) -> None:
    """It ends at 0, where (2.4) as printed divides by it: the last step drops out."""
    expected = 4 / (T - 1) + 9 / 2 * (2 / T * (T - 2 + harmonic(T - 2)) + 1 / T)
    assert bound(cdl.schedule("linear", T), 2.0, 3.0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", hard_schedules(10))
def test_curve_is_the_bound_of_every_beginning(name: str) -> None:
    eta_T = hard_schedules(700)[name]
    G_T = RNG.uniform(0.5, 2, 700)
    curve = bound_curve(eta_T, 1.5, G_T)
    for tau in (1, 2, 32, 33, 64, 65, 333, 700):
        assert curve[tau - 1] == pytest.approx(bound(eta_T[:tau], 1.5, G_T[:tau]), rel=1e-12)


@pytest.mark.parametrize("T", [64, 128, 1024])
def test_curve_of_a_length_without_padding(T: int) -> None:
    assert padded_length(T) == T
    k = np.arange(1, T + 1)
    expected = 1 / (0.2 * k) + 0.05 * (special.digamma(k) + np.euler_gamma + 1)
    np.testing.assert_allclose(bound_curve(np.full(T, 0.1)), expected, rtol=1e-13)


def test_gradient_norms_of_each_step() -> None:
    eta_T, G_T = RNG.uniform(0.1, 1, (2, 300))
    past = causal_sums(eta_T, eta_T**2 * G_T**2, np.array([299])).astype(float)[0]
    expected = 1 / (2 * eta_T.sum()) + (past + eta_T[-1] * G_T[-1] ** 2) / 2
    assert bound(eta_T, 1.0, G_T) == pytest.approx(expected, rel=1e-13)
    assert bound(eta_T, 1.0, np.full(300, 0.7)) == pytest.approx(bound(eta_T, 1.0, 0.7), rel=1e-14)
    average = (1 + (eta_T**2 * G_T**2).sum()) / (2 * eta_T.sum())
    assert average_bound(eta_T, 1.0, G_T) == pytest.approx(average, rel=1e-13)


def test_terms_scale_as_they_say_and_give_the_best_rate() -> None:
    eta_T = cdl.schedule("cosine", 500, peak=0.02, warmup=10)
    for options in (dict(), dict(iterate="average"), dict(curve=True), dict(curve=True, iterate="average")):
        terms = bound_terms(eta_T, 1.3, 0.7, **options)
        scaled = bound_terms(5 * eta_T, 1.3, 0.7, **options)
        np.testing.assert_allclose(scaled.distance, terms.distance / 5, rtol=1e-14)
        np.testing.assert_allclose(scaled.noise, terms.noise * 5, rtol=1e-14)
    terms = bound_terms(eta_T, 1.3, 0.7)
    assert bound(eta_T * terms.best_scale, 1.3, 0.7) == pytest.approx(terms.best, rel=1e-14)
    assert min(bound(eta_T * terms.best_scale * c, 1.3, 0.7) for c in (0.99, 1.01)) > terms.best
    assert terms.own == pytest.approx(eta_T[-2] * 0.7**2 / 2, rel=1e-14)  # the last rate is 0


@pytest.mark.slow
def test_many_schedules_at_once() -> None:
    eta_RxT = np.stack([hard_schedules(2000)[name] for name in ("linear", "drop by 1e-3", "jump up by 1e8")])
    D_R, G_RxT = np.array([1.0, 2.0, 3.0]), RNG.uniform(0.5, 2, eta_RxT.shape)
    for G in (0.7, G_RxT[0], G_RxT):
        G_rows = np.broadcast_to(G, eta_RxT.shape)
        rows = [bound(*row) for row in zip(eta_RxT, D_R, G_rows, strict=True)]
        np.testing.assert_allclose(bound(eta_RxT, D_R, G), rows, rtol=1e-14)
        curves = [bound_curve(*row) for row in zip(eta_RxT, D_R, G_rows, strict=True)]
        np.testing.assert_allclose(bound_curve(eta_RxT, D_R, G), curves, rtol=1e-13)


def test_more_schedules_than_fit_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    eta_RxT = RNG.uniform(0.1, 1, (11, 50))
    expected = bound(eta_RxT)
    monkeypatch.setattr("cdl.theory.bounds._BLOCK", 200)  # 4 rows, and 11 is no multiple
    np.testing.assert_allclose(bound(eta_RxT), expected, rtol=1e-15)


# --- Zero, tiny and huge rates -------------------------------------------------------------------------------------


def test_zero_rates_are_no_steps() -> None:
    eta_T = RNG.uniform(0.1, 1, 200)
    G_T = RNG.uniform(0.5, 2, 200)
    with_zeros, G_with = np.zeros(500), np.full(500, 7.0)
    at = np.sort(RNG.choice(np.arange(3, 495), 200, replace=False))
    with_zeros[at], G_with[at] = eta_T, G_T
    assert bound(with_zeros, 1.5, G_with) == pytest.approx(bound(eta_T, 1.5, G_T), rel=1e-13)
    for iterate in ("last", "average"):
        expected = np.r_[np.inf, bound_curve(eta_T, 1.5, G_T, iterate=iterate)]
        steps_before = np.searchsorted(at, np.arange(500), side="right")
        curve = bound_curve(with_zeros, 1.5, G_with, iterate=iterate)
        np.testing.assert_allclose(curve, expected[steps_before], rtol=1e-13)


def test_no_positive_rate_is_infinite() -> None:
    assert bound([0.0, 0.0]) == average_bound([0.0]) == np.inf
    assert bound_curve([0.0, 2.0]).tolist() == [np.inf, 1.25]
    terms = bound_terms([0.0])
    assert np.isnan(terms.best)
    assert np.isnan(bound_terms([0.0, 1.0], curve=True).best[0])
    assert bound_terms([1.0], G=0.0).best_scale == np.inf
    assert bound_terms([1.0], D=0.0).best_scale == 0


def test_a_tiny_last_rate_makes_a_large_bound() -> None:
    """1/2 [1/1e-9 + 1e-9] + 1/2: the formula says so, and it is not hidden."""
    assert bound([1.0, 1e-9]) == pytest.approx(0.5 + 0.5e9, rel=1e-8)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_no_under_or_overflow(scale: float) -> None:
    eta_T = hard_schedules(300)["cosine"]
    for options in (dict(), dict(curve=True), dict(iterate="average"), dict(iterate="average", curve=True)):
        one, other = bound_terms(eta_T, **options), bound_terms(eta_T * scale, **options)
        np.testing.assert_allclose(other.noise, one.noise * scale, rtol=1e-13)
        np.testing.assert_allclose(other.distance, one.distance / scale, rtol=1e-13)


# --- Derivatives ---------------------------------------------------------------------------------------------------


def curve_sum(eta_T: Any, D: Any, G: Any) -> Any:
    return (bound_curve(eta_T, D, G)[5:] * np.linspace(1, 2, 295)).sum()


@pytest.mark.parametrize("f", [bound, average_bound, pytest.param(curve_sum, marks=pytest.mark.slow)])
def test_derivatives_against_finite_differences(f: Any) -> None:
    eta_T, G_T = RNG.uniform(0.1, 1, (2, 300))
    eta_T[[0, 100, 299]] = 0
    with jax.enable_x64(True):
        gradient_T, by_G_T = (np.asarray(g) for g in jax.jit(jax.grad(f, (0, 2)))(eta_T, 1.3, G_T))
    for k in (1, 2, 31, 32, 33, 99, 150, 298):
        step = np.zeros(300)
        step[k] = 1e-5
        difference = (f(eta_T + step, 1.3, G_T) - f(eta_T - step, 1.3, G_T)) / 2e-5
        assert gradient_T[k] == pytest.approx(difference, rel=1e-6, abs=1e-7 * np.abs(gradient_T).max())
        difference = (f(eta_T, 1.3, G_T + step) - f(eta_T, 1.3, G_T - step)) / 2e-5
        assert by_G_T[k] == pytest.approx(difference, rel=1e-6, abs=1e-7 * np.abs(by_G_T).max())
    assert (gradient_T[[0, 100, 299]] == 0).all()
    single_T = jax.jit(jax.grad(f))(eta_T, 1.3, G_T)  # in a float32 program
    assert single_T.dtype == np.float32
    np.testing.assert_allclose(single_T, gradient_T, atol=1e-6 * np.abs(gradient_T).max())


@pytest.mark.parametrize("f", [bound, average_bound, lambda e, D=1.0, G=1.0: bound_curve(e, D, G)[-1]])
def test_traced_values_that_are_no_rates_are_not_taken_for_zeros(f: Any) -> None:
    for bad in (np.nan, -0.4):
        eta_T = np.array([0.5, bad, 0.3, 0.2], np.float32)
        assert np.isnan(jax.jit(f)(eta_T))
        assert np.isnan(jax.grad(f)(eta_T)).any()


@pytest.mark.parametrize("f", [bound, average_bound])
def test_traced_whole_numbers(f: Any) -> None:
    expected = f([1.0, 2.0, 3.0], 2.0, 3.0)
    for arguments in (([1, 2, 3], 2, 3), ([1.0, 2.0, 3.0], 2, 3), ([1, 2, 3], 2.0, 3.0)):
        got = jax.jit(f)(*(np.asarray(x) for x in arguments))
        assert got.dtype == np.float32
        assert float(got) == pytest.approx(expected, rel=1e-6)
    for dtype in (bool, np.complex64):
        with pytest.raises(ValueError, match="eta_T is an array of"):
            jax.jit(f)(np.ones(3, dtype))


def test_second_derivatives_of_the_last_bound() -> None:
    eta_T = RNG.uniform(0.5, 1, 6)
    with jax.enable_x64(True):
        hessian, gradient = jax.hessian(bound)(eta_T), jax.grad(bound)
        for k in range(6):
            step = 1e-6 * np.eye(6)[k]
            difference = (gradient(eta_T + step) - gradient(eta_T - step)) / 2e-6
            np.testing.assert_allclose(hessian[k], difference, atol=1e-7)


def test_inside_jit_and_vmap() -> None:
    eta_RxT = RNG.uniform(0.1, 1, (3, 40)).astype(np.float32)
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(bound)))(eta_RxT)
    np.testing.assert_allclose(values, bound(eta_RxT), rtol=1e-6)
    assert gradients.shape == eta_RxT.shape
    np.testing.assert_allclose(jax.jit(bound_curve)(eta_RxT), bound_curve(eta_RxT), rtol=1e-6)


# --- Precision and the caller's settings ---------------------------------------------------------------------------


def test_float64_whatever_the_setting_and_no_warning() -> None:
    eta_T = cdl.schedule("cosine", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = jax.config.jax_enable_x64
        value, curve = bound(eta_T.astype(np.float32)), bound_curve(eta_T.astype(np.float32))
        assert jax.config.jax_enable_x64 == before == False  # noqa: E712
    assert isinstance(value, float)
    assert curve.dtype == np.float64
    assert value == bound(eta_T.astype(np.float32).astype(np.float64))
    assert bound([2, 1]) == bound([2.0, 1.0])  # whole numbers are numbers
    assert bound(jax.numpy.asarray(eta_T)) == value
    with jax.enable_x64(True):
        assert bound(eta_T) == pytest.approx(value, rel=1e-6)


def test_accuracy_on_request() -> None:
    eta_RxT = np.stack([hard_schedules(5000)[name] for name in ("linear", "falls by 1e40")])
    curve, accuracy = bound_curve(eta_RxT, accuracy=True)
    np.testing.assert_array_equal(curve, bound_curve(eta_RxT))
    assert accuracy.shape == (2,)
    assert isinstance(bound_curve(eta_RxT[0], accuracy=True)[1], float)
    assert (accuracy < 1e-12).all()
    average, accuracy = bound_curve(eta_RxT[0], accuracy=True, iterate="average")
    exact = np.cumsum(eta_RxT[0].astype(np.longdouble))
    exact = (1 + np.cumsum(eta_RxT[0].astype(np.longdouble) ** 2)) / (2 * exact)
    assert np.abs(average / exact - 1).max() < accuracy < 2e-12


def test_on_a_chosen_device() -> None:
    device = jax.devices()[-1]
    assert bound(ETA_T, device=device) == bound(ETA_T)


# --- Bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, -0.5],), r"eta_T\[1\]=-0.5 must be a finite number, at least 0"),
        (([1.0, np.nan],), r"eta_T\[1\]=nan"),
        (([np.inf],), r"eta_T\[0\]=inf"),
        (([[1.0, 2.0], [3.0, -1e-9]],), r"eta_T\[1, 1\]=-1e-09"),
        (([],), r"eta_T has shape \(0,\); give at least one rate"),
        ((np.ones((2, 0)),), r"eta_T has shape \(2, 0\)"),
        ((np.ones((2, 2, 2)),), r"eta_T has shape \(2, 2, 2\)"),
        ((1.0,), r"eta_T has shape \(\)"),
        ((["a"],), r"eta_T=\['a'\] must be a number"),
        (([True, False],), r"eta_T=.* must be a number"),
        (([1j],), r"eta_T=.* must be a number"),
        (([1.0, [2.0]],), r"eta_T=.* must be a number"),
        (([1.0], -1.0), "D=-1 must be a finite number, at least 0"),
        (([1.0], np.nan), "D=nan"),
        (([1.0], 1.0, -2.0), "G=-2 must"),
        (([1.0, 1.0], 1.0, [1.0, -2.0]), r"G\[1\]=-2 must"),
        (([1.0, 1.0], 1.0, [1.0, 1.0, 1.0]), r"G has shape \(3,\) for eta_T of shape \(2,\)"),
        (([1.0, 1.0], [1.0, 1.0]), r"D has shape \(2,\) for eta_T of shape \(2,\)"),
        ((np.ones((2, 3)), np.ones(3)), r"D has shape \(3,\) for eta_T of shape \(2, 3\)"),
        (([1.0], None), "D=None must be a number"),
        ((np.full((2, 2), "a"),), r"eta_T=array\(.* must be a number"),
        (([1e-3, 1e-311],), "eta_T holds 1e-311, less than 1e-300 of the largest rate"),
        (([1e-305],), "eta_T holds 1e-305"),
        (([[1.0, 0.0], [1e5, 1e-299]],), "eta_T holds 1e-299"),
        (([1.0], 1e101), r"D must lie between 1e-100 and 1e\+100, or be 0"),
        (([1.0, 1.0], 1.0, [0.0, 1e-101]), "G must lie between"),
    ],
)
def test_bad_input_is_named(arguments: tuple[Any, ...], message: str) -> None:
    for f in (bound, average_bound, bound_curve):
        with pytest.raises(ValueError, match=message) as raised:
            f(*arguments)
        assert "\n" not in str(raised.value)


def test_unknown_iterate() -> None:
    with pytest.raises(ValueError, match="iterate='best' must be 'last' or 'average'"):
        bound_curve([1.0], iterate="best")  # type: ignore[arg-type]


def test_shapes_are_checked_in_traced_programs_too() -> None:
    with pytest.raises(ValueError, match=r"G has shape \(3,\)"):
        jax.jit(bound)(np.ones(2), 1.0, np.ones(3))
