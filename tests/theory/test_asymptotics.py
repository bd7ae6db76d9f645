"""Limits of the bound against the paper's constants, against quadrature, and against the bound itself at large T."""

import dataclasses
import math
import subprocess
import sys
from typing import Any

import mpmath
import numpy as np
import pytest
import sympy as _sympy
from scipy import optimize

from cdl.errors import UserError
from cdl.schedules import SHAPES, schedule
from cdl.theory import asymptotics
from cdl.theory.asymptotics import limit, limit_of
from cdl.theory.bounds import bound, bound_terms
from cdl.theory.pieces import NoLimit, Piece, X

sympy: Any = _sympy
GAMMA = float(np.euler_gamma)

EVERY: list[tuple[str, dict[str, Any]]] = [
    ("constant", {}),
    ("constant", {"warmup": 0.1}),
    ("linear", {}),
    ("linear", {"warmup": 0.1}),
    ("linear", {"final": 0.1, "warmup": 0.3}),
    ("cosine", {}),
    ("cosine", {"warmup": 0.02}),
    ("cosine", {"final": 0.1}),
    ("wsd", {"decay": 0.2}),
    ("wsd", {"decay": 0.1, "warmup": 0.1}),
    ("wsd", {"decay": 0.3, "final": 0.05}),
    ("wsd", {"decay": 0.5, "form": "cosine"}),
    ("wsd", {"decay": 0.2, "form": "sqrt", "warmup": 0.1}),
    ("wsd", {"decay": 0.2, "form": "sqrt", "final": 0.1}),
    ("wsd", {"decay": 0.2, "form": "exponential", "final": 0.1}),
    ("inv_sqrt", {"warmup": 0.1}),
    ("inv_sqrt", {"warmup": 0.1, "final": 0.5}),
    ("inv_sqrt", {"final": 0.5}),
    ("step", {}),
    ("step", {"at": (0.2, 0.6), "factor": 0.5, "warmup": 0.3}),
    ("step", {"at": (0.2, 0.6), "factor": 0.1, "final": 0.3}),
    ("cyclic", {}),
    ("cyclic", {"cycles": 1, "warmup": 0.25}),
    ("cyclic", {"cycles": 2, "final": 0.2}),
    ("one_cycle", {}),
    ("one_cycle", {"rise": 0.5, "start": 0.0, "warmup": 0.2}),
    ("one_cycle", {"final": 0.1}),
]


def terms(name: str, T: int, **arguments: Any) -> tuple[float, float]:
    """The distance and the noise term of the bound itself at eta_peak = 1."""
    found = bound_terms(schedule(name, T, **arguments))
    return found.distance, found.noise


def test_every_shape_is_tested() -> None:
    assert {name for name, _ in EVERY} == set(SHAPES)


@pytest.mark.parametrize("c", [0.1, 0.5, 0.8, 0.9])
def test_wsd_of_the_paper(c: float) -> None:
    """Table 1: q1² = 1/(1 + c), q2² = 1 + ln((1 + c)/(1 - c))/2."""
    found = limit("wsd", decay=round(1 - c, 3))
    assert found.q1**2 == pytest.approx(1 / (1 + c), rel=1e-14)
    assert found.q2**2 == pytest.approx(1 + math.log((1 + c) / (1 - c)) / 2, rel=1e-14)
    assert found.qualified


def test_other_constants_of_the_paper() -> None:
    linear, cosine, constant = limit("linear"), limit("cosine"), limit("constant")
    assert (linear.q1, linear.q2, linear.log, linear.power) == (1, 1, 0, 0)
    assert (cosine.q1, cosine.q2**2) == pytest.approx((1, 1.061), abs=5e-4)  # as printed; all digits below
    assert (constant.q1**2, constant.log) == pytest.approx((0.5, 0.5), rel=1e-14)
    assert constant.q2_squared == pytest.approx((GAMMA + 1) / 2, rel=1e-14)  # 1.577 / 2
    assert linear.best_peak(10_000) == pytest.approx(0.01, rel=1e-14)
    assert linear.best_bound(10_000) == pytest.approx(0.02, rel=1e-14)
    assert constant.q2_form == "γ/2 + 1/2"
    assert limit("wsd", decay=0.2).q1_form == "5/9"
    assert limit("wsd", decay=0.2).q2_form == "1 + ln(3)"


def test_constant_equals_its_harmonic_sum() -> None:
    """sum_{t<T} 1/(T - t) + 1 = H_(T-1) + 1."""
    T = 10**6
    harmonic = float(mpmath.harmonic(T - 1)) + 1
    assert limit("constant").noise(T) == pytest.approx(harmonic / 2, abs=1 / T)


# Heights at a distance u from the end, their integral from there on, and where the pieces meet.
BY_HAND: list[tuple[str, dict[str, Any], Any, Any, list[float]]] = [
    (
        "cosine",
        {},
        lambda u: (1 - mpmath.cos(mpmath.pi * u)) / 2,
        lambda u: (u - mpmath.sin(mpmath.pi * u) / mpmath.pi) / 2,
        [0, 1],
    ),
    (
        "wsd",
        {"decay": 0.5, "form": "sqrt"},
        lambda u: 1 - mpmath.sqrt(1 - 2 * u) if u < 0.5 else mpmath.mpf(1),
        lambda u: u + (mpmath.sqrt(1 - 2 * u) ** 3 - 1) / 3 if u < 0.5 else u - mpmath.mpf(1) / 3,
        [0, 0.5, 1],
    ),
    (
        "one_cycle",
        {"rise": 0.5, "start": 0.0},
        lambda u: (1 - mpmath.cos(2 * mpmath.pi * u)) / 2,
        lambda u: (u - mpmath.sin(2 * mpmath.pi * u) / (2 * mpmath.pi)) / 2,
        [0, 0.5, 1],
    ),
    (
        "cyclic",
        {"cycles": 1},
        lambda u: 2 * u if u < 0.5 else 2 - 2 * u,
        lambda u: u**2 if u < 0.5 else mpmath.mpf(1) / 2 - (1 - u) ** 2,
        [0, 0.5, 1],
    ),
]


@pytest.mark.parametrize(("name", "arguments", "s", "A", "edges"), BY_HAND)
def test_equal_to_integrals_written_by_hand(name: str, arguments: Any, s: Any, A: Any, edges: Any) -> None:

    def ratio(u: Any) -> Any:
        with mpmath.workdps(200):  # for the differences near u = 0
            return s(u) ** 2 / A(u)

    with mpmath.workdps(30):
        q2_squared = mpmath.quad(ratio, edges) / 2
        q1_squared = 1 / (2 * A(mpmath.mpf(1)))
    found = limit(name, **arguments)
    assert found.q2_squared == pytest.approx(float(q2_squared), rel=1e-13)
    assert found.q1**2 == pytest.approx(float(q1_squared), rel=1e-13)


@pytest.mark.parametrize(("name", "arguments"), EVERY)
def test_closed_forms_equal_quadrature(name: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    exact = limit(name, **arguments)
    monkeypatch.setattr(asymptotics, "_closed", lambda *_: None)
    monkeypatch.setattr(asymptotics, "_rational", lambda *_: None)
    by_numbers = limit(name, **arguments)
    assert by_numbers.q1 == pytest.approx(exact.q1, rel=1e-13)
    assert by_numbers.q2_squared == pytest.approx(exact.q2_squared, rel=1e-12)


def oscillating(n: int) -> Piece:
    return Piece(sympy.S.Zero, sympy.S.One, sympy.cos(n * sympy.pi * X) ** 2 * (1 - X))


@pytest.mark.parametrize("n", [10, 400])
def test_heights_that_change_often_are_resolved(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asymptotics, "_area", lambda _: None)
    found = limit_of([oscillating(n)])
    assert found.q1**2 == pytest.approx(2, rel=1e-12)  # int (1 - x) cos² = 1/4
    u_P = (np.arange(4_000_000) + 0.5) / 4_000_000
    wave_P = n * np.pi * u_P
    A_P = u_P**2 / 4 + (u_P * np.sin(2 * wave_P) - np.sin(wave_P) ** 2 / (n * np.pi)) / (4 * n * np.pi)
    q2_squared = np.mean(u_P**2 * np.cos(wave_P) ** 4 / A_P) / 2
    assert found.q2_squared == pytest.approx(q2_squared, rel=1e-7)


def test_heights_that_change_too_often_are_refused() -> None:
    with pytest.raises(NoLimit, match="change too often"):
        limit_of([oscillating(20_000)])


@pytest.mark.parametrize(("name", "arguments"), EVERY)
def test_the_bound_tends_to_the_limit(name: str, arguments: dict[str, Any]) -> None:
    """What is left falls like ln(T)/T or faster: 67 times from 1e4 to 1e6."""
    found = limit(name, **arguments)
    assert found.power == 0
    errors = []
    for T in (10**4, 10**6):
        distance, noise = terms(name, T, **arguments)
        errors.append((abs(T * distance / found.q1**2 - 1), abs(noise / found.noise(T) - 1)))
    for before, after in zip(*errors, strict=True):
        assert after < 1e-4
        assert after < max(before / 50, 1e-10)


@pytest.mark.parametrize("W", [0, 1, 2, 10, 100, 300])
def test_inv_sqrt_tends_to_its_limit(W: int) -> None:
    """What is left falls like 1/sqrt(T), so its next term is taken off by two horizons."""
    found = limit("inv_sqrt", warmup=W)
    left = {}
    for T in (10**6, 4 * 10**6):
        distance, noise = terms("inv_sqrt", T, warmup=W)
        left[T] = math.sqrt(T) * distance / found.q1**2 - 1, math.sqrt(T) * noise - found.noise(T)
    for before, after in zip(*left.values(), strict=True):
        assert abs(after) < 0.6 * abs(before)
        assert abs(2 * after - before) < 0.02 * abs(before)
    assert abs(left[4 * 10**6][1]) < 5e-3 * found.log


def test_inv_sqrt_has_three_quarters_where_the_paper_has_one() -> None:
    noise = [math.sqrt(T) * terms("inv_sqrt", T)[1] for T in (10**6, 10**7)]
    slope = (noise[1] - noise[0]) / math.log(10)
    assert slope == pytest.approx(0.75, abs=1e-3)  # the paper's 1/4 is a slip
    found, T = limit("inv_sqrt"), 10**7
    assert (found.log, found.power, found.q1**2) == (0.75, -0.5, 0.25)
    # With ln T alone, without the finite part, these are L* + DG sqrt(3 ln T/(4T)) and D/(G sqrt(3 ln T)).
    leading = dataclasses.replace(found, q2_squared=0.0)
    assert leading.best_bound(T) == pytest.approx(math.sqrt(3 * math.log(T) / (4 * T)), rel=1e-14)
    assert leading.best_peak(T) == pytest.approx(1 / math.sqrt(3 * math.log(T)), rel=1e-14)


@pytest.mark.parametrize(
    ("name", "arguments", "end"),
    [
        ("cosine", {"final": 0.1}, 0.1),
        ("wsd", {"final": 0.3}, 0.3),
        ("step", {"factor": 0.5}, 0.25),
        ("inv_sqrt", {"warmup": 0.04}, 0.2),
        ("cyclic", {"final": 0.5}, 0.5),
    ],
)
def test_a_height_at_the_end_is_a_logarithm(name: str, arguments: dict[str, Any], end: float) -> None:
    found = limit(name, **arguments)
    assert not found.qualified
    assert found.log == pytest.approx(end / 2, rel=1e-14)
    noise = [terms(name, T, **arguments)[1] for T in (200_000, 10**6)]
    assert (noise[1] - noise[0]) / math.log(5) == pytest.approx(found.log, rel=5e-4)


@pytest.mark.parametrize(("name", "arguments"), [("linear", {}), ("wsd", {}), ("constant", {}), ("inv_sqrt", {})])
def test_the_best_peak_is_where_the_bound_is_lowest(name: str, arguments: dict[str, Any]) -> None:
    T, D, G = 10**6, 3.0, 0.5
    s_T = schedule(name, T, **arguments)
    found = limit(name, D=D, G=G, **arguments)
    best = optimize.minimize_scalar(lambda log_peak: bound(math.exp(log_peak) * s_T, D, G))
    peak = found.best_peak(T)
    assert math.exp(best.x) == pytest.approx(peak, rel=1e-3)
    assert best.fun == pytest.approx(found.best_bound(T), rel=1e-3)
    assert found.bound(peak, T) == pytest.approx(found.best_bound(T), rel=1e-13)
    assert found.bound(2.5 * peak, T) == pytest.approx(bound(2.5 * peak * s_T, D, G), rel=1e-3)


@pytest.mark.parametrize(("name", "arguments"), [("cosine", {}), ("step", {}), ("inv_sqrt", {"warmup": 5})])
def test_D_and_G_scale_their_terms(name: str, arguments: dict[str, Any]) -> None:
    one, other = limit(name, **arguments), limit(name, D=3.0, G=0.2, **arguments)
    assert other.q1 == pytest.approx(3 * one.q1)
    assert (other.q2_squared, other.log) == pytest.approx((0.04 * one.q2_squared, 0.04 * one.log))


def test_whole_numbers_of_updates_vanish() -> None:
    assert limit("cosine", warmup=50_000) == limit("cosine")
    assert limit("one_cycle", rise=10**6, warmup=3) == limit("cosine")
    assert limit("inv_sqrt", warmup=4) != limit("inv_sqrt")


def test_a_negative_finite_part_asks_for_a_longer_run() -> None:
    found = limit("inv_sqrt", warmup=2000)
    assert found.q2_squared < 0
    assert math.isnan(found.q2)
    with pytest.raises(UserError, match="T=2 is too short"):
        found.best_peak(2)
    assert found.best_peak(10**6) > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(name="cosin"), "'cosin'; did you mean 'cosine'"),
        (dict(name="cosine", warmpu=3), "'warmpu'"),
        (dict(name="cosine", warmup=1.5), "warmup=1.5"),
        (dict(name="cosine", warmup=-3), "warmup=-3"),
        (dict(name="cosine", final=2), "final=2"),
        (dict(name="cosine", peak=2.0), "peak=2.0 is not part of a shape"),
        (dict(name="wsd", decay=0.9, warmup=0.2), "decay=0.9"),
        (dict(name="wsd", decay=0.5, warmup=0.500001), "decay=0.5"),
        (dict(name="wsd", decay=100), "decay=100 is a number of updates"),
        (dict(name="wsd", form="exponential"), "final=0.0"),
        (dict(name="linear", D=0), "D=0 must be a positive number"),
        (dict(name="linear", G=math.inf), "G=inf"),
        (dict(name="linear", G="1"), "G='1'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as e:
        limit(**arguments)
    assert said in str(e.value)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="T=0"):
        limit("linear").bound(0.1, 0)
    with pytest.raises(NoLimit):
        asymptotics.pieces("inv_sqrt", warmup=3)


def test_import_costs() -> None:
    """`import cdl` loads no sympy, and limits no jax."""
    code = "import cdl, sys; cdl.schedule; print({'sympy', 'mpmath'} & {*sys.modules}, end=' '); "
    code += "from cdl.theory.asymptotics import limit; limit('cosine'); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set() False"
