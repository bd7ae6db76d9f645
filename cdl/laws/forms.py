"""Laws of the loss along a run, as functions of its rates: what is fitted, apart from how.

A `Form` is linear in its coefficients once its shape is fixed,

    loss_tau = c_1 column_1(tau; shape) + c_2 column_2(tau; shape) + ..,    c >= 0, column_1 = 1,

so its constants are a few shape parameters to search for and coefficients that go with them. Rates are in units of the
largest rate of the runs fitted, which keeps the search well scaled; `natural` undoes it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cdl.errors import UserError
from cdl.theory.cauchy import causal_sum

__all__ = ["SAME_PEAK", "Form", "Prepared", "convex", "paper", "positive_steps", "without"]

SAME_PEAK = 1.1  # peak rates within this factor are one
Prepared = dict[str, np.ndarray]  # what a form knows of each recorded point, first axis P


@dataclass(frozen=True)
class Form:
    """One law.

    name: as in `fit_curve(law=...)`. title: one line for tables and figures.
    coefficients: names of the c_k, the first is L_inf. shape: names of the shape parameters.
    low, high: the range of each shape parameter; one with low > 0 is searched in its logarithm.
    starts: shapes [N][J] to start the search from.
    prepare: (eta_T, step_P, around_J) -> all that depends on the rates alone; eta_T in units of the largest rate. A
      form whose columns are interpolated in the shape makes them exact near `around_J` if that is given.
    columns: (shape_J, prepared) -> [P, K], differentiable in the shape; traced by JAX.
    natural: (params, unit) -> params for rates as they were given.
    one_peak: the form to fit instead where all runs have the same peak rate, which leaves a constant of this one open.
    """

    name: str
    title: str
    coefficients: tuple[str, ...]
    shape: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    starts: tuple[tuple[float, ...], ...]
    prepare: Callable[[np.ndarray, np.ndarray, np.ndarray | None], Prepared]
    columns: Callable[[Array, dict[str, Array]], Array]
    natural: Callable[[dict[str, float], float], dict[str, float]]
    one_peak: "Form | None" = None

    def suited(self, peaks: Sequence[float]) -> "Form":
        """This form, or `one_peak` for runs that peak at the same rate, within 10%."""
        return self.one_peak if self.one_peak and max(peaks) <= SAME_PEAK * min(peaks) else self


@functools.cache
def without(form: Form, k: int) -> Form:
    """The form without its k-th column."""
    kept = [i for i in range(len(form.coefficients)) if i != k]
    return dataclasses.replace(
        form,
        name=f"{form.name} without {form.coefficients[k]}",
        coefficients=tuple(form.coefficients[i] for i in kept),
        columns=lambda shape_J, prepared: form.columns(shape_J, prepared)[:, np.array(kept)],
    )


def positive_steps(eta_T: np.ndarray, step_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The updates that move: rates without zeros, and the index of the last of them at each recorded step.

    Raises:
      UserError: a loss is recorded before the first positive rate.
    """
    moves_T = eta_T > 0
    index_P = np.cumsum(moves_T)[step_P - 1] - 1
    if index_P.min() < 0:
        first = int(np.argmax(moves_T)) + 1 if moves_T.any() else len(eta_T) + 1
        raise UserError(
            f"a loss is recorded at step {step_P.min()}, but all rates before step {first} are 0; leave out such losses"
        )
    return eta_T[moves_T], index_P


# --- The convex law ------------------------------------------------------------------------------------------------

# The noise sum is an entire function of p and comes from its values at Chebyshev nodes: wide apart to find the
# constants, then close about them, where four are good to 1e-8 (tested).
_WIDE, _WIDE_NODES = (-0.5, 1.5), 12
_NEAR, _NEAR_NODES = 0.02, 4
_TOGETHER = 4  # sums at once
_R = 0.5  # how rates count at another peak, where the runs do not tell (docs/laws.md)


@functools.cache
def convex(across_peaks: bool = False) -> Form:
    """The forecasting law of this project (docs/laws.md),

        L_tau = L_inf + A S_tau^-alpha + B sum_{t <= tau} x_t² S_t^-p / (S_tau - S_{t-1}),
        x_t = eta_t / eta_peak^r,    S_k = x_1 + .. + x_k.

    Among runs of one peak rate r changes nothing, and it is 1/2; with `across_peaks` it is fitted, the sixth constant.
    """

    def prepare(eta_T: np.ndarray, step_P: np.ndarray, around_J: np.ndarray | None) -> Prepared:
        eta_T, index_P = positive_steps(eta_T, step_P)
        p_range = _WIDE if around_J is None else (around_J[1] - _NEAR, around_J[1] + _NEAR)
        p_K = _nodes(p_range, _WIDE_NODES if around_J is None else _NEAR_NODES)
        log_S_T = np.log(np.cumsum(eta_T))
        log_S_P = log_S_T[index_P]
        sums_KxP = _sums_so_far(eta_T, eta_T**2 * np.exp(-p_K[:, None] * log_S_T), index_P)
        noise_KxP = sums_KxP * np.exp(p_K[:, None] * log_S_P)  # varies less with p than the sums
        return {
            "log_S": log_S_P,
            "noise": (_to_coefficients(len(p_K)) @ noise_KxP).T,
            "p_range": np.tile(p_range, (len(step_P), 1)),
            "log_peak": np.full(len(step_P), np.log(eta_T.max())),
        }

    def columns(shape_J: Array, prepared: dict[str, Array]) -> Array:
        alpha, p = shape_J[0], shape_J[1]
        r = shape_J[2] if across_peaks else _R
        noise_PxK = prepared["noise"]
        T_PxK = _chebyshev(p, prepared["p_range"], noise_PxK.shape[1])
        log_scale_P = -r * prepared["log_peak"]  # of x_t over eta_t
        falling_P = jnp.exp(-alpha * (prepared["log_S"] + log_scale_P))
        noise_P = (noise_PxK * T_PxK).sum(1) * jnp.exp(-p * prepared["log_S"] + (1 - p) * log_scale_P)
        return jnp.stack([jnp.ones_like(noise_P), falling_P, noise_P], 1)

    def natural(params: dict[str, float], unit: float) -> dict[str, float]:
        scale = unit ** (1 - params.get("r", _R))  # of x_t for rates as given over x_t for those in units
        A = params["A"] * scale ** params["alpha"]
        B = params["B"] * scale ** (params["p"] - 1)
        return params | {"A": A, "B": B}

    starts = ((0.3, 0.1), (0.5, 0.2), (0.8, 0.2), (0.5, 0.6), (1.0, 0.0))
    return Form(
        name="convex",
        title="convex law" + (" across peak rates" if across_peaks else ""),
        coefficients=("L_inf", "A", "B"),
        shape=("alpha", "p", "r") if across_peaks else ("alpha", "p"),
        low=(0.02, _WIDE[0]) + ((-1.0,) if across_peaks else ()),
        high=(3.0, _WIDE[1]) + ((2.0,) if across_peaks else ()),
        starts=tuple((*s, _R) for s in starts) if across_peaks else starts,
        prepare=prepare,
        columns=columns,
        natural=natural,
        one_peak=convex() if across_peaks else None,
    )


def _nodes(span: tuple[float, float], n: int) -> np.ndarray:
    """Chebyshev nodes of an interval, [n]."""
    low, high = span
    return (low + high) / 2 + (high - low) / 2 * np.polynomial.chebyshev.chebpts1(n)


def _to_coefficients(n: int) -> np.ndarray:
    """Matrix [n, n] from the values at `_nodes` to Chebyshev coefficients."""
    return np.linalg.inv(np.polynomial.chebyshev.chebvander(np.polynomial.chebyshev.chebpts1(n), n - 1))


def _chebyshev(x: Array, range_Px2: Array, n: int) -> Array:
    """T_0(x) .. T_{n-1}(x) on each point's interval, [P, n]."""
    low_P, high_P = range_Px2[:, 0], range_Px2[:, 1]
    x_P = (2 * x - low_P - high_P) / (high_P - low_P)
    T = [jnp.ones_like(x_P), x_P]
    for _ in range(n - 2):
        T.append(2 * x_P * T[-1] - T[-2])
    return jnp.stack(T, 1)


# --- The paper's (3.1) ---------------------------------------------------------------------------------------------


def _paper_columns(shape_J: Array, prepared: dict[str, Array]) -> Array:
    del shape_J  # it has none
    distance_P, noise_P = prepared["distance"], prepared["noise"]
    return jnp.stack([jnp.ones_like(distance_P), distance_P, noise_P], 1)


def _paper_prepare(eta_T: np.ndarray, step_P: np.ndarray, around_J: np.ndarray | None) -> Prepared:
    del around_J
    eta_T, index_P = positive_steps(eta_T, step_P)
    S_P = np.cumsum(eta_T)[index_P]
    before_P = _sums_before(eta_T, eta_T[None] ** 2, index_P)[0]
    return {"distance": 1 / (2 * S_P), "noise": (before_P + eta_T[index_P]) / 2}


paper = Form(
    name="paper",
    title="(3.1) of the paper",
    coefficients=("L_inf", "D2", "G2"),
    shape=(),
    low=(),
    high=(),
    starts=((),),
    prepare=_paper_prepare,
    columns=_paper_columns,
    natural=lambda params, unit: params | {"D2": params["D2"] * unit, "G2": params["G2"] / unit},
)


# --- Sums along a run ----------------------------------------------------------------------------------------------


def _sums_before(eta_T: np.ndarray, w_KxT: np.ndarray, index_P: np.ndarray) -> np.ndarray:
    """sum_{t < tau} w_t / (S_tau - S_t) for K weights at the steps tau = index + 1; [K, P].

    In batches of one size and arrays of few lengths, because a program takes seconds to compile.
    """
    K, T = w_KxT.shape
    length = max(64, 1 << (T - 1).bit_length())
    w_KxT = np.pad(w_KxT, ((0, -K % _TOGETHER), (0, length - T)))
    eta_T = np.pad(eta_T, (0, length - T))
    with jax.enable_x64(True):
        batches = [_causal_sums(eta_T, w_KxT[k : k + _TOGETHER]) for k in range(0, K, _TOGETHER)]
        return np.concatenate([np.asarray(sums_KxT)[:, index_P] for sums_KxT in batches])[:K]


def _sums_so_far(eta_T: np.ndarray, w_KxT: np.ndarray, index_P: np.ndarray) -> np.ndarray:
    """sum_{t <= tau} w_t / (S_tau - S_{t-1}) for K weights; [K, P].

    The sum of `_sums_before` with each source moved to the start of its step: one step more, of which the first only
    makes room.
    """
    moved_KxT = np.pad(w_KxT, ((0, 0), (0, 1)))
    return _sums_before(np.concatenate([eta_T[:1], eta_T]), moved_KxT, index_P + 1)


# Weights of the same rates share all exponentials.
_causal_sums = jax.jit(jax.vmap(causal_sum, in_axes=(None, 0)))
