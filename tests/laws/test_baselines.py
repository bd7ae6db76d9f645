"""Published laws against their formulas summed term by term, and against what their authors published."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import cdl
from cdl.errors import UserError
from cdl.laws.baselines import DECAY, annealing, functional, multipower
from cdl.laws.forms import Form
from cdl.laws.holdout import score_of
from cdl.laws.records import Trajectory, trajectories
from cdl.laws.solve import objective, predict, solve

CURVES = Path(__file__).parents[2].parent / "shared" / "data" / "curves"
FITTED = ("cosine_24000", "constant_24000", "wsdcon_9")
OTHERS = ("constant_72000", "cosine_72000", "wsd_20000_24000", "wsdld_20000_24000", "wsdcon_3", "wsdcon_18")
# Constants of the size found on the published curves, rates in units of the peak.
CONSTANTS = {
    "multipower": dict(L_inf=3.0, A=30.0, B=0.11, alpha=0.5, C=0.11, beta=0.58, gamma=0.64),
    "annealing": dict(L_inf=3.2, A=30.0, C=1e-4, alpha=0.6),
    "functional": dict(L_inf=3.1, c1=30.0, c2c3=0.1, c2=2.0, s=0.5, c4=0.05, gamma=0.6),
}
FORMS = {form.name: form for form in (multipower, annealing, functional)}


# --- The laws, term by term -----------------------------------------------------------------------------------------


def literal(name: str, eta_T: np.ndarray, tau: int, p: dict[str, float]) -> float:
    """The loss after update tau; k counts from 1 as in the formulas."""
    eta = [eta_T[0], *eta_T]
    if name != "multipower":
        fall = next((k for k in range(2, len(eta)) if eta[k] < eta[k - 1]), len(eta))
        peak = eta.index(max(eta[1:fall]), 1)
        counted = eta[: peak + 1] if name == "functional" else [eta[peak]] * (peak + 1)
        eta = [*counted, *eta[peak + 1 :]]
    S = list(itertools.accumulate(eta[1:], initial=0.0))
    if name == "annealing":
        twice = sum((eta[k - 1] - eta[k]) * DECAY ** (i - k) for i in range(1, tau + 1) for k in range(1, i + 1))
        return p["L_inf"] + p["A"] * S[tau] ** -p["alpha"] - p["C"] * twice
    if name == "functional":
        drops = sum(
            (eta[k - 1] - eta[k])
            * (p["c2c3"] + p["c2"] * S[k] ** -p["s"])
            * (1 - (1 + p["c4"] * (S[tau] - S[k])) ** -p["gamma"])
            for k in range(peak + 1, tau + 1)
        )
        return p["L_inf"] + p["c1"] * S[tau] ** -p["s"] - drops
    gain = 0.0
    for k in range(1, tau + 1):
        since = S[tau] - S[k - 1]
        x = math.inf * (since > 1e-12) if eta[k] == 0 and since > 1e-12 else 0.0
        if eta[k] > 0:
            x = p["C"] * eta[k] ** -p["gamma"] * since
        gain += (eta[k - 1] - eta[k]) * (1 - (1 + x) ** -p["beta"])
    return p["L_inf"] + p["A"] * S[tau] ** -p["alpha"] - p["B"] * gain


def losses(form: Form, eta_T: np.ndarray, step_P: np.ndarray, p: dict[str, float]) -> np.ndarray:
    prepared = form.prepare(np.asarray(eta_T), np.asarray(step_P), None)
    return predict(form, prepared, np.array([p[n] for n in form.shape]), np.array([p[n] for n in form.coefficients]))


def ramp(T: int) -> np.ndarray:
    return np.arange(1, T + 1) / T


SHORT = {
    "warm-up and cosine to 0": np.concatenate([ramp(10), (1 + np.cos(np.pi * ramp(50))) / 2]),
    "sudden drops": np.concatenate([ramp(5), np.repeat([1.0, 0.3, 0.1], 15)]),
    "rises again": np.concatenate([ramp(5), 1 - 0.9 * ramp(20), 0.1 + 0.9 * ramp(20), 1 - 0.5 * ramp(20)]),
    "stops and goes on": np.concatenate([[0.0, 0.0], ramp(5), 1 - ramp(10), [0.0, 0.0], np.full(10, 0.4), [0.0]]),
    "no warm-up": 1 - 0.7 * ramp(40),
    "random": np.random.default_rng(0).uniform(0.05, 1.0, 60),
}


@pytest.mark.parametrize("schedule", SHORT)
@pytest.mark.parametrize("name", FORMS)
def test_few_changes_are_summed_as_the_formula_says(name: str, schedule: str) -> None:
    eta_T = SHORT[schedule]
    step_P = np.arange(3, len(eta_T) + 1)
    expected_P = [literal(name, eta_T, tau, CONSTANTS[name]) for tau in step_P]
    np.testing.assert_allclose(losses(FORMS[name], eta_T, step_P, CONSTANTS[name]), expected_P, rtol=1e-11)


# --- Merged sums ----------------------------------------------------------------------------------------------------


def exact(name: str, eta_T: np.ndarray, step_P: np.ndarray, p: dict[str, float]) -> np.ndarray:
    """`literal` for all steps, for schedules with a warm-up of 200 steps and positive rates."""
    S_T, drop_T = np.cumsum(eta_T), -np.diff(eta_T, prepend=eta_T[0])
    found = []
    for t in step_P - 1:
        k = np.arange(t + 1)
        if name == "multipower":
            x = p["C"] * eta_T[k] ** -p["gamma"] * (S_T[t] - S_T[k] + eta_T[k])
            gain = p["B"] * drop_T[k] @ (1 - (1 + x) ** -p["beta"])
            found.append(p["L_inf"] + p["A"] * S_T[t] ** -p["alpha"] - gain)
        else:
            k = k[200:]
            kept = (1 + p["c4"] * (S_T[t] - S_T[k])) ** -p["gamma"]
            gain = drop_T[k] @ ((1 - kept) * (p["c2c3"] + p["c2"] * S_T[k] ** -p["s"]))
            found.append(p["L_inf"] + p["c1"] * S_T[t] ** -p["s"] - gain)
    return np.array(found)


def wsd(form: str) -> np.ndarray:
    return cdl.schedule("wsd", 20_000, warmup=200, decay=0.2, final=0.1, form=form)


LONG: dict[str, tuple[Callable[[], np.ndarray], float]] = {
    "cosine": (lambda: cdl.schedule("cosine", 20_000, warmup=200, final=0.1), 1e-6),
    "cosine nearly to 0": (lambda: cdl.schedule("cosine", 20_000, warmup=200, final=1e-6), 1e-6),
    "linear nearly to 0": (lambda: cdl.schedule("linear", 20_000, warmup=200, final=1e-6), 1e-6),
    "long cosine": (lambda: cdl.schedule("cosine", 300_000, warmup=200, final=0.1), 2e-6),
    "wsd, linear": (lambda: wsd("linear"), 1e-6),
    "wsd, exponential": (lambda: wsd("exponential"), 1e-6),
    "inverse square root": (lambda: cdl.schedule("inv_sqrt", 20_000, warmup=200), 1e-6),
    "two decays": (lambda: np.concatenate([ramp(200), np.ones(6000), 1 - 0.5 * ramp(200), np.full(9000, 0.5),
                                           0.5 - 0.4 * ramp(4000)]), 1e-6),
    "restarts": (lambda: np.concatenate([ramp(200), np.tile(0.55 + 0.45 * np.cos(np.pi * ramp(5000)), 4)]), 2e-5),
}  # fmt: skip


@pytest.mark.parametrize("schedule", LONG)
@pytest.mark.parametrize("name", ["multipower", "functional"])
def test_many_changes_are_merged_closely(name: str, schedule: str) -> None:
    make, error = LONG[schedule]
    eta_T = make()
    step_P = np.unique(np.concatenate([np.geomspace(100, len(eta_T), 60).astype(int), len(eta_T) - np.arange(20)]))
    found_P = losses(FORMS[name], eta_T, step_P, CONSTANTS[name])
    assert np.abs(found_P - exact(name, eta_T, step_P, CONSTANTS[name])).max() < error


def test_merged_changes_keep_four_moments() -> None:
    """As two Gauss nodes do."""
    eta_T = np.concatenate([ramp(300), 1 - 0.9 * ramp(6000)])
    step_P = np.array([250, 1000, 6300])
    prepared = multipower.prepare(eta_T, step_P, None)
    S_T, drop_T = np.cumsum(eta_T), -np.diff(eta_T, prepend=eta_T[0])
    for p, t in enumerate(step_P):
        since_k = (S_T[t - 1] - S_T[:t] + eta_T[:t]) / S_T[t - 1]
        for power in range(4):
            merged = (prepared["change"][p] * (prepared["since"][p] / S_T[t - 1]) ** power).sum()
            assert merged == pytest.approx(drop_T[:t] @ since_k**power, rel=1e-10)


def test_nodes_are_as_many_for_every_run() -> None:
    """Points of several runs are put together."""
    shapes = {
        form.prepare(eta_T, np.array([20, 40]), None)["change"].shape
        for form in (multipower, functional)
        for eta_T in (np.ones(40), SHORT["random"], np.concatenate([np.ones(20), np.linspace(1, 0, 20_000)]))
    }
    assert len(shapes) == 1


def test_rates_that_jitter_are_refused() -> None:
    eta_T = 1 + 0.3 * np.random.default_rng(0).uniform(-1, 1, 5000)
    with pytest.raises(UserError, match=r"up and down too often.*smooth"):
        multipower.prepare(eta_T, np.arange(100, 5001, 100), None)


# --- Limits and scale -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_constant_rate_has_no_drops(form: Form) -> None:
    p = CONSTANTS[form.name]
    step_P = np.arange(1, 500, 7)
    power = p["A"] * step_P ** -p["alpha"] if "A" in p else p["c1"] * step_P ** -p["s"]
    np.testing.assert_allclose(losses(form, np.ones(500), step_P, p), p["L_inf"] + power, rtol=1e-14)


def test_all_of_a_drop_is_gained_in_the_end() -> None:
    """multipower: B times the drop, once G is 1. annealing: C times the drop times 1/(1 - lambda)."""
    eta_T = np.concatenate([np.ones(10), np.full(40_000, 0.25)])
    at = np.array([len(eta_T)])
    for form, unit, change in ((multipower, "B", {"beta": 15.0}), (annealing, "C", {})):
        p = CONSTANTS[form.name] | change
        gained = losses(form, eta_T, at, p | {unit: 0.0}) - losses(form, eta_T, at, p)
        whole = 0.75 * p[unit] * (1 if form is multipower else 1 / (1 - DECAY))
        np.testing.assert_allclose(gained, whole, rtol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_constants_for_rates_as_given(name: str) -> None:
    """Fitted in units of the peak, the constants of `natural` give the same losses for the rates themselves."""
    eta_T, unit = SHORT["rises again"], 3e-4
    step_P = np.arange(3, len(eta_T) + 1)
    natural = FORMS[name].natural(CONSTANTS[name], unit)
    expected_P = losses(FORMS[name], eta_T, step_P, CONSTANTS[name])
    np.testing.assert_allclose([literal(name, unit * eta_T, t, natural) for t in step_P], expected_P, rtol=1e-11)


def test_a_loss_before_the_first_positive_rate_is_refused() -> None:
    for form in FORMS.values():
        with pytest.raises(UserError, match="all rates before step 3 are 0"):
            form.prepare(np.array([0.0, 0.0, 1.0, 1.0]), np.array([2, 4]), None)


# --- Fits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["multipower", "functional"])
def test_derivatives_of_the_columns(name: str) -> None:
    form = FORMS[name]
    eta_T = SHORT["stops and goes on"]
    prepared = form.prepare(eta_T, np.arange(3, len(eta_T) + 1), None)
    with jax.enable_x64(True):
        shape_J = jnp.array([CONSTANTS[name][n] for n in form.shape])
        check_grads(lambda shape_J: form.columns(shape_J, prepared), (shape_J,), order=1, modes=["fwd", "rev"])


@pytest.mark.parametrize("name", FORMS)
def test_constants_are_found_again(name: str) -> None:
    """From exact losses of three runs."""
    form, p = FORMS[name], CONSTANTS[name]
    runs = [
        cdl.schedule("cosine", 8000, warmup=200, final=0.1),
        cdl.schedule("constant", 8000, warmup=200),
        np.concatenate([ramp(200), np.ones(3800), np.full(4000, 0.3)]),
    ]
    step_P = np.arange(300, 8001, 200)
    prepared = [form.prepare(eta_T, step_P, None) for eta_T in runs]
    together = {k: np.concatenate([x[k] for x in prepared]) for k in prepared[0]}
    loss_P = np.concatenate([losses(form, eta_T, step_P, p) for eta_T in runs])
    solution = solve(form, together, loss_P)
    found = dict(zip(form.shape + form.coefficients, [*solution.shape_J, *solution.coefficient_K], strict=True))
    assert found == pytest.approx(p, rel=1e-2)
    np.testing.assert_allclose(predict(form, together, solution.shape_J, solution.coefficient_K), loss_P, rtol=1e-6)


# --- As published ---------------------------------------------------------------------------------------------------

# src/config.py and README of thu-yao-01-luo/MultiPowerLaw: L_inf, A, alpha, B, C, beta, gamma; R2, MAE, mean relative
# error and worst relative error, means over six curves.
PUBLISHED = {
    "25M": (
        (3.04045406, 0.52468604, 0.50786857, 363.78751622, 2.06560812, 0.58279013, 0.64142257),
        dict(r2=0.9988, mae=0.00376, relative=0.00110, worst=0.00409),
    ),
    "100M": (
        (2.6514477, 0.60115152, 0.45295811, 437.9464276, 2.13245612, 0.59785199, 0.65523644),
        dict(r2=0.9983, mae=0.00435, relative=0.00142, worst=0.00583),
    ),
}


def published(size: str) -> tuple[dict[str, Trajectory], dict[str, np.ndarray]]:
    """The runs, and what the published constants predict for them."""
    if not CURVES.is_dir():
        pytest.skip(f"needs the published curves in {CURVES}")
    p = dict(zip(("L_inf", "A", "alpha", "B", "C", "beta", "gamma"), PUBLISHED[size][0], strict=True))
    table = cdl.read_runs([CURVES / size / f"{n}.csv" for n in FITTED + OTHERS], warmup=2160)
    runs = {t.run: t for t in trajectories(table)}
    # Their rates rise from 0 before the first update, which is the first change, to the peak at update 2159.
    warmup = 3e-4 * np.arange(2160) / 2159
    rates = {name: np.concatenate([warmup, t.eta_T[2159:]]) for name, t in runs.items()}
    return runs, {name: losses(multipower, rates[name], t.step_P + 1, p) for name, t in runs.items()}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_constants_give_the_published_figures(size: str) -> None:
    """To the printed digits."""
    runs, given = published(size)
    scores = [score_of(given[name], runs[name].loss_P) for name in OTHERS]
    for key, value in PUBLISHED[size][1].items():
        assert np.mean([s[key] for s in scores]) == pytest.approx(value, abs=5.1e-5 if key == "r2" else 1e-5), key


def test_the_search_ends_below_the_published_objective() -> None:
    runs, given = published("100M")
    prepared = [multipower.prepare(runs[n].eta_T / 3e-4, runs[n].step_P, None) for n in FITTED]
    together = {k: np.concatenate([x[k] for x in prepared]) for k in prepared[0]}
    loss_P = np.concatenate([runs[n].loss_P for n in FITTED])
    solution = solve(multipower, together, loss_P)
    assert solution.objective_N[0] < objective(np.concatenate([given[n] for n in FITTED]), loss_P)
