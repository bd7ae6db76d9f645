"""The O(T) sums against extended precision, and their derivatives against sums over rectangles of pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdl.theory import cauchy

from .reference import RNG, causal_sums, distances, hard_schedules

T = 100_000
M = cauchy.M


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", hard_schedules(10))
def test_sums_and_their_own_accuracy(name: str) -> None:
    eta_T = hard_schedules(T)[name]
    sum_T = np.asarray(jax.jit(cauchy.causal_sum)(eta_T, eta_T**2))
    borders = [1, 2, M - 1, M, M + 1, 2 * M - 1, 2 * M, 3 * M, 4 * M + 1, T - 1]
    around_changes = [T // 3 + i for i in (-1, 0, 1, M)] + [T // 2 + i for i in (-2, -1, 0, 1, 2, M, 3 * M, 100 * M)]
    taus = np.unique([*borders, *around_changes, *RNG.integers(1, T, 60)])
    error = float(np.abs(sum_T[taus] / causal_sums(eta_T, eta_T**2, taus) - 1).max())
    own = float(jax.jit(cauchy.accuracy)(eta_T))
    assert error < own < 1e-12
    assert sum_T[0] == 0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-25, 25), min_size=1, max_size=6 * M).map(lambda x: 10 ** np.array(x)),
    st.sampled_from([1, M - 1, M, 2 * M + 1, 8 * M]),
)
def test_any_positive_rates(eta_P: np.ndarray, length: int) -> None:
    eta_T = np.resize(eta_P, length)
    w_T = np.resize(eta_P[::-1], length)
    padded = np.zeros((2, 8 * M))  # one program for all; zeros at the end are padding
    padded[:, :length] = eta_T, w_T
    sum_T = np.asarray(jax.jit(cauchy.causal_sum)(*padded))
    assert np.isfinite(sum_T).all()
    np.testing.assert_allclose(sum_T[:length], causal_sums(eta_T, w_T, np.arange(length)).astype(float), rtol=1e-12)


@jax.jit
def pull_back(eta_T: jax.Array, w_T: jax.Array, g_T: jax.Array) -> tuple[jax.Array, ...]:
    return jax.vjp(cauchy.causal_sum, eta_T, w_T)[1](g_T)


@pytest.mark.parametrize("name", hard_schedules(10))
def test_derivatives(name: str) -> None:
    """d/d eta_k of sum_tau g_tau A_tau is minus the sum of g w / x² over the pairs t < k <= tau."""
    size = 5 * M + 7
    eta_T = hard_schedules(size)[name]
    w_T, g_T = RNG.uniform(0.5, 1, (2, size)) * [eta_T**2, np.ones(size)]
    by_eta, by_w = pull_back(eta_T, w_T, g_T)
    x = distances(eta_T)
    later = np.cumsum((g_T[:, None] * w_T / x**2)[::-1], axis=0)[::-1]  # [k, t]: tau >= k
    expected = [-later[k, :k].sum() for k in range(size)]
    np.testing.assert_allclose(np.asarray(by_eta), np.array(expected, float), rtol=1e-11)
    np.testing.assert_allclose(np.asarray(by_w), (g_T[:, None] / x).sum(0).astype(float), rtol=1e-12)


def kernel_error(ratio: float) -> float:
    """Largest relative error of the exponentials as 1/x on [1, ratio], in extended precision."""
    z_low = cauchy.Z_LOW / ratio
    groups = 1 + int(np.ceil(np.log(cauchy.Z_HIGH / cauchy.Z_LOW * ratio) / cauchy.SPACING / cauchy.GROUP))
    parts = [cauchy._group(jnp.asarray(i), jnp.asarray(z_low)) for i in range(groups)]
    z_J, c_J = (np.concatenate([np.asarray(part[i]) for part in parts]).astype(np.longdouble) for i in (0, 1))
    x_P = np.geomspace(1, ratio, 300).astype(np.longdouble)
    return float(np.abs((c_J * np.exp(-z_J * x_P[:, None])).sum(1) * x_P - 1).max())


def test_the_exponentials_are_one_over_x_for_any_range() -> None:
    """Over a whole group of ratios: the number of exponents is rounded up to groups, which hides gaps at some."""
    per_group = np.exp(cauchy.SPACING * cauchy.GROUP)
    assert max(kernel_error(100 * per_group**u) for u in np.linspace(0, 1, 23)) < 2e-14
    assert max(kernel_error(ratio) for ratio in (1.5, 1e8, 1e20, 1e100)) < 2e-14


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["two groups too few", "SPACING", "Z_LOW"])
def test_the_accuracy_knows_when_the_exponentials_are_bad(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    eta_T = hard_schedules(3000)["constant"]
    exact = causal_sums(eta_T, eta_T**2, np.arange(1, 3000, 7))
    right = cauchy._exponents
    if fault == "two groups too few":
        monkeypatch.setattr(cauchy, "_exponents", lambda *x: (right(*x)[0], right(*x)[1] - 2))
    else:
        monkeypatch.setattr(cauchy, fault, {"SPACING": 0.5, "Z_LOW": 30.0}[fault])
    cauchy._tail.cache_clear()
    sum_T = np.asarray(cauchy.causal_sum(jnp.asarray(eta_T), jnp.asarray(eta_T**2)))[1::7]
    own = float(cauchy.accuracy(jnp.asarray(eta_T)))
    monkeypatch.undo()
    cauchy._tail.cache_clear()
    assert 1e-11 < float(np.abs(sum_T / exact - 1).max()) < own


def test_the_accuracy_counts_roundings_where_there_are_no_exponentials() -> None:
    own = float(cauchy.accuracy(jnp.ones(2 * M)))
    assert own > 2 * M * np.finfo(float).eps


def test_weights_of_any_sign_and_linearity() -> None:
    eta_T = hard_schedules(1000)["cosine"]
    w_T, v_T = RNG.normal(size=(2, 1000))
    f = jax.jit(cauchy.causal_sum)
    combined = np.asarray(f(eta_T, 2 * w_T - v_T))
    np.testing.assert_allclose(combined, 2 * f(eta_T, w_T) - f(eta_T, v_T), atol=1e-11 * np.abs(combined).max())


def test_vmap_is_row_by_row() -> None:
    rows = np.stack([hard_schedules(500)[name] for name in ("linear", "drop by 1e-6", "falls by 1e40")])
    together = jax.jit(jax.vmap(cauchy.causal_sum))(rows, rows**2)
    alone = [jax.jit(cauchy.causal_sum)(row, row**2) for row in rows]
    np.testing.assert_allclose(together, alone, rtol=1e-13)


def test_float32_has_the_digits_of_float32() -> None:
    eta_T = hard_schedules(20_000)["linear"].astype(np.float32)
    sum_T = jax.jit(cauchy.causal_sum)(eta_T, eta_T**2)
    assert sum_T.dtype == np.float32
    taus = np.arange(1, 20_000, 371)
    exact = causal_sums(eta_T.astype(float), (eta_T**2).astype(float), taus).astype(float)
    np.testing.assert_allclose(np.asarray(sum_T)[taus], exact, rtol=3e-5)


@pytest.mark.parametrize("size", [1, 5, M, 64, 65, 1000, 12345, 10**6, 10**6 + 1])
def test_padded_lengths_are_few(size: int) -> None:
    padded = cauchy.padded_length(size)
    assert size <= padded <= max(2 * M, size * 9 / 8 + 2 * M)
    assert cauchy.padded_length(padded) == padded
