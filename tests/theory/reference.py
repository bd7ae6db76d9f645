"""The bounds as the paper prints them, in fractions, and causal sums with 64 bits of mantissa."""

from fractions import Fraction

import numpy as np

RNG = np.random.default_rng(0)


def literal_last(eta: list[Fraction], D: Fraction, G: Fraction) -> Fraction:
    """(2.4) at tau = len(eta), term by term."""
    tau = len(eta)
    e = dict(enumerate(eta, start=1))

    def total(first: int, power: int = 1) -> Fraction:
        return sum((e[t] ** power for t in range(first, tau + 1)), Fraction(0))

    distance = D**2 / (2 * total(1))
    average = G**2 * total(1, 2) / (2 * total(1))
    extra = sum((e[k] / total(k + 1) * (total(k, 2) / total(k)) for k in range(1, tau)), Fraction(0))
    return distance + average + G**2 / 2 * extra


def literal_average(eta: list[Fraction], D: Fraction, G: Fraction) -> Fraction:
    """(2.3)."""
    return (D**2 + G**2 * sum(e**2 for e in eta)) / (2 * sum(eta))


def causal_sums(eta_T: np.ndarray, w_T: np.ndarray, taus: np.ndarray) -> np.ndarray:
    """sum_{t < tau} w_t / (S_tau - S_t) at some tau (array indices), in extended precision."""
    eta, w = eta_T.astype(np.longdouble), w_T.astype(np.longdouble)
    sums = [(w[:tau] / np.cumsum(eta[1 : tau + 1][::-1])[::-1]).sum() for tau in taus]
    return np.array(sums, np.longdouble)


def distances(eta_T: np.ndarray) -> np.ndarray:
    """S_tau - S_t at [tau, t], inf where t >= tau, in extended precision."""
    T = len(eta_T)
    x = np.full((T, T), np.inf, np.longdouble)
    for tau in range(1, T):
        x[tau, :tau] = np.cumsum(eta_T[1 : tau + 1][::-1].astype(np.longdouble))[::-1]
    return x


def hard_schedules(T: int) -> dict[str, np.ndarray]:
    """Rates that break sums which are taken carelessly; all positive."""
    k = np.arange(1, T + 1)
    x = k / T
    return {
        "constant": np.ones(T),
        "linear": 1 - (k - 1) / T,
        "cosine": (1 + np.cos(np.pi * (k - 1) / T)) / 2,
        "wsd": np.minimum(1, (T - k + 1) / (0.2 * T)),
        "cyclic, troughs of 1e-9": np.abs((5 * x) % 1 - 0.5) * 2 + 1e-9,
        "inverse square root": k**-0.5,
        "drop by 1e-3": np.where(x < 0.5, 1, 1e-3),
        "drop by 1e-6": np.where(x < 0.5, 1, 1e-6),
        "jump up by 1e8": np.where(x < 0.5, 1e-8, 1),
        "random over ten decades": 10 ** RNG.uniform(-10, 0, T),
        "random walk over decades": 10 ** np.cumsum(RNG.normal(0, 0.1, T)),
        "one spike of 1e10": np.where(k == T // 2, 1e10, 1),
        "falls by 1e40": 10 ** (-40 * x),
        "one tiny rate": np.where(k == T // 3, 1e-30, 1),
    }
