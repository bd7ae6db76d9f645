"""Intervals of forecasts: what they are made of, and how often they hold what comes."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cdl.laws.curve import fit_curve
from cdl.laws.holdout import Expected, Holdout, Seen, Spread, score_of, spread_of
from cdl.schedules import schedule
from tests.laws.test_curve import SHAPES, law

SEEN = Seen(S_N=np.array([1.0, 4.0]), eta_N=np.array([0.25, 0.1]), peaks=(0.2, 0.5))


def test_reach_is_the_distance_to_the_nearest_loss_in_factors_of_two() -> None:
    """Of the sum of rates, and of the rate with 0.05 added; and of the peak beyond 0.2 to 0.5."""
    eta_T = np.full(40, 0.25)
    reach = SEEN.reach(eta_T, np.array([2, 4, 8, 40]))
    at_four = np.log2(0.3 / 0.15)  # the loss at S = 4 was at a lower rate
    np.testing.assert_allclose(reach, [1, 0, 1, np.log2(10 / 4) + at_four])
    assert SEEN.reach(np.append(eta_T[:16], 0.0), np.array([17]))[0] == pytest.approx(np.log2(0.15 / 0.05))
    assert SEEN.reach(np.array([0.75, 0.25]), np.array([2]))[0] == pytest.approx(np.log2(1.5))
    assert SEEN.reach(np.full(10, 0.1), np.array([10]))[0] == pytest.approx(1 + 1)


def test_half_width_is_students() -> None:
    expected = Expected(4e-6, np.diag([1e-6, 0.0]), np.array([False, True]), SEEN)
    J_PxI = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    half_P = Spread(expected, 1.5, 4).half_width(J_PxI, np.full(8, 0.25), np.array([4, 2, 4]), 0.9)
    one = stats.t(4).ppf(0.95) * 1.5 * np.sqrt(5e-6)
    np.testing.assert_allclose(half_P, [one, 2 * one, np.inf])  # the last rests on a constant nothing is known of


def test_factor_is_the_root_mean_square_surprise() -> None:
    def holdout(error: float) -> Holdout:
        return Holdout("", "", 1.0, np.ones(5), np.full(5, 1 + error), np.full(5, 0.01))

    expected = Expected(0.0, np.zeros((1, 1)), np.zeros(1, bool), SEEN)
    spread = spread_of(expected, [holdout(0.01), holdout(0.03)])
    assert spread.factor == pytest.approx(np.sqrt((1 + 9) / 2))
    assert spread.dof == 2


def test_score_of_a_constant_loss_has_no_r2() -> None:
    assert np.isnan(score_of(np.ones(3), np.ones(3))["r2"])


@pytest.mark.slow
def test_intervals_hold_what_follows_the_law() -> None:
    """Runs that follow the law up to noise that neighbours share: 90% intervals hold 90% or more of other runs."""
    steps, rng = np.arange(100, 2001, 20), np.random.default_rng(0)
    other = schedule("wsd", 2000, peak=1e-3, warmup=100, decay=0.3)
    inside = []
    for _ in range(12):
        frames = []
        for name in ("cosine", "constant", "drop"):
            white = rng.standard_normal(len(steps))
            noise = 1e-3 * np.convolve(white, np.full(5, 5**-0.5), mode="same")
            loss_T = np.full(2000, np.nan)
            loss_T[steps - 1] = law(SHAPES[name], steps) * np.exp(noise)
            frames.append(pd.DataFrame({"run": name, "step": np.arange(1, 2001), "eta": SHAPES[name], "loss": loss_T}))
        forecast = fit_curve(pd.concat(frames)).forecast(other, steps)
        measured = law(other, steps) * np.exp(1e-3 * rng.standard_normal(len(steps)))
        inside.append(((forecast["low"] <= measured) & (measured <= forecast["high"])).mean())
    assert np.mean(inside) >= 0.9
    assert np.mean(inside) < 1.0  # not for being endlessly wide
