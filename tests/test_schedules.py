"""Schedules against the paper's formulas, against optax's own schedules, and against bad arguments."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdl.errors import UserError
from cdl.schedules import SHAPES, optax_schedule, schedule, shape_arguments

EVERY = [
    ("constant", {}),
    ("linear", {}),
    ("cosine", {}),
    ("wsd", {}),
    ("wsd", {"decay": 0.3, "form": "cosine"}),
    ("wsd", {"decay": 0.3, "form": "sqrt"}),
    ("wsd", {"decay": 0.3, "form": "exponential", "final": 0.1}),
    ("inv_sqrt", {}),
    ("step", {"at": (0.4, 0.9), "factor": 0.3}),
    ("cyclic", {"cycles": 3}),
    ("one_cycle", {"rise": 0.2}),
]


def test_every_shape_is_tested() -> None:
    assert {name for name, _ in EVERY} == set(SHAPES)


def test_formulas_of_the_paper() -> None:
    T, k = 200, np.arange(1, 201)
    c = 0.9
    table_1 = {
        "constant": np.ones(T),
        "inv_sqrt": 1 / np.sqrt(k),
        "linear": 1 - k / T,
        "cosine": (1 + np.cos(np.pi * k / T)) / 2,
        "wsd": np.where(k < c * T, 1.0, (T - k) / (T - c * T)),
    }
    for name, expected in table_1.items():
        np.testing.assert_allclose(schedule(name, T, peak=3.0), 3.0 * expected, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("warmup", [0, 30])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_equal_to_the_schedules_of_optax(warmup: int, final: float) -> None:
    """optax counts from 0, so that our update k is its count k where the rate starts at the top."""
    T, peak = 150, 0.7
    ramp = optax.linear_schedule(0, peak, max(warmup, 1))
    rest = T - warmup
    references = {
        "linear": optax.linear_schedule(peak, final * peak, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=final),
        "wsd": optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, final * peak, 15)], [rest - 15]
        ),
    }
    for name, after in references.items():
        reference = optax.join_schedules([ramp, after], [warmup]) if warmup else after
        got = schedule(name, T, peak=peak, warmup=warmup, final=final)
        np.testing.assert_allclose(got, [reference(k) for k in range(1, T + 1)], atol=1e-6, err_msg=name)


def test_step_and_one_cycle_equal_to_optax() -> None:
    T = 100
    step = optax.piecewise_constant_schedule(2.0, {51: 0.1, 76: 0.1})  # a drop at b acts from count b on
    np.testing.assert_allclose(schedule("step", T, peak=2.0), [step(k) for k in range(1, T + 1)], rtol=1e-6)
    one = optax.cosine_onecycle_schedule(T, 2.0, pct_start=0.3, div_factor=25, final_div_factor=1e4)
    got = schedule("one_cycle", T, peak=2.0, rise=0.3, start=1 / 25, final=1 / 25 / 1e4)
    np.testing.assert_allclose(got, [one(k) for k in range(1, T + 1)], atol=1e-6)


def test_exponential_decay_is_geometric() -> None:
    eta_T = schedule("wsd", 100, decay=20, form="exponential", final=1e-3)
    np.testing.assert_allclose(eta_T[80:] / eta_T[79:-1], 1e-3 ** (1 / 20), rtol=1e-10)
    assert eta_T[-1] == pytest.approx(1e-3, rel=1e-12)


def test_cyclic_has_its_peaks_and_troughs() -> None:
    eta_T = schedule("cyclic", 1000, cycles=5, final=1e-3)
    assert np.flatnonzero(eta_T == 1.0).tolist() == [99, 299, 499, 699, 899]
    assert np.flatnonzero(eta_T == 1e-3).tolist() == [199, 399, 599, 799, 999]


@pytest.mark.parametrize("warmup", [0, 7, 0.13])
@pytest.mark.parametrize(("name", "arguments"), EVERY)
def test_optax_schedule_agrees_at_every_step(name: str, arguments: dict[str, Any], warmup: float) -> None:
    T = 137
    eta_T = schedule(name, T, peak=0.3, warmup=warmup, **arguments)
    compiled = jax.jit(optax_schedule(name, T, peak=0.3, warmup=warmup, **arguments))
    seen = np.array([compiled(count) for count in range(T)])
    assert np.array_equal(seen, eta_T.astype(np.float32))
    assert compiled(T + 5) == seen[-1]


@pytest.mark.parametrize(("name", "arguments"), EVERY)
@given(T=st.integers(10, 400), warmup=st.floats(0, 0.5), peak=st.floats(1e-6, 1e3))
def test_rates_are_in_range_and_climb_first(
    name: str, arguments: dict[str, Any], T: int, warmup: float, peak: float
) -> None:
    eta_T = schedule(name, T, peak=peak, warmup=warmup, **arguments)
    assert eta_T.shape == (T,)
    assert eta_T.dtype == np.float64
    assert np.all((eta_T >= 0) & (eta_T <= peak * (1 + 1e-12)))
    W = round(warmup * T)
    if name not in ("cyclic", "one_cycle", "step"):
        np.testing.assert_allclose(eta_T[:W], peak * np.arange(1, W + 1) / max(W, 1))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(name="cosin", T=10), "'cosin'; did you mean 'cosine'"),
        (dict(name="cosine", T=10, warmpu=3), "'warmpu'; did you mean 'warmup'"),
        (dict(name="cosine", T=10, decay=0.1), "'decay'"),
        (dict(name="cosine", T=0), "T=0"),
        (dict(name="cosine", T=1.5), "T=1.5"),
        (dict(name="cosine", T=10, warmup=10), "warmup=10 is 10 updates of T=10"),
        (dict(name="cosine", T=10, warmup=1.5), "warmup=1.5"),
        (dict(name="cosine", T=10, warmup=-1), "warmup=-1"),
        (dict(name="cosine", T=10, warmup="2%"), "warmup='2%'"),
        (dict(name="cosine", T=10, final=1.1), "final=1.1"),
        (dict(name="cosine", T=10, final=float("nan")), "final=nan"),
        (dict(name="cosine", T=10, peak=0.0), "peak=0.0"),
        (dict(name="cosine", T=10, peak=float("inf")), "peak=inf"),
        (dict(name="wsd", T=10, decay=0.9, warmup=2), "decay=0.9"),
        (dict(name="wsd", T=10, form="linaer"), "did you mean 'linear'"),
        (dict(name="wsd", T=10, form="exponential"), "final=0.0"),
        (dict(name="step", T=10, at=(0.7, 0.2)), "at=(0.7, 0.2)"),
        (dict(name="step", T=10, at=()), "at=()"),
        (dict(name="step", T=10, factor=0), "factor=0"),
        (dict(name="cyclic", T=10, cycles=0), "cycles=0"),
        (dict(name="cyclic", T=9, cycles=5), "cycles=5"),
        (dict(name="cosine", T=10**12), "T=1000000000000"),
        (dict(name="one_cycle", T=10, rise=10), "rise=10"),
        (dict(name="one_cycle", T=10, start=2), "start=2"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as e:
        schedule(**arguments)
    assert said in str(e.value)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError):
        optax_schedule(**arguments)


def test_shape_arguments_are_accepted_by_the_shape() -> None:
    for name in SHAPES:
        assert np.array_equal(schedule(name, 50, **shape_arguments(name)), schedule(name, 50))
