"""All last-iterate sums of a schedule at once, in O(T).

The bound (2.4) at every step tau is the causal Cauchy sum

    A_tau = sum_{t < tau} w_t / (S_tau - S_t),    S_k = eta_1 + .. + eta_k,    w_t = eta_t² G_t²,

T²/2 terms if they are added one by one. Here the steps are cut into chunks of M. A pair (t, tau) of one chunk, or of
neighbouring chunks, is added as it stands. For a pair further apart, 1/x is a sum of exponentials, and
exp(-z (S_tau - S_t)) factors into what happened in the chunk of t, the chunks between, and the chunk of tau: one
decaying recurrence over chunks for each exponent z.

Exponents. Put z = e^y in 1/x = integral_0^inf exp(-z x) dz and apply the trapezoid rule in y with spacing h: its
relative error is 2 |Gamma(1 + 2 pi i/h)|, 1.2e-14 for h = 0.28, whatever x (derive it by Poisson summation). The
exponents below Z_LOW / S_T, infinitely many and close to 0, are replaced by the 8 of their Gauss quadrature; those
above Z_HIGH / (shortest chunk) have died out between chunks that are not neighbours. How many are left depends on the
rates: 56 for a constant schedule of a million steps, 33 more for each factor of 10^4 between shortest chunk and S_T.

Every distance S_tau - S_t is a sum of positive rates, never a difference of prefix sums, and so is every derivative: no
digits cancel, whatever the schedule.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import Array, lax

__all__ = ["accuracy", "causal_sum", "later", "padded_length"]

M = 32  # steps of a chunk
SPACING = 0.28  # h, of the exponents' logarithms
GROUP = 8  # exponents worked on together
Z_LOW = 3.0
Z_HIGH = 34.0  # exp(-34) = 2e-15


def causal_sum(eta_T: Array, w_T: Array) -> Array:
    """sum_{t < tau} w_t / (S_tau - S_t) for all tau; [T], differentiable once in both arguments.

    Args:
      eta_T: rates; positive ones, then, where an array was padded, zeros to the end.
      w_T: a weight for each step, 0 where the rate is.

    At the zeros the result is finite and means nothing. Relative error for w >= 0: see `accuracy`.
    """
    T = eta_T.shape[0]
    C = -(-T // M)
    eta_CxM, w_CxM = (jnp.pad(x, (0, C * M - T)).reshape(C, M) for x in (eta_T, w_T))
    sum_CxM = _own_chunk(eta_CxM, w_CxM)
    u_CxM, v_CxM = _to_end(eta_CxM), _from_start(eta_CxM)
    sum_CxM += _pairs(later(u_CxM, 1, axis=0), later(w_CxM, 1, axis=0), v_CxM)  # with the chunk before
    if C > 2:
        L_C = eta_CxM.sum(1)
        z_low, groups = _exponents(eta_CxM, L_C)
        sum_CxM += _far(u_CxM, v_CxM, L_C, w_CxM, z_low, groups)
    return sum_CxM.reshape(-1)[:T]


def accuracy(eta_T: Array) -> Array:
    """A bound on the relative error of `causal_sum` for these rates and w >= 0, as computed by itself; a scalar.

    All terms are positive, so no sum is further off than its worst term: the largest error of the exponentials on a
    grid of distances between the shortest and the longest that they stand for, and what rounding can do.
    """
    T = eta_T.shape[0]
    C = -(-T // M)
    eta_CxM = jnp.pad(eta_T, (0, C * M - T)).reshape(C, M)
    z_low, groups = _exponents(eta_CxM, eta_CxM.sum(1))
    x_P = jnp.geomspace(_shortest(eta_CxM, eta_CxM.sum(1)), eta_CxM.sum(), 1000)
    x_P = jnp.where(groups > 0, x_P, 1.0)

    def add(i: Array, sum_P: Array) -> Array:
        z_J, c_J = _group(i, z_low)
        return sum_P + (c_J * jnp.exp(-z_J * x_P[:, None])).sum(1)

    approximate_P = lax.fori_loop(0, groups, add, jnp.zeros_like(x_P))
    kernel = jnp.where(groups > 0, jnp.abs(approximate_P * x_P - 1).max(), 0.0)
    # Sums of M rates, products along chunks in `_arriving`, and exp, whose argument is at most Z_HIGH where it matters.
    roundings = 2 * M + 4 * np.sqrt(C) + Z_HIGH
    return kernel + roundings * jnp.finfo(eta_T.dtype).eps


def padded_length(T: int) -> int:
    """T, or up to an eighth more: programs are compiled for few lengths only."""
    step = max(2 * M, 1 << max(0, (T - 1).bit_length() - 4))
    return -(-T // step) * step


def _wide(bwd: Callable[..., Any]) -> Callable[..., Any]:
    """JAX calls it where the caller takes the derivative, which may be outside the scope in which float64 exists."""

    def call(saved: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
        with jax.enable_x64(True):
            return bwd(saved, g)

    return call


def _sum(terms: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, terms)


# --- Pairs that are close ------------------------------------------------------------------------------------------


def _own_chunk(eta_CxM: Array, w_CxM: Array) -> Array:
    """Pairs within a chunk, by halving: each lies in two neighbouring blocks of s = 1, 2, .., M/2 for exactly one s."""
    sum_CxM = jnp.zeros_like(w_CxM)
    s = 1
    while s < M:
        eta_Nx2xS, w_Nx2xS = (x.reshape(-1, 2, s) for x in (eta_CxM, w_CxM))
        late_NxS = _pairs(_to_end(eta_Nx2xS[:, 0]), w_Nx2xS[:, 0], _from_start(eta_Nx2xS[:, 1]))
        sum_CxM += jnp.stack([jnp.zeros_like(late_NxS), late_NxS], 1).reshape(sum_CxM.shape)
        s *= 2
    return sum_CxM


@jax.custom_vjp
def _pairs(u_NxS: Array, w_NxS: Array, v_NxS: Array) -> Array:
    """sum_t w_t / (u_t + v_tau), [N, S]: sources at distance u before, targets at distance v after a border.

    Loops are unrolled because XLA on CPUs keeps no other form of this sum in registers.
    """
    v_NxS = jnp.where(v_NxS > 0, v_NxS, 1.0)  # padding
    return _sum(w_NxS[:, t, None] / (u_NxS[:, t, None] + v_NxS) for t in range(u_NxS.shape[1]))


def _pairs_bwd(saved: tuple[Array, ...], g_NxS: Array) -> tuple[Array, ...]:
    u_NxS, w_NxS, v_NxS = saved
    v_NxS = jnp.where(v_NxS > 0, v_NxS, 1.0)
    S = range(u_NxS.shape[1])
    back = _sum(g_NxS[:, t, None] / (u_NxS + v_NxS[:, t, None]) for t in S)
    back2 = _sum(g_NxS[:, t, None] / (u_NxS + v_NxS[:, t, None]) ** 2 for t in S)
    forth2 = _sum(w_NxS[:, t, None] / (u_NxS[:, t, None] + v_NxS) ** 2 for t in S)
    return -w_NxS * back2, back, -g_NxS * forth2


_pairs.defvjp(lambda *inputs: (_pairs(*inputs), inputs), _wide(_pairs_bwd))


# --- Pairs that are far apart --------------------------------------------------------------------------------------


@jax.custom_vjp
def _far(u_CxM: Array, v_CxM: Array, L_C: Array, w_CxM: Array, z_low: Array, groups: Array) -> Array:
    """The part of the sum from sources two or more chunks before, [C, M].

    u_CxM: from a source to the end of its chunk. v_CxM: from the start of its chunk to a target. L_C: chunk lengths.
    """

    def add(i: Array, sum_CxM: Array) -> Array:
        z_J, c_J = _group(i, z_low)
        F_JxC = _arriving(z_J, _gather(z_J, u_CxM, w_CxM), L_C)
        return sum_CxM + _spread(z_J, c_J[:, None] * F_JxC, v_CxM)

    return lax.fori_loop(0, groups, add, jnp.zeros_like(w_CxM))


def _far_bwd(saved: tuple[Array, ...], g_CxM: Array) -> tuple[Array | None, ...]:
    """The same with the arrow of time turned round, and d(1/x)/dx = -1/x² = -integral z exp(-z x) dz."""
    u_CxM, v_CxM, L_C, w_CxM, z_low, groups = saved

    def add(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        z_J, c_J = _group(i, z_low)
        sent_JxC, wanted_JxC = _gather(z_J, u_CxM, w_CxM), _gather(z_J, v_CxM, g_CxM)
        F_JxC = _arriving(z_J, sent_JxC, L_C)
        B_JxC = _arriving(z_J, wanted_JxC[:, ::-1], L_C[::-1])[:, ::-1]
        c_Jx1, cz_Jx1 = c_J[:, None], (c_J * z_J)[:, None]
        across_JxC = (F_JxC + later(sent_JxC, 1)) * jnp.exp(-z_J[:, None] * L_C) * (B_JxC + later(wanted_JxC, -1))
        u_sum, v_sum, L_sum, w_sum = sums
        return (
            u_sum + _spread(z_J, cz_Jx1 * B_JxC, u_CxM),
            v_sum + _spread(z_J, cz_Jx1 * F_JxC, v_CxM),
            L_sum + (cz_Jx1 * across_JxC).sum(0),
            w_sum + _spread(z_J, c_Jx1 * B_JxC, u_CxM),
        )

    zeros = tuple(jnp.zeros_like(x) for x in (u_CxM, v_CxM, L_C, w_CxM))
    u_sum, v_sum, L_sum, w_sum = lax.fori_loop(0, groups, add, zeros)
    return -w_CxM * u_sum, -g_CxM * v_sum, -L_sum, w_sum, None, None


_far.defvjp(lambda *inputs: (_far(*inputs), inputs), _wide(_far_bwd))


def _gather(z_J: Array, x_CxM: Array, w_CxM: Array) -> Array:
    """sum_m w exp(-z x) for each chunk, [J, C]."""
    return (w_CxM * jnp.exp(-z_J[:, None, None] * x_CxM)).sum(-1)


def _spread(z_J: Array, F_JxC: Array, x_CxM: Array) -> Array:
    """sum_j F_j exp(-z_j x), [C, M]."""
    return _sum(F_JxC[j, :, None] * jnp.exp(-z_J[j] * x_CxM) for j in range(GROUP))


def _arriving(z_J: Array, sent_JxC: Array, L_C: Array) -> Array:
    """What has come from chunks 0 .. c-2 to the start of chunk c: F_c = exp(-z L_{c-1}) (F_{c-1} + sent_{c-2}).

    In two levels, N blocks of K chunks, all blocks side by side: 2 sqrt(C) steps one after the other instead of C.
    """
    J, C = sent_JxC.shape
    K = 1 << (C.bit_length() // 2)
    N = -(-C // K)
    L_NxK = jnp.pad(later(L_C, 1), (0, N * K - C)).reshape(N, K)
    sent_KxJxN = jnp.moveaxis(jnp.pad(later(sent_JxC, 2), ((0, 0), (0, N * K - C))).reshape(J, N, K), 2, 0)

    def within(F_JxN: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        L_N, sent_JxN = chunk
        F_JxN = jnp.exp(-z_J[:, None] * L_N) * (F_JxN + sent_JxN)
        return F_JxN, F_JxN

    def across(F_J: Array, block: tuple[Array, Array]) -> tuple[Array, Array]:
        L, last_J = block
        return jnp.exp(-z_J * L) * F_J + last_J, F_J

    last_JxN, F_KxJxN = lax.scan(within, jnp.zeros((J, N), sent_JxC.dtype), (L_NxK.T, sent_KxJxN))
    _, before_NxJ = lax.scan(across, jnp.zeros(J, sent_JxC.dtype), (L_NxK.sum(1), last_JxN.T))
    older_JxNxK = jnp.exp(-z_J[:, None, None] * lax.cumsum(L_NxK, axis=1)) * before_NxJ.T[:, :, None]
    return (jnp.moveaxis(F_KxJxN, 0, 2) + older_JxNxK).reshape(J, N * K)[:, :C]


def _exponents(eta_CxM: Array, L_C: Array) -> tuple[Array, Array]:
    """The lowest exponent of the geometric part, and the number of groups (0 where nothing is far apart)."""
    shortest, total = _shortest(eta_CxM, L_C), L_C.sum()
    geometric = jnp.log(Z_HIGH / Z_LOW * (total / shortest)) / SPACING
    groups = jnp.where(shortest < jnp.inf, 1 + jnp.ceil(geometric / GROUP), 0)
    return lax.stop_gradient(Z_LOW / total), lax.stop_gradient(groups).astype(jnp.int32)


def _shortest(eta_CxM: Array, L_C: Array) -> Array:
    """The shortest chunk that lies between two others, inf where there is none."""
    between_C = (jnp.arange(L_C.shape[0]) > 0) & (later(eta_CxM[:, 0], -1) > 0)
    return jnp.where(between_C, L_C, jnp.inf).min()


def _group(i: Array, z_low: Array) -> tuple[Array, Array]:
    """Exponents z_J and coefficients c_J of group i: 1/x = sum c exp(-z x). Group 0 is the Gauss quadrature."""
    tail_J, tail_weight_J = (jnp.asarray(x, z_low.dtype) for x in _tail())
    z_J = jnp.exp(SPACING * ((i - 1) * GROUP + jnp.arange(GROUP, dtype=z_low.dtype)))
    return z_low * jnp.where(i == 0, tail_J, z_J), z_low * jnp.where(i == 0, tail_weight_J, SPACING * z_J)


@functools.cache
def _tail() -> tuple[np.ndarray, np.ndarray]:
    """Gauss quadrature for the weights h z at z = e^{-h}, e^{-2h}, ..: 8 nodes for all of them.

    Nodes and weights are the eigenvalues of the Jacobi matrix of that measure, which is what Householder's
    tridiagonalisation makes of the nodes bordered by the roots of the weights (Gragg and Harwood 1984).
    """
    z = np.exp(-SPACING * np.arange(1, 200))
    weight = SPACING * z
    bordered = np.diag(np.append(1.0, z))
    bordered[0, 1:] = bordered[1:, 0] = np.sqrt(weight)
    jacobi = np.asarray(scipy.linalg.hessenberg(bordered))[1 : GROUP + 1, 1 : GROUP + 1]
    nodes, vectors = np.linalg.eigh((jacobi + jacobi.T) / 2)
    return nodes, weight.sum() * vectors[0] ** 2


# --- Parts ---------------------------------------------------------------------------------------------------------


def _from_start(eta_NxS: Array) -> Array:
    """Distance from the start of the block to after each step: eta_1 + .. + eta_k."""
    return lax.cumsum(eta_NxS, axis=1)


def _to_end(eta_NxS: Array) -> Array:
    """Distance from after each step to the end of the block: eta_{k+1} + .. + eta_S."""
    return lax.cumsum(jnp.pad(eta_NxS[:, 1:], ((0, 0), (0, 1))), axis=1, reverse=True)


def later(x: Array, k: int, axis: int = -1) -> Array:
    """x moved k places to higher indices (k < 0: lower), zeros coming in."""
    pad = [(0, 0, 0)] * x.ndim
    pad[axis] = (k, -k, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), pad)
