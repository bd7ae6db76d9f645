"""The exam: the same verdicts from symbols and from numbers, and the reasons that theory.md gives."""

import functools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sympy
from scipy import integrate

from cdl.errors import UserError
from cdl.schedules import schedule
from cdl.theory.exam import HORIZONS, exam, numeric_exam
from cdl.theory.expression import parse
from cdl.theory.pieces import NoLimit

QUALIFIED: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("linear", {"warmup": 0.1}),
    ("linear", {"warmup": 3000}),
    ("cosine", {}),
    ("cosine", {"warmup": 0.02}),
    ("wsd", {"decay": 0.1, "warmup": 0.1}),  # the paper's Figure 1
    ("wsd", {"decay": 0.2}),
    ("wsd", {"decay": 0.5}),
    ("wsd", {"decay": 1 / 3}),  # no whole number of updates
    ("wsd", {"decay": 0.2, "form": "cosine"}),
    ("wsd", {"decay": 0.2, "form": "sqrt"}),
    ("one_cycle", {}),
    ("cyclic", {}),
    ("cyclic", {"cycles": 7, "warmup": 1 / 7}),
    ("1 - x", {}),
    ("1 - t/T", {}),
    ("(T - t)/(T + 1)", {}),
    ("(1 + cos(pi*x))/2", {}),
    ("(1 - x)**0.5", {}),
    ("(1 - x)**2", {}),
    ("(1 - x)**3", {}),
    ("1 - x**2", {}),
    ("sin(pi*x)", {}),
    ("(1 - x)**0.1*(1 + x)", {}),
    ("Piecewise((1, x < 0.5), (4*(1 - x)**2, True))", {}),
    ("x**(-0.4)*(1 - x)", {}),
    ("exp(-1/(1.001 - x))*(1 - x)", {}),
    ("Piecewise((1, x < 0.8), ((1 - x)/0.2, True))", {}),
    ("min(1, t/100)*min(1, 5*(1 - t/T))", {}),
    ("max(0, 1 - 2*x)", {}),  # no rates in the second half
]

# How sqrt(T) x bound grows: factor of ln T, power of T.
NOT_QUALIFIED: list[tuple[str, dict[str, Any], float, float]] = [
    ("constant", {}, 0.5, 0),
    ("step", {}, 0.005, 0),
    ("cosine", {"final": 0.1}, 0.05, 0),
    ("linear", {"final": 1e-3}, 0.0005, 0),
    ("wsd", {"decay": 0.1, "form": "exponential", "final": 0.1}, 0.05, 0),
    ("inv_sqrt", {"warmup": 0.04}, 0.1, 0),
    ("exp(-x)", {}, math.exp(-1) / 2, 0),
    ("Piecewise((1, x < 0.5), (0, True))", {}, 0.5, 0),
    ("Piecewise((1, t < 100), (0.1, True))", {}, 0.05, 0),
    ("(1 - x)/sqrt(x)", {}, 3 / 8, 0),  # int of 1/x at the start, over A(0) = 4/3
    ("inv_sqrt", {}, 0, 0.5),
    ("inv_sqrt", {"warmup": 100}, 0, 0.5),
    ("1/sqrt(t)", {}, 0, 0.5),
    ("t**(-0.25)", {}, 0, 0.25),
    ("1/t**2", {}, 0, 1),
    ("sqrt(t)", {}, 0, 0.5),
    ("x**(-0.6)*(1 - x)", {}, 0, 0.2),
]


@pytest.mark.parametrize(("shape", "arguments"), QUALIFIED)
def test_qualified_by_symbols_and_by_numbers(shape: str, arguments: dict[str, Any]) -> None:
    symbols, numbers = exam(shape, **arguments), exam(shape, method="numeric", **arguments)
    assert (symbols.method, numbers.method) == ("symbolic", "numeric")
    assert symbols.qualified
    assert numbers.qualified
    assert (symbols.log, symbols.power, numbers.log, numbers.power) == (0, 0, 0, 0)
    assert (numbers.q1, numbers.q2) == pytest.approx((symbols.q1, symbols.q2), rel=1e-5)
    assert symbols.q1 is not None
    assert symbols.q2 is not None
    assert f"levels off at {symbols.q1**2 + symbols.q2**2:.6g}" in symbols.reason


@pytest.mark.parametrize(("shape", "arguments", "log", "power"), NOT_QUALIFIED)
def test_not_qualified_by_symbols_and_by_numbers(shape: str, arguments: Any, log: float, power: float) -> None:
    symbols, numbers = exam(shape, **arguments), exam(shape, method="numeric", **arguments)
    assert (symbols.method, numbers.method) == ("symbolic", "numeric")
    assert not symbols.qualified
    assert not numbers.qualified
    assert (symbols.log, symbols.power) == pytest.approx((log, power), abs=1e-12)
    assert numbers.log == pytest.approx(log, rel=0.02)
    assert numbers.power == pytest.approx(power, abs=0.07)
    assert symbols.q2 is numbers.q2 is None
    assert (symbols.q1 is None) == (numbers.q1 is None) == (power != 0)
    if symbols.q1 is not None:
        assert numbers.q1 == pytest.approx(symbols.q1, rel=1e-5)
    grows = f"{log:.3g} ln T" if log else f"T^{power:.3g}"
    assert grows in symbols.reason


def test_slow_decay_of_fixed_length_is_a_power_with_a_logarithm() -> None:
    """S_T = 100 ln T: the distance term grows like T / ln T, locally less than T^1."""
    symbols, numbers = exam("1/(1 + t/100)"), exam("1/(1 + t/100)", method="numeric")
    assert (symbols.qualified, symbols.power) == (False, 1)
    assert symbols.reason.endswith("T^1 / ln T")
    assert not numbers.qualified
    assert 0.85 < numbers.power < 1


@pytest.mark.parametrize(
    ("text", "q1_squared", "q2_squared", "q2_form"),
    [
        ("1 - t/T", 1, 1, "1"),
        ("Piecewise((1, x <= 0.8), (5 - 5*x, True))", 5 / 9, 1 + math.log(3), "1 + ln(3)"),
        ("(1 - x)**0.5", 3 / 4, 3 / 2, "3/2"),  # A = u^(a+1)/(a+1), so (a + 1)/2 and (a + 1)/(2a)
        ("(1 - x)**3", 2, 2 / 3, "2/3"),
        ("1 - x**2", 3 / 4, 3 / 4 + 1.5 * math.log(1.5), "ln(3*sqrt(6)/4) + 3/4"),  # s²/A = 3 (1 + x)²/(x + 2)
    ],
)
def test_closed_forms_come_out(text: str, q1_squared: float, q2_squared: float, q2_form: str) -> None:
    found = exam(text)
    assert found.q1 is not None
    assert found.q2 is not None
    assert (found.q1**2, found.q2**2) == pytest.approx((q1_squared, q2_squared), rel=1e-13)
    assert found.q2_form == q2_form
    assert exam("cosine").q2_form is None


def test_summary_says_verdict_reason_and_constants() -> None:
    said = exam("wsd", decay=0.2).summary()
    assert said.startswith("wsd(decay=0.2): qualified (symbolic); sqrt(T) x bound levels off at 2.65417")
    assert "q1² = 0.555556 (5/9), q2² = 2.09861 (1 + ln(3))" in said
    assert "ends at height 0.01: the noise term grows like 0.005 ln T" in exam("step").summary()


def test_a_callable_equals_the_name() -> None:
    by_name = exam("wsd", decay=0.2, method="numeric")
    factory = exam(lambda T: schedule("wsd", T, decay=0.2))
    partial = exam(functools.partial(schedule, "wsd", decay=0.2))
    heights = exam(lambda t, T: np.minimum(1, 5 * (1 - t / T)))
    assert by_name.T == HORIZONS
    for other in (factory, partial, heights):
        assert other.method == "numeric"
        assert other.qualified
        np.testing.assert_allclose(other.distance, by_name.distance, rtol=1e-9)
        np.testing.assert_allclose(other.noise, by_name.noise, rtol=1e-9)
        assert (other.q1, other.q2) == pytest.approx((by_name.q1, by_name.q2), rel=1e-9)


def test_a_sympy_expression_equals_its_text() -> None:
    x, t, T = sympy.symbols("x t T")
    assert exam((1 - x) ** 2) == exam("(1 - x)**2")
    assert exam(1 - t / T).qualified
    with pytest.raises(UserError, match=r"not \['y'\]"):
        exam(1 - sympy.Symbol("y"))


@pytest.mark.parametrize(
    ("text", "level"),
    [  # of sqrt(T) x bound, by sums over the last updates
        ("1 - x + 1/T**2", 2.5),
        ("(1 - x)**0.5 + 1/T", 2.75),
        ("(T - t + 1)/T", 2),
        ("1 - x + 1/t", 2),
    ],
)
def test_lower_orders_in_T_are_left_to_numbers(text: str, level: float) -> None:
    with pytest.raises(NoLimit):
        exam(text, method="symbolic")
    found = exam(text)
    assert (found.method, found.qualified) == ("numeric", True)
    assert found.q1 is not None
    assert found.q2 is not None
    assert found.q1**2 + found.q2**2 == pytest.approx(level, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "power"),
    [
        ("1 - x + 1/T**3", 1),  # the last step but one, 1/T, is divided by a last one of T^-3
        ("1 - x + 1/T**5", 3),  # a last step below 1e-14 from the first T on
        ("1 - x + T/t**2", 1),
        ("Piecewise((T, t < 100), (1 - x, True))", 1),
        ("Piecewise((1 - x, t < T - 1), (1/T**3, True))", 1),
        ("1/(T - t + 1)", 1),
        ("1/(T - t + 100)", 1),
    ],
)
def test_lower_orders_in_T_that_disqualify(text: str, power: float) -> None:
    with pytest.raises(NoLimit):
        exam(text, method="symbolic")
    found = exam(text)
    assert (found.method, found.qualified) == ("numeric", False)
    assert found.power == pytest.approx(power, abs=0.11)  # T / ln T is locally less than T


def test_a_last_step_that_is_neither_rounding_nor_a_power_settles_nothing() -> None:
    found = exam("1 - x + exp(-T/100)")
    assert (found.qualified, found.q2) == (False, None)
    assert (
        "the last heights fall below 1e-14 of the highest, and the bound depends on them: not settled" in found.reason
    )


@pytest.mark.parametrize("text", ["(1 - x)*(1 + x/T)", "(1 - x)*(1 + 1/T)**2", "T*(T - t)/(T**2 + t)"])
def test_lower_orders_in_T_that_vanish_everywhere(text: str) -> None:
    assert exam(text).q2_form == exam("1 - x").q2_form == "1"


def test_an_open_condition_is_not_settled_as_false() -> None:
    text = "Piecewise((1, sin(T) > 0), (1 - x, True))"
    with pytest.raises(NoLimit, match=r"sin\(T\) > 0"):
        exam(text, method="symbolic")
    assert not exam(text).qualified


@pytest.mark.parametrize(
    "text",
    [
        "abs(sin(500*pi*x))*(1 - x)",
        "sqrt(abs(sin(20/(x + 0.01))))*(1 - x)",
        "max(" + ", ".join(f"{k + 1}/24 - {k}*x" for k in range(24)) + ")",
        " + ".join(f"abs({k + 1}/40 - x)" for k in range(40)),
        " + ".join(f"cos({k + 1}*x)**2" for k in range(60)),
        "+".join(f"(1 - t/(T + {k}))*cos({k}*pi*t/T)**2" for k in range(1, 9)),
    ],
)
def test_what_would_take_symbols_long_is_left_to_numbers(text: str) -> None:
    began = time.perf_counter()
    with pytest.raises(NoLimit, match=r"more than|too many"):
        exam(text, method="symbolic")
    assert time.perf_counter() - began < 10
    assert exam(text).method == "numeric"


@pytest.mark.parametrize(
    "text",
    [
        "Piecewise((1, x < 0.5), (1e-6*(1 - x), True))",  # levels off at 8.60, comes from 14.28 and 10.67
        "(1 - x)**0.05",  # differences shrink by 3% per doubling
        "(1 - x)**0.01",
        "x**(-0.51)*(1 - x)",  # grow by 1%
    ],
)
def test_what_is_open_at_the_last_T_is_said(text: str) -> None:
    found = exam(text, method="numeric")
    assert (found.qualified, found.q2, found.log, found.power) == (False, None, 0, 0)
    assert "not settled, looked at up to T=1024000: the noise term" in found.reason


def test_failures_of_sympy_are_no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (TypeError("mpc"), OverflowError("large"), KeyError("zoo"), ZeroDivisionError("0")):

        def fails(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("cdl.theory.exam.scaled", fails)
        with pytest.raises(NoLimit, match="sympy finds no limit"):
            exam("1 - x", method="symbolic")
        assert exam("1 - x").method == "numeric"


def test_no_growth_is_announced_that_would_have_been_seen() -> None:
    """The last 100 updates are of height 0.1, whatever T is."""
    found = exam("Piecewise((1 - x, t < T - 100), (0.1, True))")
    assert found.qualified
    assert "far beyond" not in found.reason


def test_D_and_G_are_in_the_constants() -> None:
    for method in ("symbolic", "numeric"):
        one, other = exam("cosine", method=method), exam("cosine", D=3.0, G=0.5, method=method)
        assert one.q1 is not None
        assert one.q2 is not None
        assert (other.q1, other.q2) == pytest.approx((3 * one.q1, 0.5 * one.q2), rel=1e-9)
        assert exam("step", G=2.0, method=method).log == pytest.approx(0.02, rel=1e-3)
        assert exam("(1 - x)/sqrt(x)", D=3.0, G=2.0, method=method).log == pytest.approx(1.5, rel=1e-3)


def test_rounding_errors_at_the_end_are_no_steps() -> None:
    """sin(pi) is 1e-16 in floating point; the last step but one over that would be huge."""
    found = exam(lambda T: np.sin(np.pi * np.arange(1, T + 1) / T))
    expected = exam("sin(pi*x)")
    assert found.qualified
    assert (found.q1, found.q2) == pytest.approx((expected.q1, expected.q2), rel=1e-6)


@pytest.mark.parametrize("arguments", [{"decay": 1 / 3, "final": 1e-3}, {"decay": 0.9, "final": 1e-4}])
def test_a_low_end_is_found_where_it_can_be_seen(arguments: dict[str, Any]) -> None:
    """Beside the rounding of a third of T, and where the end is only 100 updates long."""
    found = exam("wsd", method="numeric", **arguments)
    assert not found.qualified
    assert found.log == pytest.approx(arguments["final"] / 2, rel=0.2)
    assert "looked at up to T=1024000" in found.reason


def test_an_end_too_low_to_be_seen_is_said() -> None:
    found = exam("linear", final=1e-5, method="numeric")
    assert found.qualified
    assert "looked at up to T=1024000; that it ends at height 1e-05" in found.reason
    assert not exam("linear", final=1e-5).qualified


def test_what_symbols_cannot_tell_is_left_to_numbers() -> None:
    for shape, arguments in (("1/log(t + 1)", {}), ("exp(-t/100)", {}), ("wsd", {"decay": 100})):
        found = exam(shape, **arguments)
        assert (found.method, found.qualified) == ("numeric", False)
        assert "found by numbers, not by symbols" in found.reason
        with pytest.raises(NoLimit):
            exam(shape, method="symbolic", **arguments)
    assert exam("exp(-t/100)").power == pytest.approx(1, abs=0.01)  # all updates but 100 are idle


def test_erratic_bounds_are_not_passed() -> None:
    found = exam(lambda T: np.full(T, 1.0 if T.bit_length() % 2 else 0.5))
    assert not found.qualified
    assert "neither levels off nor grows steadily" in found.reason


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ("cosin", "there is no schedule 'cosin'; did you mean 'cosine'?"),
        ("1 - y", "there is no name 'y'"),
        ("1 -", "cannot be read"),
        ("", "cannot be read"),
        ("x < 0.5", "is no height"),
        ("1 + (x < 0.5)", "the expression"),
        ("sqrt(x, x, x)", "the expression"),
        ("x^2", "only numbers"),
        ("x.real", "only numbers"),
        ("'x'", "only numbers"),
        ("[1, 2]", "only numbers"),
        ("1e999", "only numbers"),
        ("x**1000000000", "powers may go up to 100"),
        ("((x + 1)**100 + 1)**100", "powers may go up to 100"),
        ("9**9**9**9", "powers may go up to 100"),
        ("-" * 5000 + "x", "cannot be read"),
        ("(" * 300 + "x" + ")" * 300, "cannot be read"),
        ("(1-x)/0", "is zoo*(1 - x); heights must be finite and real"),
        ("(-1)**0.5*x", "heights must be finite and real"),
        ("Piecewise((1, x))", "x is no condition"),
        ("Piecewise((1, 2))", "2 is no condition"),
        ("Piecewise(1, x)", "Piecewise takes pairs"),
        ("1e308*(1-x)*10", "gives no heights for T=1000"),
        ("(1-x)*1e-320", "scale heights to about 1"),
        ("r.txt", "'r.txt' looks like a file; the exam takes names, expressions or callables, no files"),
        ("/tmp/runs/r.csv", "no files"),
        ("x - 1", "x - 1 has height -0.999"),
        ("0.5 - x", "has height -0.5 at t=1000 of T=1000; heights must be at least 0"),
        ("sqrt(0.5 - x)", "sqrt(0.5 - x) has height nan"),
        ("1/(1 - x)", "heights must be finite"),
        ("Piecewise((1/(0.5 - x), x < 0.5), (1, True))", "grows without bound"),
        ("Piecewise((1, x < 0.5))", "has height nan"),
        ("0*x", "is 0 at all t"),
        (3.0, "3.0 is no schedule"),
    ],
)
def test_what_is_no_schedule_is_named(shape: Any, said: str) -> None:
    with pytest.raises(UserError) as e:
        exam(shape)
    assert said in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch {file}')",
        "open('{file}', 'w')",
        "(lambda: open('{file}', 'w'))()",
        "[c for c in ().__class__.__base__.__subclasses__()]",
        "x.__class__.__init__.__globals__",
        "exp.__globals__['open']('{file}', 'w')",
        "sqrt(open('{file}', 'w'))",
        "eval('1')",
        "Piecewise((open('{file}', 'w'), True))",
        "sqrt(evaluate=open('{file}', 'w'))",
        "f'{{open(1)}}'",
        "(y := x)",
    ],
)
def test_hostile_text_is_not_run(text: str, tmp_path: Path) -> None:
    file = tmp_path / "touched"
    with pytest.raises(UserError):
        exam(text.format(file=file))
    assert not file.exists()


def test_what_is_parsed_is_what_sympy_parses() -> None:
    x = sympy.Symbol("x", positive=True)
    texts = ["1 - x**2/3", "exp(-x)*cos(pi*x)**2", "-x + 2*(1 - x)/(1 + x)", "sqrt(1 - x) + log(1 + x)", "+e**-x"]
    for text in texts:
        assert sympy.simplify(parse(text) - sympy.sympify(text, {"x": x, "e": sympy.E}, rational=True)) == 0
    chained = parse("Piecewise((0.1, 0.2 < x <= 0.4 or x > 0.9), (1, True))")
    assert [chained.subs(x, sympy.Rational(k, 10)) for k in (2, 4, 9, 10)] == [
        1,
        sympy.Rational(1, 10),
        1,
        sympy.Rational(1, 10),
    ]


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (lambda T: np.ones(T + 1), "heights of shape (1001,) for T=1000; give one for each of the 1000 updates"),
        (lambda T: np.ones((T, 2)), "heights of shape (1000, 2)"),
        (lambda T: 0.5 - np.arange(T) / T, "has height -0.499 at t=1000 of T=1000"),
        (lambda T: np.where(np.arange(T) == 4, np.nan, 1.0), "has height nan at t=5 of T=1000"),
        (lambda T: np.where(np.arange(T) == 4, np.inf, 1.0), "has height inf at t=5 of T=1000"),
        (lambda T: np.zeros(T), "is 0 at all t of T=1000"),
        (lambda T: np.full(T, 1.0 if T < 5000 else -1.0), "T=8000"),
        (lambda T: "no", "gave no numbers for T=1000"),
        (lambda t, T, more: t, "takes 3 arguments"),
        (lambda: 1, "takes 0 arguments"),
    ],
)
def test_bad_callables_are_named(shape: Any, said: str) -> None:
    with pytest.raises(UserError) as e:
        exam(shape)
    assert said in str(e.value)
    assert "\n" not in str(e.value)


def test_bad_arguments_are_named() -> None:
    for call, said in (
        (lambda: exam("linear", warmpu=0.1), "'warmpu'; did you mean 'warmup'"),
        (lambda: exam("linear", warmpu=0.1, method="numeric"), "'warmpu'; did you mean 'warmup'"),
        (lambda: exam("linear", T=10), "T=10 is not part of a shape"),
        (lambda: exam("1 - x", warmup=0.1), r"\['warmup'\] belong to schedules with a name"),
        (lambda: exam("linear", method="symbols"), "'symbols'"),
        (lambda: exam("linear", D=-1), "D=-1 must be a positive number"),
        (lambda: exam("linear", G=0, method="numeric"), "G=0 must be a positive number"),
        (lambda: exam("linear", warmup=100_000, method="numeric"), "shorten"),
        (lambda: exam(lambda T: np.ones(T), method="symbolic"), "has no symbols"),
    ):
        with pytest.raises(UserError, match=said):
            call()


def test_a_climb_towards_the_start_counts_down_to_0() -> None:
    """With x = v^5, s = (1 - v^5)/v² and A = (1 - v³)/0.6 - (1 - v^8)/1.6: nothing is singular."""
    noise = lambda v: 2.5 * (1 - v**5) ** 2 / ((1 - v**3) / 0.6 - (1 - v**8) / 1.6)  # noqa: E731
    q2_squared, _ = integrate.quad(noise, 0, 1 - 1e-5, epsabs=1e-13)
    found = exam("x**(-0.4)*(1 - x)")
    assert found.q2 is not None
    assert found.q2**2 == pytest.approx(q2_squared + 5e-5, rel=1e-9)  # s²/A ~ 2 at the end


def test_growth_that_is_slow_is_still_growth() -> None:
    """Differences of 7% and 0% per doubling: a power of 0.1 and a logarithm; -7%: a limit far away."""
    power, log, level = (numeric_exam(text) for text in ("x**(-0.55)*(1 - x)", "(1 - x)/sqrt(x)", "(1 - x)**0.1"))
    assert power.power == pytest.approx(0.1, abs=0.02)
    assert (log.log, log.power) == (pytest.approx(0.375, rel=1e-3), 0)
    assert level.qualified
    assert level.q2 == pytest.approx(math.sqrt(5.5), rel=1e-5)
