"""The best rates against descent on the bound itself, brute force, and the continuous limit."""

from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import optimize

import cdl
from cdl.theory.bounds import bound, bound_terms
from cdl.theory.optimal import _ratios, best_continuation, best_cooldown, best_peak, best_schedule

from .reference import RNG


def descended(cost: Any, starts: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """L-BFGS on log rates, from several starts."""
    options = dict(maxiter=20_000, maxfun=50_000, ftol=1e-16, gtol=1e-12)
    with jax.enable_x64(True):
        f = jax.jit(jax.value_and_grad(lambda log_eta_T: cost(jnp.exp(log_eta_T))))
        runs = [
            optimize.minimize(lambda x: [np.asarray(y) for y in f(x)], s, jac=True, method="L-BFGS-B", options=options)
            for s in starts
        ]
    return [(run.fun, np.exp(run.x)) for run in runs]


@pytest.mark.parametrize("norms", ["same", "random", "falling"])
def test_best_schedule_is_where_gradient_descent_ends(norms: str) -> None:
    T = 60
    G_T = {"same": np.full(T, 0.7), "random": RNG.uniform(0.3, 3, T), "falling": np.linspace(3, 0.5, T)}[norms]
    best = best_schedule(T, 1.5, G_T)
    for value, eta_T in descended(lambda eta_T: bound(eta_T, 1.5, G_T), RNG.normal(-3, 1, (4, T))):
        assert value == pytest.approx(best.bound, rel=1e-13)
        np.testing.assert_allclose(eta_T, best.eta_T, rtol=1e-5)
    assert best.bound == bound(best.eta_T, 1.5, G_T)
    assert best.improvement > 0


def test_best_schedule_tends_to_linear_decay_and_its_bound() -> None:
    """2 D G / sqrt T, and heights 1 - t/T; with varying norms 2 D / sqrt(sum 1/G²) (Defazio et al. 2023's shape)."""
    T = 100_000
    best = best_schedule(T, 2.0, 3.0)
    assert best.bound == pytest.approx(2 * 2 * 3 / np.sqrt(T), rel=1e-4)
    heights = best.eta_T / best.eta_T[0]
    np.testing.assert_allclose(heights, 1 - np.arange(T) / T, atol=1e-3)
    assert 0 < best.improvement < 1e-4
    G_T = 1 + 0.5 * np.sin(np.linspace(0, 9, T))
    best = best_schedule(T, 2.0, G_T)
    assert best.bound == pytest.approx(2 * 2 / np.sqrt((1 / G_T**2).sum()), rel=1e-4)
    refined = np.cumsum((G_T**-2)[::-1])[::-1] / G_T**2
    np.testing.assert_allclose(best.eta_T / best.eta_T[0], refined / refined[0], atol=1e-3)


def test_best_schedule_of_one_step() -> None:
    assert best_schedule(1, 2.0, 4.0).eta_T.tolist() == [0.5]  # D/G


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant", "inv_sqrt"])
def test_best_peak_is_the_minimum(name: str) -> None:
    eta_T = cdl.schedule(name, 400, warmup=20)
    found = optimize.minimize_scalar(
        lambda u: bound(np.exp(u) * eta_T, 1.3, 0.6), bounds=(-9, 3), method="bounded", options=dict(xatol=1e-10)
    )
    assert best_peak(7 * eta_T, 1.3, 0.6) == pytest.approx(np.exp(found.x), rel=1e-6)
    np.testing.assert_allclose(best_peak(np.stack([eta_T, 2 * eta_T]), 1.3, 0.6), best_peak(eta_T, 1.3, 0.6))


@pytest.mark.parametrize("options", [dict(), dict(peak=0.03), dict(warmup=0.1, form="sqrt"), dict(warmup=7, peak=0.1)])
@pytest.mark.parametrize("norms", [(0.5, 2), (2, 0.5)])
def test_best_cooldown_against_every_length(norms: tuple[float, float], options: dict[str, Any]) -> None:
    T, G_T = 90, np.linspace(*norms, 90)
    cooldown = best_cooldown(T, 1.0, G_T, **options)
    shape = dict(warmup=options.get("warmup", 0), form=options.get("form", "linear"))
    warmup = {0: 0, 0.1: 9, 7: 7}[shape["warmup"]]
    costs = []
    for steps in range(T - warmup + 1):
        terms = bound_terms(cdl.schedule("wsd", T, peak=options.get("peak", 1.0), decay=steps, **shape), 1.0, G_T)
        costs.append(terms.total if "peak" in options else terms.best)
    assert cooldown.steps == int(np.argmin(costs))
    assert cooldown.bound == pytest.approx(min(costs), rel=1e-14)
    rates = cdl.schedule("wsd", T, peak=cooldown.peak, decay=cooldown.steps, **shape)
    assert bound(rates, 1.0, G_T) == pytest.approx(cooldown.bound, rel=1e-13)


def test_a_cooldown_is_longer_where_the_rate_is_higher() -> None:
    shares = [best_cooldown(1000, peak=peak / np.sqrt(1000)).share for peak in (0.3, 0.5, 0.7, 0.9)]
    assert shares == sorted(shares)
    assert shares[0] < 0.2 < 0.5 < shares[-1]


def test_best_continuation_is_where_gradient_descent_ends() -> None:
    T1, T = 30, 70
    past_T, G_T = RNG.uniform(0.02, 0.1, T1), RNG.uniform(0.5, 2, T)
    past_T[[3, 29]] = 0
    ways = best_continuation(past_T, T, 1.5, G_T)
    cost = lambda eta_T: bound(jnp.concatenate([past_T, eta_T]), 1.5, G_T)  # noqa: E731
    for value, eta_T in descended(cost, RNG.normal(-3, 1, (3, T - T1))):
        assert value == pytest.approx(ways.bounds["best"], rel=1e-13)
        np.testing.assert_allclose(eta_T, ways.ways["best"][T1:], rtol=1e-5)


def test_ways_to_continue() -> None:
    past_T = cdl.schedule("constant", 300, peak=0.05)
    ways = best_continuation(past_T, 500)
    assert list(ways.bounds) == sorted(ways.bounds, key=lambda name: ways.bounds[name])
    assert next(iter(ways.bounds)) == "best"
    assert ways.scratch < ways.bounds["best"]
    for name, eta_T in ways.ways.items():
        np.testing.assert_array_equal(eta_T[:300], past_T)
        assert bound(eta_T) == ways.bounds[name]
    same = [bound(np.r_[past_T, 0.05 * np.minimum(1, np.arange(200, 0, -1) / (n + 1))]) for n in range(1, 201)]
    assert ways.bounds["same rate"] == pytest.approx(min(same), rel=1e-14)
    lower = [np.r_[past_T, 0.05 * s * np.minimum(1, np.arange(200, 0, -1) / 101)] for s in np.linspace(0.05, 3, 500)]
    assert ways.bounds["lower rate"] <= min(bound(np.stack(lower))) <= ways.bounds["lower rate"] * 1.00001


def test_ways_to_continue_far_from_the_past_rate() -> None:
    """From 1e-3 for five updates, the best rates are far higher: no edge of a search."""
    past_T = np.full(5, 1e-3)
    ways = best_continuation(past_T, 1000)
    linear = [np.r_[past_T, s * 1e-3 * np.arange(995, 0, -1) / 996] for s in np.geomspace(0.1, 1000, 400)]
    assert ways.bounds["linear"] == pytest.approx(min(bound(np.stack(linear))), rel=1e-3)
    low = best_continuation(np.full(500, 3.0), 1000)  # and far lower
    linear = [np.r_[np.full(500, 3.0), 3.0 * s * np.arange(500, 0, -1) / 501] for s in np.geomspace(1e-5, 1, 400)]
    assert low.bounds["linear"] == pytest.approx(min(bound(np.stack(linear))), rel=1e-3)


def test_the_ratios_keep_their_digits() -> None:
    """sqrt(1 + y) - 1 loses them for small y; against 50 digits."""
    with mpmath.workdps(50):
        r = mpmath.mpf(1) / 2
        expected = []
        for _ in range(20_000):
            r = mpmath.sqrt(1 + 2 * r) - 1
            expected.append(float(r))
    ratios = _ratios(np.ones(20_001))
    np.testing.assert_allclose(ratios[-2::-1], expected, rtol=2e-14)


def test_continuing_from_the_best_schedule_is_the_best_schedule() -> None:
    best = best_schedule(200, 1.5, 0.5)
    ways = best_continuation(best.eta_T[:80], 200, 1.5, 0.5)
    np.testing.assert_allclose(ways.ways["best"], best.eta_T, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_peak([0.0, 0.0]), "no positive rate"),
        (lambda: best_peak([1.0], 1.0, 0.0), "G=0 makes every larger rate better"),
        (lambda: best_schedule(0), "T=0 must be a whole number"),
        (lambda: best_schedule(3, -1.0), "D=-1 must be"),
        (lambda: best_schedule(3, [1.0, 2.0]), "D has shape"),
        (lambda: best_schedule(3, 1.0, 0.0), "G must be positive"),
        (lambda: best_schedule(3, 0.0), "D=0 starts at a minimiser"),
        (lambda: best_peak([1.0], 0.0), "D=0 starts at a minimiser"),
        (lambda: best_continuation([1.0], 5, cooldown="a"), "cooldown='a' must be a share"),  # type: ignore[arg-type]
        (lambda: best_schedule(3, 1.0, [1.0, 2.0]), r"G has shape \(2,\) for T=3"),
        (lambda: best_cooldown(10, peak=-1.0), "peak=-1.0 must be a positive number"),
        (lambda: best_cooldown(10, warmup=10), "warmup=10 is 10 updates of T=10"),
        (lambda: best_cooldown(10, form="cubic"), "no decay form of wsd 'cubic'"),
        (lambda: best_continuation([1.0, 1.0], 2), "T=2 must be larger than the 2 updates"),
        (lambda: best_continuation([0.0], 2), "at least one positive rate"),
        (lambda: best_continuation([1.0, -1.0], 5), r"past_T\[1\]=-1 must"),
        (lambda: best_continuation([1.0], 5, cooldown=0.0), "cooldown=0.0 must be a share"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(cdl.UserError, match=message):
        call()
