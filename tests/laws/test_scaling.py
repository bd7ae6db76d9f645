"""The law over model sizes: what it was made of comes back, its intervals hold, and what is not known is said."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cdl.errors import UserError
from cdl.laws.horizon import NoLaw, fit_horizon
from cdl.laws.scaling import fit_scaling

HORIZONS = [400, 700, 1000, 1600]
L_INF: dict[str, Callable[[float], float]] = {
    "log": lambda N: 2.5 - 0.3 * math.log10(N / 1e6),
    "bent": lambda N: 1.6 + 0.9 * (N / 1e6) ** -0.25,
}


def Q(N: float) -> float:
    return 19 + 2 * math.log10(N / 1e6)


def sweeps(
    sizes: Sequence[float],
    form: str = "log",
    noise: float = 0.0,
    departure: tuple[float, float] = (0.0, 0.0),
    seed: int = 0,
    rates: Callable[[float], dict[float, float]] = lambda N: {1.0: 0.0},
) -> pd.DataFrame:
    """Runs of several sizes. departure: of L_inf and Q from the law. rates: N -> eta_ref: what it adds to Q."""
    rng = np.random.default_rng(seed)
    rows = []
    for N in sizes:
        L, q = L_INF[form](N) + departure[0] * rng.standard_normal(), Q(N) + departure[1] * rng.standard_normal()
        for eta_ref, worse in rates(N).items():
            for T in HORIZONS:
                rows.append((N, eta_ref, T, L + (q + worse) / math.sqrt(T) + noise * rng.standard_normal()))
    return pd.DataFrame(rows, columns=pd.Index(["N", "eta_ref", "T", "loss"]))


@pytest.mark.parametrize(("form", "sizes"), [("log", 3), ("log", 8), ("bent", 5), ("bent", 8)])
def test_exact_laws_come_back(form: str, sizes: int) -> None:
    fit = fit_scaling(sweeps(np.geomspace(1e6, 1e8, sizes).tolist(), form))
    trend = fit.trend(1e5)
    if form == "log":
        assert trend.k is None
        assert trend.L_inf_coef == pytest.approx([2.5, -0.3])
    else:
        assert trend.k == pytest.approx(0.25, rel=1e-4)
        assert trend.L_inf_coef == pytest.approx([1.6, 0.9], rel=1e-4)
    assert trend.Q_coef == pytest.approx([19, 2])
    assert not trend.bends[1]
    assert fit.predict(1e9, 1e5).loss == pytest.approx(L_INF[form](1e9) + Q(1e9) / math.sqrt(1e5), rel=1e-6)
    assert fit.eta_peak(1e9, 1e4) == 0.01


def test_trends_are_regressions_of_the_lines() -> None:
    """Coefficients and standard errors against scipy's, and those of the bent form against its own fit of a curve."""
    from scipy.optimize import curve_fit

    sizes = np.geomspace(1e6, 1e8, 8)
    straight = fit_scaling(sweeps(sizes.tolist(), "log", 0.002, (0.01, 0.3), seed=2)).trend(1e4)
    for name in ("L_inf", "Q"):
        peer = stats.linregress(np.log10(sizes / sizes[0]), [getattr(line, name) for line in straight.lines])
        assert getattr(straight, f"{name}_coef") == pytest.approx([peer.intercept, peer.slope])
        assert getattr(straight, f"{name}_se") == pytest.approx([peer.intercept_stderr, peer.stderr])
    bent = fit_scaling(sweeps(sizes.tolist(), "bent", 0.002, (0.005, 0.3), seed=2)).trend(1e4)
    y = np.array([line.L_inf for line in bent.lines])
    best, covariance = curve_fit(lambda n, E, A, k: E + A * n**-k, sizes / sizes[0], y, p0=[1.5, 1.0, 0.3])
    assert [*bent.L_inf_coef, bent.k] == pytest.approx(best, rel=1e-3)
    assert bent.L_inf_se == pytest.approx(np.sqrt(np.diag(covariance))[:2], rel=1e-2)


def test_without_run_scatter_the_interval_is_that_of_a_regression() -> None:
    """Lines without error: the prediction at T is ordinary least squares of their losses at T on log N."""
    sizes, T, N = np.geomspace(1e6, 1e8, 4), 10_000, 1e9
    fit = fit_scaling(sweeps(sizes.tolist(), departure=(0.01, 0.3), seed=4))
    y = np.array([line.at(T) for line in fit.trend(T).lines])
    x, at = np.log(sizes), math.log(N)
    peer = stats.linregress(x, y)
    residual = y - peer.intercept - peer.slope * x
    leverage = 1 + 1 / 4 + (at - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
    half = 6.2053 * math.sqrt(
        residual @ residual / 2 * leverage
    )  # 98.75% point of Student's t with 2 degrees of freedom
    p = fit.predict(N, T)
    assert p.loss == pytest.approx(peer.intercept + peer.slope * at)
    assert [p.loss - p.low, p.high - p.loss] == pytest.approx([half, half], rel=1e-4)


@pytest.mark.parametrize(
    ("form", "sizes", "departure", "noise"),
    [
        ("log", 3, (0.01, 0.3), 0.002),
        ("log", 4, (0.01, 0.3), 0.002),
        ("bent", 5, (0.0, 0.0), 0.005),
        ("bent", 6, (0.03, 0.5), 0.003),  # too noisy to see the bend in half of the sweeps
    ],
)
def test_intervals_hold_what_they_promise(form: str, sizes: int, departure: tuple[float, float], noise: float) -> None:
    """End to end: a new size of ten times the largest pilot, at six times the longest horizon."""
    rng = np.random.default_rng(0)
    target_N, target_T, inside = 1e9, 10_000, []
    for i in range(150):
        fit = fit_scaling(sweeps(np.geomspace(1e6, 1e8, sizes).tolist(), form, noise, departure, seed=i))
        a, b, c = rng.standard_normal(3) * (*departure, noise)
        truth = L_INF[form](target_N) + a + (Q(target_N) + b) / math.sqrt(target_T) + c
        inside.append(truth in fit.predict(target_N, target_T))
    assert np.mean(inside) > 0.95 - 0.035  # two standard errors of a mean of 150 below


def test_a_size_with_pilots_is_predicted_by_its_own_line() -> None:
    table = sweeps([1e6, 1e7, 1e8], noise=0.003)
    own = fit_horizon(table[table["N"] == 1e7])
    assert fit_scaling(table).predict(1e7, 6400) == own.best(6400).predict(6400)
    alone = fit_scaling(table[table["N"] == 1e7])
    assert alone.predict(1e7, 6400) == own.best(6400).predict(6400)
    assert alone.eta_ref(1e7, 6400) == own.best(6400).eta_ref


def test_what_one_or_two_sizes_cannot_say_is_not_said() -> None:
    one = fit_scaling(sweeps([1e6], noise=0.003))
    with pytest.raises(NoLaw, match="all pilots have N=1e\\+06, so nothing is known of how the loss changes with N"):
        one.predict(1e8, 6400)
    assert one.eta_peak(1e8, 6400) == 1 / 80
    assert any("nothing is known" in w for w in one.warnings(1e8, 6400))
    assert "no trend with N" in one.summary(1e8, 6400)
    two = fit_scaling(sweeps([1e6, 1e7]))
    p = two.predict(1e8, 6400)
    assert (p.loss, p.high) == (pytest.approx(L_INF["log"](1e8) + Q(1e8) / 80), math.inf)
    assert any("rests on 2 sizes, so there is no interval" in w for w in two.warnings(1e8, 6400))


def test_a_best_rate_that_moves_with_size_is_said_and_one_that_stays_is_not() -> None:
    sizes = [1e6, 4e6, 16e6]

    def moving(N: float) -> dict[float, float]:
        best = {1e6: 2.0, 4e6: 1.0, 16e6: 0.5}[N]
        return {e: 4 * abs(math.log2(e / best)) for e in (0.25, 0.5, 1.0, 2.0, 4.0)}

    fit = fit_scaling(sweeps(sizes, noise=0.001, rates=moving))
    moved = [w for w in fit.warnings(1e9, 6400) if "moves" in w]
    assert moved == [
        "the best rate moves with N: eta_ref=2 at N=1e+06, 1 at N=4e+06",
        "the best rate moves with N: eta_ref=2 at N=1e+06, 0.5 at N=1.6e+07",
    ]
    assert fit.eta_ref(1e9, 6400) == 2.0  # (5.1) carries the smallest model's
    assert fit.eta_ref(16e6, 6400) == 0.5  # but where it was measured, the measurement stands
    stays = fit_scaling(sweeps(sizes, noise=0.001, rates=lambda N: moving(1e6)))
    assert not any("rate" in w for w in stays.warnings(1e9, 6400))
    untried = fit_scaling(sweeps(sizes, noise=0.001, rates=lambda N: moving(N) if N == 1e6 else {2.0: 0.0}))
    assert any("no larger one was tried at other rates" in w for w in untried.warnings(1e9, 6400))
    assert not any("is the only rate" in w for w in untried.warnings(16e6, 6400))


def test_weak_trends_are_said() -> None:
    table = sweeps([1e6, 2e6, 4e6, 8e6, 16e6, 32e6], "bent", noise=1e-4)
    fit = fit_scaling(table)
    assert any("bends by more than chance; it is fitted by E + A N^-k" in w for w in fit.warnings(1e8, 6400))
    assert not any("guess" in w for w in fit.warnings(9e7, 6400))
    assert any("N=1e+09 is 31 times the largest pilot" in w for w in fit.warnings(1e9, 6400))
    few = fit_scaling(table[(table["N"] > 1e6) | (table["T"] > 700)])
    assert any("N = 1e+06 has no line of 3 horizons" in w for w in few.warnings(1e8, 6400))
    assert len(few.trend(6400).N) == 5
    rising = fit_scaling(table.assign(loss=table["loss"] + np.log10(table["N"])))
    assert any("L_inf does not fall with N" in w for w in rising.warnings(1e8, 6400))
    doubtful = fit_scaling(sweeps(np.geomspace(1e6, 1e8, 6).tolist(), "bent", 0.003, (0.03, 0.5), seed=3))
    assert doubtful.trend(1e4).k is None
    assert any("is open; the interval covers both" in w for w in doubtful.warnings(1e9, 1e4))
    wild = table.assign(loss=table["loss"] + np.where(table["N"] == 4e6, table["T"] / 400, 0))
    assert any("N = 4e+06: some losses do not lie on a line" in w for w in fit_scaling(wild).warnings(1e8, 6400))


def test_share_of_the_pilots() -> None:
    fit = fit_scaling(sweeps([1e6, 1e7]))
    assert fit.share(1e9, 1e5) == pytest.approx(sum(HORIZONS) * 1.1e7 / 1e14)


def test_tokens_serve_as_updates_do() -> None:
    table = sweeps([1e6, 1e7, 1e8], noise=0.003)
    by_T, by_tokens = fit_scaling(table), fit_scaling(table.assign(tokens=table["T"] * 4096), x="tokens")
    p, q = by_T.predict(1e9, 6400), by_tokens.predict(1e9, 6400 * 4096)
    assert [q.loss, q.low, q.high] == pytest.approx([p.loss, p.low, p.high])
    assert by_tokens.share(1e9, 6400 * 4096) == pytest.approx(by_T.share(1e9, 6400))
    with pytest.raises(UserError, match="no peak rate"):
        by_tokens.eta_peak(1e9, 1e7)
    with pytest.raises(UserError, match="x='flops' must be 'T' or 'tokens'"):
        fit_scaling(table, x="flops")
    at_best = fit_scaling(table.drop(columns="eta_ref"))
    assert at_best.predict(1e9, 6400) == p
    assert math.isnan(at_best.eta_ref(1e9, 6400))


def test_tables_that_cannot_be_fitted_are_named() -> None:
    table = sweeps([1e6, 1e7, 1e8])
    with pytest.raises(UserError, match=r"lacks the columns \['N'\]"):
        fit_scaling(table.drop(columns="N"))
    with pytest.raises(UserError, match="N=0 in row 0"):
        fit_scaling(table.assign(N=0))
    with pytest.raises(NoLaw, match="two horizons"):
        fit_scaling(table[table["T"] == 400])
    with pytest.raises(NoLaw, match="no runs"):
        fit_scaling(table[:0])
    with pytest.raises(UserError, match="N=0, T=100: both must be positive"):
        fit_scaling(table).predict(0, 100)


def test_figure_has_the_lines_the_trend_and_the_target() -> None:
    fit = fit_scaling(sweeps([1e6, 1e7, 1e8], noise=0.003))
    left, L_inf, slope = fit.plot(1e9, 6400).axes
    for ax, name in ((L_inf, "L_inf"), (slope, "Q")):
        shown = {line.get_label(): line for line in ax.lines}
        assert shown["N = 1e+09"].get_ydata()[0] == pytest.approx(getattr(fit.trend(6400), name)(1e9)[0])  # type: ignore[index]
        assert np.max(shown["trend"].get_xdata()) == pytest.approx(1e9)
    assert [t.get_text() for t in left.get_legend().get_texts()][-1] == "N = 1e+09, T=6400"  # type: ignore[union-attr]
    assert len(fit_scaling(sweeps([1e6])).plot(1e9, 6400).axes) == 3  # without a trend, the line
