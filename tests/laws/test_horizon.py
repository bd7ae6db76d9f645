"""The line against certified values, the paper's table, and its own promises."""

import math
import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cdl.errors import UserError
from cdl.laws.horizon import fit_horizon, fit_line

# NIST Statistical Reference Datasets, linear regression, "Norris": y on x, with its certified values.
NORRIS_X = """0.2 337.4 118.2 884.6 10.1 226.5 666.3 996.3 448.6 777.0 558.2 0.4 0.6 775.5 666.9 338.0 447.5 11.6
556.0 228.1 995.8 887.6 120.2 0.3 0.3 556.8 339.1 887.2 999.0 779.0 11.1 118.3 229.2 669.1 448.9 0.5"""
NORRIS_Y = """0.1 338.8 118.1 888.0 9.2 228.1 668.5 998.5 449.1 778.9 559.2 0.3 0.1 778.1 668.8 339.3 448.9 10.8 557.7
228.3 998.0 888.8 119.6 0.3 0.6 557.6 339.3 888.0 998.5 778.9 10.2 117.6 228.9 668.4 449.2 0.2"""


def test_line_equals_certified_values() -> None:
    x, y = (np.array(text.split(), float) for text in (NORRIS_X, NORRIS_Y))
    line = fit_line(x**-2, y)  # so that 1/sqrt(T) is x
    assert line.Q == pytest.approx(1.00211681802045, rel=1e-10)
    assert line.L_inf == pytest.approx(-0.262323073774029, rel=1e-9)
    assert line.Q_se == pytest.approx(0.429796848199937e-03, rel=1e-9)
    assert line.L_inf_se == pytest.approx(0.232818234301152, rel=1e-9)
    assert line.r2 == pytest.approx(0.999993745883712, rel=1e-12)
    # The interval at the mean of x is s * t * sqrt(1 + 1/n), with the certified residual standard deviation s.
    at_mean = line.predict(x.mean() ** -2)
    t_34 = 2.345  # 98.75% point of Student's t with 34 degrees of freedom, from the table
    assert at_mean.high - at_mean.loss == pytest.approx(0.884796396144373 * t_34 * math.sqrt(37 / 36), rel=1e-3)


# Table 6 of the paper: model size (B), number of horizons, slope, intercept, R2, as printed.
TABLE_6 = """0.074 5 3.22e+04 2.825 0.991|0.090 3 3.19e+04 2.774 0.991|0.106 4 3.38e+04 2.706 1.000
0.117 3 3.27e+04 2.692 0.996|0.140 7 3.04e+04 2.670 0.991|0.163 3 3.11e+04 2.619 1.000|0.175 7 3.08e+04 2.619 0.995
0.196 4 3.14e+04 2.582 0.999|0.217 6 3.54e+04 2.526 0.998|0.251 3 3.37e+04 2.517 1.000|0.279 8 3.29e+04 2.498 0.999
0.305 7 3.14e+04 2.488 0.997|0.425 8 3.27e+04 2.430 0.998|0.489 4 3.30e+04 2.404 0.999|0.552 8 3.24e+04 2.382 0.999
0.586 8 3.25e+04 2.368 0.994|0.632 8 3.17e+04 2.367 0.998|0.664 3 3.46e+04 2.330 0.999|0.724 3 3.53e+04 2.320 0.999
0.817 10 3.28e+04 2.315 0.994|0.893 3 3.35e+04 2.304 0.998|1.019 7 3.06e+04 2.305 0.997|1.143 10 3.10e+04 2.275 0.998
1.265 10 3.05e+04 2.286 0.986|1.426 3 4.07e+04 2.214 0.984|1.429 9 3.18e+04 2.253 0.996|1.592 4 4.22e+04 2.182 0.997
1.611 9 3.36e+04 2.228 0.995|1.730 7 3.53e+04 2.207 0.998|1.795 11 3.41e+04 2.211 0.997|2.004 8 3.62e+04 2.178 0.999
2.280 7 4.41e+04 2.128 1.000|2.636 6 4.08e+04 2.113 0.998|2.979 10 5.90e+04 2.016 0.990|4.519 6 3.83e+04 2.106 0.978
6.792 8 4.66e+04 2.023 0.999|9.290 4 4.29e+04 2.046 0.988|12.560 3 4.23e+04 2.053 1.000"""


def test_table_6_of_the_paper() -> None:
    """Every printed digit of all 38 rows, by the script that makes the table. Sizes are read off a figure, to 0.4%."""
    root = Path(__file__).parents[2]
    path = root.parent / "shared" / "data" / "chinchilla" / "svg_extracted_data.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not here: 245 published runs, epoch-research/analyzing-chinchilla")
    script = runpy.run_path(str(root / "experiments" / "chinchilla.py"))
    table = script["table_6"](script["lines_of"](script["read"](str(path))))
    printed = [row.split() for row in TABLE_6.replace("\n", "|").split("|")]
    assert len(table) == len(printed) == 38
    for row, (size, *numbers) in zip(table.itertuples(), printed, strict=True):
        assert [str(row.horizons), f"{row.slope:.2e}", f"{row.L_inf:.3f}", f"{row.r2:.3f}"] == numbers
        assert row.size_B == pytest.approx(float(size), rel=4e-3)


def test_the_unit_of_the_horizon_does_not_matter() -> None:
    """With one model and one batch, tokens and FLOPs are multiples of T: the same losses, intervals and choices."""
    table = lines(
        HORIZONS, {e: straight(1.0, q, 0.01, seed) for e, q, seed in ((0.5, 24, 1), (1.0, 19, 2), (4.0, 3, 3))}
    )
    table.loc[len(table)] = [4.0, 1600, math.nan]
    each = {"tokens": 4096.0, "flops": 6 * 1e6 * 4096.0}
    table = table.assign(**{name: table["T"] * n for name, n in each.items()})
    fit = fit_horizon(table)
    for name, n in each.items():
        other = fit_horizon(table, x=name)
        assert other.best(6400 * n).eta_ref == fit.best(6400).eta_ref
        for a, b in zip(fit.lines, other.lines, strict=True):
            assert b.L_inf == pytest.approx(a.L_inf)
            assert b.Q == pytest.approx(a.Q * math.sqrt(n))
            p, q = a.predict(6400), b.predict(6400 * n)
            assert [q.loss, q.low, q.high] == pytest.approx([p.loss, p.low, p.high])
        unit = {"tokens": "tokens", "flops": "FLOPs"}[name]
        assert f"loss at {unit}=" in other.summary()
        assert len(other.warnings(6400 * n)) == len(fit.warnings(6400))
        assert f"eta_ref=4 diverged at {unit} = " in "".join(other.warnings(6400 * n))
        (ax,) = other.plot().axes
        assert unit in ax.get_xlabel()
    with pytest.raises(UserError, match="no column of horizons 'token'; did you mean 'tokens'"):
        fit_horizon(table, x="token")


def test_runs_at_their_best_rate_are_one_line() -> None:
    table = lines(HORIZONS, {1.0: straight(1, 19)}).drop(columns="eta_ref")
    fit = fit_horizon(table)
    (line,) = fit.lines
    assert (line.L_inf, line.Q) == (fit_line(line.T, line.loss).L_inf, fit_line(line.T, line.loss).Q)
    assert fit.best(6400) is line
    assert fit.warnings(6400) == ["the table has no eta_ref: every run is taken to have had its best peak rate"]
    assert "eta_ref*" not in fit.summary()


def test_prediction_intervals_hold_what_they_promise() -> None:
    """95% of new runs at four times the longest horizon land in the interval, over 4,000 simulated sweeps."""
    rng = np.random.default_rng(0)
    T = np.array([400, 700, 1000, 1600.0])
    noise = 0.01 * rng.standard_normal((4000, 5))
    truth = 1.0 + 19 / np.sqrt([*T, 6400.0])
    fits = [fit_line(T, truth[:4] + e[:4]) for e in noise]
    agree = [fit.agrees(6400, truth[4:] + e[4:]) for fit, e in zip(fits, noise, strict=True)]
    assert np.mean(agree) == pytest.approx(0.95, abs=0.011)  # three standard errors of that mean
    inside = [truth[4] + e[4] in fit.predict(6400) for fit, e in zip(fits, noise, strict=True)]
    assert np.mean(inside) == pytest.approx(0.975, abs=0.008)


@pytest.mark.parametrize(("slopes", "seeds"), [([19], 1), ([25, 19, 22, 30], 1), ([19] * 4, 1), ([19, 22], 3)])
def test_intervals_hold_what_they_promise_after_all_that_was_chosen(slopes: list[float], seeds: int) -> None:
    """End to end: horizons left out and the rate chosen by the data. Equal rates are the worst case."""
    rng = np.random.default_rng(0)
    inside, left_out = [], []
    for _ in range(300):
        tables = [
            lines(HORIZONS, {1.0 + i: straight(1.0, q, 0.01, int(rng.integers(2**31))) for i, q in enumerate(slopes)})
            for _ in range(seeds)
        ]
        fit = fit_horizon(pd.concat(tables))
        best = fit.best(6400)
        left_out += [bool(line.left_out) for line in fit.lines]
        truth = 1.0 + slopes[round(best.eta_ref) - 1] / 80
        inside.append(truth + 0.01 * rng.standard_normal() in best.predict(6400))
    assert np.mean(inside) > 0.95 - 0.025  # two standard errors of a mean of 300 below
    assert np.mean(left_out) < 0.1 + 0.035  # README: one line in ten loses a good horizon


def lines(T: list[int], losses: dict[float, list[float]]) -> pd.DataFrame:
    rows = [(e, t, x) for e, xs in losses.items() for t, x in zip(T, xs, strict=True)]
    return pd.DataFrame(rows, columns=pd.Index(["eta_ref", "T", "loss"]))


HORIZONS = [100, 200, 400, 700, 1000, 1600]


def straight(L_inf: float, Q: float, noise: float = 0.003, seed: int = 0) -> list[float]:
    e = np.random.default_rng(seed).standard_normal(len(HORIZONS))
    return list(L_inf + Q / np.sqrt(HORIZONS) + noise * e)


def test_fit_recovers_lines_and_the_best_rate() -> None:
    fit = fit_horizon(lines(HORIZONS, {0.5: straight(1.0, 24), 1.0: straight(1.0, 19), 2.0: straight(1.0, 25)}))
    best = fit.best(6400)
    assert best.eta_ref == 1.0
    assert best.L_inf == pytest.approx(1.0, abs=0.01)
    assert best.Q == pytest.approx(19, abs=0.3)
    assert all(len(line.T) == 6 for line in fit.lines)
    assert fit.warnings(6400) == []
    assert "<- eta_ref*" in fit.summary().splitlines()[2]


def test_horizons_that_are_too_short_are_left_out_and_named() -> None:
    losses = straight(1.0, 19)
    losses[0] -= 0.5
    losses[1] -= 0.1
    (line,) = fit_horizon(lines(HORIZONS, {1.0: losses})).lines
    assert [t for t, _ in line.left_out] == [100, 200]
    assert line.T.tolist() == [400, 700, 1000, 1600]
    fit = fit_horizon(lines(HORIZONS, {1.0: losses}))
    assert any("T = 100, 200 is too short for the line of eta_ref = 1 and left out" in w for w in fit.warnings(6400))


def test_a_short_horizon_off_the_line_cannot_hide_behind_another() -> None:
    """Both short ones bend the same way: the fit through all is poor, and tested against it neither would stand out."""
    losses = [2.4532, 2.2810, 2.0778, 1.8077, 1.6932, 1.5513]
    (line,) = fit_horizon(lines(HORIZONS, {0.5: losses})).lines
    assert [t for t, _ in line.left_out] == [100, 200]


def test_between_rates_that_cannot_be_told_apart_the_measured_one_decides() -> None:
    fit = fit_horizon(lines(HORIZONS, {1.0: straight(1.06, 18.6, 0.02), 2.0: straight(1.0, 21.5, 0.02, seed=1)}))
    at_6400 = {line.eta_ref: line.at(6400) for line in fit.lines}
    assert at_6400[2.0] < at_6400[1.0]  # the steeper line would win by extrapolation alone
    assert fit.best(6400).eta_ref == 1.0
    assert any("eta_ref = 2 cannot be told apart from 1" in w for w in fit.warnings(6400))
    far_apart = fit_horizon(lines(HORIZONS, {1.0: straight(1.06, 18.6, 1e-4), 2.0: straight(1.0, 20.5, 1e-4)}))
    assert far_apart.best(1e6).eta_ref == 2.0  # where the extrapolation is certain, it decides


@pytest.mark.parametrize(("best", "edge", "add"), [(0.5, "smallest", "0.25"), (4.0, "largest", "8")])
def test_best_rate_on_the_edge_is_said(best: float, edge: str, add: str) -> None:
    fit = fit_horizon(lines(HORIZONS, {e: straight(1, 19 + 3 * abs(math.log2(e / best))) for e in (0.5, 1, 2, 4)}))
    (warning,) = fit.warnings(6400)
    assert f"the {edge} of the grid" in warning
    assert f"add eta_ref={add}" in warning


def test_a_best_rate_beside_a_diverged_one_is_not_on_the_edge() -> None:
    fit = fit_horizon(lines(HORIZONS, {0.5: straight(1, 25), 1.0: straight(1, 19), 2.0: [math.nan] * 6}))
    warnings = fit.warnings(6400)
    assert not any("edge" in w or "of the grid" in w for w in warnings)
    assert any("eta_ref=2 diverged at T = 100, 200, 400, 700, 1000, 1600" in w for w in warnings)


def test_a_rate_that_diverged_far_out_or_was_not_trained_far_is_not_recommended() -> None:
    good = straight(1, 22)
    for far in ([math.nan, math.nan], []):
        losses = straight(1, 15)[:4] + far
        table = pd.concat([lines(HORIZONS, {1.0: good}), lines(HORIZONS[: len(losses)], {4.0: losses})])
        fit = fit_horizon(table)
        assert fit.line(4.0).at(6400) < fit.line(1.0).at(6400)
        assert fit.best(6400).eta_ref == 1.0
        assert fit.longest == 1600


def test_weak_evidence_is_said() -> None:
    two = fit_horizon(lines([100, 400], {1.0: [2.0, 1.5]}))
    assert any("rests on 2 horizons" in w for w in two.warnings(1600))
    assert two.lines[0].predict(1600).high == math.inf
    assert math.isnan(two.lines[0].Q_se)
    rising = fit_horizon(lines(HORIZONS, {1.0: straight(2.0, -3)}))
    single = fit_horizon(lines(HORIZONS, {1.0: straight(1, 19)}))
    assert any("is the only rate" in w for w in single.warnings(6400))
    four = fit_horizon(lines(HORIZONS[2:], {1.0: straight(1, 19)[2:]}))
    assert any("none can be tested for being too short" in w for w in four.warnings(6400))
    assert any("does not fall with T" in w for w in rising.warnings(6400))
    crooked = fit_horizon(lines(HORIZONS, {1.0: [3, 2.4, 2.6, 2.2, 2.5, 2.1]}))
    assert any("do not lie on a line" in w for w in crooked.warnings(6400))
    assert any("a guess" in w for w in two.warnings(1e6))


def test_seeds_are_rows_of_one_line() -> None:
    table = pd.concat([lines(HORIZONS, {1.0: straight(1, 19, seed=s)}) for s in range(3)])
    (line,) = fit_horizon(table).lines
    assert len(line.T) == 18


def test_tables_that_cannot_be_fitted_are_named() -> None:
    with pytest.raises(UserError, match=r"lacks the columns \['loss'\]"):
        fit_horizon(pd.DataFrame({"eta_ref": [1.0], "T": [1]}))
    with pytest.raises(UserError, match="two horizons"):
        fit_horizon(lines([100], {1.0: [2.0], 2.0: [2.1]}))
    with pytest.raises(UserError, match="needs two horizons"):
        fit_line([100, 100], [1.0, 1.1])
    with pytest.raises(UserError, match="T=0 is no horizon"):
        fit_line([100, 0], [1.0, 1.1])
    with pytest.raises(UserError, match="the loss at T=200 is not finite"):
        fit_line([100, 200], [1.0, math.nan])
    with pytest.raises(UserError, match="two arrays of one length"):
        fit_line([100, 200, 300], [1.0, 1.1])
    table = lines(HORIZONS, {1.0: straight(1, 19)})
    with pytest.raises(UserError, match="T=-5 in row 2 must be positive"):
        fit_horizon(table.assign(T=[100, 200, -5, 700, 1000, 1600]))
    with pytest.raises(UserError, match="eta_ref=nan in row 0 must be positive"):
        fit_horizon(table.assign(eta_ref=[math.nan] + [1.0] * 5))
    with pytest.raises(UserError, match="loss holds what is no number"):
        fit_horizon(table.assign(loss="high"))


def test_losses_that_never_change_are_no_measurement() -> None:
    fit = fit_horizon(lines(HORIZONS, {1.0: [2.5] * 6}))
    warnings = fit.warnings(6400)
    assert "eta_ref=1: every loss is 2.5, which no measurement is; check the column" in warnings
    assert any("does not fall with T" in w for w in warnings)
    assert fit.lines[0].predict(6400).high == math.inf
