"""The O(T) sums against extended precision, and their derivatives against sums over rectangles of pairs."""

import jax
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
