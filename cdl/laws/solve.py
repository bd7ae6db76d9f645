"""The constants of a `Form`: robust fits by Levenberg and Marquardt, from all starts at once.

What is minimised is sum_i huber(log predicted_i - log loss_i), Huber's function with delta = 1e-3 (a tenth of a per
cent): squares where the law holds, absolute values where it does not, such as early in training. It is the objective of
the multi-power law's authors (arXiv 2503.12811), so that laws are compared on what one of them was made for.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from scipy.optimize import nnls

from cdl.laws.forms import Form, Prepared

__all__ = ["DELTA", "Solution", "derivatives", "objective", "predict", "solve"]

DELTA = 1e-3
_MOST_STEPS = 300
_SMALLEST = 1e-9  # of the mean loss: where a coefficient starts that least squares puts at 0


@dataclass(frozen=True)
class Solution:
    """Constants found: shape_J, coefficient_K, and the objective that each start reached, best first."""

    shape_J: np.ndarray
    coefficient_K: np.ndarray
    objective_N: np.ndarray


def solve(form: Form, prepared: Prepared, loss_P: np.ndarray, near: Solution | None = None) -> Solution:
    """Fit a form to losses, positive ones.

    The search starts from `form.starts`, or from `near` alone. A form without shape parameters is not searched: it is
    fitted by exact non-negative least squares with a free intercept, which is how the paper's (3.1) is meant.
    """
    if not form.shape:
        return _least_squares(form, prepared, loss_P)
    weight_P = np.pad(np.ones(len(loss_P)), (0, _padded_length(len(loss_P)) - len(loss_P)))
    shapes = form.starts if near is None else (near.shape_J,)
    start_NxI = np.stack([_start(form, np.array(s, float), prepared, loss_P) for s in shapes])
    with jax.enable_x64(True):
        theta_NxI, objective_N = _search(form, start_NxI, _padded(prepared), _repeat_last(np.log(loss_P)), weight_P)
        order = np.argsort(np.asarray(objective_N), stable=True)
        shape_J, coefficient_K = _constants(form, theta_NxI[order[0]])
    return Solution(np.asarray(shape_J), np.asarray(coefficient_K), np.asarray(objective_N)[order])


def predict(form: Form, prepared: Prepared, shape_J: np.ndarray, coefficient_K: np.ndarray) -> np.ndarray:
    """The losses of a form at the points prepared; [P]."""
    return _columns(form, shape_J, prepared) @ coefficient_K


def derivatives(form: Form, prepared: Prepared, solution: Solution) -> np.ndarray:
    """Derivatives of the logarithms of the predicted losses in the constants, shape first; [P, J + K]."""
    with jax.enable_x64(True):
        padded_PxI = _derivatives(form, solution.shape_J, solution.coefficient_K, _padded(prepared))
        return np.asarray(padded_PxI)[: _points(prepared)]


def objective(predicted_P: np.ndarray, loss_P: np.ndarray) -> float:
    """What `solve` minimises."""
    with jax.enable_x64(True):
        return float(_huber(jnp.log(predicted_P) - jnp.log(loss_P)).sum())


def _least_squares(form: Form, prepared: Prepared, loss_P: np.ndarray) -> Solution:
    X_PxK = _columns(form, np.zeros(0), prepared)
    scale_K = _sizes(X_PxK)
    X_PxK /= scale_K
    c, residual = nnls(np.concatenate([X_PxK, -X_PxK[:, :1]], 1), loss_P)  # L_inf may have either sign
    coefficient_K = np.concatenate([[c[0] - c[-1]], c[1:-1]])
    return Solution(np.zeros(0), coefficient_K / scale_K, np.array([residual**2]))


def _start(form: Form, shape_J: np.ndarray, prepared: Prepared, loss_P: np.ndarray) -> np.ndarray:
    """A shape with the coefficients that suit it, as they are searched."""
    X_PxK = _columns(form, shape_J, prepared)
    scale_K = _sizes(X_PxK)
    coefficient_K, _ = nnls(X_PxK / scale_K / loss_P[:, None], np.ones_like(loss_P))
    coefficient_K = np.maximum(coefficient_K, _SMALLEST * loss_P.mean()) / scale_K
    logarithmic_J = np.array(form.low) > 0
    return np.concatenate([np.where(logarithmic_J, np.log(np.where(logarithmic_J, shape_J, 1)), shape_J),
                           np.log(coefficient_K)])  # fmt: skip


def _constants(form: Form, theta_I: Array) -> tuple[Array, Array]:
    """Shape and coefficients: coefficients, and shapes with a positive lower end, are searched as logarithms."""
    J = len(form.shape)
    logarithmic_J = np.array(form.low) > 0
    searched_J = theta_I[:J]
    return jnp.where(logarithmic_J, jnp.exp(jnp.where(logarithmic_J, searched_J, 0)), searched_J), jnp.exp(theta_I[J:])


@functools.partial(jax.jit, static_argnums=0)
def _search(
    form: Form, start_NxI: Array, prepared: dict[str, Array], log_loss_P: Array, weight_P: Array
) -> tuple[Array, Array]:
    """Levenberg and Marquardt with Huber's weights from N starts side by side: constants [N, I], objectives [N]."""
    low_J, high_J = np.array(form.low), np.array(form.high)
    logarithmic_J = low_J > 0
    ends = [np.where(logarithmic_J, np.log(np.where(logarithmic_J, end, 1)), end) for end in (low_J, high_J)]

    def residual(theta_I: Array) -> Array:
        shape_J, coefficient_K = _constants(form, theta_I)
        return jnp.log(form.columns(shape_J, prepared) @ coefficient_K) - log_loss_P

    def value(r_P: Array) -> Array:
        total = (weight_P * _huber(r_P)).sum()
        return jnp.where(jnp.isfinite(total), total, jnp.inf)  # a predicted loss below 0 has no logarithm

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        theta_I, damping, best, steps, _ = state
        r_P = residual(theta_I)
        J_PxI = jax.jacfwd(residual)(theta_I)
        w_P = weight_P * jnp.minimum(1, DELTA / jnp.maximum(jnp.abs(r_P), 1e-300))
        H_IxI = J_PxI.T @ (w_P[:, None] * J_PxI)
        move_I = jnp.linalg.solve(H_IxI + jnp.diag(damping * jnp.diag(H_IxI) + 1e-12), -J_PxI.T @ (w_P * r_P))
        new_I = theta_I + jnp.clip(move_I, -1, 1)  # no constant changes by more than a factor e at once
        new_I = new_I.at[: len(ends[0])].set(jnp.clip(new_I[: len(ends[0])], *ends))
        here = value(residual(new_I))
        better = here < best
        done = (better & (best - here < 1e-10 * best)) | (damping > 1e12)
        return (
            jnp.where(better, new_I, theta_I),
            jnp.where(better, damping / 5, damping * 5),
            jnp.where(better, here, best),
            steps + 1,
            done,
        )

    def search(start_I: Array) -> tuple[Array, Array]:
        state = (start_I, jnp.asarray(1e-2), value(residual(start_I)), jnp.asarray(0), jnp.asarray(False))
        theta_I, _, best, _, _ = lax.while_loop(lambda s: (s[3] < _MOST_STEPS) & ~s[4], step, state)
        return theta_I, best

    return jax.vmap(search)(start_NxI)


def _huber(r: Array) -> Array:
    a = jnp.abs(r)
    return jnp.where(a < DELTA, r * r / 2, DELTA * (a - DELTA / 2))


@functools.partial(jax.jit, static_argnums=0)
def _derivatives(form: Form, shape_J: Array, coefficient_K: Array, prepared: dict[str, Array]) -> Array:
    def log_loss(shape_J: Array, coefficient_K: Array) -> Array:
        return jnp.log(form.columns(shape_J, prepared) @ coefficient_K)

    return jnp.concatenate(jax.jacfwd(log_loss, argnums=(0, 1))(shape_J, coefficient_K), 1)


_jitted_columns = jax.jit(lambda form, shape_J, prepared: form.columns(shape_J, prepared), static_argnums=0)


def _columns(form: Form, shape_J: np.ndarray, prepared: Prepared) -> np.ndarray:
    """[P, K], a fresh array."""
    with jax.enable_x64(True):
        return np.array(_jitted_columns(form, shape_J, _padded(prepared)))[: _points(prepared)]


def _sizes(X_PxK: np.ndarray) -> np.ndarray:
    size_K = np.abs(X_PxK).max(0)
    return np.where(size_K > 0, size_K, 1.0)  # a column of zeros: the rates never changed, and the law asks how much


def _points(prepared: Prepared) -> int:
    return len(next(iter(prepared.values())))


def _padded_length(P: int) -> int:
    """One compiled program for many numbers of points."""
    return 1 << max(8, (P - 1).bit_length())


def _padded(prepared: Prepared) -> Prepared:
    return {k: _repeat_last(x) for k, x in prepared.items()}


def _repeat_last(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.repeat(x[-1:], _padded_length(len(x)) - len(x), axis=0)])
